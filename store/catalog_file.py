"""The catalog's file. Only this module opens DuckDB.

A workspace from a stranger may have anything in its catalog: views over files, macros that replace DuckDB's functions. So no connection
can access other files, and a catalog with anything that the migrations do not create is never queried.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import duckdb
import psutil

from . import durable
from .errors import DamagedPart, DataError, WorkspaceBusy
from .migrations import MIGRATIONS, migrate
from .remedy import rebuild

MEMORY_LIMIT = 4 << 30  # bytes of a query; at most half of the machine's memory
SPILL_LIMIT = 32 << 30  # bytes that a query may write to the spill folder

_Config = dict[str, str | bool | int | float | list[str]]
_NO_VARIABLES: _Config = {"python_enable_replacements": False}  # a caller's variables are not tables
_PATIENCE_SECONDS = 10.0
_STORAGE = "v1.5.0"  # so that DuckDB 1.5 can open what a later version wrote
# By their full names, which nothing in a catalog can replace.
_OBJECTS = """
    SELECT schema_name || '.' || table_name, sql FROM system.main.duckdb_tables() WHERE NOT internal
    UNION ALL SELECT schema_name || '.' || view_name, sql FROM system.main.duckdb_views() WHERE NOT internal
    UNION ALL SELECT schema_name || '.' || index_name, sql FROM system.main.duckdb_indexes()
    UNION ALL SELECT schema_name || '.' || sequence_name, 'sequence' FROM system.main.duckdb_sequences()
    UNION ALL SELECT schema_name || '.' || type_name, 'type' FROM system.main.duckdb_types() WHERE NOT internal
    UNION ALL SELECT schema_name || '.', 'schema' FROM system.main.duckdb_schemas() WHERE NOT internal
