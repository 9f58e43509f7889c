"""Where a corpus comes from: files here, or a dataset in the hub's cache."""

import json
import os
import pickle
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest
from fuseline.ingest.choose import choose_documents
from fuseline.ingest.corpus import CorpusConfig, data_files_of
from fuseline.ingest.data_files import DataFiles, HubFiles, LocalFiles
from fuseline.ingest.digests import snapshot_commit
from fuseline.ingest.hub import cache_unwritable
from fuseline.ingest.rows import Columns
from fuseline.store.errors import DataError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def source_of(path: Path, **keys) -> DataFiles:
    return data_files_of(CorpusConfig(path=str(path), **keys), base=Path("/"))


def texts(source: DataFiles) -> dict[str, list[str]]:
    columns = Columns(required=["text"])
    return {
        split: [text for table in tables for rows in table.rows(columns) for text in rows.columns["text"]]
        for split, tables in source.splits().items()
    }


def jsonl(path: Path, *found: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return path


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """A dataset with two configurations, as the hub's client leaves it in its cache."""
    folder = tmp_path / "hub" / "datasets--owner--data" / "snapshots" / COMMIT
    (folder.parent.parent / "blobs").mkdir(parents=True)
    for name in ("english", "german"):
        (folder / name).mkdir(parents=True)
        pl.DataFrame({"text": [name]}).write_parquet(folder / name / "train.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: english\n  data_files: english/*\n- config_name: german\n  data_files: german/*\n---\n"
    )
    return folder


def test_a_dataset_of_the_hub_has_the_splits_and_configurations_that_its_card_names(snapshot):
    source = source_of(snapshot, configuration="german")
    assert isinstance(source, HubFiles)
    assert texts(source) == {"train": ["german"]}
    assert source.identity() == {"hub": str(snapshot), "commit": COMMIT}


@pytest.mark.parametrize("configuration", [None, "french"])
def test_a_configuration_that_is_missing_is_asked_for_by_the_names_there_are(snapshot, configuration):
    with pytest.raises(DataError, match=r"corpus\.configuration \(.*\) must name one of the configurations of .*: english, german\."):
        source_of(snapshot, configuration=configuration).splits()


@pytest.mark.parametrize(
    "folder",
    ["snapshots/texts", f"snapshots/{COMMIT}", f"datasets--a--b/snapshots/{COMMIT}", "datasets--a--b/snapshots/main", "blobs/" + "0" * 64],
)
def test_folders_that_only_look_like_the_hubs_cache_are_local(tmp_path, folder):
    path = tmp_path / folder
    jsonl(path / "a.jsonl", "one")
    assert snapshot_commit(path) is None
    first = source_of(path)
    assert isinstance(first, LocalFiles)
    before = first.identity()
    jsonl(path / "a.jsonl", "two")
    assert source_of(path).identity() != before


def test_a_card_and_scripts_in_a_local_folder_mean_nothing(tmp_path):
    jsonl(tmp_path / "texts" / "new.jsonl", "new")
    jsonl(tmp_path / "outside.jsonl", "outside")
    jsonl(tmp_path / "texts" / "old" / "old.jsonl", "old")
    (tmp_path / "texts" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../outside.jsonl\n---\n")
    (tmp_path / "texts" / "texts.py").write_text("raise SystemExit('run')")
    (tmp_path / "texts" / "dataset_infos.json").write_text('{"default": {}}')
    source = source_of(tmp_path / "texts")
    assert texts(source) == {"train": ["new", "old"]}
    assert source.identity()["files"].keys() == {"new.jsonl", "old/old.jsonl"}
    assert len(source.left_out) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"revision": "main"}, r"corpus\.revision \('main'\) is only for datasets of the hub.*Remove corpus\.revision"),
        ({"configuration": "x"}, r"corpus\.configuration \('x'\) is only for datasets of the hub"),
        ({"splits": {"train": []}}, r"corpus\.splits\.train names no file"),
        ({"splits": {"train": "b.jsonl"}}, r"corpus\.splits\.train: 'b\.jsonl' matches no data file in .*which holds a\.jsonl"),
        ({"splits": {"train": "../texts/a.jsonl"}}, "matches no data file"),
        ({"splits": {"train": "a.jsonl", "test": ["a*"]}}, r"corpus\.splits: .*a\.jsonl is in train and in test"),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path, keys, message):
    jsonl(tmp_path / "texts" / "a.jsonl", "x")
    with pytest.raises((UsageError, DataError), match=message):
        source_of(tmp_path / "texts", **keys)


