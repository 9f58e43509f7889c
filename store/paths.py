"""Paths as users write them, and as they are shown."""

import os
from pathlib import Path


def expanded(path: str) -> Path:
    """A path with `~` for the home folder; every other character stands for itself."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: the folder is called so
        return Path(path)


def as_text(path: Path | str) -> str:
    """A path to be shown or stored: names of files are bytes, and need not be text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def workspace_around(path: Path) -> Path | None:
    """The workspace in which a path really lies, after links are followed; None where it lies in none."""
    return next((folder for folder in Path(os.path.realpath(path)).parents if os.path.exists(folder / "workspace.json")), None)
