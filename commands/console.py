"""The output of the command line: tables, reports, plans. A terminal gets lines around tables, a pipe plain text."""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..store.errors import UsageError
from ..store.shown import harmless
from .terminal import say

if TYPE_CHECKING:  # a command imports what it needs when it runs, so that --help is fast
    import rich.console
    import rich.table

    from ..align.show import ShownDocument
    from ..pipeline.added_source import AddedSource
    from ..pipeline.recipe import Recipe
    from ..pipeline.repair import Repair
    from ..pipeline.rich_console import Console
    from ..pipeline.wanted import Wanted
    from ..store.sql.database import QueryStats
    from ..store.status import DatasetStatus, TrainingStatus
    from ..store.upkeep import Leftover, Usage
    from ..store.verify import Finding, Verification
    from ..store.workspace import Workspace
    from .options import RecipeOptions


_WATCH_SECONDS = 2.0  # between two reads of the files, on a terminal
_PLAIN_SECONDS = 10.0  # in a pipe


def show_status(workspace: "Workspace") -> None:
    """Show the progress of each dataset and each training."""
    _console().print(_status(workspace))


def show_wanted(recipe: Path, workspace: "Workspace", *, as_json: bool) -> None:
    """Show which products of a recipe are done, missing, or made from different inputs."""
    from ..pipeline.graph import products
    from ..pipeline.recipe_file import load_recipe
    from ..pipeline.wanted import wanted

    found = wanted(products(load_recipe(recipe)), layout=workspace)
    if as_json:
        say(json.dumps({"wanted": [dataclasses.asdict(item) for item in found]}, indent=1))
        return
    _show_states(found)
    if all(item.state == "done" for item in found):
        say("Nothing is missing.")
    elif any(item.state == "different inputs" for item in found):
        say("Give each product with different inputs a new name in the recipe: `fuseline run` suggests a free name. The old one is kept.")
    else:
        say(f"To make what is missing: fuseline run {shlex.quote(str(recipe))} -w {shlex.quote(str(workspace.root))}")


def show_addition(added: "AddedSource", workspace: "Workspace") -> None:
    """Show what an added source needs: which products are there already, and which will be made.

    Raises:
        UsageError: a product of the recipe was made from different inputs.
    """
    from ..pipeline.graph import products
    from ..pipeline.wanted import wanted

    found = wanted(products(added.recipe), layout=workspace)
    _show_states(found)
    others = [f"{item.kind}/{item.name}" for item in found if item.state == "different inputs"]
    if others:
        command = f"fuseline run {shlex.quote(str(added.path))}"
        raise UsageError(
            f"Run the recipe without the new source first: {command}. These were made from different inputs: {', '.join(others)}."
        )
    missing = sum(item.state != "done" for item in found)
    say(f"{len(found) - missing} of {len(found)} are there already. Making the others now.")


def _show_states(found: "Sequence[Wanted]") -> None:
    from ..pipeline.progress import size

    rows, n_variants = [], len({name for item in found for name in item.variants})
    for item in found:
        done = getattr(item.status, "parts", 0)
        total = "?" if item.expected_parts is None else item.expected_parts
        parts = "" if item.kind in {"training", "merge"} else f"{done}/{total}"
        on_disk = size(getattr(item.status, "stored_bytes", 0)) if done else ""
        shared = [_shared(item.variants, of=n_variants)] if n_variants > 1 else []
        rows.append([f"{item.kind}/{item.name}", item.state, parts, on_disk, *shared])
    columns = ["product", "state", "parts", "on disk", *(["for"] if n_variants > 1 else [])]
    show_table(columns, rows, right=[False, False, True, True, False][: len(columns)])
    for item in found:
        for line in item.differences:
            say(f"{item.kind}/{item.name}: {line}")


def _shared(variants: Sequence[str], *, of: int) -> str:
    """The variants of a recipe that need a product."""
    return "all" if len(variants) == of and of > 2 else ", ".join(variants)


def watch_status(workspace: "Workspace") -> None:
    """Show the status repeatedly until Ctrl-C: a table that is updated in place on a terminal, lines with the time in a pipe."""
    import rich.live

    try:
        if not sys.stdout.isatty():
            while True:
                say("\n".join(f"{time.strftime('%H:%M:%S')} {line}" for line in _status_lines(workspace)))
                time.sleep(_PLAIN_SECONDS)
        with rich.live.Live(_status(workspace), console=_console(), auto_refresh=False) as live:
            while True:
                time.sleep(_WATCH_SECONDS)
                live.update(_status(workspace), refresh=True)
    except KeyboardInterrupt:
        return