"""
_FUNCTIONS = "SELECT schema_name || '.' || function_name, 'function' FROM system.main.duckdb_functions() WHERE NOT internal"
_TRIGGERS = "SELECT 'trigger ' || trigger_name, 'trigger' FROM system.main.duckdb_triggers()"
_Objects = dict[str, str]
_sound: dict[Path, tuple[int, ...]] = {}  # catalogs that this process has checked, with the state of their files


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a query."""

    memory: int | None = None  # bytes; by default `MEMORY_LIMIT`, but at most half of the machine's memory
    spill: int = SPILL_LIMIT  # bytes of temporary files

    def config(self, *, spill_folder: Path | None) -> _Config:
        """The settings of DuckDB; without a spill folder, a query that needs more memory fails."""
        memory = min(MEMORY_LIMIT, psutil.virtual_memory().total // 2) if self.memory is None else self.memory
        spilling: _Config = {"temp_directory": "", "max_temp_directory_size": "0B"}
        if spill_folder is not None:
            spilling = {"temp_directory": str(spill_folder / "duckdb"), "max_temp_directory_size": f"{self.spill}B"}
        return {"memory_limit": f"{memory}B", **spilling}


DEFAULT_LIMITS = Limits()


class ForeignCatalog(DamagedPart):
    """A catalog with contents that no migration creates."""


@contextmanager
def open_to_read(path: Path, *, limits: Limits, external_access: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the catalog read-only, by default without access to other files. Waits while the coordinator writes it.

    Raises:
        DataError: it cannot be opened, or has a different version.
        ForeignCatalog: it has contents that no migration creates.
        WorkspaceBusy: it stays locked.
    """
    require_file(path)
    with (
        _plain(path) as file,
        _opened(file, of=path, read_only=True, limits=limits, config=_NO_VARIABLES, external_access=external_access) as connection,
    ):
        with suppress(duckdb.InvalidInputException):  # this process already has it open, with locked settings
            connection.execute("SET enable_progress_bar = false")
            connection.execute("SET lock_configuration = true")
        state = _state(path)
        if _sound.get(path) != state:
            applied = _require_known(connection, path=path)
            if applied != len(MIGRATIONS):
                raise DataError(f"{path} has version {applied}, but this fuseline reads version {len(MIGRATIONS)}. {rebuild(path.parent)}")
            _sound[path] = state
        yield connection


@contextmanager
def open_to_write(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the catalog for writing, create it if it is missing, and migrate it to this version. Only the coordinator may call it.

    Raises:
        DataError: it cannot be opened.
        ForeignCatalog: it has contents that no migration creates, or a newer version. Nothing was changed.
        WorkspaceBusy: it stays locked.
    """
    if os.path.lexists(path):
        require_file(path)
    with (
        _plain(path, replace=True) as file,
        _opened(
            file, of=path, read_only=False, limits=DEFAULT_LIMITS, config={"storage_compatibility_version": _STORAGE, **_NO_VARIABLES}
        ) as connection,
    ):
        if _require_known(connection, path=path) > len(MIGRATIONS):
            raise ForeignCatalog(f"{path} was written by a newer fuseline.", remedy=rebuild(path.parent))
        migrate(connection)
        yield connection


def require_file(path: Path) -> None:
    """Raise ForeignCatalog unless the catalog and DuckDB's files beside it are regular files, not links."""
    for each in (path, log_of(path)):
        if os.path.lexists(each) and (each.is_symlink() or not each.is_file()):
            raise ForeignCatalog(f"{each} must be a regular file, but is a link, a folder or a pipe.", remedy=rebuild(path.parent))


def log_of(path: Path) -> Path:
    """DuckDB's write-ahead log, which a crash leaves behind."""
    return path.with_name(f"{path.name}.wal")


def _require_known(connection: duckdb.DuckDBPyConnection, *, path: Path) -> int:
    """The number of migrations that were applied to the catalog.

    Raises:
        ForeignCatalog: it has contents that these do not create.
    """
    found = dict(connection.execute(_OBJECTS).fetchall()) | dict(connection.execute(_FUNCTIONS).fetchall())
    with suppress(duckdb.CatalogException):  # DuckDB 1 has no triggers
        found |= dict(connection.execute(_TRIGGERS).fetchall())
    if not found:
        return 0
    applied = 0
    if found.get("main.migrations") == _made_by(0)["main.migrations"] and not any(kind == "function" for kind in found.values()):
        ((applied,),) = connection.execute("SELECT count(*) FROM main.migrations").fetchall()
    if applied > len(MIGRATIONS):
        return int(applied)
    expected = _made_by(applied)
    strange = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if strange:
        raise ForeignCatalog(
            f"{path} has tables, views or functions that fuseline did not create, such as {strange[0]!r}.", remedy=rebuild(path.parent)
        )
    return int(applied)


@cache
def _made_by(n_migrations: int) -> _Objects:
    """The contents of a catalog after the first migrations: each name with its definition, as this DuckDB writes it."""
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        migrate(connection, n_migrations=n_migrations)
        return dict(connection.execute(_OBJECTS).fetchall())


def _state(path: Path) -> tuple[int, ...]:
    found = []
    for each in (path, log_of(path)):
        if each.exists():
            facts = each.stat()
            found += [facts.st_ino, facts.st_mtime_ns, facts.st_size]
    return tuple(found)


@contextmanager
def _plain(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """The file itself, or a copy with a name that DuckDB reads as a path; with `replace`, the copy replaces the file afterwards.

    DuckDB reads text after a `?` as the options of a URL, and a backslash as a slash; all other characters are literal.
    """
    if not set("?\\") & set(str(path.absolute())):
        yield path.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="fuseline-") as folder:
        copy = Path(folder, "catalog.duckdb")
        if path.exists():
            shutil.copyfile(path, copy)
        yield copy
        if replace:
            with durable.temporary(path) as changed:
                shutil.copyfile(copy, changed)
                durable.publish(changed, to=path)


@contextmanager
def _opened(
    file: Path, *, of: Path, read_only: bool, limits: Limits, config: _Config, external_access: bool = False
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with limits and a private spill folder; `of` is the catalog, and `file` may be a copy of it."""
    settings = config | limits.config(spill_folder=_spill_folder()) | {"enable_external_access": external_access}
    connection = _connect(file, of=of, read_only=read_only, config=settings)
    try:
        yield connection
    finally:
        connection.close()


@cache
def _spill_folder() -> Path | None:
    """The folder for this process's temporary files, removed when the process ends; None if it cannot be created.

    All connections of a process to one file must have the same settings. The next process removes the folder of a killed one.
    """
    try:
        place = Path(tempfile.gettempdir(), "fuseline-sql")
        for left in place.parent.glob(f"{durable.TEMPORARY}*@{place.name}"):
            with suppress(OSError):
                if left.lstat().st_uid == os.getuid() and durable.is_abandoned(left):
                    durable.discard(left)
        folder = durable.temporary_sibling(place)
        folder.mkdir(mode=0o700)
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _connect(file: Path, *, of: Path, read_only: bool, config: _Config) -> duckdb.DuckDBPyConnection:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return duckdb.connect(str(file), read_only=read_only, config=config)
        except duckdb.ConnectionException as error:
            raise WorkspaceBusy(f"{of} is already open in this process with different settings. Close that connection first.") from error
        except duckdb.IOException as error:
            if "lock" not in str(error).lower():
                raise DataError(f"{of} cannot be opened: {error}\n{rebuild(of.parent)}") from error
            if time.monotonic() > deadline:
                raise WorkspaceBusy(f"{of} is locked by another process. Try again in a moment.") from error
            time.sleep(0.1)
        except duckdb.Error as error:
            raise DataError(f"{of} cannot be opened: {error}\n{rebuild(of.parent)}") from error
