"""The report in its three written forms; names in it may be a stranger's."""

import json
from html.parser import HTMLParser

from fuseline.commands.report import Report, ReportTable, as_html, as_json, as_markdown

HOSTILE = '<script>alert(1)</script>|\x1b[2J"'
REPORT = Report(
    workspace="w",
    tables=[
        ReportTable(
            title="Bits per byte on 12 documents of split test",
            columns=["model", "law", HOSTILE, "all"],
            rows=[["start", "1.0000", "2.0000", "1.5000"], [HOSTILE, "0.9000", "1.9000", "1.4000"]],
            values=[{"model": "start", "all": 1.5}, {"model": HOSTILE, "all": 1.4}],
        ),
        ReportTable(
            title="Difference", columns=["model", "difference", "result"], rows=[["fused", "-0.1000", "better"]], texts=frozenset({0, 2})
        ),
    ],
    models={"fused": "w/exports/fused"},
)


class Cells(HTMLParser):
    """The text of each cell, by row, and the names of all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th") and self.rows and data.strip():
            self.rows[-1].append(data)


def test_the_page_holds_every_cell_and_runs_nothing():
    page = as_html(REPORT)
    cells = Cells()
    cells.feed(page)
    assert [row[0] for row in cells.rows] == ["model", "start", cells.rows[2][0], "model", "fused"]
    assert [len(row) for row in cells.rows] == [4, 4, 4, 3, 3]
    assert "script" not in cells.tags
    assert "\x1b" not in page
    assert "default-src 'none'" in page
    assert '<tr class="better">' in page


def test_the_tables_of_markdown_have_as_many_cells_as_columns():
    lines = [line for line in as_markdown(REPORT).splitlines() if line.startswith("|")]
    assert lines[1] == "|:--|--:|--:|--:|"
    assert [len(line.replace("\\|", "").split("|")) for line in lines] == [6, 6, 6, 6, 5, 5, 5]
    assert "<script>" not in as_markdown(REPORT)


def test_scripts_get_exact_numbers():
    read = json.loads(as_json(REPORT))
    assert read["tables"][0]["rows"][1] == {"model": HOSTILE, "all": 1.4}
    assert read["models"] == REPORT.models
