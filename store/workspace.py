"""The workspace: one folder that holds everything of a project.

<workspace>/
  catalog.duckdb                                      index of all of it; can be rebuilt
  tokenizers/<digest>/                                tokenizer.json, token_bytes.parquet
  corpus/<name>/  distributions/<model>/  alignments/<source>--<target>/  targets/<name>/  evaluations/<model>/
  token_matches/<source>--<target>--<positions>/  vocab_maps/<source>--<target>--<rule>/     tables, in the same form as the others
  runs/<run>/                                         one execution of a stage: run.json; of training also checkpoints, metrics, logs
  exports/<name>/                                     models in the Hugging Face format
  models/<digest>.json                                what transformers reads differently in a model's folder; found again if removed
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from . import durable
from .dataset import Dataset
from .errors import DamagedPart, DataError, UsageError, WorkspaceBusy
from .fingerprint import Identity
from .machine import usable_cores

if TYPE_CHECKING:
    import polars as pl

    from .database import Database, Parameters

# In the order of the pipeline, which is also the order in which the catalog folds them.
DATASET_KINDS = ("corpus", "distributions", "token_matches", "vocab_maps", "alignments", "targets", "evaluations")

_RUN_KEYS = ("run", "stage", "dataset", "parameters", "fuseline", "host", "started_at", "ended_at", "status", "metrics")  # of a run.json


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of a stage that is going on."""

    folder: Path
    metrics: dict[str, Any]  # what is put in here is recorded


class Workspace:
    """The folder of a project and the paths in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def create(cls, root: Path) -> "Workspace":
        """Open the workspace, making its folder if need be.

        Raises:
            DataError: the folder cannot be written, or holds something else.
        """
        try:
            foreign = root.is_dir() and any(not path.name.startswith(durable.TEMPORARY) for path in root.iterdir())
            if foreign and not (root / "workspace.json").exists():
                raise DataError(f"{root} is not empty and is not a workspace. Choose another --workspace.")
            root.mkdir(parents=True, exist_ok=True)
            if not (root / "workspace.json").exists():
                durable.write_json(root / "workspace.json", {"created_by": f"fuseline {__version__}"})
        except OSError as error:
            raise DataError(f"The workspace {root} cannot be made or written: {error.strerror or error}.") from error
        return cls(root)

    @classmethod
    def open(cls, root: Path | str) -> "Workspace":
        """Open a workspace that exists.

        Raises:
            UsageError: there is none.
        """
        root = Path(root)
        if not (root / "workspace.json").exists():
            raise UsageError(f"{root} is not a workspace. Name one with --workspace, or make it with: fuseline run RECIPE.")
        return cls(root)

    @cached_property
    def database(self) -> "Database":
        """Everything that is stored, for SQL."""
        from .database import Database  # which opens workspaces

        return Database(self)

    def sql(self, query: str, parameters: "Parameters" = None) -> "pl.DataFrame":
        """The result of a DuckDB query over everything that is stored, as a polars table; see `Database.sql`."""
        return self.database.sql(query, parameters)

    @property
    def catalog_path(self) -> Path:
        """The DuckDB file."""
        return self.root / "catalog.duckdb"

    def folder(self, kind: str, name: str) -> Path:
        """Where something of this kind and name is, or would be."""
        return self.root / kind / name

    def dataset(self, kind: str, name: str, *, identity: Identity, description: Mapping[str, Any] | None = None) -> Dataset:
        """Open or begin a dataset; see `Dataset.create`."""
        return Dataset.create(self.folder(kind, name), identity=identity, description=description)

    def datasets(self) -> Iterator[Dataset]:
        """Every dataset of the workspace, in the order of the pipeline."""
        for kind in DATASET_KINDS:
            for record in sorted((self.root / kind).glob("*/dataset.json")):
                yield Dataset.open(record.parent)

    @contextmanager
    def coordinator(self) -> Iterator[None]:
        """Be the one process that runs stages and writes the catalog; sweeps what dead writers left behind.

        Raises:
            WorkspaceBusy: another process is. The lock is the kernel's, so a killed coordinator holds nothing.
        """
        with (self.root / ".coordinator").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise WorkspaceBusy(
                    f"The workspace {self.root} is in use by {file.read().strip() or 'another process'}. "
                    "Wait for it or stop it; `fuseline status` and `fuseline sql` work meanwhile."
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            for folder in self.swept_folders():
                durable.sweep(folder)
            yield

    def tokenizer_folders(self) -> list[Path]:
        """The folders of all stored tokenizers, by digest."""
        return sorted((self.root / "tokenizers").glob("[!.]*/"))

    def swept_folders(self) -> Iterator[Path]:
        """The folders into which stages publish, and in which a dead one leaves temporaries. Trainers sweep theirs themselves."""
        yield self.root
        for folder in ("tokenizers", "models", *DATASET_KINDS):
            yield self.root / folder
        for kind in DATASET_KINDS:
            yield from sorted((self.root / kind).glob("[!.]*/"))

    @contextmanager
    def run(self, stage: str, *, name: str, parameters: Mapping[str, Any]) -> Iterator["Run"]:
        """Record one execution of a stage as `runs/<run>/run.json`."""
        started = time.time()
        moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime(started))
        folder = self.folder("runs", f"{moment}-{started % 1 * 1e6:06.0f}-{stage}-{name}")
        folder.mkdir(parents=True)
        record: dict[str, Any] = {
            "run": folder.name,
            "stage": stage,
            "dataset": name,
            "parameters": dict(parameters),
            "fuseline": __version__,
            "host": platform.node(),
            "cores": usable_cores(),
            "started_at": started,
            "ended_at": None,
            "status": "running",
            "metrics": {},
        }
        durable.write_json(folder / "run.json", record)
        status = "failed"
        try:
            yield Run(folder, record["metrics"])
            status = "done"
        except (KeyboardInterrupt, SystemExit):  # SystemExit: a signal that asked to stop
            status = "interrupted"
            raise
        finally:
            durable.write_json(folder / "run.json", record | {"status": status, "ended_at": time.time()})

    def runs(self) -> Iterator[dict[str, Any]]:
        """The record of every run, oldest first.

        Raises:
            DamagedPart: one cannot be read.
        """
        for path in sorted((self.root / "runs").glob("*/run.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                missing = [key for key in _RUN_KEYS if key not in record]
                if missing:
                    raise ValueError(f"it lacks {', '.join(missing)}")
            except (ValueError, TypeError) as error:
                remedy = "Remove it: it is only a record of what was done."
                raise DamagedPart(f"{path} cannot be read ({error}).", remedy=remedy) from error
            yield record