def test_a_revision_of_a_snapshot_is_its_commit(snapshot):
    assert source_of(snapshot, configuration="german", revision=COMMIT[:8]).identity()["commit"] == COMMIT
    with pytest.raises(UsageError, match=rf"corpus\.revision \('main'\) must be the commit of .*{COMMIT}"):
        source_of(snapshot, revision="main")


def test_dates_that_python_has_no_place_for_are_an_error_with_the_rows(tmp_path):
    dates = pa.array([-800_000], pa.int32()).cast(pa.date32())
    pyarrow.parquet.write_table(pa.table({"text": ["x"], "day": dates}), tmp_path / "a.parquet")
    (table,) = source_of(tmp_path / "a.parquet").splits()["train"]
    with pytest.raises(DataError, match=r"a\.parquet, rows 0 to 0: a value cannot be read"):
        list(table.rows(Columns(required=["text", "day"], labels=["day"])))


def test_a_column_that_no_row_has_is_named_before_a_row_is_blamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "split": "train"}\n')
    config = CorpusConfig(path=str(path), split_column="splt")
    with pytest.raises(DataError, match=r"a\.jsonl has no column 'splt'; it has: text, split"):
        choose_documents(config, data_files=data_files_of(config, base=tmp_path))


def test_splits_of_a_dataset_of_the_hub_are_its_own(snapshot):
    with pytest.raises(UsageError, match=r"corpus\.splits is only for local files"):
        source_of(snapshot, splits={"train": "english"})


def test_names_that_are_no_text_and_workspaces_in_the_folder(tmp_path):
    name = os.fsdecode(b"caf\xe9.jsonl")
    jsonl(tmp_path / "texts" / name, "x")
    jsonl(tmp_path / "texts" / "workspaces" / "run" / "workspace.json", "a workspace")
    jsonl(tmp_path / "texts" / "workspaces" / "run" / "stored.jsonl", "never")
    source = source_of(tmp_path / "texts")
    assert texts(source) == {"train": ["x"]}
    assert list(source.left_out) == ["workspaces/run (a workspace)"]
    json.dumps(source.identity(), ensure_ascii=False).encode()
    (tmp_path / "texts" / name).write_text("{")
    with pytest.raises(DataError, match=r"caf\\xe9\.jsonl, line 1: is not valid JSON") as error:
        texts(source_of(tmp_path / "texts"))
    str(error.value).encode()


def test_files_in_no_split_are_reported_and_not_part_of_the_identity(tmp_path):
    for name in ("train/a", "held-out/b", "notes/c"):
        jsonl(tmp_path / "texts" / f"{name}.jsonl", name)
    source = source_of(tmp_path / "texts", splits={"train": "train", "test": ["held-*/b.jsonl"]})
    assert texts(source) == {"train": ["train/a"], "test": ["held-out/b"]}
    assert list(source.left_out) == ["notes/c.jsonl (in no split)"]
    assert source.identity()["files"].keys() == {"train/a.jsonl", "held-out/b.jsonl"}


