"""A user's mistakes: one clear message, the right exit code, no traceback, and a workspace that stays valid."""

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest
from fuseline.store.dataset import Dataset
from support.workspaces import RECIPE, contents, run, start, wait_for, write_project


@pytest.fixture
def project(tmp_path, corpus_texts) -> Path:
    return write_project(tmp_path / "project", texts=corpus_texts)


def ingest_corpus(project: Path, models_dir: Path) -> tuple[int, str]:
    return run("ingest", "corpus", project, "-w", project.parent / "workspace", "--models", models_dir)


def assert_usable_afterwards(project: Path, models_dir: Path, corpus_texts: list[str]) -> None:
    """After the mistake is fixed, the same workspace works."""
    write_project(project.parent, texts=corpus_texts)
    code, output = ingest_corpus(project, models_dir)
    assert code == 0, output


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [], "domain": [], "split": []}, "no text"),
        ({"text": ["", "  \n\t", None], "domain": ["a"] * 3, "split": ["train"] * 3}, "3 documents, all empty or white space"),
        ({"content": ["x"], "domain": ["a"], "split": ["train"]}, "no column 'text'; it has: content, domain, split"),
        ({"text": [1, 2], "domain": ["a"] * 2, "split": ["train"] * 2}, "corpus.text_column"),
        ({"text": ["only training text"], "domain": ["a"], "split": ["train"]}, "evaluation.split ('test') must be one of"),
    ],
)
def test_an_unusable_corpus(project, models_dir, corpus_texts, columns, message):
    schema = {"text": pl.String} if not columns.get("text", [1]) else None
    pl.DataFrame(columns, schema_overrides=schema).write_parquet(project.parent / "corpus.parquet")
    code, output = ingest_corpus(project, models_dir)
    assert code in {1, 2}
    assert message in output
    shutil.rmtree(project.parent / "workspace")  # the corpus is another one now, as the fingerprint test shows
    assert_usable_afterwards(project, models_dir, corpus_texts)


def test_a_truncated_parquet_file(project, models_dir):
    path = project.parent / "corpus.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    code, output = ingest_corpus(project, models_dir)
    assert code == 1
    assert "corpus.parquet cannot be read" in output


def test_empty_documents_are_left_out_and_counted(project, models_dir):
    path = project.parent / "corpus.parquet"
    table = pl.read_parquet(path)
    extra = pl.DataFrame({"text": ["", " \n ", table["text"][0]], "domain": ["even"] * 3, "split": ["train"] * 3})
    pl.concat([table, extra]).write_parquet(path)
    code, output = ingest_corpus(project, models_dir)
    assert code == 0
    assert "48 documents" in output
    assert "left out: 1 duplicates, 2 empty" in output


