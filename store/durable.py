"""Files that survive a crash: written beside their place, fsynced, renamed into it, and the folder fsynced too.

`zarr-python` and `polars` write without fsync, so a power cut may leave a renamed file empty; these few functions are the only ones that
put anything into a workspace for good.
"""

import io
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

TEMPORARY = ".tmp-"  # prefix of every name that a crash may leave behind; nothing with it is ever read


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_sibling(path: Path) -> Path:
    """A name in the same folder (so that a rename is atomic) that readers ignore and `sweep` removes."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def publish(temporary: Path, *, to: Path) -> None:
    """Make a finished temporary file or folder appear under its name, in one step and for good.

    A folder left under that name by a crash between this step and its manifest is replaced.
    """
    if temporary.is_dir():
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                fsync(Path(folder, name))
            fsync(Path(folder))
        if to.exists():
            remove(to)
    else:
        fsync(temporary)
    os.replace(temporary, to)
    fsync(to.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    temporary = temporary_sibling(path)
    temporary.write_bytes(data)
    publish(temporary, to=path)


def write_parquet(path: Path, table: "pl.DataFrame") -> None:
    """Write a table atomically. It goes through memory, because polars reports a full disk as an error of its own."""
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder is renamed first, so that a crash cannot leave half of it under its name."""
    if path.is_dir():
        doomed = temporary_sibling(path.with_name(f"old-{path.name}"))  # not the name of what may be about to replace it
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what an interrupted writer left in a folder. Only the coordinator may call it, while no worker writes."""
    for path in folder.glob(TEMPORARY + "*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
