"""The whole pipeline as a user runs it: real processes, killed with SIGKILL in the middle of each stage in turn."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fuseline as fuseline_package
import polars as pl
import pytest
from fuseline.store import catalog
from fuseline.store.dataset import Dataset
from fuseline.store.sql.database import LAZY_TABLES
from fuseline.store.workspace import Workspace
from support.rounding import model_terms, rounding
from support.workspaces import contents, kill_group, start, wait_for, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory, corpus_texts) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), texts=corpus_texts)


def fuseline(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fuseline", *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def uninterrupted(project, models_dir, tmp_path_factory) -> Path:
    workspace = tmp_path_factory.mktemp("uninterrupted") / "workspace"
    result = fuseline("run", project, "-w", workspace, "--models", models_dir)
    assert result.returncode == 0, result.stderr
    assert "Bits per byte" in result.stdout
    return workspace


def test_a_second_run_does_nothing_and_says_so(project, models_dir, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file() and path.suffix != ".duckdb"}
    result = fuseline("run", project, "-w", uninterrupted, "--models", models_dir)
    assert result.returncode == 0, result.stderr
    stages = [line for line in result.stderr.splitlines() if ": " in line and not line.startswith("corpus corpus:")]
    assert len(stages) == 12
    assert all("nothing to do" in line for line in stages), stages
    after = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file() and path.suffix != ".duckdb"}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"recipe.toml", ".coordinator"}


def test_the_evaluations_of_a_training_are_those_of_the_start_and_of_the_exported_model(uninterrupted):
    with catalog.reading(Workspace.open(uninterrupted)) as connection:
        during = connection.execute("SELECT training, step, domain, bpb, n_scored, scored_bytes FROM training_evaluations").fetchall()
        after = connection.execute("SELECT model, domain, bpb, n_tokens, n_bytes FROM evaluations").fetchall()
        metrics = connection.execute("SELECT training, step, held_out_bpb FROM metrics WHERE held_out_bpb IS NOT NULL").fetchall()
    domains = len({domain for *_, domain, _, _, _ in during})
    assert sorted((training, step) for training, step, *_ in during) == [
        (name, step) for name in ("clm", "fused") for step in (0, 24) for _ in range(domains)
    ]
    assert sorted(step for _, step, _ in metrics) == [24, 24]
    measured = {(model, domain): figures for model, domain, *figures in after}
    for training, step, domain, *figures in during:
        if step in (0, 24):
            (bpb, n_tokens, n_bytes), (expected, *counts) = figures, measured["target" if step == 0 else training, domain]
            assert [n_tokens, n_bytes] == counts
            terms = model_terms(layers=2, hidden=32, ffn=64, head_dim=8, length=128) + 600
            assert bpb == pytest.approx(expected, abs=rounding(expected, terms=terms, averaged=n_tokens))


def test_trainings_start_from_the_model_of_the_distributions(uninterrupted):
    for name in ("fused", "clm"):
        check = json.loads((uninterrupted / "runs" / name / "start.json").read_text())
        assert check["tokens"] >= 100
        assert check["difference"] <= check["tolerance"] < 0.01  # float32


# Kind and name of a dataset, or of a training; each is interrupted when it has something but not all.
STAGES = [
    ("corpus", "corpus"),
    ("distributions", "target"),
    ("distributions", "source"),
    ("alignments", "source--target"),
    ("targets", "fused"),
    ("runs", "fused"),
    ("evaluations", "source--test"),
]


def test_killed_in_the_middle_of_each_stage_it_ends_with_the_same_bits(project, models_dir, uninterrupted, tmp_path):
    workspace = tmp_path / "workspace"
    log = tmp_path / "log"
    for kind, name in STAGES:
        process = start("run", project, "-w", workspace, "--models", models_dir, log=log)
        wait_for(lambda: _has_begun(workspace, kind, name), process=process)  # noqa: B023  # called at once
        kill_group(process)
        expected = _n_done(uninterrupted, kind, name)
        assert 0 < _n_done(workspace, kind, name) < expected, f"{kind}/{name} was not interrupted in the middle"
    result = fuseline("run", project, "-w", workspace, "--models", models_dir)
    assert result.returncode == 0, result.stderr
    resumed, reference = contents(workspace), contents(uninterrupted)
    assert resumed.keys() == reference.keys()
    assert [key for key in reference if resumed[key] != reference[key]] == []
    with catalog.reading(Workspace.open(workspace)) as connection:
        runs = dict(connection.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall())
    assert runs["interrupted"] == len(STAGES)


def _n_done(workspace: Path, kind: str, name: str) -> int:
    if kind == "runs":
        path = workspace / "runs" / name / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0
    folder = workspace / kind / name
    return len(Dataset.open(folder).parts()) if (folder / "dataset.json").exists() else 0


def _has_begun(workspace: Path, kind: str, name: str) -> bool:
    # A training is killed between two checkpoints, so that steps are lost and must be done again.
    return _n_done(workspace, kind, name) >= (6 if kind == "runs" else 1)


def test_the_exported_model_generates_and_has_a_card(uninterrupted):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = uninterrupted / "exports" / "fused"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The method", return_tensors="pt")
    output = model.generate(input_ids=inputs["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 5
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert "source" in (folder / "README.md").read_text()


def stored_bpb(workspace: Path, name: str) -> float:
    dataset = Dataset.open(workspace / "evaluations" / name)
    nll = predicted = 0.0
    for part in dataset.parts():
        nll_S, bytes_S = dataset.read(part, "nll_S", "scored_bytes_S")
        nll += nll_S.sum()
        predicted += bytes_S.sum()
    return nll / predicted / 0.6931471805599453


def test_the_report_is_what_the_stored_likelihoods_say(uninterrupted):
    fused, clm = (stored_bpb(uninterrupted, f"{name}--test") for name in ("fused", "clm"))
    result = fuseline("report", "-w", uninterrupted)
    line = next(line for line in result.stdout.splitlines() if line.startswith("| fused"))
    assert f"{fused:.4f}" == line.split("|")[-2].strip()
    _, compared = result.stdout.split("Difference from clm in bits per byte (below 0 is better), over 6 documents of split test:")
    line = next(line for line in compared.splitlines() if line.startswith("| fused"))
    _, _, difference, interval, says, _ = (cell.strip() for cell in line.split("|"))
    low, high = map(float, interval.split(" to "))
    assert difference == f"{fused - clm:+.4f}"
    assert low <= fused - clm <= high
    assert says == "too few documents: at least 10 are needed"


COOKBOOK = (Path(fuseline_package.__file__).parent / "docs" / "sql.md").read_text()


@pytest.mark.parametrize("query", re.findall(r"```sql\n(.*?)```", COOKBOOK, re.DOTALL))
def test_every_query_of_the_cookbook_has_an_answer(uninterrupted, query):
    answer = Workspace.open(uninterrupted).sql(query)
    assert len(answer) or "FROM quarantine" in query or "warning IS NOT NULL" in query
    floats = answer.select(pl.selectors.float())
    assert not any(column.is_nan().any() for column in floats)


def test_the_tables_of_the_cookbook_are_those_of_the_program(uninterrupted):
    tables = Workspace.open(uninterrupted).database.tables()
    documented = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", COOKBOOK, re.MULTILINE))
    assert set(documented) == set(LAZY_TABLES)
    assert {name: documented[name].strip() for name in documented} == {name: ", ".join(tables[name]) for name in documented}


def test_the_numbers_of_the_lazy_tables_agree_with_the_catalogs(uninterrupted):
    found = Workspace.open(uninterrupted).sql("""
        WITH stored AS (
            SELECT model, corpus, split, doc_id, segment, count(*) AS n, sum(gold_logprob) AS logprob FROM positions GROUP BY ALL)
        SELECT n_tokens, n, nll, logprob, n_scored, model
        FROM segments JOIN documents USING (corpus, doc_id) JOIN stored USING (model, corpus, split, doc_id, segment)""")
    assert len(found) == Workspace.open(uninterrupted).sql("SELECT count(*) AS n FROM segments")["n"].item()
    assert (found["n"] == found["n_tokens"]).all()
    without_bos = found.filter(pl.col("model") != "source")  # bos predicts a token that is not scored
    difference = (without_bos["nll"] + without_bos["logprob"]).abs()
    assert (difference < 1e-3 * without_bos["n_scored"] + 0.02).all()  # stored in float16


def test_the_catalog_rebuilt_from_the_files_equals_the_original(uninterrupted):
    def tables() -> dict[str, list]:
        with catalog.reading(Workspace.open(uninterrupted)) as connection:
            names = [name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall() if name != "migrations"]
            return {name: sorted(map(repr, connection.execute(f"SELECT * FROM {name}").fetchall())) for name in names}

    before = tables()
    assert all(
        before[name]
        for name in (
            "documents",
            "segments",
            "target_segments",
            "target_sources",
            "metrics",
            "alignment_coverage",
            "models",
            "tokenizers",
            "parts",
        )
    )
    result = fuseline("store", "rebuild", "-w", uninterrupted)
    assert result.returncode == 0, result.stderr
    assert tables() == before


def test_sql_reads_the_catalog_and_cannot_write_or_leave_it(uninterrupted, tmp_path):
    result = fuseline(
        "sql", "SELECT model, count(*) AS n FROM evaluations GROUP BY model ORDER BY model", "-w", uninterrupted, "--format", "csv"
    )
    assert result.stdout.splitlines() == ["model,n", "clm,2", "fused,2", "source,2", "target,2"]
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    for query in ("DELETE FROM segments", f"SELECT * FROM '{secret}'", "SELEC 1"):
        result = fuseline("sql", query, "-w", uninterrupted)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
    assert fuseline("sql", "SELECT count(*) FROM segments", "-w", uninterrupted, "--format", "csv").stdout.split()[1] != "0"


@pytest.fixture
def finished(uninterrupted, tmp_path) -> Path:
    """A copy of the finished workspace, to be changed."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "workspace"))


