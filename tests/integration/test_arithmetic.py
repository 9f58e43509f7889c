"""The number format of forward passes: chosen once for a dataset, stored with it, and kept by whoever goes on with it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.pipeline.graph import products
from fuseline.pipeline.opened import Opened
from fuseline.pipeline.recipe_file import load_recipe
from fuseline.store import durable
from fuseline.store.dataset import Dataset
from fuseline.store.fingerprint import sealed
from fuseline.store.workspace import Workspace
from support.workspaces import RECIPE, contents, write_project

KIND = "distributions"


@pytest.fixture(scope="module")
def project(tmp_path_factory, corpus_texts) -> Path:
    recipe = RECIPE.replace('dtype = "float32"', 'dtype = "bfloat16"')
    return write_project(tmp_path_factory.mktemp("project"), texts=corpus_texts, recipe=recipe)


@pytest.fixture(scope="module")
def ingest(project, models_dir):
    """Makes what is missing of the distributions, on a machine that computes fastest in a number format."""

    def ingested(workspace: Path, *, fastest: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fuseline.pipeline.opened.arithmetic_for", lambda dtype: fastest)
            arguments = ["ingest", "distributions", project, "-w", workspace, "--models", models_dir]
            corpus = CliRunner().invoke(main, ["ingest", "corpus", *map(str, arguments[2:])])
            result = CliRunner().invoke(main, list(map(str, arguments)))
        assert (corpus.exit_code, result.exit_code) == (0, 0), corpus.output + result.output
        return workspace

    return ingested


@pytest.fixture(scope="module")
def computed_in(ingest, tmp_path_factory) -> dict[str, Path]:
    """A workspace by the number format it was computed in."""
    return {fastest: ingest(tmp_path_factory.mktemp(fastest) / "w", fastest=fastest) for fastest in ("float32", "bfloat16")}


@pytest.fixture
def in_float32(computed_in, tmp_path) -> Path:
    return Path(shutil.copytree(computed_in["float32"], tmp_path / "w"))


def target(workspace: Path) -> Dataset:
    return Dataset.open(workspace / KIND / "target")


def test_the_arithmetic_is_stored_and_determines_no_fingerprint(computed_in):
    found = {name: target(workspace) for name, workspace in computed_in.items()}
    assert {name: dataset.description["arithmetic"] for name, dataset in found.items()} == {name: name for name in found}
    assert found["float32"].fingerprint == found["bfloat16"].fingerprint
    gold = [dataset.read(0, "gold_logprob_T")[0].astype(float) for dataset in found.values()]
    assert not np.array_equal(*gold, equal_nan=True), "products in bfloat16 are rounded"


def test_a_machine_that_computes_faster_otherwise_goes_on_with_the_same_bits(ingest, computed_in, in_float32):
    target(in_float32).drop(0)
    assert contents(ingest(in_float32, fastest="bfloat16")) == contents(computed_in["float32"])


def test_the_parts_say_what_a_lost_record_said(ingest, computed_in, in_float32):
    target(in_float32).drop(1)
    (in_float32 / KIND / "target" / "dataset.json").unlink()
    assert contents(ingest(in_float32, fastest="bfloat16")) == contents(computed_in["float32"])
    assert target(in_float32).description["arithmetic"] == "float32"


def test_a_dataset_from_before_goes_on_in_its_dtype(ingest, computed_in, tmp_path):
    old = Path(shutil.copytree(computed_in["bfloat16"], tmp_path / "w"))
    path = old / KIND / "target" / "dataset.json"
    record = json.loads(path.read_text())
    del record["description"]["arithmetic"], record["checksum"]
    durable.write_json(path, sealed(record))
    target(old).drop(0)
    assert contents(ingest(old, fastest="float32")) == contents(computed_in["bfloat16"])


def test_status_says_what_is_computed_in_what(in_float32, computed_in):
    shown = CliRunner().invoke(main, ["status", "-w", str(in_float32)], terminal_width=200).output
    (line,) = (line for line in shown.splitlines() if f"{KIND}/target" in line)
    assert "float32, 1 thread" in line
    as_json = json.loads(CliRunner().invoke(main, ["status", "--json", "-w", str(computed_in["bfloat16"])]).output)
    assert {(item["name"], item["arithmetic"], item["threads"]) for item in as_json["datasets"] if item["kind"] == KIND} == {
        ("target", "bfloat16", 1),
        ("source", "bfloat16", 1),
    }


@pytest.mark.parametrize(
    ("executor", "gpus", "arithmetic"), [("local", 0, "bfloat16"), ("slurm", 0, "float32"), ("slurm", 1, "bfloat16"), ("ray", 0, "float32")]
)
def test_a_gpu_here_says_nothing_of_workers_without_one(monkeypatch, corpus_texts, tmp_path, executor, gpus, arithmetic):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("fuseline.store.machine.flops", {"float32": 9e9, "bfloat16": 1e9}.get)
    asked = f'[executor]\nkind = "{executor}"\n[executor.resources.distributions]\ngpus = {gpus}\n'
    recipe = load_recipe(write_project(tmp_path, texts=corpus_texts, recipe=RECIPE + ("" if executor == "local" else asked)))
    workspace = Workspace.create(tmp_path / "w")
    site = Opened(products(recipe), base=tmp_path, workspace=workspace, models_dir=tmp_path, executor=recipe.executor, say=print)
    assert site.arithmetic(Dataset(tmp_path / "w" / KIND / "target", {}, {}), dtype="bfloat16") == arithmetic
