"""What the command line shows: tables, reports, plans; on a terminal with lines, in a pipe plain."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .store.errors import UsageError

if TYPE_CHECKING:  # what a command needs is imported when it runs, so that --help is quick
    import polars as pl

    from .cluster.repair import Repair
    from .store.status import DatasetStatus, TrainingStatus
    from .store.upkeep import Leftover, Usage
    from .store.verify import Finding, Verification
    from .store.workspace import Workspace


def show_status(datasets: "list[DatasetStatus]", trainings: "list[TrainingStatus]") -> None:
    """How far each dataset and each training is."""
    from .cluster.progress import duration, size

    rows = []
    for item in datasets:
        total = "?" if item.expected_parts is None else item.expected_parts
        rate = f"{item.tokens_per_second:,.0f}" if item.tokens_per_second else ""
        left = duration(item.seconds_left) if item.seconds_left else ""
        tokens = f"{item.tokens:,}" if item.tokens else ""
        rows.append(
            [f"{item.kind}/{item.name}", f"{item.parts}/{total}", tokens, size(item.stored_bytes), rate, left, str(item.left_out or "")]
        )
    show_table(["dataset", "parts", "tokens", "on disk", "tokens/s", "time left", "left out"], rows)
    for training in trainings:
        loss = "" if training.loss is None else f", loss {training.loss:.4f}"
        if training.done:
            state = "done"
        elif training.running:
            state = "running" + ("" if training.seconds_left is None else f", {duration(training.seconds_left)} left")
        else:
            saved = "no checkpoint" if training.last_checkpoint is None else f"the last checkpoint is of step {training.last_checkpoint}"
            state = f"not running, {saved}"
        click.echo(f"training {training.name}: step {training.step}/{training.steps or '?'}{loss}, {state}")


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


def show_findings(found: "Verification", *, as_json: bool) -> None:
    """What is wrong in a workspace, and how much of it was looked at."""
    from .cluster.progress import size

    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=1, default=str))
        return
    for finding in found.findings:
        click.echo(_finding_line(finding))
    what = f"{len(found.findings)} problem{'s' * (len(found.findings) != 1)}" if found.findings else "nothing wrong"
    click.echo(f"{found.datasets} datasets, {found.parts} parts, {size(found.n_bytes)} checked: {what}")


def _finding_line(finding: "Finding") -> str:
    return f"{finding.path}: {finding.problem.removeprefix(f'{finding.path} ')}. {finding.remedy}".rstrip()


def show_repair(done: "Repair") -> None:
    """What a repair made again, and what it could not mend."""
    for kind, name, part in done.made:
        changed = done.different.get((kind, name, part))
        how = f"made again, but not as it was: {', '.join(changed)} differ" if changed else "made again"
        click.echo(f"{kind}/{name} part {part}: {how}")
    for finding in done.left:
        click.echo(f"not mended: {_finding_line(finding)}")
    if not done.made and not done.left:
        click.echo("Nothing to repair.")


def show_leftovers(found: "list[Leftover]", *, deleted: bool) -> None:
    """What nothing refers to."""
    from .cluster.progress import size

    for leftover in found:
        click.echo(f"{leftover.path} ({size(leftover.n_bytes)}): {leftover.why}")
    total = size(sum(leftover.n_bytes for leftover in found))
    if deleted:
        click.echo(f"{len(found)} removed, {total}")
    else:
        click.echo(f"{len(found)} to remove, {total}. " + ("Nothing was changed; to remove it: --delete" if found else "Nothing to do."))


def show_usage(found: "list[Usage]", *, as_json: bool) -> None:
    """What each dataset and each of its arrays takes up."""
    from .cluster.progress import size

    total = sum(item.n_bytes for item in found)
    if as_json:
        click.echo(json.dumps({"datasets": [dataclasses.asdict(item) for item in found], "n_bytes": total}, indent=1))
        return
    rows = []
    for item in found:
        for name, n_bytes in [("", item.n_bytes), *sorted(item.arrays.items(), key=lambda entry: -entry[1])]:
            per_token = f"{n_bytes / item.tokens:.2f}" if item.tokens else ""
            head = f"  {name}" if name else f"{item.kind}/{item.name}"
            rows.append([head, "" if name else str(item.parts), size(n_bytes), per_token])
    show_table(["dataset", "parts", "on disk", "B/token"], [*rows, ["total", "", size(total), ""]])


def show_table(columns: list[str], rows: list[list[str]]) -> None:
    """A table; the first column is aligned left, the others right."""
    import rich.box
    import rich.console
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD if sys.stdout.isatty() else rich.box.ASCII2, highlight=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = rich.console.Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    console.print(table)
