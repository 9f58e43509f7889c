"""Paths as users write them, and as messages show them."""

import os
from pathlib import Path


def expanded(path: str) -> Path:
    """A path with `~` for the home folder; every other character is literal."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: it is a folder's name
        return Path(path)


def as_text(path: Path | str) -> str:
    """A path as text, to be shown or stored: file names are bytes, and may not be valid text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def workspace_around(path: Path) -> Path | None:
    """The workspace that contains a path, after links are followed; None if there is none."""
    return next((folder for folder in Path(os.path.realpath(path)).parents if os.path.exists(folder / "workspace.json")), None)
