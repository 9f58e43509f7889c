"""Opens the folder of a project, creates datasets and runs in it, and queries it."""

import fcntl
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
from .errors import DamagedPart, DataError, UsageError, WorkspaceBusy, reason_of
from .fingerprint import Identity
from .inside import require_inside
from .json_files import read_object
from .layout import Layout, folders_in
from .machine import usable_cores

if TYPE_CHECKING:
    import polars as pl

    from .sql.database import Database, Parameters

_SHOWN_HOLDER = 200  # characters of the coordinator's own description


@dataclass(frozen=True, slots=True)
class Run:
    """A running execution of a stage."""

    folder: Path
    metrics: dict[str, Any]  # recorded with the run


class Workspace(Layout):
    """The opened folder of a project, in which stages make datasets and record their runs."""

    @classmethod
    def create(cls, root: Path) -> "Workspace":
        """Open the workspace; create its folder if it is missing.

        Raises:
            DataError: the folder cannot be written, is not a workspace, or has a folder that is a link out of it.
        """
        try:
            foreign = root.is_dir() and any(not path.name.startswith(durable.TEMPORARY) for path in root.iterdir())
            if foreign and not (root / "workspace.json").exists():
                raise DataError(f"{root} is not empty and is not a workspace. Choose another --workspace.")
            root.mkdir(parents=True, exist_ok=True)
            if not (root / "workspace.json").exists():
                durable.write_json(root / "workspace.json", {"created_by": f"fuseline {__version__}"})
        except OSError as error:
            raise DataError(f"The workspace {root} cannot be created or written: {error.strerror or error}.") from error
        _require_record(root)
        _require_own_folders(root)
        return cls(root)

    @classmethod
    def open(cls, root: Path | str) -> "Workspace":
        """Open an existing workspace.

        Raises:
            UsageError: there is none.
            OutsideFolder: one of its folders is a link out of it.
        """
        root = Path(root)
        if not (root / "workspace.json").exists():
            raise UsageError(f"{root} is not a workspace. Name one with --workspace, or create one with: fuseline run RECIPE.")
        _require_record(root)
        _require_own_folders(root)
        return cls(root)

    @cached_property
    def database(self) -> "Database":
        """All stored data, for SQL."""
        from .sql.database import Database  # which opens workspaces

        return Database(self)

    def sql(self, query: str, parameters: "Parameters" = None) -> "pl.DataFrame":
        """The result of a DuckDB query over all stored data, as a polars table; see `Database.sql`."""
        return self.database.sql(query, parameters)

    def dataset(self, kind: str, name: str, *, identity: Identity, description: Mapping[str, Any] | None = None) -> Dataset:
        """Open or begin a dataset; see `Dataset.create`."""
        return Dataset.create(self.folder(kind, name), identity=identity, description=description)

    @contextmanager
    def coordinator(self) -> Iterator[None]:
        """Become the only process that runs stages and writes the catalog; remove temporary files of dead writers.

        Raises:
            WorkspaceBusy: another process is the coordinator. The kernel holds the lock, so a killed coordinator releases it.
            DataError: the workspace cannot be written.
        """
        try:
            file = durable.open_lock(self.root / ".coordinator")
        except OSError as error:
            raise DataError(f"The workspace {self.root} cannot be written: {error.strerror or error}.") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise WorkspaceBusy(
                    f"The workspace {self.root} is in use by {file.read(_SHOWN_HOLDER).strip() or 'another process'}. "
                    "Wait for it or stop it. `fuseline status` and `fuseline sql` work in the meantime."
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            for folder in self.swept_folders():
                durable.sweep(folder)
            yield

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
        except (KeyboardInterrupt, SystemExit):  # SystemExit: a signal to stop
            status = "interrupted"
            raise
        finally:
            durable.write_json(folder / "run.json", record | {"status": status, "ended_at": time.time()})


def _require_record(root: Path) -> None:
    """Raise DamagedPart unless `workspace.json` has the form that `Workspace.create` writes."""
    path = root / "workspace.json"
    try:
        read_object(path)
    except (OSError, ValueError) as error:
        raise DamagedPart(
            f"{path} cannot be read ({reason_of(error)}).", remedy="If the folder is a workspace, replace the file's content with {}."
        ) from error


def _require_own_folders(root: Path) -> None:
    """Raise OutsideFolder if the folder of a kind, or one in it, is a link out of the workspace: it would be read, written and cleaned."""
    for kind in folders_in(root):
        for path in (kind, *folders_in(kind)):
            require_inside(path, folder=root)
