"""Parses TOML from untrusted files, and finds the lines of its keys."""

import re
import tomllib
from functools import cache
from typing import Any

from .errors import UsageError
from .json_text import reason_of, require_shallow

KeyPath = tuple[str | int, ...]

MOST_KEY_PARTS = 50  # of a dotted key; the parsing time grows with the square
# Keys, and what may hide them. Nothing is read twice: a quote without an end extends to the end of its line.
_PART = r"""(?:[\w-]++|"(?:[^"\\\n]++|\\[^\n])*+"?+|'[^'\n]*+'?+)"""
_DOT = r"[ \t]*+\.[ \t]*+"
_KEY = re.compile(
    r'"""(?:[^"\\]++|\\.|"{1,2}+(?!"))*+(?:"{3,5}+)?'
    r"|'''(?:[^']++|'{1,2}+(?!'))*+(?:'{3,5}+)?"
    r"|#[^\n]*+"
    rf"|(?P<long>{_PART}(?:{_DOT}{_PART}){{{MOST_KEY_PARTS}}})"
    rf"|{_PART}(?:{_DOT}{_PART})*+",
    re.DOTALL,
)
# Line ends and brackets, and what may hide them.
_TOKEN = re.compile(
    r'"""(?:[^"\\]+|\\.|"{1,2}(?!"))*"{3,5}'
    r"|'''(?:[^']+|'{1,2}(?!'))*'{3,5}"
    r'|"(?:[^"\\\n]+|\\.)*"'
    r"|'[^'\n]*'"
    r"|#[^\n]*"
    r"|[\[\]{}\n]",
    re.DOTALL,
)


def parse_toml(text: str, *, what: str, hint: str = "") -> dict[str, Any]:
    """The values in a TOML text.

    Args:
        text: of the file.
        what: its name in messages, such as "The recipe x.toml".
        hint: one more sentence for an invalid text.

    Raises:
        UsageError: it is invalid or nested too deeply, a key has more than `MOST_KEY_PARTS` parts, or a number has thousands of digits.
    """
    if any(found["long"] for found in _KEY.finditer(text)):
        raise UsageError(f"{what} is not valid TOML: a key must have at most {MOST_KEY_PARTS} parts separated by dots. {hint}".rstrip())
    try:
        data = tomllib.loads(text)
        require_shallow(data)
    except RecursionError as error:
        raise UsageError(f"{what} is not valid TOML: its arrays and tables are nested too deeply. {hint}".rstrip()) from error
    except ValueError as error:
        raise UsageError(f"{what} is not valid TOML: {reason_of(error)}. {hint}".rstrip()) from error
    return data


class Lines:
    """The lines of a valid TOML text, from 1."""

    def __init__(self, text: str) -> None:
        self._lines = [f"{line}\n" for line in text.split("\n")]  # as TOML and editors count: form feeds do not end a line
        self._ends = _statement_ends(text)
        self._parsed = cache(self._parse)

    def of(self, path: KeyPath) -> int:
        """The line on which a key's value starts, or its section if the key is missing.

        It is the line after the longest prefix of the text that is valid TOML and does not contain the key.
        """
        while path:
            if holds(self._parsed(len(self._ends) - 1), path):
                first, last = 0, len(self._ends) - 1  # a key that is present stays present: bisect
                while first < last:
                    middle = (first + last) // 2
                    first, last = (first, middle) if holds(self._parsed(middle), path) else (middle + 1, last)
                start = self._ends[first - 1] + 1 if first else 1
                return next((n for n in range(start, self._ends[first] + 1) if self._lines[n - 1].strip()), self._ends[first])
            path = path[:-1]
        return 1

    def _parse(self, index: int) -> dict[str, Any]:
        return tomllib.loads("".join(self._lines[: self._ends[index]]))


def _statement_ends(text: str) -> list[int]:
    """The lines whose end is not inside a value."""
    ends, line, depth = [], 1, 0
    for token in _TOKEN.finditer(text):
        match token[0]:
            case "[" | "{":
                depth += 1
            case "]" | "}":
                depth -= 1
            case "\n":
                if depth == 0:
                    ends.append(line)
                line += 1
            case long:
                line += long.count("\n")
    return [*ends, line]


def holds(data: Any, path: KeyPath) -> bool:
    """Whether a path has a value."""
    for key in path:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True
