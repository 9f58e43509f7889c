"""Corpora in the layouts in which they come, to the byte."""

import csv
import gzip
import hashlib
import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest
from fuseline.ingest.choose import ChosenDocuments, choose_documents
from fuseline.ingest.corpus import CorpusConfig, CorpusPlan, CorpusStage, corpus_identity, data_files_of
from fuseline.ingest.data_files import DataFiles
from fuseline.ingest.rows import Columns
from fuseline.store.dataset import Dataset
from fuseline.store.errors import DataError
from fuseline.store.tokenizer import Tokenizer


def config(**choices) -> CorpusConfig:
    return CorpusConfig(**{"path": "corpus"} | choices)


def source_of(path: Path, **choices) -> DataFiles:
    return data_files_of(config(path=str(path), **choices), base=Path("/"))


def parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(columns).write_parquet(path)
    return path


def jsonl(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chosen_from(path: Path, **choices) -> ChosenDocuments:
    return choose_documents(config(**choices), data_files=source_of(path, **choices))


def texts_by_split(path: Path, chosen: ChosenDocuments, **choices) -> dict[str, list[str]]:
    """The texts of the chosen documents, found again by their row, sorted."""
    read = {
        split: [text for table in tables for rows in table.rows(Columns(required=["text"])) for text in rows.columns["text"]]
        for split, tables in source_of(path, **choices).splits().items()
    }
    found: dict[str, list[str]] = {}
    for row in chosen.documents.iter_rows(named=True):
        found.setdefault(row["split"], []).append(read[row["source_split"]][row["row"]])
    return {split: sorted(texts) for split, texts in found.items()}


MINIPILE = {split: f"data/{split}-*" for split in ("train", "validation", "test")}


@pytest.fixture
def minipile(tmp_path) -> Path:
    """The layout of MiniPile and of most datasets of the hub."""
    folder = tmp_path / "minipile"
    parquet(folder / "data" / "train-00000-of-00002-0a1b.parquet", text=[f"train {i}" for i in range(40)] + ["in all", "in two"])
    parquet(folder / "data" / "train-00001-of-00002-2c3d.parquet", text=[f"more {i}" for i in range(40)] + ["in all", "   "])
    parquet(folder / "data" / "validation-00000-of-00001-4e5f.parquet", text=["validation 0", "in all", "validation 0"])
    parquet(folder / "data" / "test-00000-of-00001-6a7b.parquet", text=["test 0", "in all", "in two", ""])
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA corpus.\n")
    return folder


def test_minipile_with_duplicates_kept_on_the_held_out_side(minipile):
    chosen = chosen_from(minipile, splits=MINIPILE)
    texts = texts_by_split(minipile, chosen, splits=MINIPILE)
    assert texts["train"] == sorted([*(f"train {i}" for i in range(40)), *(f"more {i}" for i in range(40))])
    assert sorted(texts["test"] + texts["validation"]) == ["in all", "in two", "test 0", "validation 0"]
    assert "in two" in texts["test"]
    assert (chosen.n_duplicates, chosen.n_empty) == (5, 2)
    by_hash = dict(zip(chosen.documents["sha256"], chosen.documents["n_bytes"], strict=True))
    assert by_hash[hashlib.sha256(b"validation 0").hexdigest()] == 12
    assert chosen.documents["doc_id"].to_list() == list(range(84))


def test_duplicates_can_be_kept(minipile):
    chosen = chosen_from(minipile, keep_duplicates=True, splits=MINIPILE)
    texts = texts_by_split(minipile, chosen, splits=MINIPILE)
    assert {split: len(found) for split, found in texts.items()} == {"train": 83, "validation": 3, "test": 3}
    assert (chosen.n_duplicates, chosen.n_empty) == (0, 2)


def test_parts_hold_one_split_each_and_are_filled_in_order(minipile):
    chosen = chosen_from(minipile, part_bytes=1024, keep_duplicates=True, splits=MINIPILE)
    parts = chosen.documents.group_by("part", maintain_order=True).agg(pl.col("split").unique(), pl.col("n_bytes"))
    assert parts["part"].to_list() == list(range(len(parts)))
    assert all(len(splits) == 1 for splits in parts["split"])
    assert [splits[0] for splits in parts["split"]] == ["train", "test", "validation"]
    small = choose_documents(
        config().model_copy(update={"part_bytes": 50}), data_files=source_of(minipile, splits=MINIPILE)
    ).documents  # a part is closed as soon as it has that much
    for (split,), documents in small.group_by("split"):
        filled = [part["n_bytes"].to_list() for _, part in documents.group_by("part", maintain_order=True)]
        assert all(sum(sizes) >= 50 for sizes in filled[:-1]), split
        assert all(sum(sizes[:-1]) < 50 for sizes in filled), split


def test_the_order_is_random_seeded_and_the_same_again(minipile):
    orders = [
        chosen_from(minipile, seed=seed, splits=MINIPILE).documents.filter(pl.col("split") == "train")["row"].to_list()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == sorted(orders[2])


def test_a_cut_at_max_train_bytes_takes_a_beginning_of_the_order_of_train_alone(minipile):
    everything = chosen_from(minipile, splits=MINIPILE).documents
    cut = chosen_from(minipile, max_train_bytes=100, splits=MINIPILE).documents
    train, held_out = cut.filter(pl.col("split") == "train"), cut.filter(pl.col("split") != "train")
    assert train["sha256"].to_list() == everything["sha256"].to_list()[: len(train)]
    assert train["n_bytes"].sum() >= 100 > train["n_bytes"].sum() - train["n_bytes"][-1]
    assert len(held_out) == 4


def test_the_held_out_share_goes_by_the_text_and_not_by_its_place(tmp_path):
    texts = [f"document {i}" for i in range(2000)]
    forward = jsonl(tmp_path / "forward.jsonl", *({"text": text} for text in texts))
    backward = jsonl(tmp_path / "backward.jsonl", *({"text": text} for text in reversed(texts[:1000])))
    held_out = {}
    for source in (forward, backward):
        chosen = chosen_from(source, held_out_fraction=0.1)
        held_out[source] = set(texts_by_split(source, chosen)["test"])
    assert held_out[backward] == held_out[forward] & set(texts[:1000])
    assert 150 < len(held_out[forward]) < 250
    more = set(texts_by_split(forward, chosen_from(forward, held_out_fraction=0.2))["test"])
    assert held_out[forward] < more
    for text in held_out[forward]:
        assert int(hashlib.sha256(text.encode()).hexdigest(), 16) < 0.1 * 2**256
    assert texts_by_split(forward, chosen_from(forward)).keys() == {"train"}


def test_held_out_and_split_column_exclude_each_other():
    with pytest.raises(ValueError, match="split_column"):
        config(held_out_fraction=0.1, split_column="split")


def test_a_split_and_a_domain_column(tmp_path):
    source = jsonl(
        tmp_path / "all.jsonl",
        {"text": "a", "kind": "train", "origin": "web"},
        {"text": "b", "kind": "dev", "origin": "books"},
        {"text": "b", "kind": "train", "origin": "web"},
    )
    chosen = chosen_from(source, split_column="kind", domain_column="origin")
    assert chosen.documents.select("split", "domain", "row").rows() == [("train", "web", 0), ("dev", "books", 1)]
    assert chosen.n_duplicates == 1


def test_a_document_without_a_split_is_reported(tmp_path):
    source = jsonl(tmp_path / "all.jsonl", {"text": "a", "kind": "train"}, {"text": "b", "kind": None})
    with pytest.raises(DataError, match=r"all\.jsonl, line 2: kind names no split"):
        chosen_from(source, split_column="kind")


EXACT = [
    "one\r\ntwo\n\n\nthree\rfour \t\n",
    "\ufeffbyte order mark",
    "nul \0 é 漢字 👩‍👩‍👧‍👦 \u2028\x85\u00a0",
    " leading",
    "trailing \n",
    "</s>",
    "x" * 100_000,
]


@pytest.mark.parametrize("layout", ["txt", "jsonl", "jsonl.gz", "json", "parquet", "csv"])
def test_documents_are_exactly_those_of_the_files(tmp_path, sentencepiece_folder, layout):
    folder = tmp_path / "corpus"
    folder.mkdir()
    if layout == "txt":
        for index, text in enumerate(EXACT):
            (folder / f"{index}.txt").write_bytes(text.encode())
    elif layout == "jsonl":
        jsonl(folder / "a.jsonl", *({"text": text} for text in EXACT))
    elif layout == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in EXACT).encode()))
    elif layout == "json":
        (folder / "a.json").write_text(json.dumps([{"text": text} for text in EXACT]))
    elif layout == "csv":
        with (folder / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in EXACT)])
    else:
        parquet(folder / "a.parquet", text=EXACT)
    Tokenizer.from_model_folder(sentencepiece_folder).save(tmp_path / "tokenizer")
    stage = corpus_stage(tmp_path, folder, part_bytes=1024, context_length=64)
    documents: dict[int, str] = {}
    segments = 0
    for part in stage.parts():
        content = stage.compute(part)
        table = content.data
        assert table.columns == ["doc_id", "segment", "domain", "split", "sha256", "text"]
        assert table.sort("doc_id", "segment").equals(table)
        for (doc_id,), rows in table.group_by("doc_id"):
            assert rows["segment"].to_list() == list(range(len(rows)))
            documents[doc_id] = "".join(rows["text"])
            assert set(rows["sha256"]) == {hashlib.sha256(documents[doc_id].encode()).hexdigest()}
        assert content.counts["segments"] == len(table)
        assert content.counts["text_bytes"] == sum(len(text.encode()) for text in table["text"])
        segments += len(table)
    exact = [text.removeprefix("\ufeff") for text in EXACT] if layout == "txt" else EXACT
    assert sorted(documents.values()) == sorted(exact)
    assert segments > len(EXACT)


