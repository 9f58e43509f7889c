"""The lazy tables over stored arrays: `distributions`, `positions`, `alignments`, `targets`.

Axes: R rows of one read, K entries of a distribution. `token` is the token at a position, `gold_token` the next one, which the distribution
at the position predicts.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import DataError
from ..part import PartArrays
from ..targets import ONE_HOT, SEVERAL
from .lazy_table import LABEL
from .rows import MAKERS, Part, Rows, id_column
from .store_reader import StoreReader

_KNOWN_PARTS = 1024  # parts whose segment offsets are cached: about 50 kB each
_DOCUMENT = [("corpus", LABEL), ("domain", LABEL), ("split", LABEL), ("part", pa.int32()), ("doc_id", pa.int64())]
_PLACE = [*_DOCUMENT, ("segment", pa.int32()), ("position", pa.int32())]
_TOKEN = [("token_id", pa.uint32()), ("token", pa.string())]
_GOLD = [("gold_id", pa.uint32()), ("gold_token", pa.string())]
_TOPK = [("topk_ids", pa.list_(pa.uint32())), ("topk_tokens", pa.list_(pa.string())), ("topk_logprobs", pa.list_(pa.float32()))]


class ArrayTable:
    """The base of the tables. Implements `TableContent`."""

    name: str
    part_class: type[Part] = Part
    own_columns: Sequence[tuple[str, pa.DataType]]  # of the dataset
    row_columns: Sequence[tuple[str, pa.DataType]]
    parts_query: str  # (kind, name, part, corpus, tokenizer, …) of all parts
    segments_query: str  # (doc_id, segment, n_rows, …) of one part, in order

    def __init__(self, store: StoreReader) -> None:
        self.store = store
        self._part = lru_cache(maxsize=_KNOWN_PARTS)(self._make_part)
        self.schema = pa.schema([*self.own_columns, *_PLACE, *self.row_columns])
        self.dataset_columns: Sequence[str] = [name for name, _ in self.own_columns] + ["corpus"]
        self.document_columns: Sequence[str] = [name for name, _ in _DOCUMENT]
        self.segment_columns: Sequence[str] = [name for name, _ in (*self.own_columns, *_DOCUMENT)] + ["segment"]

    @cached_property
    def _parts(self) -> list[dict[str, Any]]:
        rows = self.store.catalog_rows(self.parts_query)
        assert len({(row["kind"], row["name"], row["part"]) for row in rows}) == len(rows)
        return rows

    @cached_property
    def _rows(self) -> dict[tuple[str, str, int], dict[str, Any]]:
        return {(row["kind"], row["name"], row["part"]): row for row in self._parts}

    @cached_property
    def _datasets(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((row["kind"], row["name"]) for row in self._parts))

    def datasets(self) -> pa.Table:
        """A row per dataset."""
        facts = {(row["kind"], row["name"]): row for row in self._parts}
        return pa.table({name: pa.array([facts[key][name] for key in self._datasets], pa.string()) for name in self.dataset_columns})

    def documents(self) -> pa.Table:
        """A row per document of every corpus."""
        return self.store.all_documents()

    def parts(self, *, datasets: NDArray[np.bool_], corpus_parts: set[tuple[str, int]] | None) -> Iterator[Part]:
        """The parts of some datasets."""
        chosen = {key for key, keep in zip(self._datasets, datasets, strict=True) if keep}
        for row in self._parts:
            if (row["kind"], row["name"]) in chosen and (corpus_parts is None or (row["corpus"], row["part"]) in corpus_parts):
                yield self._part(row["kind"], row["name"], row["part"])

    def _make_part(self, kind: str, name: str, part: int) -> Part:
        row = self._rows[kind, name, part]
        return self.part_class(self, store=self.store, row=row, segments=self.store.catalog_arrays(self.segments_query, row))


_FORWARD_PARTS = """
    SELECT p.kind, p.name, p.part, (d.description->>'$.model') AS model, (d.description->>'$.corpus') AS corpus,
        (d.identity->>'$.tokenizer') AS tokenizer
    FROM parts p JOIN datasets d USING (kind, name) WHERE {kinds} ORDER BY kind, name, part"""
_FORWARD_SEGMENTS = """
    SELECT doc_id, segment, n_tokens AS n_rows FROM segments
    WHERE kind = $kind AND name = $name AND part = $part ORDER BY doc_id, segment"""


class Positions(ArrayTable):
    """A row per position of every model, from its distributions and its likelihoods of held-out text."""

    name = "positions"
    own_columns = (("model", LABEL),)
    row_columns = (
        *_TOKEN, *_GOLD, ("gold_logprob", pa.float32()), ("is_label", pa.bool_()), ("tail_logprob", pa.float32()),
        ("entropy", pa.float32()), *_TOPK,
    )  # fmt: skip
    parts_query = _FORWARD_PARTS.format(kinds="kind IN ('distributions', 'evaluations')")
    segments_query = _FORWARD_SEGMENTS


class _DistributionsPart(Part):
    """K rows for each position."""

    def row_bytes(self, names: Iterable[str]) -> int:
        return self.top_k * super().row_bytes(names)

    def columns(self, names: Iterable[str], *, segments: NDArray[np.int64]) -> dict[str, pa.Array]:
        rows = Rows(self, segments)
        n = len(rows.position_R)
        k = self.top_k
        repeat = pa.array(np.repeat(np.arange(n), k))
        found: dict[str, pa.Array] = {}
        for name in names:
            match name:
                case "rank":
                    found[name] = pa.array(np.tile(np.arange(k, dtype=np.uint16), n))
                case "token_id":
                    found[name] = id_column(rows.topk_ids_RK.ravel())
                case "token":
                    found[name] = rows.texts(rows.topk_ids_RK.ravel())
                case "logprob":
                    found[name] = pa.array(rows.topk_logprobs_RK.ravel())
                case _:
                    found[name] = self._column(rows, name).take(repeat)
        return found


class Distributions(ArrayTable):
    """A row per position and rank: the entries of every model's stored distributions."""

    name = "distributions"
    part_class = _DistributionsPart
    own_columns = (("model", LABEL),)
    row_columns = (("rank", pa.uint16()), *_TOKEN, ("logprob", pa.float32()))
    parts_query = _FORWARD_PARTS.format(kinds="kind = 'distributions'")
    segments_query = _FORWARD_SEGMENTS