def changed(project: Path, *replacements: tuple[str, str]) -> Path:
    text = project.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = project.with_name("changed.toml")
    path.write_text(text)
    return path


def test_another_split_is_evaluated_beside_the_first(project, models_dir, finished):
    recipe = changed(project, ("[training]", '[evaluation]\nsplit = "validation"\n\n[training]'))
    result = fuseline("run", recipe, "-w", finished, "--models", models_dir)
    assert result.returncode == 0, result.stderr
    assert "training fused: nothing to do" in result.stderr
    assert "6 documents of split test" in result.stdout
    assert "2 documents of split validation" in result.stdout


def test_an_export_of_another_training_is_not_evaluated(project, models_dir, finished):
    recipe = changed(project, ("learning_rate = 1e-3", "learning_rate = 2e-3"))
    result = fuseline("run", recipe, "-w", finished, "--models", models_dir)
    assert result.returncode == 1
    assert "learning_rate: stored 0.001, asked for 0.002" in result.stderr
    shutil.rmtree(finished / "runs" / "fused")
    shutil.rmtree(finished / "runs" / "clm")
    result = fuseline("eval", recipe, "-w", finished, "--models", models_dir)
    assert result.returncode == 2
    assert "Train the model clm first" in result.stderr


def test_another_fusion_shares_what_does_not_depend_on_it(project, models_dir, finished):
    recipe = changed(project, ("[training]", '[fusion]\nname = "mean"\nmethod = "avgce"\n\n[training]\nname = "mean"'))
    result = fuseline("fuse", recipe, "-w", finished, "--models", models_dir)
    assert result.returncode == 0, result.stderr
    assert {line.removesuffix(": started") for line in result.stderr.splitlines() if line.endswith(": started")} == {"targets mean"}
    wanted = json.loads(fuseline("status", recipe, "-w", finished, "--json").stdout)["wanted"]
    missing = {f"{item['kind']}/{item['name']}" for item in wanted if item["state"] != "done"}
    assert missing == {"training/mean", "evaluations/mean--test"}


