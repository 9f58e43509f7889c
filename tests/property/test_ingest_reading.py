"""Files of a corpus against a plain reading of the same folder: any names and layouts, any csv, any JSON."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tempfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from fuseline.ingest.choose import choose_documents
from fuseline.ingest.corpus import CorpusConfig, data_files_of
from fuseline.ingest.data_files import DataFiles
from fuseline.ingest.rows import Columns
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=60, deadline=None)
NAMES = st.text(alphabet="ab.[]{}*?!$'\" ~%:#&|;\\-_\n漢é😀", min_size=1, max_size=10).filter(lambda name: name not in {".", ".."})
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
ENDINGS = st.sampled_from([".jsonl", ".ndjson", ".JSONL", ".json", ".Jsonl", ".md", "", ".jsonl.txt2", ".parquet.bak"])
COMPRESSIONS = st.sampled_from(["", ".gz", ".bz2", ".xz", ".zst", ".GZ"])


def compressed(data: bytes, ending: str) -> bytes:
    match ending.lower():
        case ".gz":
            return gzip.compress(data)
        case ".bz2":
            return bz2.compress(data)
        case ".xz":
            return lzma.compress(data)
        case ".zst":
            return pa.Codec("zstd").compress(data, asbytes=True)
    return data


def source_of(path: Path, **keys) -> DataFiles:
    return data_files_of(CorpusConfig(path=str(path), **keys), base=Path("/"))


def read(source: DataFiles, *columns: str, labels: tuple[str, ...] = ()) -> list[tuple]:
    """The values of some columns of all rows, in order."""
    rows = []
    for tables in source.splits().values():
        for table in tables:
            for batch in table.rows(Columns(required=columns, labels=labels)):
                values = [batch.labels(column) if column in labels else batch.columns[column] for column in columns]
                rows += zip(*values, strict=True)
    return rows


def listed_plainly(folder: Path) -> list[Path]:
    """The data files of a folder, hidden ones left out, in the order of the parts of their paths."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent) / name for name in names if not name.startswith(".") and is_data(name)]
    return sorted(found)


def is_data(name: str) -> bool:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes[-1:] and suffixes[-1] in {".gz", ".bz2", ".xz", ".zst"}:
        suffixes = suffixes[:-1]
    return suffixes[-1:] and suffixes[-1] in {".jsonl", ".ndjson", ".json"}


@FEW
@given(
    files=st.lists(st.tuples(st.lists(NAMES, max_size=2), NAMES, ENDINGS, COMPRESSIONS, st.lists(TEXTS, max_size=3)), max_size=6),
    root=NAMES,
)
@example(files=[([], "travel-by-train", ".jsonl", "", ["a"]), ([], "test", ".jsonl", "", ["b"])], root="snapshots")
@example(files=[(["test"], "a[1]", ".jsonl", "", ["a"]), (["test"], "a1", ".jsonl", "", ["b"])], root="x::y")
@example(files=[(["a"], "x", ".jsonl", "", ["in the folder"]), ([], "a", ".jsonl", "", ["beside it"])], root="order")
def test_any_folder_is_read_as_a_plain_reading_has_it(files, root):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / root
        folder.mkdir()
        for folders, name, ending, compression, texts in files:
            parent = folder.joinpath(*folders)
            path = parent / f"{name}{ending}{compression}"
            try:
                parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(compressed("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), compression))
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                assume(False)  # a file has a folder's name
        expected = []
        for path in listed_plainly(folder):
            opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
            data = pa.input_stream(str(path), compression="zstd") if path.suffix == ".zst" else opened(path, "rb")
            with data as file:
                expected += [(json.loads(line)["text"],) for line in file.read().decode().splitlines()]
        if not listed_plainly(folder):
            return
        source = source_of(folder)
        assert read(source, "text") == expected
        names = {path.relative_to(folder).as_posix() for path in listed_plainly(folder)}
        assert set(source.identity()["files"]) == names
        left_out = [entry for entry in source.left_out if "(hidden)" not in entry]
        assert len(left_out) == sum(len(names) for _, _, names in visible(folder)) - len(names)


def visible(folder: Path):
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield parent, folders, [name for name in names if not name.startswith(".")]


FIELDS = st.text(alphabet=st.one_of(st.sampled_from(",;\"'\r\n \t\ufeff\0"), st.characters(exclude_categories=["Cs"])), max_size=12)


@FEW
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), max_size=8),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.booleans(),
    columns=st.permutations(["text", "domain"]),
)
@example(
    rows=[("null", "NA"), ("NA", "null"), ("None", ""), ("", "None"), ("1.0", "007")],
    quoting=0,
    end="\n",
    mark=True,
    columns=["text", "domain"],
)
def test_any_csv_is_read_as_python_reads_it(tmp_path_factory, rows, quoting, end, mark, columns):
    written = io.StringIO(newline="")
    csv.writer(written, quoting=quoting, lineterminator=end).writerows([columns, *rows])
    records = list(csv.reader(io.StringIO(written.getvalue(), newline="")))
    assume(all(len(record) in (0, 2) for record in records))  # csv's writer does not quote every line end
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" * mark + written.getvalue().encode())
    expected = [(row["text"] or None, row["domain"] or "") for row in csv.DictReader(io.StringIO(written.getvalue(), newline=""))]
    assert read(source_of(path), "text", "domain", labels=("domain",)) == expected


