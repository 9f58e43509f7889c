"""What is wrong in a user's file, as lines: with the line number, the key, what it must be, and what would be valid."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..store.shown import shown
from ..store.toml_text import KeyPath, Lines
from .executors.config import WrongKeys

MOST_PROBLEMS = 10  # that a message lists
_LONGEST_KEY = 80  # characters of a key that a message names


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a file."""

    path: KeyPath
    text: str
    is_unknown: bool = False  # the key, or the section, is unknown


def problems_of(error: ValidationError, *, of: type[BaseModel], valid: Sequence[str] | None = None) -> list[Problem]:
    """What a validation found, one by one.

    Args:
        error: of the validation.
        of: what was validated.
        valid: the keys of its outermost table, where the file may have others there than `of`.
    """
    return [problem for details in error.errors() for problem in _problems(dict(details), of=of, valid=valid)]


def _problems(details: dict[str, Any], *, of: type[BaseModel], valid: Sequence[str] | None) -> list[Problem]:
    path, error = tuple(details["loc"]), details.get("ctx", {}).get("error")
    if isinstance(error, WrongKeys):
        return [Problem((*path, key), text) for key, text in error.problems.items()]
    match details["type"]:
        case "extra_forbidden":
            keys = valid if valid is not None and len(path) == 1 else list(_fields_at(path[:-1], of=of))
            close = difflib.get_close_matches(short_key(path[-1]), keys, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            return [Problem(path, f"unknown key. {hint}Valid are: {', '.join(keys)}", is_unknown=True)]
        case "missing":
            field = _fields_at(path[:-1], of=of)[str(path[-1])]
            return [Problem(path, f"is missing: {field.description or 'a section'}")]
        case "value_error":
            return [Problem(path, str(error))]
        case _:
            message = details["msg"].removeprefix("Input ")
            said = message if message.startswith("should") else f"is wrong: {message}"
            return [Problem(path, f"{shown(details['input'])} {said}")]


def _fields_at(path: KeyPath, *, of: type[BaseModel]) -> Mapping[str, Any]:
    """The fields of the section at a path, by name."""
    model: type[BaseModel] | None = of
    for key in path:
        if isinstance(key, str):
            assert model is not None
            model = section_of(model, key)
    return {} if model is None else model.model_fields


def section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a key of a section holds, or a list of which it holds; None of any other key."""
    field = section.model_fields.get(key)
    if field is None:
        return None
    choices = (field.annotation, *get_args(field.annotation))  # a section, a list of them, or one that may be left out
    return next((choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)), None)


def said_of_problems(problems: Sequence[tuple[KeyPath, str]], *, text: str, what: str) -> str:
    """What is wrong in a file, with lines; of many problems the first `MOST_PROBLEMS`.

    Args:
        problems: the key, and what is wrong with it.
        text: of the file, which is valid TOML.
        what: names it, as in "The recipe x.toml".
    """
    lines = Lines(text)
    placed = sorted((lines.of(path), ".".join(map(short_key, path)) or "recipe", said) for path, said in problems[:MOST_PROBLEMS])
    listed = "\n".join(f"  line {line}: {where}: {said}" for line, where, said in placed)
    more = f"\n  and {len(problems) - MOST_PROBLEMS:,} more" if len(problems) > MOST_PROBLEMS else ""
    return f"{what} has {len(problems):,} problem{'s' * (len(problems) > 1)}:\n{listed}{more}"


def short_key(key: str | int) -> str:
    text = str(key)
    return text if len(text) <= _LONGEST_KEY else f"{text[:_LONGEST_KEY]}..."
