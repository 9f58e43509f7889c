"""Parses JSON from untrusted files: parsing always ends with a value or a ValueError."""

import json
import re
from typing import Any

DEEPEST_JSON = 500  # nested arrays and objects; Python's limit is a thousand calls
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # two of them are a character
_TOO_DEEP = f"its arrays and objects are nested more than {DEEPEST_JSON} deep"


def parse_json(text: str | bytes, **how: Any) -> Any:
    """The value of a JSON text.

    Args:
        text: if bytes, in UTF-8.
        how: more arguments of `json.loads`.

    Raises:
        ValueError: it is not valid, a number has thousands of digits, or it is nested deeper than `DEEPEST_JSON`.
    """
    try:
        value = json.loads(text, **how)
    except (ValueError, RecursionError) as error:
        if (reason := reason_of(error)) != str(error):
            raise ValueError(reason) from error
        raise
    marks = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, marks)) > DEEPEST_JSON:  # type: ignore[arg-type]  # few texts have so many at all
        require_shallow(value)
    return value


def parse_writable_json(text: str) -> Any:
    """The value of a JSON text whose strings can be written again.

    Raises:
        ValueError: as in `parse_json`, or a string in it has half a surrogate pair.
    """
    value = parse_json(text)
    if "\\u" in text and _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a string in it is not valid Unicode: it has half a surrogate pair") from error
    return value


def reason_of(error: Exception) -> str:
    """Why a text cannot be parsed. For deep nesting and numbers with thousands of digits, Python's own message names its settings."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    return "a number has thousands of digits" if "set_int_max_str_digits" in str(error) else str(error)


def require_shallow(value: Any) -> None:
    """Raise ValueError if lists and dicts are nested deeper than `DEEPEST_JSON`: their readers are recursive."""
    level = [value]
    for _ in range(DEEPEST_JSON + 1):
        level = [each for each in level if isinstance(each, list | dict)]
        if not level:
            return
        level = [each for holder in level for each in (holder.values() if isinstance(holder, dict) else holder)]
    raise ValueError(_TOO_DEEP)
