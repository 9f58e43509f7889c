"""The JSON files of a model folder. Some editors write a byte order mark before the text, which `json` and transformers refuse."""

import json
import re
from pathlib import Path
from typing import Any

from .json_text import parse_json

_SURROGATE = re.compile(r"\\u[dD][89abcdefABCDEF]")  # two of them are a character
MARK = "\ufeff".encode()
LARGEST_MODEL_JSON = 256 << 20  # bytes; the largest published tokenizer.json has some 35 MB


def read_json(path: Path) -> Any:
    """The content of a JSON file, with or without a byte order mark.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    if not path.is_file() and path.exists():  # reading a pipe would wait for ever
        raise ValueError("it is not a regular file")
    if path.stat().st_size > LARGEST_MODEL_JSON:
        raise ValueError(f"it is larger than {LARGEST_MODEL_JSON >> 20} MiB")
    text = path.read_text(encoding="utf-8-sig")
    value = parse_json(text)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text in it is not valid Unicode: it has half a character") from error
    return value


def without_mark(path: Path) -> bytes:
    """The bytes of a text file without its byte order mark."""
    return path.read_bytes().removeprefix(MARK)
