"""The JSON files of a model folder. Some editors write a byte order mark before the text, which `json` and transformers refuse."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MARK = "\ufeff".encode()


def read_json(path: Path) -> Any:
    """The content of a JSON file, with or without a byte order mark.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    return json.loads(path.read_text(encoding="utf-8-sig"))


def without_mark(path: Path) -> bytes:
    """The bytes of a text file without its byte order mark."""
    return path.read_bytes().removeprefix(_MARK)


@contextmanager
def for_transformers(folder: Path) -> Iterator[Path]:
    """The folder itself, or where one of its JSON files has a byte order mark, a temporary one with links and those files without it."""
    marked = {path.name for path in folder.glob("*.json") if _starts_with_mark(path)}
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fuseline-model-") as temporary:
        for path in folder.iterdir():
            if path.name in marked:
                (Path(temporary) / path.name).write_bytes(without_mark(path))
            else:
                (Path(temporary) / path.name).symlink_to(path.absolute())
        yield Path(temporary)


def _starts_with_mark(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK
