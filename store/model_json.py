"""The JSON files of a model folder. Some editors write a byte order mark first, which `json` and transformers refuse."""

from pathlib import Path
from typing import Any

from .json_text import parse_writable_json

MARK = "\ufeff".encode()
LARGEST_MODEL_JSON = 256 << 20  # bytes; the largest published tokenizer.json has some 35 MB


def read_json(path: Path) -> Any:
    """The content of a JSON file, with or without a byte order mark.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    if not path.is_file() and path.exists():  # reading a pipe would wait forever
        raise ValueError("it is not a regular file")
    if path.stat().st_size > LARGEST_MODEL_JSON:
        raise ValueError(f"it is larger than {LARGEST_MODEL_JSON >> 20} MiB")
    return parse_writable_json(path.read_text(encoding="utf-8-sig"))


def without_mark(path: Path) -> bytes:
    """The bytes of a text file without its byte order mark."""
    return path.read_bytes().removeprefix(MARK)