def test_a_link_to_nothing_and_one_in_a_circle(tmp_path):
    jsonl(tmp_path / "texts" / "a.jsonl", "x")
    (tmp_path / "texts" / "again").symlink_to(tmp_path / "texts")
    source = source_of(tmp_path / "texts")
    assert (texts(source), list(source.left_out)) == ({"train": ["x"]}, ["again (a link to a folder above it)"])
    (tmp_path / "texts" / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.jsonl is a link to nowhere, which does not exist"):
        source_of(tmp_path / "texts")


@pytest.mark.parametrize("link", ["secret.txt", "folder", "in/side/secret.txt"])
def test_a_link_out_of_the_corpus_is_refused_and_one_inside_is_followed(tmp_path, link):
    jsonl(tmp_path / "texts" / "in" / "side" / "a.jsonl", "x")
    (tmp_path / "texts" / "b.jsonl").symlink_to("in/side/a.jsonl")
    assert texts(source_of(tmp_path / "texts")) == {"train": ["x", "x"]}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret.txt").write_text("a password")
    (tmp_path / "texts" / link).symlink_to(tmp_path / "home" / ("secret.txt" if link.endswith("txt") else ""))
    with pytest.raises(DataError, match=r"is a link that leads out of \S+/texts, to \S+/home"):
        source_of(tmp_path / "texts")
    (tmp_path / "texts" / link).unlink()
    (tmp_path / "by-name").symlink_to(tmp_path / "texts" / "in")
    assert texts(source_of(tmp_path / "by-name")) == {"train": ["x"]}


def test_a_file_that_changes_while_it_is_read_is_noticed_also_with_its_old_time(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "one")
    os.utime(path, (0, 0))
    source = source_of(path)
    jsonl(path, "two")
    os.utime(path, (0, 0))
    with pytest.raises(DataError, match=r"a\.jsonl changed while the corpus was read"):
        source.identity()
    with pytest.raises(DataError, match=r"a\.jsonl changed while the corpus was read"):
        choose_documents(CorpusConfig(path=str(path)), data_files=source)


def test_sources_travel_to_workers(tmp_path, snapshot):
    for source in (source_of(jsonl(tmp_path / "a.jsonl", "one")), source_of(snapshot, configuration="german")):
        before = texts(source)
        assert texts(pickle.loads(pickle.dumps(source))) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"a\.jsonl, line 2: must be an object .* has type list"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), r"a\.jsonl is in UTF-16, not UTF-8\. Convert"),
        ("a.json", b'[{"text": "x"},\n{"text": "y"}', r"a\.json, line 2: is not valid JSON \(.*, or does not end\)"),
        ("a.json", b"[", r"a\.json is not valid JSON \(its array does not end"),
        ("a.json", b'[{"text": "x"}\n{"text": "y"}]', r"a\.json, line 1: is not valid JSON .* has no comma"),
        ("a.csv", b"text;domain\nx;y\n", r"a\.csv has one column, 'text;domain': .* separated by ';'"),
        ("a.csv", b"text\nx\nx,y\n", r"a\.csv, line 3: has 2 fields, but the header has 1"),
        ("a.csv", b"id,text\n1,x\nline two of it\n", r"a\.csv, line 3: has 1 field, but the header has 2\. Put texts with"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"is a Git LFS pointer"),
        ("a.csv", b'text\nx\n"y\nz\n', r"a\.csv, line 3: is not valid csv"),
        ("a.csv", b"text,text\nx,y\n", r"a\.csv has several columns named 'text'"),
        ("a.csv", b"body\nx\n", r"a\.csv has no column 'text'; it has: body"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz cannot be read: BadGzipFile"),
        ("a.jsonl.xz", b"not xz", r"a\.jsonl\.xz cannot be read: LZMAError"),
        ("a.jsonl.zst", b"not zstd", r"a\.jsonl\.zst cannot be read: "),
        ("a.jsonl.bz2", b"not bzip2", r"a\.jsonl\.bz2 cannot be read: "),
        ("a.parquet", b"not parquet", r"a\.parquet cannot be read: ArrowInvalid"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"a\.txt is a Git LFS pointer.*git lfs pull"),
        ("a.jsonl.tar.gz", b"x", r"a\.jsonl\.tar\.gz is not a data file \(an archive: unpack it\)"),
        ("a.parquet.gz", b"x", r"a\.parquet\.gz is not a data file \(compressed Parquet is not read: decompress it\)"),
    ],
)
def test_what_cannot_be_read_names_the_file_the_place_and_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(source_of(tmp_path / name))


def test_a_cache_that_cannot_be_written_is_named_as_that():
    error = cache_unwritable(PermissionError(13, "Permission denied", "/nowhere/hub"))
    assert "The cache of the Hugging Face hub cannot be written (Permission denied: /nowhere/hub). Set HF_HOME" in str(error)