def corpus_stage(tmp_path: Path, source: Path, **choices) -> CorpusStage:
    tokenizers = [tmp_path / "tokenizer"]
    found = source_of(source, **choices)
    identity = corpus_identity(config(**choices), data_files=found, tokenizers=[Tokenizer.load(folder) for folder in tokenizers])
    dataset = Dataset.create(tmp_path / "workspace" / "corpus" / "corpus", identity=identity)
    return CorpusStage(dataset, config=config(**choices), data_files=found, tokenizer_folders=tokenizers)


def test_the_plan_is_made_once_and_read_again(tmp_path, minipile, byte_level_folder):
    Tokenizer.from_model_folder(byte_level_folder).save(tmp_path / "tokenizer")
    stage = corpus_stage(tmp_path, minipile, part_bytes=1024, splits=MINIPILE)
    assert CorpusPlan.load(stage.dataset) is None
    plan = stage.plan
    again = CorpusPlan.load(stage.dataset)
    assert again.documents.equals(plan.documents)
    assert {name: again.summary[name] for name in plan.summary} == plan.summary
    assert {name: plan.summary[name] for name in ("documents", "duplicates", "empty")} == {"documents": 84, "duplicates": 5, "empty": 2}
    assert [part["split"] for part in plan.parts] == ["train", "test", "validation"]
    assert sum(part["documents"] for part in plan.parts) == 84
    assert sum(part["text_bytes"] for part in plan.parts) == plan.summary["text_bytes"] == plan.documents["n_bytes"].sum()


