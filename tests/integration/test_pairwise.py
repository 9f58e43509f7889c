"""Pairwise fusion: each source by itself, then one merge; with a source that is added later, and killed in the middle of both."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.store import catalog
from fuseline.store.dataset import Dataset
from fuseline.store.workspace import Workspace
from fuseline.train.config import TrainJob
from support.tiny import save_model
from support.workspaces import RECIPE, kill_group, start, wait_for, write_project

OTHER = '[[sources]]\nname = "other"\nmodel = "tiny-other"\ndtype = "float32"\n'
PAIRWISE = (
    RECIPE.replace("steps = 24", "steps = 12").replace("checkpoint_every = 4", "checkpoint_every = 2").replace("evaluate_every = 24\n", "")
)
PAIRWISE += f"\n{OTHER}\n[merge]\n[evaluation]\nclm_baseline = false"  # and no line end

THIRD = ("--name", "third", "--model", "tiny-third", "--dtype", "float32")

# Dies in the moment in which the merged model, all written, would appear.
KILLED_IN_THE_MERGE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.crashes import kill, strike
from fuseline.cli import main
appears = lambda name, arguments: name == "os.rename" and str(arguments[1]).endswith("exports/merged-3")
strike(1, kill, folder=Path("nowhere"), only=appears)
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory, models_dir, byte_level_folder) -> Path:
    """`tiny-third` is `tiny-source`, which no identity can tell: what is made of the one must be what is made of the other."""
    folder = Path(shutil.copytree(models_dir, tmp_path_factory.mktemp("pairwise") / "models"))
    save_model(folder / "tiny-other", tokenizer_folder=byte_level_folder, seed=3)
    shutil.copytree(folder / "tiny-source", folder / "tiny-third")
    return folder


def options(recipe: Path, models: Path) -> list[str]:
    return [str(recipe), "-w", str(recipe.parent / "workspace"), "--models", str(models)]


def fuseline(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def fused(tmp_path_factory, corpus_texts, models) -> Path:
    """A pairwise project with two sources, in which everything is done."""
    recipe = write_project(tmp_path_factory.mktemp("pairwise") / "project", texts=corpus_texts, recipe=PAIRWISE)
    code, output = fuseline("run", *options(recipe, models))
    assert code == 0, output
    return recipe


@pytest.fixture(scope="module")
def added(fused, tmp_path_factory, models) -> tuple[Path, list[set[str]]]:
    """The project with a third source: killed in its training, then in the merge, and finished; and what each of the three runs made."""
    folder = tmp_path_factory.mktemp("added") / "project"
    recipe = Path(shutil.copytree(fused.parent, folder, copy_function=shutil.copy2)) / "recipe.toml"
    workspace, log = folder / "workspace", folder / "log"
    before = files(recipe)
    metrics = workspace / "runs" / "fused--third" / "metrics.jsonl"
    process = start("fuse", "add-source", *options(recipe, models), *THIRD, log=log)
    wait_for(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) >= 3, process=process)
    kill_group(process)
    assert 0 < len(metrics.read_bytes().splitlines()) < 12, "not interrupted in the middle"
    command = [sys.executable, "-c", KILLED_IN_THE_MERGE, Path(__file__).parents[1], "run", *options(recipe, models)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (workspace / "exports" / "merged-3").exists()
    assert len(list((workspace / "exports").glob(".tmp-*"))) == 1
    code, output = fuseline("run", *options(recipe, models))
    assert code == 0, output
    after = files(recipe)
    assert {path: after.get(path) for path in before} == before, "nothing that was there is made again, or touched"
    return recipe, [made(text) for text in (log.read_text(), killed.stderr, output)]


@pytest.fixture
def project(fused, tmp_path) -> Path:
    """A copy of the project, to be changed."""
    return Path(shutil.copytree(fused.parent, tmp_path / "project", copy_function=shutil.copy2)) / "recipe.toml"


def made(output: str) -> set[str]:
    """Titles of the stages that did something."""
    return {line.removesuffix(": started") for line in output.splitlines() if line.endswith(": started")}


def files(recipe: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of every file that was made, with the manifests."""
    root = recipe.parent / "workspace"
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.glob("*/*/**/*") if path.is_file()}


def state(recipe: Path) -> dict[str, str]:
    code, output = fuseline("status", recipe, "--json", "-w", recipe.parent / "workspace")
    assert code == 0, output
    return {f"{item['kind']}/{item['name']}": item["state"] for item in json.loads(output)["wanted"]}


