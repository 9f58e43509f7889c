"""Where things lie in a workspace, the one folder that holds everything of a project, and what lies there.

<workspace>/
  catalog.duckdb                                      index of all of it; can be rebuilt
  tokenizers/<digest>/                                tokenizer.json, token_bytes.parquet
  corpus/<name>/  distributions/<model>/  alignments/<source>--<target>/  targets/<name>/  evaluations/<model>/
  token_matches/<source>--<target>--<positions>/  vocab_maps/<source>--<target>--<rule>/     tables, in the same form as the others
  runs/<run>/                                         one execution of a stage: run.json; of training also checkpoints, metrics, logs
  exports/<name>/                                     models in the Hugging Face format
  models/<digest>.json                                what transformers reads differently in a model's folder; found again if removed
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
    """The folder of a project, the paths in it, and what is there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def catalog_path(self) -> Path:
        """The DuckDB file."""
        return self.root / "catalog.duckdb"

    def folder(self, kind: str, name: str) -> Path:
        """Where something of this kind and name is, or would be."""
        return self.root / kind / name

    def kinds(self) -> list[str]:
        """The kinds of datasets: those that every workspace may have, in the order of the pipeline, and others that are there."""
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
        """The folders into which stages publish, and in which a dead one leaves temporaries. Trainers sweep theirs themselves.

        The folder of a kind may be a link, to another disk; one of a dataset that is a link is not swept.
        """
        yield self.root
        for folder in ("tokenizers", "models", *self.kinds()):
            yield self.root / folder
        for kind in self.kinds():
            yield from (folder for folder in folders_in(self.root / kind) if not folder.is_symlink())

    def runs(self) -> Iterator[dict[str, Any]]:
        """The record of every run, oldest first.

        Raises:
            DamagedPart: one cannot be read.
        """
        yield from map(read_run, self.run_files())

    def run_files(self) -> list[Path]:
        """The `run.json` of every run, oldest first."""
        return sorted((self.root / "runs").glob("*/run.json"))


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, by name, also where they are links; nothing where there is no folder."""
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def read_run(path: Path) -> dict[str, Any]:
    """The record of a run, by its `run.json`; its name is that of its folder.

    Raises:
        DamagedPart: it cannot be read, or lacks something.
    """
    try:
        record = read_object(path)
        _check_run(record)
    except (OSError, ValueError) as error:
        raise DamagedPart(
            f"{path} cannot be read ({reason_of(error)}).", remedy="Remove it: it is only a record of what was done."
        ) from error
    return record | {"run": path.parent.name}


def _check_run(record: dict[str, Any]) -> None:
    """Raise ValueError unless a record has what a run's has."""
    missing = [key for key in _RUN_KEYS if key not in record]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for key in ("stage", "dataset", "fuseline", "host", "status"):
        if not isinstance(record[key], str):
            raise ValueError(f"{key} ({shown(record[key])}) must be a text")
    if not is_number(record["started_at"], below=END_OF_TIME) or not is_number(record["ended_at"] or 0, below=END_OF_TIME):
        raise ValueError("started_at and ended_at must be numbers of seconds from 0")
