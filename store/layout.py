"""The layout of a workspace, the one folder that holds everything of a project.

<workspace>/
  catalog.duckdb                                      index of everything; can be rebuilt
  tokenizers/<digest>/                                tokenizer.json, token_bytes.parquet
  corpus/<name>/  distributions/<model>/  alignments/<source>--<target>/  targets/<name>/
  evaluations/<model>--<split>/  ensembles/<rule>--<split>/
  token_matches/<source>--<target>--<positions>/  vocab_maps/<source>--<target>--<rule>/     tables, in the same form
  runs/<run>/                                         one execution of a stage: run.json; of training also checkpoints, metrics, logs
  exports/<name>/                                     models in the Hugging Face format
  models/<digest>.json                                differences from how transformers reads a model's folder; found again if removed
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .dataset import Dataset
from .errors import DamagedPart, reason_of
from .json_files import END_OF_TIME, is_number, read_object
from .shown import shown

# In the order of the pipeline, which is also the order in which the catalog folds them.
DATASET_KINDS = ("corpus", "distributions", "token_matches", "vocab_maps", "alignments", "targets", "evaluations", "ensembles")

_RUN_KEYS = ("run", "stage", "dataset", "parameters", "fuseline", "host", "started_at", "ended_at", "status", "metrics")  # of a run.json


class Layout:
    """The folder of a project, its paths and its contents."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def catalog_path(self) -> Path:
        """The DuckDB file."""
        return self.root / "catalog.duckdb"

    def folder(self, kind: str, name: str) -> Path:
        """The folder for this kind and name, which may not exist."""
        return self.root / kind / name

    def kinds(self) -> list[str]:
        """The kinds of datasets: the known ones, in the order of the pipeline, then other kinds in this workspace."""
        there = {path.parent.parent.name for path in self.root.glob("[!.]*/*/dataset.json")}
        return [*DATASET_KINDS, *sorted(there - set(DATASET_KINDS) - {"runs", "exports", "tokenizers", "models"})]

    def datasets(self) -> Iterator[Dataset]:
        """Every dataset of the workspace, in the order of the pipeline."""
        for kind in self.kinds():
            for folder in folders_in(self.root / kind):
                if os.path.lexists(folder / "dataset.json"):
                    yield Dataset.open(folder)

    def tokenizer_folders(self) -> list[Path]:
        """The folders of all stored tokenizers, by digest."""
        return folders_in(self.root / "tokenizers")

    def swept_folders(self) -> Iterator[Path]:
        """The folders into which stages publish, where a killed stage leaves temporary files. Trainers sweep their own folders.

        The folder of a kind may be a link to another disk; a dataset's folder that is a link is not swept.
        """
        yield self.root
        for folder in ("tokenizers", "models", *self.kinds()):
            yield self.root / folder
        for kind in self.kinds():
            yield from (folder for folder in folders_in(self.root / kind) if not folder.is_symlink())

    def runs(self) -> Iterator[dict[str, Any]]:
        """The record of every run, oldest first.

        Raises:
            DamagedPart: a record cannot be read.
        """
        yield from map(read_run, self.run_files())

    def run_files(self) -> list[Path]:
        """The `run.json` of every run, oldest first."""
        return sorted((self.root / "runs").glob("*/run.json"))


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, by name, including links to folders; none if the folder is missing."""
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def read_run(path: Path) -> dict[str, Any]:
    """The record of a run, from its `run.json`; the run's name is that of its folder.

    Raises:
        DamagedPart: it cannot be read, or is incomplete.
    """
    try:
        record = read_object(path)
        _check_run(record)
    except (OSError, ValueError) as error:
        raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy="Remove it: it is only a record of the run.") from error
    return record | {"run": path.parent.name}


def _check_run(record: dict[str, Any]) -> None:
    """Raise ValueError unless a record has the form of a run's record."""
    missing = [key for key in _RUN_KEYS if key not in record]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for key in ("stage", "dataset", "fuseline", "host", "status"):
        if not isinstance(record[key], str):
            raise ValueError(f"{key} ({shown(record[key])}) must be a text")
    if not is_number(record["started_at"], below=END_OF_TIME) or not is_number(record["ended_at"] or 0, below=END_OF_TIME):
        raise ValueError("started_at and ended_at must be seconds since 1970, at least 0")
