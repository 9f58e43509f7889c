"""Checks that the contents of a part are valid: lengths, offsets, ids and texts. Checksums only show that they are what was written.

Axes: T tokens of a part, S its segments, K entries of a distribution.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from . import durable
from .dataset import Dataset
from .errors import DamagedPart, FuselineError
from .targets import ONE_HOT, SEVERAL
from .tokenizer import Tokenizer

_SLACK = 1e-3  # for sums of float32 means
_ROUNDING = 1.2e-2  # of `q8`, in a probability: the text's next token is stored more exactly than the entries


def check_content(dataset: Dataset, part: int) -> None:
    """Read a whole part.

    Raises:
        DamagedPart: an array or table cannot be read, is inconsistent, or contradicts the manifest's counts or another array.
    """
    manifest = dataset.manifest(part)
    where = dataset.folder / manifest.payload
    if manifest.payload.endswith(".parquet"):
        table = dataset.table(part)
        problem = _problem_or_none(lambda: _PROBLEMS_OF_TABLES.get(dataset.kind, lambda table: None)(table))
    else:
        arrays = dataset.arrays(part)
        found = {name: arrays.read(name) for name in arrays.names}
        vocab_size = dataset.description.get("vocab_size")
        problem = _problem_or_none(lambda: _problem_of_arrays(found, counts=manifest.counts, vocab_size=vocab_size))
        if dataset.kind == "targets":
            sources: Any = arrays.attributes["sources"]
            problem = problem or _problem_or_none(lambda: _problem_of_sources(found, n_sources=len(sources)))
    if problem:
        raise DamagedPart(f"{where}: {problem}.")


def _problem_or_none(look: Callable[[], str | None]) -> str | None:
    """The problem, if any; also when the check fails because a column, an array or a count is missing or has the wrong type."""
    try:
        return look()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, pl.exceptions.PolarsError) as error:
        if isinstance(error, FuselineError):
            raise
        return f"something is missing or has the wrong form ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def check_tokenizer_table(folder: Path) -> None:
    """Compare the stored bytes of a tokenizer's tokens with those of its definition.

    Raises:
        DamagedPart: they differ.
    """
    try:
        table = durable.read_parquet(folder / "token_bytes.parquet")
    except pl.exceptions.PolarsError as error:
        raise DamagedPart(f"token_bytes.parquet cannot be read: {error}") from error
    expected = Tokenizer.load(folder).token_bytes
    if table["bytes"].to_list() != expected.to_list() or table["is_special"].to_list() != expected.is_special_V.tolist():
        raise DamagedPart("token_bytes.parquet does not match the tokens of tokenizer.json")


def _problem_of_arrays(arrays: Mapping[str, NDArray[Any]], *, counts: Mapping[str, int], vocab_size: int | None) -> str | None:
    for name, array in arrays.items():
        if name in {"token_ids_T", "topk_ids_TK"} and vocab_size is not None and array.size and int(array.max()) >= vocab_size:
            return f"{name} has the id {int(array.max())}, which must be below vocab_size ({vocab_size})"
    offsets = arrays.get("segment_offsets")
    return None if offsets is None else _problem_of_offsets(offsets, n_segments=counts["segments"], n_tokens=counts["tokens"])


def _problem_of_sources(arrays: Mapping[str, NDArray[Any]], *, n_sources: int) -> str | None:
    """For fused targets. Parts of earlier versions have no arrays by source; these are not required."""
    for name, array in arrays.items():
        if name.endswith("_SN") and array.shape[1] != n_sources:
            return f"{name} has {array.shape[1]} columns, but there are {n_sources} sources"
    for name, others in (("source_T", (SEVERAL, ONE_HOT)), ("source_S", (SEVERAL,))):
        index = arrays.get(name, np.zeros(0, np.uint8))
        unknown = index[(index >= n_sources) & ~np.isin(index, others)]
        if len(unknown):
            return f"{name} has the source {int(unknown[0])}, but there are {n_sources} sources"
    if "n_spoken_SN" in arrays:
        if not _adds_up(arrays["weight_SN"], total_S=1):
            return "weight_SN must sum to 1 over the sources"
        if not _adds_up(arrays["share_SN"], total_S=1 - _one_hot_share(arrays)):
            return "share_SN must sum over the sources to 1 minus the share of positions with all mass on one token"
        total_SN = sum(arrays[name] for name in ("mapped_SN", "merged_SN", "lost_SN", "tail_SN"))
        if not np.allclose(np.where(arrays["n_spoken_SN"] > 0, total_SN, 1), 1, atol=_ROUNDING):
            return "mapped_SN, merged_SN, lost_SN and tail_SN must sum to 1 where n_spoken_SN is not 0"
    return None


def _adds_up(values_SN: NDArray[Any], *, total_S: Any) -> bool:
    """Whether each segment's values have this sum. A segment without positions has NaN."""
    return bool(np.isclose(values_SN.sum(axis=1), total_S, atol=_SLACK)[~np.isnan(values_SN).any(axis=1)].all())


def _one_hot_share(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Share of each segment's positions without a source: all mass is on one token."""
    n_before = np.concatenate([[0], np.cumsum(arrays["source_T"] == ONE_HOT)])
    offsets = arrays["segment_offsets"]
    return np.diff(n_before[offsets]) / np.maximum(np.diff(offsets), 1)


def _problem_of_offsets(offsets: NDArray[np.int64], *, n_segments: int, n_tokens: int) -> str | None:
    if len(offsets) != n_segments + 1 or offsets[0] != 0 or offsets[-1] != n_tokens or (np.diff(offsets) < 0).any():
        return f"segment_offsets must rise from 0 to {n_tokens} (tokens) in {n_segments} steps (segments)"
    return None


def _problem_of_texts(table: pl.DataFrame) -> str | None:
    documents = table.group_by("doc_id", maintain_order=True).agg(pl.col("text").sort_by("segment"), pl.first("sha256"))
    for doc_id, texts, sha256 in documents.iter_rows():
        if hashlib.sha256("".join(texts).encode()).hexdigest() != sha256:
            return f"the text of document {doc_id} does not hash to its sha256"
    for name in {"control_spans", "assistant_spans", "messages"} & set(table.columns):  # in bytes, for conversations
        ends = table.select(pl.col("text").str.len_bytes(), pl.col(name).list.eval(pl.element().struct.field("end").max()).list.first())
        if len(ends.filter(pl.col(name) > pl.col("text"))):
            return f"{name} extend beyond the text"
    return None


def _problem_of_matches(table: pl.DataFrame) -> str | None:
    if not (table["count"] > 0).all():
        return "a pair of tokens has count 0; a count must be at least 1"
    return "a pair of tokens has several rows" if table.select("source_id", "target_id").is_duplicated().any() else None


def _problem_of_map(table: pl.DataFrame) -> str | None:
    if table["source_id"].to_list() != list(range(len(table))):
        return f"source_id must count from 0 to {len(table) - 1}"
    unmapped = table.filter(pl.col("target_id").is_null() != (pl.col("rule") == "none"))
    return f"token {unmapped['source_id'][0]} has a target_id that contradicts its rule" if len(unmapped) else None


_PROBLEMS_OF_TABLES = {"corpus": _problem_of_texts, "token_matches": _problem_of_matches, "vocab_maps": _problem_of_map}
