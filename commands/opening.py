"""How commands open what they work on: a recipe's pipeline with its workspace, or a workspace alone."""

import functools
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..store.errors import UsageError
from .console import show_addition
from .options import WORKSPACES, RecipeOptions, default_workspace

if TYPE_CHECKING:  # what a command needs is imported when it runs, so that --help is quick
    from collections.abc import Iterator

    from ..pipeline.added_source import AddedSource
    from ..pipeline.pipeline import Pipeline
    from ..store.workspace import Workspace


@contextmanager
def open_pipeline(
    options: RecipeOptions,
    *,
    fold: bool = True,
    makes_parts: bool = True,
    added: "AddedSource | None" = None,
    variant: str | None = None,
) -> "Iterator[Pipeline]":
    """Check the recipe, become the workspace's coordinator, bring its catalog up to date, and hand out the pipeline.

    Args:
        options: of the command.
        fold: whether to bring the catalog up to date.
        makes_parts: an executor that is not available here is then reported at once, before hours are spent on something else.
        added: a source that is written into the recipe when all models were found, can read the corpus, and the target can be trained.
        variant: makes only what this variant of the recipe needs.
    """
    from ..pipeline.recipe_file import load_recipe

    checked = added.recipe if added else load_recipe(options.recipe)

    from ..pipeline.executors.executor import open_executor
    from ..pipeline.pipeline import Pipeline
    from ..pipeline.progress import Progress
    from ..store import durable
    from ..store.workspace import Workspace

    progress = Progress()
    chosen = {name: value for name, value in (("kind", options.executor), ("workers", options.workers)) if value is not None}
    checked = checked.model_copy(update={"executor": checked.executor.model_copy(update=chosen)})
    engine = functools.cache(lambda: open_executor(checked.executor, say=progress.say))
    if makes_parts:
        engine()
    opened = Workspace.create(options.workspace_folder)
    with opened.coordinator():
        pipeline = Pipeline(
            checked,
            base=options.recipe.parent,
            workspace=opened,
            models_dir=options.models_dir,
            progress=progress,
            executor=engine,
            variant=variant,
        )
        if added:
            pipeline.check_models()
            show_addition(added, opened)
            added.save()
        durable.write_bytes(opened.root / "recipe.toml", options.recipe.read_bytes())
        if fold:
            pipeline.fold()
        yield pipeline


def open_workspace(workspace: Path | None) -> "Workspace":
    """The workspace that is named, or the only one in `workspaces/`.

    Raises:
        UsageError: it is not there, or there is no one such.
    """
    from ..store.workspace import Workspace

    if workspace is None:
        found = sorted(path.parent for path in WORKSPACES.glob("*/workspace.json"))
        if len(found) != 1:
            if not found:
                raise UsageError("There is no workspace in workspaces/. Make one with `fuseline run RECIPE`, or name one with --workspace.")
            names = ", ".join(map(str, found))
            raise UsageError(f"Say which workspace with --workspace (or FUSELINE_WORKSPACE); in workspaces/ there are: {names}.")
        (workspace,) = found
    return Workspace.open(workspace)


def workspace_of(recipe: Path | None) -> Path | None:
    """The workspace that a recipe has unless another one is named, if it is there."""
    folder = default_workspace(recipe) if recipe else None
    return folder if folder and (folder / "workspace.json").exists() else None