def _fusion_source(rows: Rows) -> pa.Array:
    source_R = rows.array("source_T").astype(np.int32)
    names = [*rows.arrays.attributes["sources"], rows.arrays.attributes.get("one_hot", "")]
    places_R = np.where(source_R == ONE_HOT, len(names) - 1, source_R)
    return pa.DictionaryArray.from_arrays(pa.array(places_R, mask=source_R == SEVERAL), pa.array(names, pa.string()))


def _fused_gold_logprob(rows: Rows) -> pa.Array:
    """Log-probability of the next token under the fused distribution; -inf if it is not among the entries."""
    logprobs_RK = np.where(rows.topk_ids_RK == rows.gold_ids_R[:, None], rows.topk_logprobs_RK, -np.inf)
    return pa.array(logprobs_RK.max(axis=1, initial=-np.inf).astype(np.float32), mask=rows.is_last_R)


class _TargetsPart(Part):
    makers = MAKERS | {"source": _fusion_source, "gold_logprob": _fused_gold_logprob}


class Targets(ArrayTable):
    """A row per position of fused targets."""

    name = "targets"
    part_class = _TargetsPart
    own_columns = (("name", LABEL),)
    row_columns = (
        *_TOKEN, *_GOLD, ("gold_logprob", pa.float32()), ("is_label", pa.bool_()), ("source", LABEL),
        ("tail_logprob", pa.float32()), *_TOPK,
    )  # fmt: skip
    # A model may be stored under two names, with one fingerprint.
    parts_query = """
        SELECT p.kind, p.name, p.part, (d.description->>'$.corpus') AS corpus, (own.identity->>'$.tokenizer') AS tokenizer
        FROM parts p JOIN datasets d USING (kind, name)
        LEFT JOIN (SELECT fingerprint, any_value(identity) AS identity FROM datasets GROUP BY fingerprint) own
            ON own.fingerprint = (d.identity->>'$.sources[0][0]')
        WHERE p.kind = 'targets' ORDER BY p.name, p.part"""
    segments_query = """
        SELECT doc_id, segment, n_positions AS n_rows FROM target_segments WHERE name = $name AND part = $part ORDER BY doc_id, segment"""


