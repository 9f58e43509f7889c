"""A source, or a target, that is added later: only what is new is made, nothing that is there is touched, and both are reported."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.store.dataset import Dataset
from fuseline.store.workspace import Workspace
from support.tiny import save_model
from support.workspaces import RECIPE, write_project

OTHER_SOURCE = '[[sources]]\nname = "other"\nmodel = "tiny-other"\ndtype = "float32"\n\n[training]'
RENAMED = '[fusion]\nname = "three"\n\n[training]\nname = "three"'


@pytest.fixture(scope="module")
def models(tmp_path_factory, models_dir, byte_level_folder) -> Path:
    folder = Path(shutil.copytree(models_dir, tmp_path_factory.mktemp("more") / "models"))
    save_model(folder / "tiny-other", tokenizer_folder=byte_level_folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory, corpus_texts, models) -> Path:
    """A project that has fused one source, with its workspace beside it."""
    recipe = write_project(
        tmp_path_factory.mktemp("adding") / "project", texts=corpus_texts, recipe=RECIPE.replace("steps = 24", "steps = 2")
    )
    code, output = fuseline("run", recipe, models=models)
    assert code == 0, output
    return recipe.parent


@pytest.fixture
def project(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "project", copy_function=shutil.copy2))


def fuseline(*arguments: object, models: Path | None = None) -> tuple[int, str]:
    workspace = next(Path(str(argument)).parent / "workspace" for argument in arguments if str(argument).endswith(".toml"))
    options = [] if models is None else ["--models", models]
    result = CliRunner().invoke(main, [*map(str, [*arguments, "-w", workspace, *options])])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def write(project: Path, *replacements: tuple[str, str]) -> Path:
    text = (project / "recipe.toml").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = project / "more.toml"
    path.write_text(text)
    return path


def files(project: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of every file of datasets, trainings and exports."""
    kinds = ("corpus", "distributions", "vocab_maps", "alignments", "targets", "runs", "exports", "evaluations", "tokenizers")
    found = [path for kind in kinds for path in (project / "workspace" / kind).rglob("*") if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def made(output: str) -> set[str]:
    """Titles of the stages that did something."""
    return {line.removesuffix(": started") for line in output.splitlines() if line.endswith(": started")}


def state(project: Path, recipe: Path) -> dict[str, str]:
    code, output = fuseline("status", recipe, "--json")
    assert code == 0, output
    return {f"{item['kind']}/{item['name']}": item["state"] for item in json.loads(output)["wanted"]}


def test_one_more_source_makes_only_what_is_new(project, models):
    before = files(project)
    recipe = write(project, ("[training]", OTHER_SOURCE), ("[training]", RENAMED))
    assert state(project, recipe) == {
        "corpus/corpus": "done", "distributions/target": "done", "distributions/source": "done", "distributions/other": "missing",
        "vocab_maps/source--target--prefix": "done", "alignments/source--target": "done",
        "vocab_maps/other--target--prefix": "missing", "alignments/other--target": "missing", "targets/three": "missing",
        "training/clm": "done", "training/three": "missing", "evaluations/target--test": "done", "evaluations/source--test": "done",
        "evaluations/other--test": "missing", "evaluations/clm--test": "done", "evaluations/three--test": "missing",
    }  # fmt: skip
    code, output = fuseline("run", recipe, models=models)
    assert code == 0, output
    assert made(output) == {
        "distributions other", "vocabulary map other--target", "alignment other--target", "targets three", "training three",
        "evaluation other", "evaluation three",
    }  # fmt: skip
    assert {path: seen for path, seen in files(project).items() if path in before} == before
    assert set(state(project, recipe).values()) == {"done"}
    code, output = fuseline("status", recipe)
    assert "Nothing is missing." in output


def test_another_target_for_the_same_sources_makes_only_what_is_new(project, models):
    before = files(project)
    target = ('name = "target"\nmodel = "tiny-target"', 'name = "second"\nmodel = "tiny-other"')
    recipe = write(project, target, ("[training]", "[evaluation]\nclm_baseline = false\n\n" + RENAMED.replace("three", "second-fused")))
    assert {what for what, how in state(project, recipe).items() if how == "done"} == {
        "corpus/corpus", "distributions/source", "evaluations/source--test",
    }  # fmt: skip
    code, output = fuseline("run", recipe, models=models)
    assert code == 0, output
    assert made(output) == {
        "distributions second", "vocabulary map source--second", "alignment source--second", "targets second-fused",
        "training second-fused", "evaluation second", "evaluation second-fused",
    }  # fmt: skip
    assert {path: seen for path, seen in files(project).items() if path in before} == before


def test_names_that_are_taken_are_reported_together_before_anything_is_computed_with_names_that_are_free(project, models):
    before = files(project)
    recipe = write(project, ("[training]", OTHER_SOURCE))
    assert state(project, recipe)["targets/fused"] == "different inputs"
    code, output = fuseline("run", recipe, models=models)
    assert code == 1
    assert "targets/fused\n    sources: stored target, source; asked for target, source, other\n" in output
    assert "training fused\n    targets: stored " in output
    assert '[fusion]\n  name = "fused-2"\n' in output
    assert '[training]\n  name = "fused-2"\n' in output
    assert "clm" not in output, "the baseline learns from the text alone, and is the same"
    assert made(output) == set()
    assert {path: seen for path, seen in files(project).items() if path in before} == before
    # What it says, done:
    recipe.write_text(recipe.read_text().replace("[training]", '[fusion]\nname = "fused-2"\n\n[training]\nname = "fused-2"'))
    for stage in (("ingest", "distributions"), ("align",), ("fuse",)):
        code, output = fuseline(*stage, recipe, models=models)
        assert code == 0, output
    assert made(output) == {"targets fused-2"}


def test_other_parameters_under_a_taken_name_are_reported_key_by_key(project, models):
    recipe = write(project, ("[training]", '[fusion]\nmethod = "avgce"\nfallback = "one_hot"\n\n[training]'))
    code, output = fuseline("fuse", recipe, models=models)
    assert code == 1
    assert '  targets/fused\n    fallback: stored "target", asked for "one_hot"\n    method: stored "mince", asked for "avgce"\n' in output
    recipe = write(project, ("[training]", "[distributions]\ntop_k = 4\n\n[training]"))
    code, output = fuseline("status", recipe)
    assert "distributions/target: top_k: stored 10, asked for 4" in output
    assert "different inputs" in output


@pytest.mark.parametrize("name", ["vocab_maps/source--target--prefix", "alignments/source--target"])
def test_what_another_version_made_is_of_other_inputs_to_the_status_as_it_is_to_a_run(project, models, name):
    folder = project / "workspace" / name
    stored = Dataset.open(folder)
    shutil.rmtree(folder)
    changed = stored.identity | {"stage": "of another version"}
    Workspace.open(project / "workspace").dataset(*name.split("/"), identity=changed, description=stored.description)
    recipe = project / "recipe.toml"
    assert state(project, recipe)[name] == "different inputs"
    code, output = fuseline("align", recipe, models=models)
    assert (code, "of another version" in output) == (1, True)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (("context_length = 128", "context_length = 64"), {"corpus/corpus"}),
        (("[training]", '[evaluation]\ndtype = "bfloat16"\n\n[training]'), {f"evaluations/{name}--test" for name in
                                                                         ("source", "target", "fused", "clm")}),
    ],
)  # fmt: skip
def test_other_choices_for_what_is_there_are_reported(project, models, change, names):
    recipe = write(project, change)
    found = {what for what, how in state(project, recipe).items() if how == "different inputs"}
    assert names <= found
    assert found <= names | {"targets/fused", "training/fused"}
    code, output = fuseline("run", recipe, models=models)
    assert (code, "asked for" in output) == (1, True)


def test_weights_of_a_domain_that_the_corpus_has_not_are_reported_before_anything_is_computed(project, models):
    fixed = '[fusion]\nname = "fixed"\nmethod = "fixed"\nweights = {source = 1}\n[fusion.domain_weights.%s]\ntarget = 1\n\n'
    fixed += '[training]\nname = "fixed"'
    code, output = fuseline("run", write(project, ("[training]", fixed % "nowhere")), models=models)
    assert (code, made(output)) == (2, set())
    assert "fusion.domain_weights: nowhere must be domains of the corpus: even, odd." in output
    code, output = fuseline("run", write(project, ("[training]", "[training.domain_weights]\nelsewhere = 2\n[training]")), models=models)
    assert (code, made(output)) == (2, set())
    assert "training.domain_weights: elsewhere must be domains of the corpus: even, odd." in output
    code, output = fuseline("fuse", write(project, ("[training]", fixed % "even")), models=models)
    assert code == 0, output
