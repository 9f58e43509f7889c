"""Corpora that an earlier version read: kept where they were read right, refused where they were not."""

import json
from pathlib import Path

import polars as pl
import pytest
from fuseline.ingest.corpus import CorpusConfig, CorpusPlan, CorpusStage, corpus_identity, data_files_of
from fuseline.ingest.earlier_corpus import kept_identity, require_read_right
from fuseline.store import durable
from fuseline.store.corpus_plan import read_plan, write_plan
from fuseline.store.dataset import Dataset
from fuseline.store.errors import DataError
from fuseline.store.tokenizer import Tokenizer

TEXTS = [f"document number {number}" for number in range(20)]


@pytest.fixture
def tokenizer(tmp_path, byte_level_folder) -> Path:
    Tokenizer.from_model_folder(byte_level_folder).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write(path: Path, texts: list[str], **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text} | {name: values[index] for name, values in columns.items()} for index, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def opened(corpus: Path, *, workspace: Path, tokenizer: Path, **choices) -> CorpusStage:
    """The stage of a corpus, as a command opens it."""
    config = CorpusConfig(path=str(corpus), part_bytes=1024, **choices)
    source = data_files_of(config, base=corpus.parent)
    identity = asked = corpus_identity(config, data_files=source, tokenizers=[Tokenizer.load(tokenizer)])
    folder = workspace / "corpus" / "corpus"
    if folder.exists():
        identity = kept_identity(Dataset.open(folder), asked=asked)
    stage = CorpusStage(Dataset.create(folder, identity=identity), config=config, data_files=source, tokenizer_folders=[tokenizer])
    require_read_right(stage, asked=asked)
    return stage


def made_before(stage: CorpusStage, *, documents: pl.DataFrame | None = None, all_parts: bool = True, **identity: object) -> None:
    """Leave a corpus as the earlier version left it: its plan says nothing of how files are read, its identity something else."""
    plan, folder = stage.plan, stage.dataset.folder
    for part in stage.parts()[: None if all_parts else 1]:
        stage.dataset.commit(part, content=stage.compute(part), seconds=0)
    summary = {key: value for key, value in plan.summary.items() if key != "reader"}
    write_plan(folder, documents=plan.documents if documents is None else documents, summary=summary)
    if identity:
        durable.remove(folder / "dataset.json")
        for path in folder.glob("part-*.json"):
            durable.remove(path)
        Dataset.create(folder, identity=stage.dataset.identity | identity)


def test_what_was_read_right_keeps_its_fingerprint_and_is_compared_once(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "texts" / "a.jsonl", TEXTS)
    keys = {"workspace": tmp_path / "workspace", "tokenizer": tokenizer}
    stage = opened(tmp_path / "texts", **keys)
    made_before(stage)
    assert opened(tmp_path / "texts", **keys).dataset.fingerprint == stage.dataset.fingerprint
    monkeypatch.setattr("fuseline.ingest.earlier_corpus.choose_documents", None)
    assert opened(tmp_path / "texts", **keys).plan.documents.equals(stage.plan.documents)


def test_a_readme_that_counted_as_content_does_not_change_the_fingerprint(tmp_path, tokenizer):
    write(tmp_path / "texts" / "a.jsonl", TEXTS)
    (tmp_path / "texts" / "README.md").write_text("words")
    keys = {"workspace": tmp_path / "workspace", "tokenizer": tokenizer}
    stage = opened(tmp_path / "texts", **keys)
    files = stage.dataset.identity["files"]
    assert files.keys() == {"a.jsonl"}
    made_before(stage, files={"README.md": "0" * 64} | files)
    (tmp_path / "texts" / "README.md").write_text("other words")
    assert opened(tmp_path / "texts", **keys).dataset.identity["files"].keys() == {"README.md", "a.jsonl"}


