"""A recipe with variants as a user runs it: what is the same is computed once, and it completes after a SIGKILL."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fuseline.eval.ensemble import mixed, read_tokens, shared_chunks
from fuseline.pipeline import graph as graph_module
from fuseline.store.dataset import Dataset
from fuseline.store.tokenizer import Tokenizer
from fuseline.store.workspace import Workspace
from support.lengths import Lengths
from support.tiny import save_model
from support.workspaces import RECIPE, contents, kill_group, run, start, wait_for, write_project

OTHER = '[[sources]]\nname = "other"\nmodel = "tiny-other"\ndtype = "float32"\n\n[training]'
# Two numbers of sources, two fusion functions, two alignments: the recipe itself is one of the eight, six are variants.
VARIANTS = "".join(
    f'\n[[variants]]\nname = "{name}"\n{changes}\n'
    for name, changes in {
        "one": 'sources = ["source"]',
        "mean": 'fusion.method = "avgce"',
        "spans": 'alignment.positions = "span"',
        "one-mean": 'sources = ["source"]\nfusion.method = "avgce"',
        "one-spans": 'sources = ["source"]\nalignment.positions = "span"',
        "mean-spans": 'fusion.method = "avgce"\nalignment.positions = "span"',
    }.items()
)
SHORT = RECIPE.replace("steps = 24", "steps = 4").replace("evaluate_every = 24\n", "") + '[evaluation]\nensembles = ["uniform", "bayes"]\n'


@pytest.fixture(scope="module")
def models(models_dir, byte_level_folder):
    save_model(models_dir / "tiny-other", tokenizer_folder=byte_level_folder, seed=3)
    return models_dir


@pytest.fixture(scope="module")
def project(tmp_path_factory, corpus_texts) -> Path:
    recipe = SHORT.replace("[training]", OTHER).replace("tensor_parallel", "") + VARIANTS
    return write_project(tmp_path_factory.mktemp("project"), texts=corpus_texts, recipe=recipe)


@pytest.fixture(scope="module")
def workspace(project, models, tmp_path_factory) -> Path:
    """Of a run that was killed in the third training, and run again."""
    folder = tmp_path_factory.mktemp("variants") / "workspace"
    options = (project, "-w", folder, "--models", models)
    process = start("run", *options, log=folder.parent / "log")
    wait_for(lambda: len(list(folder.glob("runs/*/metrics.jsonl"))) == 3, process=process, seconds=600)
    kill_group(process)
    code, output = run("run", *options)
    assert code == 0, output
    return folder


def test_before_it_runs_it_says_what_is_shared(project, models, tmp_path):
    code, plan = run("run", project, "-w", tmp_path / "none", "--models", models, "--dry-run")
    assert code == 0
    cells = [[cell.strip() for cell in line.split("|")] for line in plan.splitlines() if line.startswith("|")]
    rows = {row[1]: row[-2] for row in cells}
    assert rows["distributions source"] == "all"
    assert rows["distributions other"] == "base, mean, spans, mean-spans"
    assert rows["targets fused-one-mean"] == "one-mean"
    assert rows["training clm (TP 1 × DP 1)"] == "all"
    assert not (tmp_path / "none").exists()


def test_everything_is_computed_once(project, models, workspace):
    opened = Workspace.open(workspace)
    runs = opened.sql("SELECT stage, dataset, status, metrics->>'$.parts' AS parts FROM runs").to_dicts()
    made = Counter()
    for each in runs:
        made[each["stage"], each["dataset"]] += int(each["parts"] or 0)
    n_parts = Counter(part["split"] for part in json.loads((workspace / "corpus" / "corpus" / "plan.json").read_text())["parts"])
    forward = {name: parts for (stage, name), parts in made.items() if stage == "distributions"}
    assert forward == dict.fromkeys(("target", "source", "other"), n_parts["train"])
    assert {name for stage, name in made if stage == "alignments"} == {
        "source--target",
        "other--target",
        "source--target--span",
        "other--target--span",
    }
    endings = ["", *(f"-{name}" for name in ("one", "mean", "spans", "one-mean", "one-spans", "mean-spans"))]
    assert {name for stage, name in made if stage == "targets"} == {f"fused{ending}" for ending in endings}
    trained = Counter(each["dataset"] for each in runs if each["stage"] == "train" and each["status"] == "done")
    assert trained == dict.fromkeys(["clm", *(f"fused{ending}" for ending in endings)], 1)
    assert [each["status"] for each in runs if each["stage"] == "train"].count("interrupted") == 1


def test_status_says_that_all_is_done_and_for_whom(project, workspace):
    code, output = run("status", project, "-w", workspace, "--json")
    found = {f"{item['kind']}/{item['name']}": item for item in json.loads(output)["wanted"]}
    assert code == 0
    assert {item["state"] for item in found.values()} == {"done"}
    assert found["targets/fused-one"]["variants"] == ["one"]
    assert len(found["corpus/corpus"]["variants"]) == 7


def test_a_second_run_and_one_variant_have_nothing_to_do(project, models, workspace):
    before = contents(workspace)
    for more in ((), ("--variant", "one-mean")):
        code, output = run("run", project, "-w", workspace, "--models", models, *more)
        lines = [line for line in output.splitlines() if line.startswith(("distributions", "targets", "training", "evaluation"))]
        assert code == 0
        assert lines
        assert all("nothing to do" in line for line in lines)
    assert contents(workspace) == before


def test_a_variant_has_the_bits_of_a_recipe_that_says_the_same(models, workspace, tmp_path, corpus_texts):
    alone = SHORT.replace("[training]", '[fusion]\nmethod = "avgce"\n\n[training]')
    recipe = write_project(tmp_path, texts=corpus_texts, recipe=alone)
    code, output = run("run", recipe, "-w", tmp_path / "alone", "--models", models)
    assert code == 0, output
    places = [workspace / "targets" / "fused-one-mean", tmp_path / "alone" / "targets" / "fused"]
    left, right = map(Dataset.open, places)
    assert left.fingerprint == right.fingerprint
    for part in left.parts():
        assert left.manifest(part).files == right.manifest(part).files  # sizes and checksums
    weights = [workspace / "exports/fused-one-mean/model.safetensors", tmp_path / "alone/exports/fused/model.safetensors"]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_ensembles_are_mixed_from_the_stored_likelihoods(models, workspace):
    """All members read every token as `evaluations` counts it, and the stored ensemble is what their tokens give."""
    opened = Workspace.open(workspace)
    members = [Dataset.open(workspace / "evaluations" / f"{name}--test") for name in ("target", "source", "other")]
    tokenizers = [Tokenizer.load(workspace / "tokenizers" / member.identity["tokenizer"]) for member in members]
    for rule in ("uniform", "bayes"):
        ensemble = Dataset.open(workspace / "ensembles" / f"{rule}--test")
        for part in ensemble.parts():
            tokens = [read_tokens(member, part, tokenizer=tokenizer) for member, tokenizer in zip(members, tokenizers, strict=True)]
            for member, read in zip(members, tokens, strict=True):
                nll_S, n_scored_S = member.read(part, "nll_S", "n_scored_S")
                assert -np.nansum(read.logprob_T) == pytest.approx(nll_S.sum(), rel=1e-3)  # as stored, in half precision
                assert np.isfinite(read.logprob_T).sum() == n_scored_S.sum()
            logprob_C, scored_bytes_S, n_bytes_S = ensemble.read(part, "logprob_C", "scored_bytes_S", "n_bytes_S")
            np.testing.assert_array_equal(logprob_C, mixed(shared_chunks(tokens), rule=rule))
            assert (scored_bytes_S < n_bytes_S).all()
    code, output = run("store", "verify", "-w", workspace, "--full")
    assert code == 0, output
    found = opened.sql("SELECT model, sum(bpb) FROM evaluations GROUP BY model").rows_by_key("model")
    assert {"ensemble-uniform", "ensemble-bayes"} <= found.keys()
    assert "ensemble-uniform" in run("report", "-w", workspace)[1]
    code, output = run("eval", "compare", "fused", "ensemble-bayes", "-w", workspace)
    assert code == 0
    for names, said in ((("fused", "nothing"), "'nothing' was not evaluated"), (("fused", "fused"), "Choose two different models")):
        code, output = run("eval", "compare", *names, "-w", workspace)
        assert (code, said in output) == (2, True), output


def test_a_kind_of_product_is_one_entry_and_its_stage(project, models, workspace, monkeypatch):
    """`run`, `--dry-run`, `status`, `verify`, `repair` and SQL know it from there."""
    monkeypatch.setattr(graph_module, "KINDS", [*graph_module.KINDS, Lengths])
    options = (project, "-w", workspace, "--models", models)
    assert "| lengths corpus " in run("run", *options, "--dry-run")[1]
    states = {
        f"{item['kind']}/{item['name']}": item["state"]
        for item in json.loads(run("status", project, "-w", workspace, "--json")[1])["wanted"]
    }
    assert states["lengths/corpus"] == "missing"
    code, output = run("run", *options)
    assert code == 0, output
    code, output = run("run", *options)
    assert "lengths corpus: nothing to do" in output
    dataset = Dataset.open(workspace / "lengths" / "corpus")
    assert dataset.parts()
    assert {"kind": "lengths", "n": len(dataset.parts())} in Workspace.open(workspace).sql(
        "SELECT kind, count(*) AS n FROM parts GROUP BY kind"
    ).to_dicts()
    assert run("store", "verify", "-w", workspace, "--full")[0] == 0
    table = dataset.table_path(dataset.parts()[0])
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    assert run("store", "verify", "-w", workspace, "--full")[0] == 1
    code, output = run("store", "repair", *options, "--full")
    assert code == 0, output
    assert "lengths/corpus part 0: made again" in output