def weights(export: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in export.glob("*.safetensors")}


def report_of(recipe: Path, name: str) -> dict:
    return json.loads((recipe.parent / "workspace" / "exports" / name / "merge_report.json").read_text())


def test_each_source_has_targets_and_a_model_of_its_own_and_all_models_are_merged_and_evaluated(fused):
    workspace = fused.parent / "workspace"
    target = Dataset.open(workspace / "distributions" / "target").fingerprint
    for source in ("source", "other"):
        own = Dataset.open(workspace / "distributions" / source).fingerprint
        sources = Dataset.open(workspace / "targets" / f"fused--{source}").identity["sources"]
        assert [parts[0] for parts in sources] == [target, own]
    with catalog.reading(Workspace.open(workspace)) as connection:
        evaluated = {model for (model,) in connection.execute("SELECT DISTINCT model FROM evaluations").fetchall()}
        merges = connection.execute("SELECT dataset, status FROM runs WHERE stage = 'merge'").fetchall()
    assert evaluated == {"target", "source", "other", "fused--source", "fused--other", "merged-2"}
    assert merges == [("merged-2", "done")]
    assert set(state(fused).values()) == {"done"}
    code, output = fuseline("report", "-w", workspace)
    assert (code, output.count("| merged-2")) == (0, 2)


def test_the_card_of_the_merged_model_says_what_it_comes_from_down_to_the_documents(fused):
    workspace = fused.parent / "workspace"
    comes_from = report_of(fused, "merged-2")["lineage"]
    assert json.dumps(comes_from, indent=2, ensure_ascii=False) in (workspace / "exports" / "merged-2" / "README.md").read_text()
    assert comes_from["corpus"]["fingerprint"] == Dataset.open(workspace / "corpus" / "corpus").fingerprint
    for source, training in (("source", "fused--source"), ("other", "fused--other")):
        of_model = comes_from["models"][source]
        assert (of_model["training"], list(of_model["sources"])) == (training, [source])
        assert of_model["targets"] == Dataset.open(workspace / "targets" / training).fingerprint


def test_a_source_that_is_added_makes_nothing_again_and_a_merged_model_beside_the_old_one(fused, added, models):
    recipe, runs = added
    assert runs == [
        {"distributions third", "vocabulary map third--target", "alignment third--target", "targets fused--third", "training fused--third"},
        {"training fused--third", "merge merged-3"},
        {"merge merged-3", "evaluation third", "evaluation fused--third", "evaluation merged-3"},
    ]
    assert recipe.read_text() == f'{fused.read_text()}\n\n[[sources]]\nname = "third"\nmodel = "tiny-third"\ndtype = "float32"\n'
    assert list(report_of(recipe, "merged-3")["lineage"]["models"]) == ["source", "other", "third"]
    assert set(state(recipe).values()) == {"done"}
    code, output = fuseline("run", *options(recipe, models))
    assert (code, made(output)) == (0, set()), output


def test_what_was_killed_ends_with_the_weights_of_what_was_not(added, models):
    exports = added[0].parent / "workspace" / "exports"
    assert [path.name for path in exports.iterdir() if path.name.startswith(".")] == []
    assert weights(exports / "fused--third") == weights(exports / "fused--source") != weights(exports / "fused--other")
    resumed = weights(exports / "merged-3")
    shutil.rmtree(exports / "merged-3")
    code, output = fuseline("eval", *options(added[0], models))
    assert (code, made(output)) == (0, {"merge merged-3"}), output
    assert weights(exports / "merged-3") == resumed


def test_the_costs_of_a_source_that_would_be_added_are_reported_and_nothing_is_changed(project, models):
    text, before = project.read_text(), files(project)
    code, output = fuseline("fuse", "add-source", *options(project, models), *THIRD, "--dry-run")
    assert code == 0, output
    assert all(stage in output for stage in ("targets fused--third", "training fused--third", "merge merged-3"))
    assert (project.read_text(), files(project)) == (text, before)


