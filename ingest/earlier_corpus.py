"""Corpora of earlier versions, which had no explicit list of files. They keep their fingerprints if they were read correctly.

In these, `datasets` chose the files of a folder, their splits by their names, and which values meant null; a README.md beside them
counted as content. Such a corpus is read again and compared document by document.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl

from ..store import durable
from ..store.corpus_plan import read_plan
from ..store.dataset import Dataset
from ..store.errors import DataError
from ..store.fingerprint import fingerprint, sealed
from .choose import choose_documents
from .corpus import READER, CorpusStage

_LATER_KEYS = ("splits", "configuration")
_CONTENT = ("split", "domain", "sha256")
_PLACE = ("source_split", "row", "part", "doc_id")


def kept_identity(stored: Dataset, *, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The identity to compare with a stored corpus; for an earlier version, without the keys that it did not have."""
    kept = dict(asked)
    if not _is_earlier(stored):
        return kept
    for key in _LATER_KEYS:
        if key not in stored.identity:
            kept.pop(key, None)
    readme = stored.identity.get("files", {}).get("README.md")
    if readme and "files" in kept:
        kept["files"] = {"README.md": readme} | kept["files"]
    return kept


def require_read_right(stage: CorpusStage, *, asked: Mapping[str, Any]) -> None:
    """Compare a corpus of an earlier version with its files, once.

    Raises:
        DataError: its documents differ from those of the files.
    """
    dataset, verified_as = stage.dataset, fingerprint(asked)
    summary = read_plan(dataset.folder)
    if summary is None or not _is_earlier(dataset) or summary.get("verified_as") == verified_as:
        return
    stored, read = stage.plan.documents, choose_documents(stage.config, data_files=stage.data_files, chat=stage.chat).documents
    if "None" not in read["domain"]:  # the name of a missing domain then
        read = read.with_columns(pl.col("domain").replace("", "None"))
    all_made = not dataset.missing(stage.parts())
    if not (_same(stored, read, *_CONTENT, *_PLACE) or (all_made and _same(stored, read, *_CONTENT))):
        raise _misread(dataset, stored=stored, read=read)
    durable.write_json(dataset.folder / "plan.json", sealed(summary | {"verified_as": verified_as}))


def _is_earlier(dataset: Dataset) -> bool:
    summary = read_plan(dataset.folder)
    return summary is not None and summary.get("reader", 1) < READER


def _same(stored: pl.DataFrame, read: pl.DataFrame, *columns: str) -> bool:
    left, right = (table.select(columns).sort(columns) for table in (stored, read))
    return left.equals(right)


def _misread(dataset: Dataset, *, stored: pl.DataFrame, read: pl.DataFrame) -> DataError:
    missing, extra = _n_only_in(read, stored), _n_only_in(stored, read)
    if missing or extra:
        what = f"it lacks {missing} documents of the files, and has {extra} documents that are not in the files"
    else:
        what = "it had the files in another order, and parts of it are missing"
    return DataError(
        f"An earlier version read corpus/{dataset.name} differently from its files: {what}. Everything made from it has the wrong text. "
        "Use another --workspace. If the names of files or folders give the splits, list them in [corpus.splits] first."
    )


def _n_only_in(left: pl.DataFrame, right: pl.DataFrame) -> int:
    """Number of documents of one table that the other lacks; duplicates count separately."""
    counts = (table.group_by(_CONTENT).len() for table in (left, right))
    both = next(counts).join(next(counts), on=_CONTENT, how="left", suffix="_right").fill_null(0)
    return int((both["len"].cast(pl.Int64) - both["len_right"].cast(pl.Int64)).clip(lower_bound=0).sum())