def test_a_model_folder_without_a_tokenizer(project, models_dir, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(models_dir, models)
    (models / "tiny-source" / "tokenizer.json").unlink()
    code, output = ingest_corpus(project, models)
    assert code == 1
    assert "tiny-source has no tokenizer.json" in output


def test_vocabularies_that_disagree(project, models_dir, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(models_dir, models)
    path = models / "tiny-source" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vocab_size": 1000}))
    code, output = ingest_corpus(project, models)
    assert code == 1
    assert "vocab_size of config.json (1000) must equal the rows of model.embed_tokens.weight in the weights (800)" in output


def test_a_model_that_is_nowhere(project, tmp_path):
    code, output = ingest_corpus(project, tmp_path / "no-models")
    assert code == 1
    assert "tiny-target" in output
    assert "--models" in output


def test_recipe_mistakes_are_reported_all_at_once_with_their_lines(project, models_dir):
    text = RECIPE.replace("part_bytes = 4096", 'part_bytez = 4096\nseed = "x"').replace("steps = 24", "steps = 24\nepochs = 2")
    project.write_text(text)
    lines = text.splitlines()
    code, output = ingest_corpus(project, models_dir)
    assert code == 2
    assert f"line {lines.index('part_bytez = 4096') + 1}: corpus.part_bytez: unknown key. Did you mean part_bytes?" in output
    assert f"line {lines.index('seed = ' + chr(34) + 'x' + chr(34)) + 1}: corpus.seed: 'x' should be a valid integer" in output
    assert "epochs (2) and steps (24) must not both be given" in output
    assert not (project.parent / "workspace").exists()


def test_another_fingerprint_shows_both_sides_and_changes_nothing(project, models_dir):
    workspace = project.parent / "workspace"
    assert ingest_corpus(project, models_dir)[0] == 0
    before = contents(workspace)
    project.write_text(RECIPE.replace("part_bytes = 4096", "part_bytes = 8192"))
    code, output = ingest_corpus(project, models_dir)
    assert code == 1
    assert "part_bytes: stored 4096, asked for 8192" in output
    assert contents(workspace) == before
    project.write_text(RECIPE)
    code, output = ingest_corpus(project, models_dir)
    assert code == 0
    assert "nothing to do" in output


def test_stages_out_of_order_name_the_one_that_comes_first(project, models_dir):
    options = ("-w", project.parent / "workspace", "--models", models_dir)
    code, output = run("ingest", "distributions", project, *options)
    assert (code, "fuseline ingest corpus" in output) == (2, True)
    assert ingest_corpus(project, models_dir)[0] == 0
    code, output = run("align", project, *options)
    assert (code, "fuseline ingest distributions" in output) == (2, True)
    code, output = run("fuse", project, *options)
    assert (code, "fuseline ingest distributions" in output) == (2, True)
    code, output = run("train", project, *options)
    assert (code, "fuseline ingest distributions" in output) == (2, True)


def test_a_folder_that_is_not_a_workspace_is_left_alone(project, models_dir):
    code, output = run("ingest", "corpus", project, "-w", project.parent, "--models", models_dir)
    assert code == 1
    assert "is not empty and is not a workspace" in output


def test_a_second_coordinator_is_refused_and_changes_nothing(project, models_dir, tmp_path):
    workspace = project.parent / "workspace"
    first = start("run", project, "-w", workspace, "--models", models_dir, log=tmp_path / "log")
    try:
        wait_for(lambda: (workspace / ".coordinator").exists() and (workspace / ".coordinator").read_text() != "", process=first)
        code, output = ingest_corpus(project, models_dir)
        assert code == 1
        assert f"in use by process {first.pid}" in output
        assert run("status", "-w", workspace)[0] == 0
    finally:
        first.kill()
        first.wait()


def test_a_full_disk(project, models_dir, tmp_path):
    """The workspace is on a small file system that fills up; when there is room again the same command goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        options = (project, "-w", disk / "workspace", "--models", models_dir)
        assert run("ingest", "corpus", *options)[0] == 0
        ballast, log = disk / "ballast", tmp_path / "log"
        target = disk / "workspace" / "distributions" / "target"
        process = start("ingest", "distributions", *options, log=log)
        wait_for(lambda: (target / "part-00000.json").exists(), process=process)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert process.wait() == 1
        assert "No space left on device" in log.read_text()
        assert "Traceback" not in log.read_text()
        dataset = Dataset.open(target)
        parts = dataset.parts()
        assert parts
        before = [dataset.read(part, "token_ids_T", "topk_ids_TK", "topk_logprobs_TK")[2].tobytes() for part in parts]
        ballast.unlink()
        code, output = run("ingest", "distributions", *options)
        assert code == 0, output
        assert len(Dataset.open(target.with_name("source")).parts()) == len(dataset.parts()) >= len(parts)
        assert [dataset.read(part, "topk_logprobs_TK")[0].tobytes() for part in parts] == before
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def read_only(project):
    """Makes a folder read-only, for root too."""
    mounted = []

    def make(folder: Path) -> None:
        if os.geteuid() != 0:
            folder.chmod(0o500)
            return
        for arguments in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
            done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"root writes into read-only folders, and a read-only mount cannot be had: {done.stderr.strip()}")
            mounted.append(folder)

    yield make
    for folder in mounted[-1:]:
        subprocess.run(["umount", "--lazy", folder], check=True)
    (project.parent / "workspace").chmod(0o700)


def test_a_read_only_workspace(project, models_dir, read_only):
    workspace = project.parent / "workspace"
    assert ingest_corpus(project, models_dir)[0] == 0
    before = contents(workspace)
    read_only(workspace)
    code, output = ingest_corpus(project, models_dir)
    assert code == 1
    assert "Permission denied" in output or "Read-only file system" in output
    assert contents(workspace) == before
    assert run("store", "verify", "-w", workspace, "--full")[0] == 0, "what only reads needs no permission to write"
