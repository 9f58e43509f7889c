"""Adds a source to a recipe file: one more `[[sources]]` table at its end. No existing byte changes."""

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ..ingest.model_config import ModelConfig
from ..store import durable
from ..store.errors import UsageError
from ..store.paths import expanded
from ..store.toml_text import parse_toml
from ..store.user_text import decode_user_text
from .problems import problems_of
from .recipe import Recipe
from .recipe_file import load_recipe, parse_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedSource:
    """A recipe with one more source. It is not written yet."""

    path: Path  # the recipe file
    recipe: Recipe  # includes the new source
    before: bytes
    after: bytes

    def save(self) -> None:
        """Write the recipe in one step. If the path is a link, its target is replaced.

        Raises:
            UsageError: the recipe has changed since it was read.
        """
        path = self.path.resolve()
        if path.read_bytes() != self.before:
            raise UsageError(f"Run the same command again: the recipe {self.path} has changed since it was read.")
        with durable.temporary(path) as temporary:
            temporary.write_bytes(self.after)
            shutil.copymode(path, temporary)
            durable.publish(temporary, to=path)


def add_source(
    path: Path, *, name: str, model: str, revision: str | None = None, dtype: str | None = None, chat_template: str | None = None
) -> AddedSource:
    """A recipe with one more source, checked as a whole. The path of a model's folder becomes relative to the recipe.

    Args:
        path: the recipe; it must have [merge].
        name: name of the source in the workspace.
        model: id on the hub, or a folder relative to the working directory.
        revision: revision of a hub model.
        dtype: number format of the forward passes.
        chat_template: template for conversations: `shared` or `own`.

    Raises:
        UsageError: the recipe is wrong or has no [merge], or the source cannot be added.
    """
    recipe = load_recipe(path)
    if recipe.merge is None:
        raise UsageError(
            f"{path} has no [merge]: it fuses all sources at once, so a new source changes the targets and the trained model. "
            "Add [merge] to fuse each source alone, or write the source into the recipe with new names in [fusion] and [training]."
        )
    taken = [each.name for each in recipe.models] + recipe.made_models
    if name in taken:
        command = f"fuseline run {shlex.quote(str(path))}"
        raise UsageError(
            f"--name ({name}) must be a new name; the recipe already has: {', '.join(taken)}. To continue an addition: {command}."
        )
    given = {"name": name, "model": _from_recipe(model, path=path), "revision": revision, "dtype": dtype, "chat_template": chat_template}
    entry = {key: value for key, value in given.items() if value is not None}
    try:
        ModelConfig.model_validate(entry)
    except ValidationError as error:
        problem = problems_of(error, of=ModelConfig)[0]
        raise UsageError(f"--{problem.path[0]}: {problem.text}.") from error
    before = path.read_bytes()
    after = _with_table(before, entry)
    return AddedSource(path=path, recipe=_checked(after, entry=entry, before=before, path=path), before=before, after=after)


def _from_recipe(model: str, *, path: Path) -> str:
    """The name in the recipe of a model that is given relative to the working directory."""
    folder = expanded(model)
    if not folder.is_dir():
        return model
    return str(folder) if folder.is_absolute() else Path(os.path.relpath(folder, path.parent)).as_posix()


def _with_table(before: bytes, entry: dict[str, str]) -> bytes:
    end = b"\r\n" if b"\r\n" in before else b"\n"
    lines = ["[[sources]]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in entry.items())]
    gap = b"" if before.endswith(end) else end
    return before + gap + end + b"".join(line.encode() + end for line in lines)


def _checked(after: bytes, *, entry: dict[str, str], before: bytes, path: Path) -> Recipe:
    was, text = (decode_user_text(data, what=f"The recipe {path}") for data in (before, after))
    stored = parse_toml(was, what=f"The recipe {path}")
    try:
        now = parse_toml(text, what="With the table, the file")
    except UsageError as error:
        raise UsageError(
            f"Write the sources of {path} as [[sources]] tables, and run the command again. No table can be added to it now ({error})"
        ) from error
    assert now == stored | {"sources": [*stored["sources"], entry]}
    try:
        return parse_recipe(text, path=path)
    except UsageError as error:
        raise UsageError(f"The source {entry['name']} cannot be added. {error}") from error