def test_a_document_that_changed_since_the_plan_is_reported(tmp_path, byte_level_folder):
    Tokenizer.from_model_folder(byte_level_folder).save(tmp_path / "tokenizer")
    source = jsonl(tmp_path / "a.jsonl", {"text": "as it was"})
    stage = corpus_stage(tmp_path, source)
    assert stage.parts() == [0]
    stage.finish()
    jsonl(source, {"text": "as it is!"})
    again = CorpusStage(stage.dataset, config=stage.config, data_files=source_of(source), tokenizer_folders=stage.tokenizer_folders)
    with pytest.raises(DataError, match="Document 0 changed since the corpus was planned"):
        again.compute(0)


def test_the_identity_changes_with_the_content_and_not_with_the_place(tmp_path, byte_level_folder):
    tokenizer = Tokenizer.from_model_folder(byte_level_folder)
    one, two = jsonl(tmp_path / "one" / "a.jsonl", {"text": "x"}), jsonl(tmp_path / "two" / "a.jsonl", {"text": "x"})
    identities = [corpus_identity(config(), data_files=source_of(path), tokenizers=[tokenizer]) for path in (one, two)]
    assert identities[0] == identities[1]
    jsonl(two, {"text": "y"})
    assert corpus_identity(config(), data_files=source_of(two), tokenizers=[tokenizer]) != identities[0]
    assert corpus_identity(config(seed=1), data_files=source_of(one), tokenizers=[tokenizer]) != identities[0]
    assert corpus_identity(config(name="other", expected_bytes=5), data_files=source_of(one), tokenizers=[tokenizer]) == identities[0]


