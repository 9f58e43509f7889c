"""What a user sees of corpora as others have them: the exit code, the message with the file and what to do, and what was read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.store.workspace import Workspace

TEXTS = [f"This is document number {number}, which says little." for number in range(12)]
MARK = b"\xef\xbb\xbf"
FIELDS = [text.replace(",", "") for text in TEXTS[:6]] + ["NA", "null", "None", "nan", "n/a", "#N/A"]
KINDS = ["NA", "null", "", "7", "007", "None"] * 2
CSV = "text,kind\n" + "".join(f"{text},{kind}\n" for text, kind in zip(FIELDS, KINDS, strict=True))
RECIPE = """
[corpus]
path = "texts"
context_length = 64
part_bytes = 1024
{corpus}

[target]
name = "target"
model = "tiny-target"

[[sources]]
name = "source"
model = "tiny-source"

[evaluation]
split = "test"
"""


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def files(**contents: str | bytes) -> Callable[[Path], None]:
    """Writes files; `__` in a name stands for a dot, `_of_` for a folder."""

    def write(folder: Path) -> None:
        for name, content in contents.items():
            path = folder / name.replace("_of_", "/").replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def ingest(folder: Path, *, models_dir: Path, corpus: str) -> tuple[int, str]:
    (folder / "recipe.toml").write_text(RECIPE.format(corpus=corpus))
    result = CliRunner().invoke(
        main, ["ingest", "corpus", str(folder / "recipe.toml"), "-w", str(folder / "ws"), "--models", str(models_dir)]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("write", "corpus", "expected"),
    [
        (files(letters__jsonl=lines(TEXTS[:6]), travel_by_train__jsonl=lines(TEXTS[6:])), "held_out_fraction = 0.3", {"all": 12}),
        (files(train__jsonl=lines(TEXTS[:8]), test__jsonl=lines(TEXTS[8:])), "held_out_fraction = 0.3", {"all": 12}),
        (files(A__JSONL=lines(TEXTS[:6]), b__ndjson=lines(TEXTS[6:])), "held_out_fraction = 0.3", {"all": 12}),
        (
            files(a__csv=CSV),
            'held_out_fraction = 0.3\ndomain_column = "kind"',
            {"NA": 2, "null": 2, "": 2, "7": 2, "007": 2, "None": 2},
        ),
        (
            files(a__jsonl=MARK + lines(TEXTS[:6]).encode(), b__jsonl=MARK + lines(TEXTS[6:]).encode()),
            "held_out_fraction = 0.3",
            {"all": 12},
        ),
    ],
    ids=["names like splits", "train and test", "extensions", "csv", "marks"],
)
def test_everything_is_read_as_it_is_written(tmp_path, models_dir, write, corpus, expected):
    write(tmp_path / "texts")
    code, output = ingest(tmp_path, models_dir=models_dir, corpus=corpus)
    assert code == 0, output
    found = Workspace.open(tmp_path / "ws").sql("SELECT domain, count(*) AS n FROM documents GROUP BY ALL")
    assert dict(found.rows()) == expected
    assert "files" in output or "1 file," in output


@pytest.mark.parametrize(
    ("write", "corpus", "code", "messages"),
    [
        (files(a__jsonl=lines(TEXTS) + '{"text": 5}\n'), "", 1, ["a.jsonl, line 13: the text column has type int", "corpus.text_column"]),
        (files(a__jsonl=lines(TEXTS), side__json='{"name": "x"}'), "", 1, ["side.json has no column 'text'; it has: name"]),
        (files(a__jsonl=lines(TEXTS), b__txt="x"), "", 1, ["mixes files of several kinds (json, txt)", "[corpus.splits]"]),
        (files(a__csv="text;kind\nx;y\n"), "", 1, ["a.csv has one column", "Separate them by commas"]),
        (files(a__csv=b"text\n" + "café\n".encode("latin-1")), "", 1, ["a.csv, line 2: the text is not valid UTF-8", "iconv"]),
        (files(a__jsonl=lines(TEXTS).encode("utf-16")), "", 1, ["a.jsonl is in UTF-16, not UTF-8", "iconv"]),
        (
            files(a__jsonl=lines(TEXTS)),
            'splits = {train = "b.jsonl"}',
            1,
            ["corpus.splits.train: 'b.jsonl' matches no data file", "a.jsonl"],
        ),
        (files(a__jsonl=lines(TEXTS)), 'revision = "main"', 2, ["corpus.revision ('main') is only for datasets of the hub", "Remove"]),
        (files(a__jsonl=lines(TEXTS)), 'configuration = "en"', 2, ["corpus.configuration ('en') is only for datasets of the hub"]),
        (
            files(a__jsonl=lines(TEXTS)),
            "",
            2,
            ["evaluation.split ('test') must be one of the corpus's splits (train)", "held_out_fraction"],
        ),
        (files(notes__md="x"), "", 1, ["texts holds no data files", "notes.md (another kind of file)"]),
    ],
)
def test_what_cannot_be_read_gives_one_message_with_the_file_and_what_to_do(tmp_path, models_dir, write, corpus, code, messages):
    write(tmp_path / "texts")
    found, output = ingest(tmp_path, models_dir=models_dir, corpus=corpus)
    assert found == code, output
    for message in messages:
        assert message in output


def test_splits_that_the_recipe_names_and_what_no_split_names(tmp_path, models_dir):
    files(a_of_x__jsonl=lines(TEXTS[:8]), held_out_of_y__jsonl=lines(TEXTS[8:]), notes_of_z__jsonl=lines(["never"]))(tmp_path / "texts")
    code, output = ingest(tmp_path, models_dir=models_dir, corpus='splits = {train = "a", test = ["held_out/*"]}')
    assert code == 0, output
    assert "not read: notes/z.jsonl (in no split)" in output
    found = Workspace.open(tmp_path / "ws").sql("SELECT split, count(*) AS n FROM documents GROUP BY ALL")
    assert dict(found.rows()) == {"train": 8, "test": 4}
    (tmp_path / "texts" / "notes" / "z.jsonl").write_text(lines(["still never"]))
    code, output = ingest(tmp_path, models_dir=models_dir, corpus='splits = {train = "a", test = ["held_out/*"]}')
    assert (code, "nothing to do" in output) == (0, True)
    assert not (tmp_path / "ws" / "corpus" / "corpus" / "texts.arrow").exists()