def test_splits_that_names_of_files_said_are_kept_where_the_recipe_says_them_too(tmp_path, tokenizer):
    write(tmp_path / "texts" / "train.jsonl", TEXTS[:15])
    write(tmp_path / "texts" / "test.jsonl", TEXTS[15:])
    keys = {"workspace": tmp_path / "workspace", "tokenizer": tokenizer}
    splits = {"train": "train.jsonl", "test": "test.jsonl"}
    stage = opened(tmp_path / "texts", splits=splits, **keys)
    identity = {key: value for key, value in stage.dataset.identity.items() if key != "splits"}
    made_before(stage)
    durable.remove(stage.dataset.folder / "dataset.json")
    for path in stage.dataset.folder.glob("part-*.json"):
        durable.remove(path)
    earlier = Dataset.create(stage.dataset.folder, identity=identity)
    assert opened(tmp_path / "texts", splits=splits, **keys).dataset.fingerprint == earlier.fingerprint
    with pytest.raises(DataError, match=r"it lacks 5 documents of the files.*5 documents that are not in the files.*\[corpus\.splits\]"):
        opened(tmp_path / "texts", **keys)
    with pytest.raises(DataError, match="differently from its files"):
        opened(tmp_path / "texts", splits={"train": "test.jsonl", "test": "train.jsonl"}, **keys)


@pytest.mark.parametrize("what", ["documents", "texts", "splits", "domains"])
def test_what_was_read_wrongly_is_refused_with_the_reason_and_stays(tmp_path, tokenizer, what):
    write(tmp_path / "texts" / "a.jsonl", TEXTS, domain=["NA", "None"] * 10)
    keys = {"workspace": tmp_path / "workspace", "tokenizer": tokenizer, "domain_column": "domain"}
    stage = opened(tmp_path / "texts", **keys)
    documents = stage.plan.documents
    wrong = {
        "documents": documents.head(-3),
        "texts": documents.with_columns(sha256=pl.when(pl.col("doc_id") < 3).then(pl.lit("0" * 64)).otherwise("sha256")),
        "splits": documents.with_columns(split=pl.when(pl.col("doc_id") < 3).then(pl.lit("test")).otherwise("split")),
        "domains": documents.with_columns(domain=pl.lit("None")),
    }[what]
    made_before(stage, documents=wrong)
    before = read_plan(stage.dataset.folder)
    n = 10 if what == "domains" else 3
    with pytest.raises(DataError, match=rf"An earlier version read.*: it lacks {n} documents of the files.*--workspace"):
        opened(tmp_path / "texts", **keys)
    assert read_plan(stage.dataset.folder) == before


def test_a_missing_domain_was_called_none(tmp_path, tokenizer):
    write(tmp_path / "texts" / "a.jsonl", TEXTS, domain=["a", None] * 10)
    keys = {"workspace": tmp_path / "workspace", "tokenizer": tokenizer, "domain_column": "domain"}
    stage = opened(tmp_path / "texts", **keys)
    assert set(stage.plan.documents["domain"]) == {"a", ""}
    made_before(stage, documents=stage.plan.documents.with_columns(pl.col("domain").replace("", "None")))
    assert set(opened(tmp_path / "texts", **keys).plan.documents["domain"]) == {"a", "None"}


def test_another_order_of_the_files_is_kept_where_all_parts_are_there(tmp_path, tokenizer):
    write(tmp_path / "texts" / "a.jsonl", TEXTS)
    for all_parts in (True, False):
        keys = {"workspace": tmp_path / f"workspace-{all_parts}", "tokenizer": tokenizer}
        stage = opened(tmp_path / "texts", **keys)
        documents = stage.plan.documents
        other = documents.with_columns(row=documents["row"].reverse())
        made_before(stage, documents=other)
        if all_parts:
            assert CorpusPlan.load(opened(tmp_path / "texts", **keys).dataset) is not None
            continue
        stage.dataset.drop(0)
        with pytest.raises(DataError, match="had the files in another order, and parts of it are missing"):
            opened(tmp_path / "texts", **keys)


def test_what_is_read_now_is_asked_for_to_the_letter(tmp_path, tokenizer):
    write(tmp_path / "texts" / "a.jsonl", TEXTS)
    keys = {"workspace": tmp_path / "workspace", "tokenizer": tokenizer}
    assert opened(tmp_path / "texts", **keys).parts() == [0]
    with pytest.raises(ValueError, match="splits"):
        opened(tmp_path / "texts", splits={"train": "a.jsonl"}, **keys)
