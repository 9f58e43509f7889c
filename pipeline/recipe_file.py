"""The file of a recipe: TOML, read, checked as a whole, and reported on by line."""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..store.errors import UsageError
from ..store.shown import shown
from ..store.toml_text import KeyPath, Lines, holds, parse_toml
from ..store.user_text import read_user_text
from .executors.config import WrongKeys
from .recipe import BASE, Recipe, changed_data, section_of
from .recipe_checks import Problem, impossible

_COMPARED = ("name", "path", "model", "revision")  # the keys that other sections are compared with, and those without which there is none
MOST_PROBLEMS = 10  # that a message lists
_LONGEST_KEY = 80  # characters of a key that a message names


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UsageError: it cannot be read, or something in it is wrong; the text lists everything at once, with lines and what would be valid.
    """
    return parse_recipe(read_user_text(path, what=f"The recipe {path}"), path=path)


def parse_recipe(text: str, *, path: Path) -> Recipe:
    """Check the text of a recipe; `path` is for the messages.

    Raises:
        UsageError: as of `load_recipe`.
    """
    data = parse_toml(text, what=f"The recipe {path}")
    recipe, problems = _validated(copy.deepcopy(data))
    if recipe is not None and not problems:
        problems = list(_variant_problems(recipe, data))
    if problems or recipe is None:
        raise UsageError(said_of_problems([(each.path, each.text) for each in problems], text=text, what=f"The recipe {path}"))
    return recipe


def said_of_problems(problems: Sequence[tuple[KeyPath, str]], *, text: str, what: str) -> str:
    """What is wrong in a file, with lines; of many problems the first `MOST_PROBLEMS`.

    Args:
        problems: the key, and what is wrong with it.
        text: of the file, which is valid TOML.
        what: names it, as in "The recipe x.toml".
    """
    lines = Lines(text)
    placed = sorted((lines.of(path), ".".join(map(_short_key, path)) or "recipe", said) for path, said in problems[:MOST_PROBLEMS])
    listed = "\n".join(f"  line {line}: {where}: {said}" for line, where, said in placed)
    more = f"\n  and {len(problems) - MOST_PROBLEMS:,} more" if len(problems) > MOST_PROBLEMS else ""
    return f"{what} has {len(problems):,} problem{'s' * (len(problems) > 1)}:\n{listed}{more}"


def _short_key(key: str | int) -> str:
    text = str(key)
    return text if len(text) <= _LONGEST_KEY else f"{text[:_LONGEST_KEY]}..."


def _validated(data: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, if it can be made at all, and everything wrong with it.

    What is wrong is noted, dropped, and the rest checked again, so that combinations are checked even where some other key is wrong.
    """
    problems: list[Problem] = []
    while True:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            found = [problem for details in error.errors() for problem in _problems(dict(details))]
            noted = {problem.path for problem in problems}  # what was dropped is not missing
            problems += [problem for problem in found if problem.path not in noted]
            dropped = [_drop(data, problem) for problem in found]
            if not any(dropped):
                return None, problems
        else:
            return recipe, problems + list(impossible(recipe))


def _variant_problems(recipe: Recipe, data: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with the variants of a recipe that is right without them."""
    names = [BASE]  # of the recipe itself
    sources = [source.name for source in recipe.sources]
    for index, variant in enumerate(recipe.variants):
        place: KeyPath = ("variants", index)
        if variant.name in names:
            yield Problem((*place, "name"), f"{variant.name!r} is taken: give each variant a name of its own, which is not {BASE!r}")
        names.append(variant.name)
        refused = [key for key in ("executor", "variants") if key in variant.changes]
        for key in refused:
            yield Problem((*place, key), "is the same for all variants: remove it here")
        named = variant.changes.get("sources")
        unknown = [name for name in named if name not in sources] if isinstance(named, list) else []
        for name in unknown:
            yield Problem((*place, "sources"), f"{shown(name)} must be the name of one of the sources: {', '.join(sources)}")
        if not refused and not unknown:
            _, problems = _validated(changed_data(data, variant.changes))
            for problem in problems:
                path = _known_path(variant.changes, problem.path)
                inside = "" if path == problem.path else f"with the keys of this variant, {'.'.join(map(_short_key, problem.path))}: "
                yield Problem((*place, *path), f"{inside}{problem.text}")


def _known_path(changes: Mapping[str, Any], path: KeyPath) -> KeyPath:
    """As much of a path as there is in a variant."""
    found: list[str | int] = []
    node: Any = changes
    for key in path:
        if not isinstance(node, dict) or key not in node:
            break
        node = node[key]
        found.append(key)
    return tuple(found)


def _problems(details: dict[str, Any]) -> list[Problem]:
    error = details.get("ctx", {}).get("error")
    if isinstance(error, WrongKeys):
        return [Problem((*details["loc"], key), text) for key, text in error.problems.items()]
    return [_problem(details)]


def _problem(details: dict[str, Any]) -> Problem:
    path = tuple(details["loc"])
    match details["type"]:
        case "extra_forbidden":
            valid = list(_fields_at(path[:-1]))
            close = difflib.get_close_matches(_short_key(path[-1]), valid, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            return Problem(path, f"unknown key. {hint}Valid are: {', '.join(valid)}", is_unknown=True)
        case "missing":
            return Problem(path, f"is missing: {_fields_at(path[:-1])[str(path[-1])].description or 'a section'}")
        case "value_error":
            return Problem(path, str(details["ctx"]["error"]))
        case _:
            message = details["msg"].removeprefix("Input ")
            return Problem(path, f"{shown(details['input'])} {message if message.startswith('should') else 'is wrong: ' + message}")


def _fields_at(path: KeyPath) -> Mapping[str, Any]:
    """The fields of the section at a path, by name."""
    model: Any = Recipe
    for key in path:
        if isinstance(key, str):
            model = section_of(model, key)
    return model.model_fields


def _drop(data: dict[str, Any], problem: Problem) -> bool:
    """Take what is wrong out of the data. Of a section whose keys do not go together, those stay that other sections are compared with."""
    node: Any = data
    for key in problem.path[:-1]:
        if not holds(node, (key,)):
            return False
        node = node[key]
    if not problem.path or not isinstance(node, dict) or problem.path[-1] not in node:
        return False
    section = node.pop(problem.path[-1])
    if problem.is_unknown or not isinstance(section, dict):
        return True
    node[problem.path[-1]] = {key: section[key] for key in _COMPARED if key in section}
    return node[problem.path[-1]] != section