def test_a_source_that_is_added_later_undoes_nothing(project, models_dir, finished, tmp_path):
    """Not even where parts of the corpus are missing: their segments stay those of the tokenizers it was begun with."""
    before = contents(finished)
    for part in (2, 5):
        (finished / "corpus" / "corpus" / f"part-{part:05d}.json").unlink()
    models = Path(shutil.copytree(models_dir, tmp_path / "models"))
    shutil.copytree(models / "tiny-source", models / "tiny-other")
    other = '[[sources]]\nname = "other"\nmodel = "tiny-other"\ndtype = "float32"\n\n[training]'
    recipe = changed(project, ("[training]", other))
    for stage in (("ingest", "corpus"), ("ingest", "distributions"), ("align",)):
        result = fuseline(*stage, recipe, "-w", finished, "--models", models)
        assert result.returncode == 0, result.stderr
    after = contents(finished)
    assert {key: after[key] for key in before} == before
    assert {key.rsplit("/", 1)[0] for key in after.keys() - before.keys()} == {
        "distributions/other",
        "alignments/other--target",
        "vocab_maps/other--target--prefix",
    }


def test_training_waits_for_all_targets_and_names_those_that_are_missing(project, models_dir, finished):
    parts = Dataset.open(finished / "targets" / "fused").parts()
    for part in (1, 2, 3, 5):
        (finished / "targets" / "fused" / f"part-{part:05d}.json").unlink()
    shutil.rmtree(finished / "runs" / "fused")
    for more in ((), ("--prepare",)):
        result = fuseline("train", project, "-w", finished, "--models", models_dir, "--only", "fused", *more)
        assert result.returncode == 2
        message = f"targets/fused lacks 4 of {len(parts)} parts (1-3, 5). Make them first: fuseline fuse RECIPE."
        assert message in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr
    assert not (finished / "runs" / "fused").exists()


