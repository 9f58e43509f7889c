"""Checks the description of a hub dataset, which lists the files of its splits. `datasets` opens every file that it names, anywhere.

It is the header of README.md, and `.huggingface.yaml`, whose settings replace those of the header.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..store.errors import DataError
from ..store.inside import OutsideFolder, plain_name, require_inside
from ..store.shown import shown
from ..store.yaml_text import parse_yaml

CARD = "README.md"
_SETTINGS = ".huggingface.yaml"
LARGEST_CARD = 16 << 20  # bytes; some list statistics of hundreds of configurations
_HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
_FILES = ("data_files", "data_dir")


def require_named_inside(folder: Path) -> None:
    """Check the files that the description of a dataset names.

    Raises:
        OutsideFolder: a file of the snapshot is a link out of it.
        DataError: the description cannot be read, or names a file outside the snapshot or a URL.
    """
    for path in folder.rglob("*"):
        require_inside(path, folder=folder)
    for name in (CARD, _SETTINGS):
        if (folder / name).exists():
            _require_inside(folder / name)


def _require_inside(path: Path) -> None:
    try:
        if path.stat().st_size > LARGEST_CARD:
            raise ValueError(f"it has more than {LARGEST_CARD >> 20} MiB")
        text = path.read_text(encoding="utf-8-sig")
        if path.name == CARD:
            header = _HEADER.match(text)
            text = header[1] if header else ""
        settings = parse_yaml(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Download the dataset again.") from error
    configs = settings.get("configs") if isinstance(settings, dict) else None
    for config in configs if isinstance(configs, list) else []:
        for name in _texts([config.get(key) for key in _FILES] if isinstance(config, dict) else None):
            if not _is_inside(name):
                raise DataError(f"{path} names {shown(name)}, which is outside the dataset's folder. Use another dataset.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _is_inside(name: str) -> bool:
    """Whether a name, which may have wildcards, is inside the dataset's folder."""
    try:
        plain_name(name.removeprefix("./").rstrip("/") or "data")
    except OutsideFolder:
        return False
    return ":" not in name
