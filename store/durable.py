"""Files that survive crashes and concurrent workers: written under a unique name, fsynced and renamed into place; then the folder is
fsynced too.

`zarr-python` and `polars` write without fsync, so a power cut may leave a renamed file empty. Only these functions publish files in a
workspace. The file system must have hard links and atomic renames.
"""

import contextlib
import errno
import io
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import polars as pl

TEMPORARY = ".tmp-"  # prefix of every name that a crash may leave behind; files with it are never read
_WRITER = re.compile(re.escape(TEMPORARY) + r"(?P<pid>\d+)@(?P<host>[^@]+)@[0-9a-f]+@")
_OTHERS = re.compile(
    re.escape(TEMPORARY) + r"(step-\d{8,}|\d+-.*)", re.DOTALL
)  # of checkpoints, which all ranks write; of earlier versions
_OTHER_HOSTS_SECONDS = 24 * 3600.0  # a writer on another host, which cannot be checked, counts as dead after this
_CLOCK_SECONDS = 600.0  # most that the clock of a file server may be ahead of this host's


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_sibling(path: Path) -> Path:
    """A unique name in the same folder (so that a rename is atomic) that no reader reads; it contains the writer's process and host."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}@{_host()}@{secrets.token_hex(4)}@{path.name}")


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A `temporary_sibling` to write to and to publish; if it still exists at the end, it is removed."""
    name = temporary_sibling(path)
    try:
        yield name
    finally:
        with contextlib.suppress(OSError):  # a Zarr thread may still write into it: `sweep` then removes it later
            discard(name)


def publish(temporary: Path, *, to: Path) -> None:
    """Publish a finished temporary file or folder under its name, atomically and durably; it replaces an existing one."""
    _flush(temporary)
    _make_way(to, is_folder=temporary.is_dir())
    os.replace(temporary, to)
    fsync(to.parent)


def publish_link(path: Path, *, to: str) -> None:
    """Publish a link to a sibling atomically; it replaces an existing file or link."""
    with temporary(path) as name:
        name.symlink_to(to)
        _make_way(path, is_folder=False)
        os.replace(name, path)


def publish_new(temporary: Path, *, to: Path) -> None:
    """Publish a finished temporary file or folder under a free name, atomically and durably.

    Raises:
        FileExistsError: the name is taken, perhaps by another process just now; both files stay as they are.
    """
    _flush(temporary)
    if temporary.is_dir():
        try:
            os.rename(temporary, to)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to)) from error
            raise
    else:
        os.link(temporary, to)  # unlike a rename, never replaces
        os.unlink(temporary)
    fsync(to.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    with temporary(path) as name:
        name.write_bytes(data)
        publish(name, to=path)


def write_parquet(path: Path, table: "pl.DataFrame") -> None:
    """Write a table atomically."""
    write_bytes(path, parquet_bytes(table))


def read_parquet(path: Path, *, columns: list[str] | None = None) -> "pl.DataFrame":
    """Read a table from a file. Polars would read `[`, `*` and `?` in a path as a pattern, and open another file."""
    import polars as pl

    return pl.read_parquet(path, columns=columns, glob=False, hive_partitioning=False)


def parquet_bytes(table: "pl.DataFrame") -> bytes:
    """A table as the content of a Parquet file. It is made in memory, because polars reports a full disk as an error of its own."""
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file atomically."""
    write_bytes(path, _json_bytes(value))


def write_new_json(path: Path, value: Any) -> None:
    """Write a small JSON file atomically, unless it exists.

    Raises:
        FileExistsError: it exists, perhaps written by another process just now; it stays.
    """
    with temporary(path) as name:
        name.write_bytes(_json_bytes(value))
        publish_new(name, to=path)


def open_lock(path: Path) -> TextIO:
    """Open a file to lock it; create it if it is missing. Anything else with its name, such as a link, is removed.

    Raises:
        OSError: it cannot be written.
    """
    while True:
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            remove(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:  # it appeared just now
                continue
            raise
        return os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")


def remove(path: Path) -> None:
    """Remove a file, a folder or a link; never the target of a link.

    A folder is renamed first, so that a crash cannot leave part of it under its name.
    """
    if is_real_folder(path):
        doomed = temporary_sibling(path)
        path.rename(doomed)
        path = doomed
    discard(path)


def discard(path: Path) -> None:
    """Remove a file, a folder or a link that nobody reads, if it exists; never the target of a link."""
    with contextlib.suppress(FileNotFoundError):  # another process removes it too
        if is_real_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()


def is_real_folder(path: Path) -> bool:
    """Whether the path is a folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def sweep(folder: Path, *, alone: bool = False) -> None:
    """Remove temporary files of dead writers from a folder; with `alone` (no other process writes to it), all temporary files."""
    for path in list(written_temporaries(folder)) if alone else abandoned(folder):
        discard(path)


def written_temporaries(folder: Path) -> Iterator[Path]:
    """The temporary files and folders in a folder, by name: only those with fuseline's naming scheme.

    The folder may be a stranger's link to one where `.tmp-` means something else.
    """
    for path in sorted(folder.glob(TEMPORARY + "*")):
        if _WRITER.match(path.name) or _OTHERS.fullmatch(path.name):
            yield path


def abandoned(folder: Path) -> Iterator[Path]:
    """The temporary files and folders in a folder whose writer is dead."""
    for path in written_temporaries(folder):
        with contextlib.suppress(FileNotFoundError):  # its writer has just published it
            if is_abandoned(path):
                yield path


def is_abandoned(path: Path) -> bool:
    """Whether the writer of a temporary file or folder is dead, as far as this host can tell.

    On this host: its process has ended, or its number belongs to a process that started later. On another host: unchanged for a day.

    Raises:
        FileNotFoundError: it does not exist any more.
    """
    import psutil

    touched = last_touched(path)
    writer = _WRITER.match(path.name)
    if writer is None or writer["host"] != _host():
        return time.time() - touched > _OTHER_HOSTS_SECONDS
    try:
        return psutil.Process(int(writer["pid"])).create_time() > touched + _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


def last_touched(path: Path) -> float:
    """When a file or a link, or the newest file or folder in a folder, was last changed (seconds since 1970). Links are not followed.

    Raises:
        FileNotFoundError: the name does not exist.
    """
    newest = path.lstat().st_mtime
    for folder, _, names in os.walk(path) if is_real_folder(path) else ():
        for name in (".", *names):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, Path(folder, name).lstat().st_mtime)
    return newest


def _make_way(path: Path, *, is_folder: bool) -> None:
    """Remove an existing file or folder that a rename onto this name would not replace."""
    if os.path.lexists(path) and (is_folder or is_real_folder(path)):
        remove(path)


def _flush(path: Path) -> None:
    for folder, _, names in os.walk(path, topdown=False):  # empty for a file
        for name in names:
            fsync(Path(folder, name))
        fsync(Path(folder))
    if not path.is_dir():
        fsync(path)


def _host() -> str:
    """This host; containers with their own process numbers count as different hosts."""
    namespace = Path("/proc/self/ns/pid")
    return platform.node() + (f"-{namespace.stat().st_ino}" if namespace.exists() else "")


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
