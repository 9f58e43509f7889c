"""Checks that a name from a file stays inside its folder: one rule for everything that is opened, copied or deleted.

A name in a manifest, an index or a list is data, and may come from a stranger. It must be a plain relative path, and its target must be
inside the folder after all links are followed.
"""

import os
from pathlib import Path

from .errors import DataError
from .shown import shown

FOLLOW_LINKS = "FUSELINE_FOLLOW_LINKS"  # an environment variable, because a stranger's file cannot set it
LONGEST_NAME = 4096  # characters of a name; the limit of Linux for a path
LONGEST_COMPONENT = 255  # bytes of each component; the limit of Linux and macOS
_CACHED = ("models--", "datasets--")  # how folders in the cache of the Hugging Face hub begin


class OutsideFolder(DataError):
    """A name from a file leads out of its folder."""


def plain_name(name: object, *, what: str = "The name") -> str:
    """Return the name, if it is a relative path of plain components, with "/" between them.

    Args:
        name: as written in a file.
        what: names the field in the message, as in "weight_map of x/model.safetensors.index.json".

    Raises:
        OutsideFolder: it is not text, empty, absolute or too long, or it has a component "", "." or "..", a backslash, a control
            character, or a character that is not valid Unicode.
    """
    if isinstance(name, str) and is_plain_name(name):
        return name
    raise OutsideFolder(
        f"{what} ({shown(name)}) must be the plain name of a file in this folder.", remedy="Do not use this file: download it again."
    )


def is_plain_name(name: str) -> bool:
    """Whether a text is a relative path of plain components; see `plain_name`."""
    return (
        0 < len(name) <= LONGEST_NAME
        and name.isprintable()
        and "\\" not in name
        and not any(part in {"", ".", ".."} or len(part.encode()) > LONGEST_COMPONENT for part in name.split("/"))
    )


def inside(folder: Path, name: object, *, what: str = "The name") -> Path:
    """The path of a name below a folder. It may not exist; if it exists, it must be inside after links are followed.

    Raises:
        OutsideFolder: the name is not plain (`plain_name`), or it leads out of the folder through a link.
    """
    path = folder / plain_name(name, what=what)
    require_inside(path, folder=folder)
    return path


def require_inside(path: Path, *, folder: Path) -> None:
    """Raise OutsideFolder unless a path is inside a folder, or the folder itself, after links are followed.

    A snapshot in the Hugging Face cache (`models--owner--name/snapshots/<commit>`) consists of links into its sibling `blobs`, which count
    as inside.
    """
    if not lies_inside(path, folder=folder):
        raise OutsideFolder(
            f"{path} is a link that leads out of {folder}, to {_target(path)}.",
            remedy=f"Copy its target into the folder; or, if you trust all links, set {FOLLOW_LINKS}=1.",
        )


def lies_inside(path: Path, *, folder: Path) -> bool:
    """Whether a path is inside a folder, or the folder itself, after links are followed; see `require_inside`.

    If the user allows it (`FOLLOW_LINKS`), links may lead anywhere.
    """
    if os.environ.get(FOLLOW_LINKS) == "1" or _has_no_links(path, below=folder):  # 5 µs; following links takes 50
        return True
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    return real.is_relative_to(root) or (_is_snapshot(root) and real.parent == root.parent.parent / "blobs")


def _has_no_links(path: Path, *, below: Path) -> bool:
    """Whether a path has only plain components below a folder, and no links."""
    place, whole = str(below), str(path)
    if not whole.startswith(f"{place}/"):
        return False
    for part in whole[len(place) + 1 :].split("/"):
        place = f"{place}/{part}"
        if part == "..":
            return False
        if os.path.islink(place):
            return False
    return True


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith(_CACHED)


def _target(path: Path) -> str:
    try:
        return str(path.resolve())
    except (OSError, RuntimeError):
        return "itself"
