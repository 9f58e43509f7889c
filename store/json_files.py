"""Reads the small JSON files of a workspace with limits, because they may be damaged or malicious.

Every problem is a ValueError or an OSError; the caller adds the file's name and what to do.
"""

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import DamagedPart
from .json_text import parse_writable_json

MOST_JSON_BYTES = 64 << 20  # of a file; the plan of a corpus with a million parts has 60 MB
MOST_LINE_BYTES = 1 << 20  # of a record on one line; a training step has less than 1 kB

END_OF_TIME = 253_402_300_800.0  # seconds from 1970 to the year 10000, where dates end


def open_file(path: Path) -> BufferedReader:
    """Open a regular file to read its bytes. This never waits for a pipe.

    Raises:
        OSError: it does not exist, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return open(descriptor, "rb")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: the file does not exist, or cannot be read.
        ValueError: it is not JSON in UTF-8, is larger than `MOST_JSON_BYTES`, or is nested too deeply (`json_text`).
    """
    return decode_json(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: the file does not exist, or cannot be read.
        ValueError: it is larger than `MOST_JSON_BYTES`.
    """
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_JSON_BYTES:
            raise ValueError(f"it has more than {MOST_JSON_BYTES:,} bytes")
        return file.read()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; see `read_json` for the errors."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"it must hold an object, but holds a {type(value).__name__}")
    return value


def read_lines(path: Path) -> Iterator[bytes]:
    """The complete lines of a file of records, with line ends; none if the file is missing. A last line that was cut short is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is longer than `MOST_LINE_BYTES`.
    """
    try:
        file = open_file(path)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(MOST_LINE_BYTES):
            if line.endswith(b"\n"):
                yield line
            elif len(line) == MOST_LINE_BYTES:
                raise ValueError(f"a line has more than {MOST_LINE_BYTES:,} bytes")


def decode_json(data: bytes) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: it is not JSON in UTF-8, or is nested too deeply (`json_text`).
    """
    return parse_writable_json(data.decode("utf-8"))


class Facts(dict[str, Any]):
    """An object from a JSON file. If a key is missing, the error names the file."""

    def __init__(self, values: dict[str, Any], *, path: Path, what: str, remedy: str) -> None:
        super().__init__(values)
        self._path, self._what, self._remedy = path, what, remedy

    def __missing__(self, key: str) -> Any:
        raise DamagedPart(f"{self._path} lacks {self._what}.{key}.", remedy=self._remedy)


def is_count(value: object, *, below: int = 1 << 53) -> bool:
    """Whether a value from a file is a whole number from 0 to less than `below`."""
    return type(value) is int and 0 <= value < below


def is_number(value: object, *, below: float = 1e15) -> bool:
    """Whether a value from a file is a finite number from 0 to less than `below`."""
    return type(value) in (int, float) and 0 <= value < below  # type: ignore[operator]