def _status(workspace: "Workspace") -> "rich.console.Group":
    import rich.console

    from ..pipeline.progress import duration, size
    from ..store.status import dataset_statuses, training_statuses

    rows = []
    for item in dataset_statuses(workspace):
        total = "?" if item.expected_parts is None else item.expected_parts
        rate = f"{item.tokens_per_second:,.0f}" if item.tokens_per_second else ""
        left = duration(item.seconds_left) if item.seconds_left else ""
        tokens = f"{item.tokens:,}" if item.tokens else ""
        parts = [f"{item.parts}/{total}", str(len(item.running_parts) or ""), str(len(item.failed_parts) or "")]
        rows.append(
            [f"{item.kind}/{item.name}", *parts, tokens, size(item.stored_bytes), rate, left, str(item.left_out or ""), _computed(item)]
        )
    columns = ["dataset", "parts", "running", "failed", "tokens", "on disk", "tokens/s", "time left", "left out", "computed in"]
    return rich.console.Group(_table(columns, rows), *map(_training_line, training_statuses(workspace)))


def _computed(item: "DatasetStatus | TrainingStatus") -> str:
    """The number format of the arithmetic, and the threads of a process, if known: `float32, 2 threads`."""
    threads = "" if item.threads is None else f"{item.threads} thread{'s' * (item.threads != 1)}"
    return ", ".join(filter(None, [item.arithmetic, threads]))


def _status_lines(workspace: "Workspace") -> list[str]:
    """A line for each dataset that is not complete and each training that is not done."""
    from ..pipeline.progress import duration
    from ..store.status import dataset_statuses, training_statuses

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
    from ..pipeline.progress import duration

    loss = "" if training.loss is None else f", loss {training.loss:.4f}"
    if training.done:
        state = "done"
    elif training.running:
        state = "running" + ("" if training.seconds_left is None else f", {duration(training.seconds_left)} left")
    else:
        saved = "no checkpoint" if training.last_checkpoint is None else f"last checkpoint at step {training.last_checkpoint}"
        state = f"not running, {saved}"
    computed = f", computed in {_computed(training)}" if training.arithmetic else ""
    return f"training {training.name}: step {training.step}/{training.steps or '?'}{loss}, {state}{computed}"


def show_document(document: "ShownDocument", *, html_file: Path | None, details: bool) -> None:
    """Show a document under two tokenizers, in the terminal or as a page."""
    from ..store.output_file import open_output
    from .alignment_view import page, print_alignment

    if html_file is None:
        print_alignment(document, console=_console(), details=details)
        return
    with open_output(html_file, what="--html") as file:
        file.write(page(document).encode())
    say(f"Wrote {html_file}. Open it in a browser.")


def show_query_stats(stats: "QueryStats") -> None:
    """Show on the error stream what a query read."""
    from ..pipeline.progress import size

    say(f"{stats.seconds * 1e3:,.0f} ms; {stats.chunks:,} chunks, {size(stats.stored_bytes)} of stored arrays read", err=True)
    for scan in stats.scans:
        where = "" if scan.filter is None else f", where {' '.join(scan.filter.split())}"
        say(
            f"  {scan.table}: {scan.parts:,} parts, {scan.segments:,} segments, {scan.rows:,} rows, for {', '.join(scan.columns)}{where}",
            err=True,
        )


def show_plan(recipe: "Recipe", *, options: "RecipeOptions") -> None:
    """Show what a recipe would cost; `options` are the command's."""
    from ..pipeline.graph import products
    from ..pipeline.plan import GPU_FLOPS, UTILISATION, plan
    from ..pipeline.progress import size
    from ..pipeline.sizes import BYTES_PER_TOKEN
    from ..store.layout import Layout

    folder, graph = Layout(options.workspace_folder), products(recipe)
    if options.variant is not None:
        graph = graph.only(options.variant)
    stages = plan(graph, base=options.recipe.parent, models_dir=options.models_dir, layout=folder)
    has_variants = len(graph.recipes) > 1
    rows = [
        [
            item.stage,
            f"{item.parts_done}/{item.parts}",
            f"{item.tokens / 1e6:,.1f}",
            size(item.stored_bytes),
            f"{item.gpu_hours:,.1f}" if item.gpu_hours else "",
            *([_shared(item.variants, of=len(graph.recipes))] if has_variants else []),
        ]
        for item in stages
    ]
    total_hours = sum(item.gpu_hours for item in stages)
    rows.append(["total", "", "", size(sum(item.stored_bytes for item in stages)), f"{total_hours:,.1f}", *([""] if has_variants else [])])
    show_table(["stage", "parts", "tokens (M)", "on disk", "GPU hours", *(["for"] if has_variants else [])], rows)
    say(
        f"Estimated with {BYTES_PER_TOKEN} bytes of text per token and a GPU of {GPU_FLOPS / 1e12:,.0f} TFLOP/s used at {UTILISATION:.0%}. "
        "Nothing was changed."
    )


