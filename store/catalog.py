"""The catalog: `catalog.duckdb`, an index of the workspace for SQL queries. It can be rebuilt from the files on disk.

Only the coordinator writes it, and only during a fold: DuckDB lets one process at a time open a file for writing. All other processes
open it read-only and wait if it is locked.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

from . import durable, remedy
from .catalog_file import DEFAULT_LIMITS, ForeignCatalog, Limits, log_of, open_to_read, open_to_write
from .corpus_plan import read_documents, read_plan
from .dataset import Dataset
from .errors import DamagedPart, DataError, FuselineError
from .json_files import is_count, read_object
from .layout import Layout
from .lineage import tokenizer_digests
from .manifest import Manifest
from .trainings import checkpoint_steps, read_evaluations, read_metrics, training_folders


@contextmanager
def reading(layout: Layout, *, limits: Limits = DEFAULT_LIMITS, external_access: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
    """The catalog, opened to be read (`catalog_file.open_to_read`).

    Raises:
        DataError: there is no catalog yet, or this fuseline cannot read it.
        WorkspaceBusy: it stays locked.
    """
    if not os.path.lexists(layout.catalog_path):
        raise DataError(f"{layout.root} has no catalog yet. Run a stage first: fuseline run RECIPE.")
    with open_to_read(layout.catalog_path, limits=limits, external_access=external_access) as connection:
        yield connection


def known_parts(layout: Layout) -> set[tuple[str, str, int]]:
    """Dataset kind, dataset name and index of every part in the catalog.

    Raises:
        DataError: there is no catalog, or it cannot be read.
        WorkspaceBusy: it stays locked.
    """
    with reading(layout) as connection, _explained(layout):
        return set(connection.execute("SELECT kind, name, part FROM parts").fetchall())


def read_all(layout: Layout) -> None:
    """Read every row of the catalog: DuckDB then checks its own checksums.

    Raises:
        DataError: there is no catalog, or it cannot be read.
        WorkspaceBusy: it stays locked.
    """
    with reading(layout) as connection, _explained(layout):
        for (table,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall():
            connection.execute(f"SELECT bit_xor(hash({table})) FROM {table}").fetchall()


@contextmanager
def _explained(layout: Layout) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise DataError(f"{layout.catalog_path} cannot be read: {error}\n{remedy.rebuild(layout.root)}") from error


def forget(layout: Layout, *, kind: str, name: str) -> None:
    """Remove a dataset from the catalog, so that the next fold reads it again. Only the coordinator may call it."""
    try:
        with open_to_write(layout.catalog_path) as connection:
            connection.begin()
            _forget(connection, kind, name)
            connection.commit()
    except ForeignCatalog:  # the next fold makes it again from the files on disk
        return


def fold(layout: Layout) -> None:
    """Update the catalog from the files on disk. Only the coordinator may call it, between two stages.

    Parts are immutable, so parts that are in the catalog are not read again. A catalog with foreign contents is made again and never
    queried.
    """
    if os.path.lexists(layout.catalog_path):
        with suppress(ForeignCatalog):
            _fold_into(layout.catalog_path, layout)
            return
    rebuild(layout)


def rebuild(layout: Layout) -> None:
    """Make a new catalog, which replaces an existing one when it is complete. Only the coordinator may call it."""
    with durable.temporary(layout.catalog_path) as path:
        _fold_into(path, layout)
        durable.discard(log_of(layout.catalog_path))  # left by a crash
        durable.publish(path, to=layout.catalog_path)


def _fold_into(path: Path, layout: Layout) -> None:
    try:
        with open_to_write(path) as connection:
            connection.begin()
            _fold_all(connection, layout)
            connection.commit()
    except duckdb.Error as error:
        raise DataError(
            f"{layout.catalog_path} cannot be brought up to date: {error}\nMake room if the disk is full, and run the "
            f"same command again. Otherwise: {remedy.rebuild(layout.root)}"
        ) from error


def _fold_all(connection: duckdb.DuckDBPyConnection, layout: Layout) -> None:
    present = {(dataset.kind, dataset.name): dataset for dataset in layout.datasets()}
    for kind, name, fingerprint in connection.execute("SELECT kind, name, fingerprint FROM datasets").fetchall():
        dataset = present.get((kind, name))
        gone = dataset is None or dataset.fingerprint != fingerprint or _known_parts(connection, kind, name) - set(dataset.parts())
        if gone:
            _forget(connection, kind, name)
    for dataset in present.values():
        _fold_dataset(connection, dataset)
    _fold_tokenizers(connection, layout, needed={digest for dataset in present.values() for digest in tokenizer_digests(dataset)})
    _fold_runs(connection, layout)


# Tables that hold rows of a dataset of each kind, and their column with its name.
_TABLES_OF_KIND = {
    "corpus": {"corpora": "corpus", "documents": "corpus"},
    "distributions": {"segments": "name", "quarantine": "name", "models": "model"},
    "evaluations": {"segments": "name", "quarantine": "name"},
    "ensembles": {"segments": "name", "quarantine": "name"},
    "token_matches": {},
    "vocab_maps": {"vocab_maps": "name"},
    "alignments": {"alignment_coverage": "name"},
    "targets": {"target_segments": "name", "target_sources": "name"},
}
_TABLES_WITH_KIND = ("segments", "quarantine")


def _known_parts(connection: duckdb.DuckDBPyConnection, kind: str, name: str) -> set[int]:
    return {part for (part,) in connection.execute("SELECT part FROM parts WHERE kind = ? AND name = ?", [kind, name]).fetchall()}


def _forget(connection: duckdb.DuckDBPyConnection, kind: str, name: str) -> None:
    for table in ("datasets", "parts"):
        connection.execute(f"DELETE FROM {table} WHERE kind = ? AND name = ?", [kind, name])
    for table, column in _TABLES_OF_KIND.get(kind, {}).items():
        of_kind = f"AND kind = '{kind}'" if table in _TABLES_WITH_KIND else ""
        connection.execute(f"DELETE FROM {table} WHERE {column} = ? {of_kind}", [name])


def _fold_dataset(connection: duckdb.DuckDBPyConnection, dataset: Dataset) -> None:
    if not connection.execute("SELECT 1 FROM datasets WHERE kind = ? AND name = ?", [dataset.kind, dataset.name]).fetchone():
        row = {
            "kind": dataset.kind,
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "identity": json.dumps(dataset.identity),
            "description": json.dumps(dataset.description),
        }
        _insert(connection, "datasets", pl.DataFrame([row]))
        if dataset.kind == "distributions":
            columns = ("source", "weights", "tokenizer", "model_type", "vocab_size", "parameters")
            facts = {**dataset.identity, **dataset.description}
            _insert(connection, "models", pl.DataFrame([{"model": dataset.name, **{name: facts.get(name) for name in columns}}]))
    if dataset.kind == "corpus":
        _fold_plan(connection, dataset)
    new = sorted(set(dataset.parts()) - _known_parts(connection, dataset.kind, dataset.name))
    frames: dict[str, list[pl.DataFrame]] = {}
    for part in new:
        manifest = dataset.manifest(part)
        frames.setdefault("parts", []).append(_part_row(dataset, manifest))
        for table, frame in _part_frames(dataset, manifest).items():
            frames.setdefault(table, []).append(frame)
    for table, pieces in frames.items():
        _insert(connection, table, pl.concat(pieces, how="vertical_relaxed"))


def _part_row(dataset: Dataset, manifest: Manifest) -> pl.DataFrame:
    row = {
        "kind": dataset.kind,
        "name": dataset.name,
        "part": manifest.part,
        "counts": json.dumps(manifest.counts),
        "stored_bytes": manifest.n_bytes,
        "seconds": float(manifest.producer["seconds"]),
        "host": manifest.producer["host"],
        "committed_at": manifest.producer["committed_at"],
    }
    return pl.DataFrame([row]).with_columns(pl.from_epoch(pl.col("committed_at") * 1e6, time_unit="us").cast(pl.Datetime("us")))


def _part_frames(dataset: Dataset, manifest: Manifest) -> dict[str, pl.DataFrame]:
    """The rows that a part adds to the tables of its kind."""
    fold_kind = _FOLDS.get(dataset.kind)
    try:
        return fold_kind(dataset, manifest.part) if fold_kind else {}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, pl.exceptions.PolarsError) as error:
        if isinstance(error, FuselineError):
            raise
        reason = str(error).split("\n")[0]
        what = remedy.remake_part(dataset.folder, full=True)
        raise DamagedPart(f"{dataset.manifest_path(manifest.part)}: its arrays do not fit together ({reason}).", remedy=what) from error


def _forward_frames(dataset: Dataset, part: int) -> dict[str, pl.DataFrame]:
    names = ("doc_id_S", "segment_S", "n_bytes_S", "n_scored_S", "scored_bytes_S", "nll_S")
    *columns, offsets = dataset.read(part, *names, "segment_offsets")
    facts = dataset.description
    labels = {"kind": dataset.kind, "name": dataset.name, "model": facts["model"], "corpus": facts["corpus"], "part": part}
    segments = _frame(labels, dict(zip(names, columns, strict=True)) | {"n_tokens_S": np.diff(offsets)}).with_columns(
        ce=pl.col("nll") / pl.col("n_scored"), bpb=pl.col("nll") / (pl.col("scored_bytes") * np.log(2))
    )
    quarantined: Any = dataset.arrays(part).attributes["quarantined"]
    left_out = [{**labels, **row} for row in quarantined]
    return {"segments": segments} | ({"quarantine": pl.DataFrame(left_out)} if left_out else {})


def _alignment_frames(dataset: Dataset, part: int) -> dict[str, pl.DataFrame]:
    names = ("doc_id_S", "segment_S", "n_positions_S", "n_aligned_S")
    arrays = dict(zip(names, dataset.read(part, *names), strict=True))
    return {"alignment_coverage": _frame({"name": dataset.name, "corpus": dataset.description["corpus"], "part": part}, arrays)}


def _target_frames(dataset: Dataset, part: int) -> dict[str, pl.DataFrame]:
    arrays = dataset.arrays(part)
    keys = {name: arrays.read(name) for name in ("doc_id_S", "segment_S")} | {"n_positions_S": np.diff(arrays.read("segment_offsets"))}
    labels = {"name": dataset.name, "corpus": dataset.description["corpus"], "part": part}
    names: Any = arrays.attributes["sources"]
    facts = {name: arrays.read(name) for name in ("lost_mass_S", "gold_nll_S", "n_gold_S") if name in arrays.names}
    by_index = dict(enumerate(names))
    segments = _frame(labels, keys | facts).with_columns(
        source=pl.Series([by_index.get(int(index)) for index in arrays.read("source_S")], dtype=pl.String)
    )
    # Parts of an earlier version have no arrays by source: these columns stay NULL.
    by_source = {name: arrays.read(name) for name in arrays.names if name.endswith("_SN")}
    chosen_S = by_source["weight_SN"].argmax(axis=1) if by_source else None
    frames = []
    for index, source in enumerate(names):
        columns = {name.removesuffix("N"): array_SN[:, index] for name, array_SN in by_source.items()}
        frame = _frame(labels, keys | columns).with_columns(pl.selectors.float().fill_nan(None), source=pl.lit(source), place=pl.lit(index))
        frames.append(frame if chosen_S is None else frame.with_columns(chosen=pl.Series(chosen_S == index)))
    return {"target_segments": segments, "target_sources": pl.concat(frames)}


def _vocabulary_frames(dataset: Dataset, part: int) -> dict[str, pl.DataFrame]:
    return {"vocab_maps": dataset.table(part).group_by("rule").agg(tokens=pl.len()).with_columns(name=pl.lit(dataset.name))}


_FOLDS = {
    "distributions": _forward_frames,
    "evaluations": _forward_frames,
    "ensembles": _forward_frames,
    "alignments": _alignment_frames,
    "targets": _target_frames,
    "vocab_maps": _vocabulary_frames,
}


def _frame(labels: dict[str, Any], arrays: dict[str, Any]) -> pl.DataFrame:
    columns = {name.removesuffix("_S"): array for name, array in arrays.items()}
    return pl.DataFrame(columns).with_columns(**{name: pl.lit(value) for name, value in labels.items()})


def _fold_plan(connection: duckdb.DuckDBPyConnection, dataset: Dataset) -> None:
    summary = read_plan(dataset.folder)
    if summary is None or connection.execute("SELECT 1 FROM corpora WHERE corpus = ?", [dataset.name]).fetchone():
        return
    row = {"corpus": dataset.name} | summary | {"parts": len(summary["parts"])}
    _insert(connection, "corpora", pl.DataFrame([row]))
    documents = read_documents(dataset.folder, summary=summary).rename({"row": "source_row"})
    _insert(connection, "documents", documents.with_columns(corpus=pl.lit(dataset.name)))


def _fold_tokenizers(connection: duckdb.DuckDBPyConnection, layout: Layout, *, needed: set[str]) -> None:
    connection.execute("DELETE FROM tokenizers")
    for folder in (layout.folder("tokenizers", digest) for digest in sorted(needed)):
        if not folder.exists():
            continue  # `verify` reports it
        try:
            settings = read_object(folder / "settings.json")
            vocab_size = len(durable.read_parquet(folder / "token_bytes.parquet", columns=["token_id"]))
            row = [folder.name, vocab_size, settings["roles"]["bos"], settings["roles"]["eos"], settings["prepends_bos"]]
            if not all(value is None or is_count(value) for value in row[2:4]) or not isinstance(row[4], bool):
                raise ValueError("roles must be ids of tokens, and prepends_bos true or false")
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            raise DamagedPart(f"The tokenizer {folder} cannot be read ({error}).", remedy=remedy.remake(layout.root)) from error
        connection.execute("INSERT INTO tokenizers VALUES (?, ?, ?, ?, ?)", row)


def _fold_runs(connection: duckdb.DuckDBPyConnection, layout: Layout) -> None:
    for table in ("runs", "checkpoints", "metrics", "training_evaluations"):
        connection.execute(f"DELETE FROM {table}")
    for run in layout.runs():
        status = "interrupted" if run["status"] == "running" else run["status"]  # a fold runs between stages, so this run was killed
        row = [run["run"], run["stage"], run["dataset"], status, run["started_at"], run["ended_at"], run["host"], run["fuseline"]]
        documents = [json.dumps(run["parameters"]), json.dumps(run["metrics"])]
        moments = "make_timestamp((? * 1e6)::BIGINT), make_timestamp((? * 1e6)::BIGINT)"
        connection.execute(f"INSERT INTO runs VALUES (?, ?, ?, ?, {moments}, ?, ?, ?, ?)", row + documents)
    for folder in training_folders(layout):
        for step in checkpoint_steps(folder):
            path = f"runs/{folder.name}/checkpoints/step-{step:08d}"
            connection.execute("INSERT INTO checkpoints VALUES (?, ?, ?)", [folder.name, step, path])
        for table, records in (("metrics", read_metrics(folder)), ("training_evaluations", read_evaluations(folder))):
            if records:
                _insert(connection, table, pl.DataFrame(records, infer_schema_length=None).with_columns(training=pl.lit(folder.name)))


def _insert(connection: duckdb.DuckDBPyConnection, table: str, frame: pl.DataFrame) -> None:
    """Insert the frame's columns that the table has."""
    columns = [row[0] for row in connection.execute(f"DESCRIBE {table}").fetchall()]
    new_rows = frame.select([name for name in columns if name in frame.columns]).to_arrow()
    connection.register("new_rows", new_rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM new_rows")
    connection.unregister("new_rows")
