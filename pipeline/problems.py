"""Lists the problems in a user's file: line number, key, what the value must be, and what is valid."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..store.shown import shown
from ..store.toml_text import KeyPath, Lines
from .executors.config import WrongKeys

MOST_PROBLEMS = 10  # in one message
_LONGEST_KEY = 80  # characters of a key in a message


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in a file."""

    path: KeyPath
    text: str
    is_unknown: bool = False  # the key or section is unknown


def problems_of(error: ValidationError, *, of: type[BaseModel], valid: Sequence[str] | None = None) -> list[Problem]:
    """The problems that a validation found.

    Args:
        error: the error of the validation.
        of: the class that was validated.
        valid: the keys of the file's outermost table, if they differ from those of `of`.
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
    """The class of the section, or list of sections, that a key has; None for any other key."""
    field = section.model_fields.get(key)
    if field is None:
        return None
    choices = (field.annotation, *get_args(field.annotation))  # a section, a list of sections, or an optional section
    return next((choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)), None)


def said_of_problems(problems: Sequence[tuple[KeyPath, str]], *, text: str, what: str) -> str:
    """The text that lists the problems in a file by line; at most `MOST_PROBLEMS` of them.

    Args:
        problems: the key, and its problem.
        text: text of the file, which is valid TOML.
        what: name of the file, such as "The recipe x.toml".
    """
    lines = Lines(text)
    placed = sorted((lines.of(path), ".".join(map(short_key, path)) or "recipe", said) for path, said in problems[:MOST_PROBLEMS])
    listed = "\n".join(f"  line {line}: {where}: {said}" for line, where, said in placed)
    more = f"\n  and {len(problems) - MOST_PROBLEMS:,} more" if len(problems) > MOST_PROBLEMS else ""
    return f"{what} has {len(problems):,} problem{'s' * (len(problems) > 1)}:\n{listed}{more}"


def short_key(key: str | int) -> str:
    text = str(key)
    return text if len(text) <= _LONGEST_KEY else f"{text[:_LONGEST_KEY]}..."
