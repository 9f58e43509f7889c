"""A path is a path: the pipeline in folders with any names, for the corpus, the workspace, the models and what is written."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.store.workspace import Workspace
from hypothesis import example, given, settings
from hypothesis import strategies as st

ODD = "[1]*{a,b}?::$HOME 'q' \"ü\" 100% \\ #;&|~ -x"
NAMES = st.text(alphabet="ab1[]{}*?!$'\" ~%:#&|;\\-_.ü漢", min_size=1, max_size=12).filter(
    lambda name: name not in {".", ".."} and name[0] != "."
)
RECIPE = """
[corpus]
path = {path}
context_length = 64
part_bytes = 2048
held_out_fraction = 0.3

[target]
name = "target"
model = {target}
dtype = "float32"

[[sources]]
name = "source"
model = "tiny-source"
dtype = "float32"

[training]
sequence_length = 64
global_batch_size = 2
steps = 2
evaluate_every = 1

[evaluation]
clm_baseline = false
"""


def project(folder: Path, *, models_dir: Path, texts: list[str], names: list[str]) -> dict[str, Path]:
    """A recipe, its corpus, its models and a decoy of the corpus, in folders with these names (corpus, file, workspace, models)."""
    corpus, file, workspace, models = names
    paths = {
        name: folder / f"{number}{part}"
        for number, (name, part) in enumerate(zip(("corpus", "workspace", "models"), (corpus, workspace, models), strict=True))
    }
    paths["corpus"].mkdir()
    (paths["corpus"] / f"{file}.jsonl").write_text("".join(json.dumps({"text": text[:300]}) + "\n" for text in texts))
    shutil.copytree(models_dir, paths["models"])
    paths["recipe"] = folder / "-recipe.toml"
    target = json.dumps(str(paths["models"] / "tiny-target"), ensure_ascii=False)
    paths["recipe"].write_text(RECIPE.format(path=json.dumps(paths["corpus"].name, ensure_ascii=False), target=target))
    return paths


@pytest.fixture(scope="module")
def texts(corpus_texts) -> list[str]:
    """A few short documents: Hypothesis prints what a test is given."""
    return list(dict.fromkeys(text[:300] for text in corpus_texts))[:12]


@settings(max_examples=1, deadline=None)
@given(names=st.lists(NAMES, min_size=4, max_size=4))
@example(names=[ODD] * 4)
@example(names=["run[1]", "docs[1]", "run[1]", "x?y"])
def test_parts_are_made_and_asked_in_folders_of_any_name(models_dir, texts, names):
    with tempfile.TemporaryDirectory() as temporary:
        paths = project(Path(temporary), models_dir=models_dir, texts=texts, names=names)
        plain = paths["workspace"].with_name(paths["workspace"].name.replace("[1]", "1") + "x")  # what a pattern would find
        plain.mkdir()
        for stage in (["ingest", "corpus"], ["ingest", "distributions"], ["align", "run"], ["fuse", "run"]):
            command = [*stage, f"--workspace={paths['workspace']}", f"--models={paths['models']}", "--", str(paths["recipe"])]
            result = CliRunner().invoke(main, command)
            assert result.exit_code == 0, result.output
        workspace = Workspace.open(paths["workspace"])
        found = workspace.sql("SELECT doc_id, string_agg(text, '' ORDER BY segment) AS text FROM texts GROUP BY ALL")
        assert sorted(found["text"]) == sorted(texts)
        assert workspace.sql("SELECT count(*) AS n FROM targets")["n"].item() > 0
        result = CliRunner().invoke(main, ["store", "verify", "--full", f"--workspace={paths['workspace']}"])
        assert result.exit_code == 0, result.output
        assert not list(plain.iterdir())


@pytest.fixture(scope="module")
def trained(models_dir, texts, tmp_path_factory) -> dict[str, Path]:
    """A whole run, from a folder with an odd name, with relative paths, through a link."""
    folder = tmp_path_factory.mktemp("odd") / ODD
    folder.mkdir()
    paths = project(folder, models_dir=models_dir, texts=texts, names=[ODD] * 4)
    (folder / "link *").symlink_to(paths["workspace"].name, target_is_directory=True)
    paths["workspace"].mkdir()
    command = [sys.executable, "-m", "fuseline", "run", "--workspace=link *", f"--models={paths['models'].name}", "--", "-recipe.toml"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return paths | {"folder": folder}


def test_a_whole_run_in_a_folder_of_an_odd_name(trained):
    workspace = Workspace.open(trained["workspace"])
    assert set(workspace.sql("SELECT model FROM evaluations")["model"]) == {"target", "source", "fused"}
    assert workspace.sql("SELECT count(*) AS n FROM training_evaluations")["n"].item() > 0
    assert (trained["workspace"] / "exports" / "fused" / "model.safetensors").exists()
    for command in (["report"], ["status"], ["status", "--", str(trained["recipe"])], ["align", "show", "--doc=0"], ["store", "du"]):
        options = [f"--workspace={trained['workspace']}"]
        at = command.index("--") if "--" in command else len(command)
        result = CliRunner().invoke(main, [*command[:at], *options, *command[at:]])
        assert result.exit_code == 0, result.output


def test_models_are_merged_into_and_talked_with_in_folders_of_odd_names(trained):
    folder = trained["folder"]
    merge = folder / "merge [1].toml"
    entries = "".join(
        f'\n[[merge.models]]\nname = "{name}"\nmodel = {json.dumps(str(path), ensure_ascii=False)}\n'
        for name, path in {"start": trained["models"] / "tiny-target", "fused": trained["workspace"] / "exports" / "fused"}.items()
    )
    merge.write_text(f'[merge]\nmethod = "linear"\n{entries}')
    result = CliRunner().invoke(main, ["merge", str(merge), "-o", str(folder / f"out {ODD}")])
    assert result.exit_code == 0, result.output
    assert (folder / f"out {ODD}" / "model.safetensors").exists()
    result = CliRunner().invoke(main, ["sql", "SELECT 1 AS a", f"--workspace={trained['workspace']}", "-o", str(folder / "a [1]*?.csv")])
    assert result.exit_code == 0, result.output
    assert (folder / "a [1]*?.csv").read_text() == "a\n1\n"