def test_ranks_started_by_hand_train_the_same_model(project, models_dir, finished):
    before = contents(finished)
    for kind in ("runs", "exports"):
        shutil.rmtree(finished / kind / "fused")
    result = fuseline("train", project, "-w", finished, "--models", models_dir, "--only", "fused", "--prepare")
    assert result.returncode == 0, result.stderr
    command = result.stderr.split("start them with:\n")[1].split()
    assert command[0] == "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command[1:]]
    assert subprocess.run(torchrun, capture_output=True, check=False).returncode == 0
    assert contents(finished) == before


def test_asked_to_stop_it_saves_the_step_that_it_is_at(project, models_dir, finished, tmp_path):
    for kind in ("runs", "exports"):
        shutil.rmtree(finished / kind / "fused")
    recipe = changed(project, ("steps = 24", "steps = 100_000"), ("checkpoint_every = 4", "checkpoint_every = 100_000"))
    log = tmp_path / "log"
    process = start("train", recipe, "-w", finished, "--models", models_dir, "--only", "fused", log=log)
    wait_for(lambda: _n_done(finished, "runs", "fused") >= 3, process=process)
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    assert "Traceback" not in log.read_text()
    (checkpoint,) = (finished / "runs" / "fused" / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == _n_done(finished, "runs", "fused")
    assert f"last checkpoint at step {_n_done(finished, 'runs', 'fused')}" in fuseline("status", "-w", finished).stdout
    moved = finished.rename(tmp_path / "moved")  # its job.json names the folders of before
    result = fuseline("train", recipe, "-w", moved, "--models", models_dir, "--only", "fused", "--prepare")
    assert result.returncode == 0, result.stderr
