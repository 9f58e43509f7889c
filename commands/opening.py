"""Opens what a command works on: a recipe's pipeline with its workspace, or only a workspace."""

import functools
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..store.errors import UsageError
from .console import show_addition
from .options import WORKSPACES, RecipeOptions

if TYPE_CHECKING:  # a command imports what it needs when it runs, so that --help is fast
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
) -> "Iterator[Pipeline]":
    """Check the recipe, become the workspace's coordinator, update its catalog, and yield the pipeline.

    Args:
        options: the command's options.
        fold: whether to update the catalog.
        makes_parts: if true, an executor that is not available is reported at once, before hours of other work.
        added: a source; it is written into the recipe after checks that all models exist and can read the corpus, and the target can train.
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
            variant=options.variant,
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
    """Open the named workspace, or the only one in `workspaces/`.

    Raises:
        UsageError: it does not exist; or none is named, and `workspaces/` does not have exactly one.
    """
    from ..store.workspace import Workspace

    if workspace is None:
        found = sorted(path.parent for path in WORKSPACES.glob("*/workspace.json"))
        if len(found) != 1:
            if not found:
                raise UsageError("Make a workspace with `fuseline run RECIPE`, or name one with --workspace. There is none in workspaces/.")
            names = ", ".join(map(str, found))
            raise UsageError(f"Choose a workspace with --workspace (or FUSELINE_WORKSPACE). workspaces/ has: {names}.")
        (workspace,) = found
    return Workspace.open(workspace)