NUMBERS = st.from_regex(r"-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,6})?([eE][+-]?[0-9]{1,2})?", fullmatch=True)


@FEW
@given(
    rows=st.lists(
        st.tuples(TEXTS, st.one_of(st.none(), TEXTS, NUMBERS.map(lambda text: ("number", text)), st.booleans())), min_size=1, max_size=6
    ),
    layout=st.sampled_from(["lines", "array", "indented array", "objects"]),
    mark=st.booleans(),
    extra=st.lists(
        st.recursive(
            st.none() | st.integers() | TEXTS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2)
        ),
        max_size=6,
    ),
)
def test_any_json_keeps_texts_and_the_spelling_of_labels(tmp_path_factory, rows, layout, mark, extra):
    spelled = []
    for index, (text, label) in enumerate(rows):
        value = label[1] if isinstance(label, tuple) else json.dumps(label)
        other = json.dumps(extra[index] if index < len(extra) else None)  # of another type in each row
        gap = "\n  " if layout in {"indented array", "objects"} else " "
        spelled.append(f'{{"type": {other},{gap}"text": {json.dumps(text)},{gap}"domain": {value}}}')
    joined = "[\n" + ",\n".join(spelled) + "\n]\n" if "array" in layout else "\n".join(spelled)
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" * mark + joined.encode())
    labels = [label[1] if isinstance(label, tuple) else {None: "", True: "true", False: "false"}.get(label, label) for _, label in rows]
    assert read(source_of(path), "text", "domain", labels=("domain",)) == list(zip([text for text, _ in rows], labels, strict=True))


@FEW
@given(
    rows=st.lists(st.tuples(st.none() | TEXTS, st.none() | st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=8), strings=st.booleans()
)
def test_any_parquet_keeps_its_values(tmp_path_factory, rows, strings):
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    numbers = pl.Series("domain", [number for _, number in rows], dtype=pl.Int64)
    table = pl.DataFrame(
        {"other": [{"x": [1]}] * len(rows), "text": pl.Series([text for text, _ in rows], dtype=pl.String), "domain": numbers}
    )
    table = table.with_columns(pl.col("text").cast(pl.Categorical)) if strings else table
    with path.open("wb") as file:
        table.write_parquet(file)
    expected = [(text, "" if number is None else str(number)) for text, number in rows]
    assert read(source_of(path), "text", "domain", labels=("domain",)) == expected


@settings(max_examples=25, deadline=None)
@given(entries=st.dictionaries(st.sampled_from(["train", "test", "dev"]), st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1))
def test_splits_are_what_the_recipe_names(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("splits")
    names = [f"{parent}/file-{number}.jsonl" for parent in ("train", "a") for number in range(3)]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    chosen = {split: [names[index] for index in indices] for split, indices in entries.items()}
    owners = [name for files in chosen.values() for name in set(files)]
    config = CorpusConfig(path=str(folder), splits=chosen)
    if len(owners) != len(set(owners)):
        with pytest.raises(ValueError, match=r"corpus\.splits: .* is in .* and in "):
            data_files_of(config, base=folder)
        return
    documents = choose_documents(config, data_files=data_files_of(config, base=folder)).documents
    assert dict(documents.group_by("split").len().rows()) == {split: len(set(files)) for split, files in chosen.items()}
