"""`fuseline report`: the models' results side by side, in the terminal, as Markdown for papers, JSON for scripts, or one HTML page."""

import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..store.errors import UsageError
from ..store.shown import harmless
from .console import show_table
from .terminal import say

if TYPE_CHECKING:  # a command imports what it needs when it runs, so that --help is fast
    from ..eval.comparison import Difference
    from ..store.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """One table of a report."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    texts: frozenset[int] = frozenset({0})  # numbers of the columns that hold text; the others are aligned right
    values: list[dict[str, Any]] = field(default_factory=list)  # the rows with exact numbers, for scripts


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is known of the models of a workspace."""

    workspace: str
    tables: list[ReportTable]
    models: dict[str, str]  # folder of each model that was made


def report_of(workspace: "Workspace") -> Report:
    """Collect the results.

    Raises:
        UsageError: no model has been evaluated yet.
    """
    from ..eval.report import compared, evaluations
    from ..store import catalog
    from ..store.trainings import text_only

    exports = {path.parent.name: str(path.parent) for path in sorted((workspace.root / "exports").glob("*/config.json"))}
    tables: list[ReportTable] = []
    with catalog.reading(workspace) as connection:
        found = evaluations(connection)
        if not found:
            raise UsageError("No model has been evaluated yet. Run `fuseline eval RECIPE` first.")
        for evaluation in found:
            text = f"{evaluation.documents:,} document{'s' * (evaluation.documents != 1)} of split {evaluation.split}"
            if evaluation.left_out:
                text += f" ({evaluation.left_out} left out, which some model cannot read)"
            for metric, what in (("bpb", "Bits per byte"), ("perplexity", "Perplexity per token")):
                columns, rows = evaluation.table(metric)
                tables.append(
                    ReportTable(
                        title=f"{what} on {text}, by domain (less is better)",
                        columns=["model", *columns],
                        rows=[[name, *(f"{value:.4f}" for value in values)] for name, values in rows],
                        values=[
                            {
                                "corpus": evaluation.corpus,
                                "split": evaluation.split,
                                "metric": metric,
                                "model": name,
                                "by_domain": dict(zip(columns[:-1], values[:-1], strict=True)),
                                "all": values[-1],
                            }
                            for name, values in rows
                        ],
                    )
                )
        for evaluation in found:
            for baseline in text_only(workspace):
                differences = compared(connection, evaluation=evaluation, baseline=baseline, models=list(exports))
                if differences:
                    tables.append(_difference_table(differences, baseline=baseline, split=evaluation.split))
    return Report(workspace=str(workspace.root), tables=tables, models=exports)


def _difference_table(found: "list[Difference]", *, baseline: str, split: str) -> ReportTable:
    import dataclasses

    documents = f"{found[0].documents:,} documents of split {split}"
    return ReportTable(
        title=f"Difference from {baseline} in bits per byte (below 0 is better), over {documents}",
        columns=["model", "difference", "95 % interval", "result"],
        rows=[[item.model, f"{item.bpb:+.4f}", f"{item.low:+.4f} to {item.high:+.4f}", _result(item)] for item in found],
        texts=frozenset({0, 3}),
        values=[dataclasses.asdict(item) | {"split": split, "result": _result(item)} for item in found],
    )


def _result(difference: "Difference") -> str:
    from ..eval.comparison import LEAST_DOCUMENTS

    if not difference.has_enough:
        return f"too few documents: at least {LEAST_DOCUMENTS} are needed"
    if not difference.is_clear:
        return "not significant: the interval contains 0"
    return "better" if difference.bpb < 0 else "worse"


def show_report(workspace: "Workspace") -> None:
    """Show the models' results side by side in the terminal."""
    report = report_of(workspace)
    for table in report.tables:
        say(f"{table.title}:")
        show_table(table.columns, table.rows, right=[index not in table.texts for index in range(len(table.columns))])
    for name, folder in report.models.items():
        say(f"model {name}: {folder}")


def as_json(report: Report) -> str:
    """The report for scripts: a list of rows for each table, with numbers that are not rounded."""
    tables = [{"title": table.title, "rows": table.values} for table in report.tables]
    return json.dumps({"workspace": report.workspace, "tables": tables, "models": report.models}, indent=1)


def as_markdown(report: Report) -> str:
    """The report for papers: tables of Markdown."""
    lines = []
    for table in report.tables:
        marks = [":--" if index in table.texts else "--:" for index in range(len(table.columns))]
        lines += [f"**{_cell(table.title)}**", "", _row(table.columns), "|" + "|".join(marks) + "|", *map(_row, table.rows), ""]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return harmless(text, one_line=True).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); text-align: right; }
th.text, td.text { text-align: left; }
tr.better td { font-weight: 600; }
code { overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""


def as_html(report: Report) -> str:
    """The report as one page that needs nothing else: no script, no network, readable on a phone and printed."""
    sections = "".join(map(_section, report.tables))
    models = "".join(f"<li>{_text(name)}: <code>{_text(folder)}</code></li>" for name, folder in report.models.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fuseline report: {_text(Path(report.workspace).name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(Path(report.workspace).name)}</h1>\n{sections}<section><h2>Models</h2><ul>{models}</ul></section>\n</body>\n</html>\n"
    )


def _section(table: ReportTable) -> str:
    def cells(tag: str, row: list[str]) -> str:
        kinds = ["text" if index in table.texts else "number" for index in range(len(row))]
        return "".join(f'<{tag} class="{kind}">{_text(cell)}</{tag}>' for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f'<tr class="{"better" if row[-1] == "better" else "row"}">{cells("td", row)}</tr>\n' for row in table.rows)
    head = f"<thead><tr>{cells('th', table.columns)}</tr></thead>"
    return f'<section><h2>{_text(table.title)}</h2><div class="wide"><table>{head}<tbody>\n{body}</tbody></table></div></section>\n'


def _text(text: str) -> str:
    return html.escape(harmless(text, one_line=True))