# What cannot be used


@pytest.mark.parametrize("rows", [[], [{"text": ""}], [{"text": " \n\t "}, {"text": None}]])
def test_a_corpus_without_text_is_reported(tmp_path, rows):
    source = jsonl(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match=rf"a\.jsonl has no text: {len(rows)} documents"):
        chosen_from(source)


def test_empty_and_white_space_documents_are_counted(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in ["", "x", " ", "\n\r\t", None, "y"]))
    chosen = chosen_from(source)
    assert (len(chosen.documents), chosen.n_empty, chosen.n_duplicates) == (2, 4, 0)


@pytest.mark.parametrize(("choices", "column"), [({}, "text"), ({"text_column": "body", "domain_column": "origin"}, "origin")])
def test_a_missing_column_is_reported_with_those_there_are(tmp_path, choices, column):
    source = jsonl(tmp_path / "a.jsonl", {"body": "x", "kind": "y"})
    with pytest.raises(DataError, match=rf"has no column '{column}'; it has: body, kind"):
        chosen_from(source, **choices)


@pytest.mark.parametrize("value", [1, 1.5, True, {"a": 1}, ["x"]])
def test_a_column_that_is_not_text_is_reported(tmp_path, value):
    source = jsonl(tmp_path / "a.jsonl", {"text": value})
    with pytest.raises(DataError, match=r"the text column has type .*, not text\. Name another column with corpus\.text_column"):
        chosen_from(source)


def test_bytes_are_not_taken_for_text(tmp_path):
    pyarrow.parquet.write_table(pa.table({"text": pa.array([b"x"], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 0: the text column has type bytes, not text"):
        chosen_from(tmp_path / "a.parquet")


@pytest.mark.parametrize("bad", [b"bad \xff", b"bad \xed\xa0\x80", rb"bad \ud800 x"])
def test_a_document_that_is_not_unicode_is_reported_with_its_row(tmp_path, bad):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "' + bad + b'"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: "):
        chosen_from(tmp_path / "a.jsonl")


def test_a_surrogate_pair_escape_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert texts_by_split(tmp_path / "a.jsonl", chosen_from(tmp_path / "a.jsonl")) == {"train": ["😀"]}


def test_invalid_utf8_in_parquet_and_in_text_files_is_reported_with_its_place(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")])
    pyarrow.parquet.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: the text is not valid UTF-8"):
        chosen_from(tmp_path / "a.parquet")
    (tmp_path / "txt").mkdir()
    (tmp_path / "txt" / "good.txt").write_bytes(b"fine")
    (tmp_path / "txt" / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin1\.txt, line 1: is not valid UTF-8 \(byte 0xe9\)"):
        chosen_from(tmp_path / "txt")


@pytest.mark.parametrize("broken", ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"])
@pytest.mark.parametrize("n_left", [0, 3, 300, -5])
def test_a_truncated_parquet_file_is_reported(tmp_path, broken, n_left):
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        parquet(tmp_path / "corpus" / "data" / name, text=[f"{name} {i}" for i in range(50)])
    path = tmp_path / "corpus" / "data" / broken
    path.write_bytes(path.read_bytes()[:n_left])
    with pytest.raises(DataError, match=rf"{broken} cannot be read"):
        chosen_from(tmp_path / "corpus")


def test_files_of_several_kinds_are_reported(tmp_path):
    parquet(tmp_path / "corpus" / "train.parquet", text=["x"])
    jsonl(tmp_path / "corpus" / "test.jsonl", {"text": "y"})
    with pytest.raises(DataError, match=r"mixes files of several kinds \(json, parquet\)"):
        source_of(tmp_path / "corpus")


@pytest.mark.parametrize("name", ["notes.md", "weights.bin", "noext"])
def test_a_folder_or_file_without_data_is_reported(tmp_path, name):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_text("x")
    for source in (tmp_path / "corpus", tmp_path / "corpus" / name):
        with pytest.raises(DataError, match=r"(no|not a) data file.*: \.parquet, \.jsonl"):
            source_of(source)


def test_a_column_of_text_and_numbers_is_reported(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"text": "a text"}\n{"text": 42}\n')
    with pytest.raises(DataError, match=r"mixed\.jsonl, line 2: the text column has type int"):
        chosen_from(path)