def show_estimate(options: "RecipeOptions") -> None:
    """Show on the error stream how long the missing products take on this machine. Show nothing if none is missing."""
    from ..pipeline.graph import products
    from ..pipeline.plan import plan, seconds_here
    from ..pipeline.recipe_file import load_recipe
    from ..store.layout import Layout
    from ..store.machine import threads

    stages = plan(
        products(load_recipe(options.recipe)),
        base=options.recipe.parent,
        models_dir=options.models_dir,
        layout=Layout(options.workspace_folder),
    )
    seconds = seconds_here(stages)
    if seconds:
        minutes, n = max(1, round(seconds / 60)), threads()
        text = f"This takes {minutes} to {2 * minutes} minutes here ({n} thread{'s' * (n != 1)})"
        say(f"{text}, without downloads, if nothing else runs on the machine.", err=True)


def show_findings(found: "Verification", *, as_json: bool) -> None:
    """Show what is wrong in a workspace, and how much of it was checked."""
    from ..pipeline.progress import size

    if as_json:
        say(json.dumps(dataclasses.asdict(found), indent=1, default=str))
        return
    for finding in found.findings:
        say(_finding_line(finding))
    what = f"{len(found.findings)} problem{'s' * (len(found.findings) != 1)}" if found.findings else "no problems"
    say(f"{found.datasets} datasets, {found.parts} parts, {size(found.n_bytes)} checked: {what}")


def _finding_line(finding: "Finding") -> str:
    return f"{finding.path}: {finding.problem}. {finding.remedy}".rstrip()


def show_repair(done: "Repair") -> None:
    """Show what a repair made again, and what it could not repair."""
    for kind, name, part in done.made:
        changed = done.different.get((kind, name, part))
        how = f"made again, but different from before: {', '.join(changed)}" if changed else "made again"
        say(f"{kind}/{name} part {part}: {how}")
    for finding in done.left:
        say(f"not repaired: {_finding_line(finding)}")
    if not done.made and not done.left:
        say("Nothing to repair.")


def show_leftovers(found: "list[Leftover]", *, deleted: bool) -> None:
    """Show the files that nothing refers to."""
    from ..pipeline.progress import size

    for leftover in found:
        say(f"{leftover.path} ({size(leftover.n_bytes)}): {leftover.why}")
    total = size(sum(leftover.n_bytes for leftover in found))
    if deleted:
        say(f"{len(found)} removed, {total}")
    else:
        say(f"{len(found)} to remove, {total}. " + ("Nothing was changed. Remove them with --delete." if found else "Nothing to do."))


def show_usage(found: "list[Usage]", *, as_json: bool) -> None:
    """Show the size of each dataset and of each of its arrays."""
    from ..pipeline.progress import size

    total = sum(item.n_bytes for item in found)
    if as_json:
        say(json.dumps({"datasets": [dataclasses.asdict(item) for item in found], "n_bytes": total}, indent=1))
        return
    rows = []
    for item in found:
        for name, n_bytes in [("", item.n_bytes), *sorted(item.arrays.items(), key=lambda entry: -entry[1])]:
            per_token = f"{n_bytes / item.tokens:.2f}" if item.tokens else ""
            head = f"  {name}" if name else f"{item.kind}/{item.name}"
            rows.append([head, "" if name else str(item.parts), size(n_bytes), per_token])
    show_table(["dataset", "parts", "on disk", "B/token"], [*rows, ["total", "", size(total), ""]])


def show_table(columns: list[str], rows: list[list[str]], *, right: Sequence[bool] | None = None) -> None:
    """Show a table. `right` says which columns are right-aligned; by default all but the first."""
    _console().print(_table(columns, rows, right=right))


def _table(columns: list[str], rows: list[list[str]], *, right: Sequence[bool] | None = None) -> "rich.table.Table":
    import rich.box
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD if sys.stdout.isatty() else rich.box.ASCII2, highlight=False)
    for index, column in enumerate(columns):
        is_right = index > 0 if right is None else right[index]
        table.add_column(harmless(column, one_line=True), justify="right" if is_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(harmless(cell, one_line=True) for cell in row))
    return table


def _console() -> "Console":
    from ..pipeline.rich_console import Console

    return Console(sys.stdout, width=None if sys.stdout.isatty() else 200)