class _AlignmentRows(Rows):
    """The positions of the target's part, with the aligned positions of the source's part."""

    @cached_property
    def token_ids_R(self) -> NDArray[Any]:
        """The target's tokens at these positions."""
        return self.array("token_ids_T", of=self._of_model("target"))

    @cached_property
    def source_index_R(self) -> NDArray[Any]:
        """Index of the source position in the source's part, -1 if there is none."""
        return self.array("source_position_T")

    @property
    def is_unaligned_R(self) -> NDArray[np.bool_]:
        """Whether there is no source position."""
        return self.source_index_R < 0

    @cached_property
    def source_token_ids_R(self) -> NDArray[Any]:
        """The source's token at that position; undefined if there is none."""
        index_R = self.source_index_R[~self.is_unaligned_R]
        ids_R = np.zeros(len(self.source_index_R), np.uint32)
        if len(index_R):
            first, stop = int(index_R.min()), int(index_R.max()) + 1
            ids_R[~self.is_unaligned_R] = self._of_model("source").read("token_ids_T", first, stop)[index_R - first]
        return ids_R

    def _of_model(self, role: str) -> PartArrays:
        model = self.part.row[f"{role}_name"]
        if model is None:
            raise DataError(f"alignments/{self.part.name} was made from distributions of its {role} that do not exist any more.")
        return self.part.store.arrays("distributions", model, self.part.index)


def _source_position(rows: _AlignmentRows) -> pa.Array:
    start_R = rows.repeated(rows.part.facts["source_start"])
    return pa.array((rows.source_index_R - start_R).astype(np.int32), mask=rows.is_unaligned_R)


def _bytes_ahead(rows: _AlignmentRows) -> pa.Array:
    ahead_R = rows.array("ahead_T") if "ahead_T" in rows.arrays.names else np.zeros(len(rows.position_R), np.uint16)
    return pa.array(ahead_R, mask=rows.is_unaligned_R)


def _source_token(rows: _AlignmentRows) -> pa.Array:
    texts = rows.texts(rows.source_token_ids_R, tokenizer=rows.part.row["source_tokenizer"])
    return pc.if_else(pa.array(rows.is_unaligned_R), pa.scalar(None, pa.string()), texts)


class _AlignmentsPart(Part):
    rows_class = _AlignmentRows
    makers = MAKERS | {
        "source_position": _source_position,
        "bytes_ahead": _bytes_ahead,
        "source_token_id": lambda rows: id_column(rows.source_token_ids_R, mask=rows.is_unaligned_R),
        "source_token": _source_token,
    }


class Alignments(ArrayTable):
    """A row per position of a target, with the aligned position of a source, if there is one."""

    name = "alignments"
    part_class = _AlignmentsPart
    own_columns = (("name", LABEL), ("source", LABEL), ("target", LABEL))  # a pair may have several alignments
    row_columns = (
        *_TOKEN, ("source_position", pa.int32()), ("bytes_ahead", pa.uint16()), ("source_token_id", pa.uint32()),
        ("source_token", pa.string()),
    )  # fmt: skip
    parts_query = """
        SELECT p.kind, p.name, p.part, split_part(p.name, '--', 1) AS source, split_part(p.name, '--', 2) AS target,
            (a.description->>'$.corpus') AS corpus, s.name AS source_name, (s.identity->>'$.tokenizer') AS source_tokenizer,
            t.name AS target_name, (t.identity->>'$.tokenizer') AS tokenizer
        FROM parts p JOIN datasets a USING (kind, name)
        LEFT JOIN datasets s
            ON s.kind = 'distributions' AND s.name = split_part(p.name, '--', 1) AND s.fingerprint = (a.identity->>'$.source')
        LEFT JOIN datasets t
            ON t.kind = 'distributions' AND t.name = split_part(p.name, '--', 2) AND t.fingerprint = (a.identity->>'$.target')
        WHERE p.kind = 'alignments' ORDER BY p.name, p.part"""
    segments_query = """
        SELECT doc_id, segment, n_positions AS n_rows, coalesce(source.start, 0) AS source_start
        FROM alignment_coverage LEFT JOIN (
            SELECT doc_id, segment, sum(n_tokens) OVER (ORDER BY doc_id, segment) - n_tokens AS start
            FROM segments WHERE kind = 'distributions' AND name = $source_name AND part = $part) source USING (doc_id, segment)
        WHERE name = $name AND part = $part ORDER BY doc_id, segment"""


ARRAY_TABLES = (Distributions, Positions, Alignments, Targets)
