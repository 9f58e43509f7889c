"""What the command line shows: tables, reports, plans; on a terminal with lines, in a pipe plain."""

import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .store.errors import UsageError

if TYPE_CHECKING:  # what a command needs is imported when it runs, so that --help is quick
    import polars as pl
    import rich.console
    import rich.table

    from .store.status import TrainingStatus
    from .store.workspace import Workspace


_WATCH_SECONDS = 2.0  # between two looks at the files, on a terminal
_PLAIN_SECONDS = 10.0  # in a pipe


def show_status(workspace: "Workspace") -> None:
    """How far each dataset and each training is."""
    _console().print(_status(workspace))


def watch_status(workspace: "Workspace") -> None:
    """The same, again and again: a table that changes in place on a terminal, lines with the time in a pipe. Ends with Ctrl-C."""
    import rich.live

    try:
        if not sys.stdout.isatty():
            while True:
                click.echo("\n".join(f"{time.strftime('%H:%M:%S')} {line}" for line in _status_lines(workspace)))
                time.sleep(_PLAIN_SECONDS)
        with rich.live.Live(_status(workspace), console=_console(), auto_refresh=False) as live:
            while True:
                time.sleep(_WATCH_SECONDS)
                live.update(_status(workspace), refresh=True)
    except KeyboardInterrupt:
        return


def _status(workspace: "Workspace") -> "rich.console.Group":
    import rich.console

    from .cluster.progress import duration, size
    from .store.status import dataset_statuses, training_statuses

    rows = []
    for item in dataset_statuses(workspace):
        total = "?" if item.expected_parts is None else item.expected_parts
        rate = f"{item.tokens_per_second:,.0f}" if item.tokens_per_second else ""
        left = duration(item.seconds_left) if item.seconds_left else ""
        tokens = f"{item.tokens:,}" if item.tokens else ""
        parts = [f"{item.parts}/{total}", str(len(item.running_parts) or ""), str(len(item.failed_parts) or "")]
        rows.append([f"{item.kind}/{item.name}", *parts, tokens, size(item.stored_bytes), rate, left, str(item.left_out or "")])
    columns = ["dataset", "parts", "running", "failed", "tokens", "on disk", "tokens/s", "time left", "left out"]
    return rich.console.Group(_table(columns, rows), *map(_training_line, training_statuses(workspace)))


def _status_lines(workspace: "Workspace") -> list[str]:
    """A line for each dataset that is not complete and each training that is not done."""
    from .cluster.progress import duration
    from .store.status import dataset_statuses, training_statuses

    lines = []
    for item in dataset_statuses(workspace):
        if item.parts == item.expected_parts:
            continue
        figures = [f"{item.parts}/{'?' if item.expected_parts is None else item.expected_parts} parts"]
        figures += [f"{len(item.running_parts)} running by {item.workers} workers"] if item.workers else []
        figures += [f"{len(item.failed_parts)} failed"] if item.failed_parts else []
        figures += [f"{item.tokens_per_second:,.0f} tokens/s"] if item.tokens_per_second else []
        figures += [f"{duration(item.seconds_left)} left"] if item.seconds_left else []
        lines.append(f"{item.kind}/{item.name}: {', '.join(figures)}")
    lines += [_training_line(training) for training in training_statuses(workspace) if not training.done]
    return lines or ["nothing is missing"]


def _training_line(training: "TrainingStatus") -> str:
    from .cluster.progress import duration

    loss = "" if training.loss is None else f", loss {training.loss:.4f}"
    if training.done:
        state = "done"
    elif training.running:
        state = "running" + ("" if training.seconds_left is None else f", {duration(training.seconds_left)} left")
    else:
        saved = "no checkpoint" if training.last_checkpoint is None else f"the last checkpoint is of step {training.last_checkpoint}"
        state = f"not running, {saved}"
    return f"training {training.name}: step {training.step}/{training.steps or '?'}{loss}, {state}"


def write_result(result: "pl.DataFrame", *, style: str, output: Path | None) -> None:
    """Write a result as csv, json or parquet, to a file or the standard output."""
    match style:
        case "parquet":
            buffer = io.BytesIO()
            result.write_parquet(buffer)
            output.write_bytes(buffer.getvalue())  # type: ignore[union-attr]
        case "json":
            text = result.write_json() + "\n"
            output.write_text(text, encoding="utf-8") if output else click.echo(text, nl=False)
        case _:
            text = result.write_csv()
            output.write_text(text, encoding="utf-8") if output else click.echo(text, nl=False)


def show_plan(recipe: Path, workspace: Path | None, models_dir: Path) -> None:
    """What a recipe would take."""
    from .cluster.plan import BYTES_PER_TOKEN, GPU_FLOPS, UTILISATION, plan
    from .cluster.progress import size
    from .recipe import load_recipe
    from .store.workspace import Workspace

    checked = load_recipe(recipe)
    folder = Workspace(workspace or Path("workspaces") / recipe.stem)
    stages = plan(checked, base=recipe.parent, models_dir=models_dir, workspace=folder)
    rows = [
        [
            item.stage,
            f"{item.parts_done}/{item.parts}",
            f"{item.tokens / 1e6:,.1f}",
            size(item.stored_bytes),
            f"{item.gpu_hours:,.1f}" if item.gpu_hours else "",
        ]
        for item in stages
    ]
    total_hours = sum(item.gpu_hours for item in stages)
    rows.append(["total", "", "", size(sum(item.stored_bytes for item in stages)), f"{total_hours:,.1f}"])
    show_table(["stage", "parts", "tokens (M)", "on disk", "GPU hours"], rows)
    click.echo(
        f"Reckoned with {BYTES_PER_TOKEN} bytes of text per token, and a GPU of {GPU_FLOPS / 1e12:,.0f} TFLOP/s used at {UTILISATION:.0%}. "
        "Nothing was changed."
    )


def show_report(workspace: "Workspace") -> None:
    """The models' results side by side."""
    from .eval.report import evaluations
    from .store import catalog

    with catalog.reading(workspace) as connection:
        found = evaluations(connection)
    if not found:
        raise UsageError("Nothing has been evaluated yet: fuseline eval RECIPE.")
    for evaluation in found:
        text = f"{evaluation.documents:,} document{'s' * (evaluation.documents != 1)} of split {evaluation.split}"
        if evaluation.left_out:
            text += f" ({evaluation.left_out} left out that some model cannot read)"
        for metric, what in (("bpb", "Bits per byte"), ("perplexity", "Perplexity per token")):
            click.echo(f"{what} on {text}, by domain (less is better):")
            columns, rows = evaluation.table(metric)
            show_table(["model", *columns], [[name, *(f"{value:.4f}" for value in values)] for name, values in rows])
    for folder in sorted((workspace.root / "exports").glob("*/config.json")):
        click.echo(f"model {folder.parent.name}: {folder.parent}")


def show_table(columns: list[str], rows: list[list[str]]) -> None:
    """A table; the first column is aligned left, the others right."""
    _console().print(_table(columns, rows))


def _table(columns: list[str], rows: list[list[str]]) -> "rich.table.Table":
    import rich.box
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD if sys.stdout.isatty() else rich.box.ASCII2, highlight=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _console() -> "rich.console.Console":
    import rich.console

    return rich.console.Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
