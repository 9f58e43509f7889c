"""Writes files that the user names: results of queries, pages. They must not lie in a workspace, and keep their file mode."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from . import durable
from .errors import UsageError
from .paths import workspace_around


def require_outside_workspaces(path: Path, *, what: str) -> None:
    """Raise UsageError if a path, after links are followed, lies in a workspace. Only the stages may change its files.

    Args:
        path: of a file, which may not exist.
        what: names the option in the message, as in "--output".
    """
    workspace = workspace_around(path)
    if workspace is not None:
        raise UsageError(f"{what} ({path}) lies in the workspace {workspace}. Choose a path outside the workspace.")


@contextmanager
def open_output(path: Path, *, what: str) -> Iterator[BinaryIO]:
    """A file to write to. It appears under its name when it is complete. An existing file keeps its mode; a link is followed.

    Raises:
        UsageError: it lies in a workspace, or cannot be written.
    """
    require_outside_workspaces(path, what=what)
    try:
        if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
            with path.open("wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        with durable.temporary(target) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666 if mode is None else mode & 0o600)
            with open(descriptor, "wb") as file:
                yield file
                if mode is not None:
                    os.fchmod(descriptor, mode)
            os.replace(temporary, target)
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise UsageError(f"{what} ({path}) cannot be written: {error.strerror}.") from error
