"""`fuseline store`: the commands that maintain the workspace."""

from pathlib import Path

import click

from .console import show_findings, show_leftovers, show_repair, show_usage
from .opening import open_pipeline, open_workspace
from .options import RecipeOptions, parts_options, workspace_option
from .terminal import say


@click.group()
def store() -> None:
    """Maintain the workspace: check, repair, clean up."""


@store.command()
@workspace_option
def rebuild(workspace: Path | None) -> None:
    """Make the catalog again from the files on disk.

    Example:  fuseline store rebuild -w workspaces/demo
    """
    from ..store import catalog

    opened = open_workspace(workspace)
    with opened.coordinator():
        catalog.rebuild(opened)
    say(f"Made {opened.catalog_path} again.")


@store.command()
@workspace_option
@click.option("--full", is_flag=True, help="Read everything: checksums of all files, contents of all arrays, texts.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def verify(workspace: Path | None, full: bool, as_json: bool) -> None:
    """List data that is damaged, missing or inconsistent, and how to fix it.

    Changes nothing, and works during a run. The exit code is 1 if there is a problem.

    Example:  fuseline store verify --full -w workspaces/demo
    """
    from ..store.verify import verify

    found = verify(open_workspace(workspace), full=full)
    show_findings(found, as_json=as_json)
    if found.findings:
        raise click.exceptions.Exit(1)


@store.command()
@parts_options
@click.option("--full", is_flag=True, help="Also find damage that only shows if everything is read.")
@click.option("--dry-run", is_flag=True, help="Only show what would be made again.")
def repair(options: RecipeOptions, full: bool, dry_run: bool) -> None:
    """Make only the damaged or missing parts again, with the stages of RECIPE.

    Parts that were never made are left to `fuseline run`. A part whose content changes is reported.

    Example:  fuseline store repair recipes/demo.toml --full
    """
    from ..store.workspace import Workspace

    opened = Workspace.open(options.workspace_folder)
    if dry_run:
        from ..store.verify import verify

        show_findings(verify(opened, full=full), as_json=False)
        return
    from ..pipeline.repair import repair

    with open_pipeline(options, fold=False) as pipeline:
        done = repair(pipeline, full=full)
    show_repair(done)
    if done.left:
        raise click.exceptions.Exit(1)


@store.command()
@workspace_option
@click.option("--delete", is_flag=True, help="Remove the listed files.")
def gc(workspace: Path | None, delete: bool) -> None:
    """List unused files: payloads without a manifest, leftovers of writers that died, tokenizers without a dataset.

    Removes nothing without --delete. Files that changed within the last hour are never listed.

    Example:  fuseline store gc --delete -w workspaces/demo
    """
    from ..store import upkeep

    opened = open_workspace(workspace)
    if not delete:
        show_leftovers(upkeep.leftovers(opened), deleted=False)
        return
    found = upkeep.leftovers(opened)
    with opened.coordinator():
        removed = upkeep.delete(opened, found)
    show_leftovers(removed, deleted=True)


@store.command()
@workspace_option
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def du(workspace: Path | None, as_json: bool) -> None:
    """Show the size of each dataset and of each of its arrays, in total and per token.

    Example:  fuseline store du -w workspaces/demo
    """
    from ..store.upkeep import usage

    show_usage(usage(open_workspace(workspace)), as_json=as_json)