def test_all_sources_at_once_are_a_baseline_of_their_own(project, models):
    project.write_text(project.read_text() + "\nall_at_once = true\n")
    assert {what for what, how in state(project).items() if how != "done"} == {
        "targets/fused-all-2", "training/fused-all-2", "evaluations/fused-all-2--test",
    }  # fmt: skip
    code, output = fuseline("fuse", *options(project, models))
    assert (code, made(output)) == (0, {"targets fused-all-2"}), output
    names = [Dataset.open(project.parent / "workspace" / "distributions" / name).fingerprint for name in ("target", "source", "other")]
    stored = Dataset.open(project.parent / "workspace" / "targets" / "fused-all-2").identity["sources"]
    assert [parts[0] for parts in stored] == names
    code, output = fuseline("train", *options(project, models), "--only", "fused-all-2", "--prepare")
    assert (code, "training fused-all-2 is prepared" in output) == (0, True), output
    job = TrainJob.load(project.parent / "workspace" / "runs" / "fused-all-2")
    assert (job.targets_folder.name, list(job.lineage["sources"])) == ("fused-all-2", ["source", "other"])


def test_a_merge_of_other_models_under_a_taken_name_is_reported_before_anything_is_trained(project, models):
    before, text = files(project), project.read_text()
    project.write_text(text.replace("[merge]", "[merge]\ndensity = 0.5"))
    assert {what for what, how in state(project).items() if how != "done"} == {"merge/merged-2"}
    code, output = fuseline("run", *options(project, models))
    assert (code, made(output)) == (1, set())
    assert "  exports/merged-2\n    settings.density: stored 0.1, asked for 0.5\n" in output
    assert '  [merge]\n  name = "merged-3"\n' in output
    # Another second source: the number of sources, and so the name, is that of before.
    project.write_text(text.replace('name = "other"', 'name = "third"').replace('model = "tiny-other"', 'model = "tiny-third"'))
    assert (state(project)["merge/merged-2"], state(project)["training/fused--third"]) == ("different inputs", "missing")
    code, output = fuseline("run", *options(project, models))
    assert (code, made(output)) == (1, set())
    assert "  exports/merged-2\n    trainings.other: stored" in output
    assert "    trainings.third: stored nothing, asked for" in output
    after = files(project)
    assert {path: after.get(path) for path in before} == before


def test_the_baseline_on_text_is_the_same_training_whichever_sources_there_are_and_in_whichever_order(project, models):
    first, *middle, last = project.read_text().replace("clm_baseline = false", "clm_baseline = true").split("[[sources]]")
    source, (other, rest) = middle[0].split("[training]")[0], last.split("[merge]")
    training = middle[0].removeprefix(source)
    jobs = []
    for sources in ([source, other], [other, source], [other]):
        project.write_text(first + "".join(f"[[sources]]{table}\n" for table in sources) + training + "[merge]" + rest)
        code, output = fuseline("train", *options(project, models), "--only", "clm", "--prepare")
        assert code == 0, output
        jobs.append(TrainJob.load(project.parent / "workspace" / "runs" / "clm"))
    assert [job.targets_folder.name for job in jobs] == ["target"] * 3  # whose tokens it reads
    assert [job.identity for job in jobs] == [jobs[0].identity] * 3
    assert [job.lineage for job in jobs] == [jobs[0].lineage] * 3
    assert "sources" not in jobs[0].lineage


@pytest.mark.parametrize(
    ("new", "code", "message"),
    [
        (("--name", "third", "--model", "tiny-nowhere"), 1, "tiny-nowhere"),
        (("--name", "source", "--model", "tiny-third"), 2, "--name (source) must be a new name"),
        (("--name", "a b", "--model", "tiny-third"), 2, "--name: 'a b' is wrong"),
        (("--name", "third"), 2, "Missing option '--model'"),
    ],
)
def test_a_source_that_cannot_be_added_is_reported_and_the_recipe_stays(project, models, new, code, message):
    text, before = project.read_bytes(), files(project)
    found, output = fuseline("fuse", "add-source", *options(project, models), *new)
    assert (found, message in output) == (code, True), output
    assert (project.read_bytes(), files(project)) == (text, before)


def test_a_source_is_not_added_to_what_is_of_other_inputs_or_fuses_all_at_once(project, models):
    new = ("--name", "third", "--model", "tiny-third")
    text = project.read_text()
    project.write_text(text.replace("[merge]", '[fusion]\nmethod = "avgce"\n[merge]'))
    code, output = fuseline("fuse", "add-source", *options(project, models), *new)
    assert (code, "These were made from different inputs: targets/fused--source" in output) == (2, True), output
    project.write_text(text.replace("[merge]\n", ""))
    code, output = fuseline("fuse", "add-source", *options(project, models), *new)
    assert (code, "has no [merge]" in output) == (2, True), output
    assert "third" not in project.read_text()
