"""Files of a corpus from a stranger: small files that become large, deep values, long lines. Each ends with a message that names it."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from fuseline.ingest import opened_file
from fuseline.ingest.data_files import HubFiles, open_data_files
from fuseline.ingest.dataset_card import require_named_inside
from fuseline.ingest.formats import column_names, read_rows
from fuseline.ingest.rows import Columns
from fuseline.store.errors import DataError, UsageError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

COLUMNS = Columns(required=("text",), labels=())
N = 60_000


@pytest.fixture
def small(monkeypatch):
    """Limits that a test reaches quickly."""
    monkeypatch.setattr(opened_file, "LEAST_EXPANDED", 1 << 20)
    for module in ("opened_file", "formats", "read_csv"):
        monkeypatch.setattr(f"fuseline.ingest.{module}.LARGEST_TEXT", 1 << 20)


def texts(path: Path) -> list:
    source = open_data_files(str(path), base=path.parent)
    (table,) = source.splits()["train"]
    column_names(table.file)
    return [text for rows in read_rows(table.file, COLUMNS) for text in rows.columns["text"]]


def read_or_refused(path: Path) -> None:
    message = ""
    try:
        texts(path)
    except DataError as error:
        message = str(error)
    assert str(path) in message or not message


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
LINE = json.dumps({"text": "a" * 1000}).encode() + b"\n"


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(("kind", "content"), [("jsonl", LINE * 3000), ("txt", b"a" * 1_040_000), ("csv", b"text\n" + b"a\n" * 1_000_000)])
def test_a_small_file_that_becomes_large_is_refused(tmp_path, monkeypatch, packed, kind, content):
    monkeypatch.setattr(opened_file, "LEAST_EXPANDED", 1 << 19)
    path = tmp_path / f"bomb.{kind}.{packed}"
    path.write_bytes(PACK[packed](content))
    with pytest.raises(DataError, match=rf"bomb\.{kind}\.{packed} .*more than 300 times its size .*FUSELINE_LARGEST_EXPANSION"):
        texts(path)
    monkeypatch.setenv("FUSELINE_LARGEST_EXPANSION", "999999")
    assert texts(path)


def test_what_is_usual_is_read(tmp_path):
    rows = [{"text": os.urandom(50).hex()} for _ in range(2000)]
    for packed, pack in PACK.items():
        path = tmp_path / f"usual.jsonl.{packed}"
        path.write_bytes(pack("\n".join(map(json.dumps, rows)).encode()))
        assert texts(path) == [row["text"] for row in rows]


@pytest.mark.parametrize("value", ["much", "-1", "1.5", "1" * 5000, "٣"])
def test_a_limit_that_is_no_number_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.setattr(opened_file, "LEAST_EXPANDED", 0)
    monkeypatch.setenv("FUSELINE_LARGEST_EXPANSION", value)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINE))
    with pytest.raises(UsageError, match=r"FUSELINE_LARGEST_EXPANSION .* must be a whole number"):
        texts(tmp_path / "a.jsonl.gz")


def test_parquet_that_repeats_one_text_is_counted_as_often(tmp_path, small):
    path = tmp_path / "bomb.parquet"
    indices = pa.array([0] * 100_000, pa.int32())
    pa.parquet.write_table(pa.table({"text": pa.DictionaryArray.from_arrays(indices, pa.array(["a" * 10_000]))}), path)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"bomb.parquet .*more than 300 times its size"):
        texts(path)


READ = """
import resource
import sys
from pathlib import Path
from fuseline.ingest.formats import read_rows
from fuseline.ingest.rows import Columns
from fuseline.ingest.data_files import open_data_files
from fuseline.store.errors import DataError

(table,) = open_data_files(sys.argv[1], base=Path("/")).splits()["train"]
try:
    list(read_rows(table.file, Columns(required=("text",), labels=())))
except DataError as error:
    print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10))
