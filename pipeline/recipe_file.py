"""Reads a recipe file (TOML), checks it as a whole, and reports problems by line."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..store.errors import UsageError
from ..store.shown import shown
from ..store.toml_text import KeyPath, holds, parse_toml
from ..store.user_text import read_user_text
from .problems import Problem, problems_of, said_of_problems, short_key
from .recipe import BASE, Recipe, changed_data
from .recipe_checks import impossible

_COMPARED = ("name", "path", "model", "revision")  # keys that other sections are compared with, and keys that a section must have


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UsageError: the file cannot be read, or has problems; the text lists all problems with their lines and what is valid.
    """
    return parse_recipe(read_user_text(path, what=f"The recipe {path}"), path=path)


def parse_recipe(text: str, *, path: Path) -> Recipe:
    """Check the text of a recipe; `path` is for the messages.

    Raises:
        UsageError: as in `load_recipe`.
    """
    data = parse_toml(text, what=f"The recipe {path}")
    recipe, problems = _validated(copy.deepcopy(data))
    if recipe is not None and not problems:
        problems = list(_variant_problems(recipe, data))
    if problems or recipe is None:
        raise UsageError(said_of_problems([(each.path, each.text) for each in problems], text=text, what=f"The recipe {path}"))
    return recipe


def _validated(data: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, if it can be built, and all its problems.

    Each wrong key is noted and removed, and the rest is checked again. Combinations are thus checked even if some key is wrong.
    """
    problems: list[Problem] = []
    while True:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            found = problems_of(error, of=Recipe)
            noted = {problem.path for problem in problems}  # a removed key is not missing
            problems += [problem for problem in found if problem.path not in noted]
            dropped = [_drop(data, problem) for problem in found]
            if not any(dropped):
                return None, problems
        else:
            return recipe, problems + list(impossible(recipe))


def _variant_problems(recipe: Recipe, data: dict[str, Any]) -> Iterator[Problem]:
    """Problems of the variants, for a recipe that is valid without them."""
    names = [BASE]  # the recipe itself
    sources = [source.name for source in recipe.sources]
    for index, variant in enumerate(recipe.variants):
        place: KeyPath = ("variants", index)
        if variant.name in names:
            yield Problem((*place, "name"), f"{variant.name!r} is taken: give each variant a unique name other than {BASE!r}")
        names.append(variant.name)
        refused = [key for key in ("executor", "variants") if key in variant.changes]
        for key in refused:
            yield Problem((*place, key), "is the same for all variants: remove it here")
        named = variant.changes.get("sources")
        unknown = [name for name in named if name not in sources] if isinstance(named, list) else []
        for name in unknown:
            yield Problem((*place, "sources"), f"{shown(name)} must be the name of a source: {', '.join(sources)}")
        if not refused and not unknown:
            _, problems = _validated(changed_data(data, variant.changes))
            for problem in problems:
                path = _known_path(variant.changes, problem.path)
                inside = "" if path == problem.path else f"with the keys of this variant, {'.'.join(map(short_key, problem.path))}: "
                yield Problem((*place, *path), f"{inside}{problem.text}")


def _known_path(changes: Mapping[str, Any], path: KeyPath) -> KeyPath:
    """The part of a path that exists in a variant."""
    found: list[str | int] = []
    node: Any = changes
    for key in path:
        if not isinstance(node, dict) or key not in node:
            break
        node = node[key]
        found.append(key)
    return tuple(found)


def _drop(data: dict[str, Any], problem: Problem) -> bool:
    """Remove a problem from the data. If the keys of a section conflict, keep those that other sections are compared with."""
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