"""


def test_parquet_that_repeats_a_long_text_is_refused_after_few_rows(tmp_path):
    path = tmp_path / "bomb.parquet"
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * 2_000_000]))
    pa.parquet.write_table(pa.table({"text": values}), path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    result = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=120, check=True)
    message, size = result.stdout.splitlines()
    assert "bomb.parquet" in message
    assert "more than 300 times its size" in message
    assert int(size) < 1800  # MiB; the rows would take 2 GB and more


@pytest.mark.parametrize("n_rows", [0, 1, 49, 50, 999, 1000, 1001, 2050])
@pytest.mark.parametrize("group", [7, 1000, 5000])
def test_rows_of_parquet_come_in_order_and_with_their_numbers(tmp_path, n_rows, group):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": pa.array([str(i) for i in range(n_rows)], pa.string())}), path, row_group_size=group)
    (table,) = open_data_files(str(path), base=tmp_path).splits()["train"]
    batches = list(read_rows(table.file, COLUMNS))
    assert [len(rows) for rows in batches] == [1000] * (n_rows // 1000) + [n_rows % 1000] * (n_rows % 1000 > 0)
    assert [(number, text) for rows in batches for number, text in zip(rows.numbers, rows.columns["text"], strict=True)] == [
        (i, str(i)) for i in range(n_rows)
    ]


def test_a_parquet_file_that_declares_too_much_is_refused_before_it_is_read(tmp_path, small):
    path = tmp_path / "bomb.parquet"
    pa.parquet.write_table(pa.table({"text": ["a" * 1_000_000] * 20}), path, use_dictionary=False, compression="zstd")
    with pytest.raises(DataError, match=r"bomb.parquet .*more than 300 times its size"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "' + b"a" * (1 << 20) + b'"}\n', "line 1: must have at most 1 MiB"),
        ("a.jsonl", LINE + b" " * (2 << 20), "line 2: must have at most 1 MiB"),
        ("a.csv", b"text\n" + b"a" * (2 << 20), "is not valid csv"),
        ("a.txt", b"a" * (2 << 20), "must have at most 1 MiB"),
    ],
)
def test_a_long_text_is_refused(tmp_path, small, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        texts(tmp_path / name)


LISTS, OBJECTS = "[" * N + "]" * N, '{"a":' * N + "1" + "}" * N


@pytest.mark.parametrize("deep", [LISTS, OBJECTS, "[" * N, "[" * 501 + "]" * 501])
@pytest.mark.parametrize(
    "place", ["{}", '{{"text": "a", "other": {}}}', '{{"text": {}}}', '[{{"text": "a", "other": {}}}]', '{{"text":\n {}}}']
)
@pytest.mark.parametrize("is_first", [True, False])
def test_deep_json_is_refused(tmp_path, deep, place, is_first):
    first = "" if is_first else '{"text": "sound"}\n'
    (tmp_path / "deep.json").write_text(first + place.format(deep) + "\n")
    with pytest.raises(DataError, match=r"deep\.json, line \d+: (is not valid JSON|must be an object)") as caught:
        texts(tmp_path / "deep.json")
    assert len(str(caught.value)) < 500
    assert "recursion" not in str(caught.value)


@pytest.mark.parametrize("number", ["1" * 10_000, "-" + "9" * 10_000, "[" + "1" * 10_000 + "]"])
def test_long_numbers_are_refused_in_plain_words(tmp_path, number):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": ' + number + "}\n")
    with pytest.raises(DataError, match=r"line 1: is not valid JSON .a number has thousands of digits"):
        texts(tmp_path / "a.jsonl")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "messages", "a"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=80) | st.lists(json_values.map(json.dumps), max_size=4).map("\n".join).map(str.encode),
    kind=st.sampled_from(["json", "jsonl", "csv", "txt", "parquet", "jsonl.gz", "csv.xz", "txt.zst", "json.bz2"]),
    packed=st.booleans(),
    cut=st.integers(0, 30),
)
def test_a_file_of_any_bytes_is_read_or_refused_by_name(tmp_path, content, kind, packed, cut):
    path = tmp_path / f"any.{kind}"
    pack = PACK.get(kind.rpartition(".")[2])
    path.write_bytes(pack(content)[: None if cut > 20 else -cut or None] if pack and packed else content)
    read_or_refused(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_parquet_file_is_read_or_refused_by_name(tmp_path, changes):
    path = tmp_path / "any.parquet"
    pa.parquet.write_table(pa.table({"text": ["one", "two", None], "n": [[1], [], None]}), path)
    raw = bytearray(path.read_bytes())
    for place, value in changes:
        raw[int(place * len(raw))] = value
    path.write_bytes(raw)
    read_or_refused(path)


# ---- datasets of the hub ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data_files",
    [
        "../../../../secret.jsonl",
        "/etc/passwd",
        "https://example.org/a.jsonl",
        "hf://datasets/org/other/a.jsonl",
        "a/../../../../../secret.jsonl",
        ["a.jsonl", "../secret.jsonl"],
        {"train": "../secret.jsonl"},
        {"train": ["file:///etc/passwd"]},
        [{"split": "train", "path": "../../../../secret.jsonl"}],
        [{"split": "train", "path": ["a.jsonl", "zip://a::../secret.zip"]}],
    ],
)
@pytest.mark.parametrize("key", ["data_files", "data_dir"])
def test_a_description_of_a_dataset_names_nothing_outside(tmp_path, data_files, key):
    folder = tmp_path / "hub" / "datasets--org--texts" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "datasets--org--texts" / "blobs").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"text": "PRIVATE"}\n')
    (folder / "a.jsonl").write_text('{"text": "sound"}\n')
    description = json.dumps({"configs": [{"config_name": "default", key: data_files}]})
    (folder / "README.md").write_text(f"---\n{description}\n---\n")
    source = open_data_files(str(folder), base=tmp_path)
    assert isinstance(source, HubFiles)
    with pytest.raises(DataError, match=r"README.md names .* outside"):
        source.splits()
    (folder / "README.md").write_text("---\nconfigs: []\n---\n")
    (folder / ".huggingface.yaml").write_text(description)
    with pytest.raises(DataError, match=r"\.huggingface\.yaml names .* outside"):
        source.splits()


@pytest.mark.parametrize("text", ["configs: [", "a: &a [*a]", "a: 1" + ":59" * 100_000, "[" * 60_000])
def test_a_description_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / ".huggingface.yaml").write_text(text)
    with pytest.raises(DataError, match=r"\.huggingface\.yaml cannot be read: .* Download the dataset again") as caught:
        require_named_inside(tmp_path)
    assert len(str(caught.value)) < 500
