"""`store repair` makes again exactly what is damaged or gone, with the same bits, wherever it is interrupted."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.pipeline.pipeline import Pipeline
from fuseline.store import catalog
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.fingerprint import sealed
from fuseline.store.verify import verify
from fuseline.store.workspace import Workspace
from support.workspaces import contents, write_project

STAGES = (("ingest", "corpus"), ("ingest", "distributions"), ("align",), ("fuse",))


def fuseline(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def project(tmp_path_factory, corpus_texts) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), texts=corpus_texts)


@pytest.fixture(scope="module")
def fused(project, models_dir, tmp_path_factory) -> Path:
    workspace = tmp_path_factory.mktemp("fused") / "workspace"
    for stage in STAGES:
        code, output = fuseline(*stage, project, "-w", workspace, "--models", models_dir)
        assert code == 0, output
    return workspace


@pytest.fixture
def workspace(fused, tmp_path) -> Path:
    return Path(shutil.copytree(fused, tmp_path / "workspace"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage(workspace: Path) -> set[str]:
    """One part of each kind of dataset, each in another way; returns how a repair names them."""
    flip(workspace / "corpus" / "corpus" / "part-00001.parquet")
    shutil.rmtree(workspace / "distributions" / "source" / "part-00000.zarr")
    manifest = workspace / "distributions" / "target" / "part-00002.json"
    manifest.write_bytes(manifest.read_bytes()[:200])
    (workspace / "alignments" / "source--target" / "part-00003.json").unlink()
    flip(workspace / "vocab_maps" / "source--target--prefix" / "part-00000.parquet")
    flip(workspace / "targets" / "fused" / "part-00001.zarr" / "topk_ids_TK" / "c" / "0" / "0")
    (workspace / "targets" / "fused" / "part-00004.zarr" / "zarr.json").unlink()
    return {
        "corpus/corpus part 1", "distributions/source part 0", "distributions/target part 2", "alignments/source--target part 3",
        "vocab_maps/source--target--prefix part 0", "targets/fused part 1", "targets/fused part 4",
    }  # fmt: skip


def test_what_is_damaged_or_gone_is_made_again_and_nothing_else(project, models_dir, workspace, fused):
    expected = damage(workspace)
    kept = {path: path.stat().st_mtime_ns for path in workspace.glob("*/*/part-*.json")}
    options = (project, "-w", workspace, "--models", models_dir, "--full")
    code, output = fuseline("store", "verify", "-w", workspace, "--full")
    assert code == 1
    assert len([line for line in output.splitlines() if "store repair" in line]) == len(expected)
    code, output = fuseline("store", "repair", *options, "--dry-run")
    assert (code, "7 problems" in output) == (0, True)
    assert verify(Workspace.open(workspace), full=True).lost_parts
    code, output = fuseline("store", "repair", *options)
    assert code == 0, output
    assert {line.split(": ")[0] for line in output.splitlines() if line.endswith(": made again")} == expected
    changed = {path for path, moment in kept.items() if path.stat().st_mtime_ns != moment}
    assert len(changed) == len(expected) - 1, "the manifest that was gone is not among those that were kept"
    assert contents(workspace) == contents(fused)
    assert not (workspace / "repair.json").exists()
    assert fuseline("store", "verify", "-w", workspace, "--full") == (0, fuseline("store", "verify", "-w", workspace, "--full")[1])
    code, output = fuseline("store", "repair", *options)
    assert (code, "Nothing to repair." in output) == (0, True)


def test_an_interrupted_repair_goes_on_where_it_was(project, models_dir, workspace, fused, monkeypatch):
    expected = damage(workspace)
    options = (project, "-w", workspace, "--models", models_dir, "--full")
    make, left = Pipeline.make_parts, 2

    def interrupted(self, product, *, parts):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        make(self, product, parts=parts)

    monkeypatch.setattr(Pipeline, "make_parts", interrupted)
    assert fuseline("store", "repair", *options)[0] == 130
    assert (workspace / "repair.json").exists()
    catalog.fold(Workspace.open(workspace))  # what was set aside is no longer known there
    monkeypatch.setattr(Pipeline, "make_parts", make)
    code, output = fuseline("store", "repair", *options)
    assert code == 0, output
    assert {line.split(": ")[0] for line in output.splitlines() if line.endswith(": made again")} == expected
    assert contents(workspace) == contents(fused)


def test_what_a_repair_with_another_recipe_has_set_aside_stays_written_down(project, models_dir, workspace):
    foreign = {"part": ["distributions", "other", 3], "files": {"zarr.json": [1, 2]}}
    own = {"part": ["targets", "fused", 1], "files": {}}
    record = workspace / "repair.json"
    record.write_text(json.dumps(sealed({"parts": [foreign, own]})))
    code, output = fuseline("store", "repair", project, "-w", workspace, "--models", models_dir)
    assert code == 1
    assert "targets/fused part 1: made again" in output
    assert "other/part-00003.json: belongs to another recipe, and an interrupted repair set it aside" in output
    assert json.loads(record.read_text())["parts"] == [foreign]
    assert Dataset.open(workspace / "targets" / "fused").parts() == list(range(len(Dataset.open(workspace / "targets" / "fused").parts())))


def test_what_a_repair_wrote_down_and_cannot_be_read_is_reported(project, models_dir, workspace):
    record = workspace / "repair.json"
    damage(workspace)
    before = sorted(workspace.glob("*/*/part-*"))
    whole = json.dumps(sealed({"parts": [{"part": ["targets", "fused", 1], "files": {}}]}))
    for text in (whole[:20], "[]", "{}", whole.replace("fused", "fuzed")):
        record.write_text(text)
        code, output = fuseline("store", "repair", project, "-w", workspace, "--models", models_dir)
        assert code == 1
        assert f"{record}, the record of an interrupted repair, cannot be read" in " ".join(output.split("\n"))
        assert "Remove it" in output
    assert sorted(workspace.glob("*/*/part-*")) == before


def test_parts_that_never_were_are_left_to_run(project, models_dir, workspace):
    targets = Dataset.open(workspace / "targets" / "fused")
    targets.drop(2)
    catalog.fold(Workspace.open(workspace))  # as if it had never been
    code, output = fuseline("store", "repair", project, "-w", workspace, "--models", models_dir)
    assert (code, "Nothing to repair." in output) == (0, True)
    assert 2 not in targets.parts()


def test_a_part_that_comes_out_other_than_it_was_is_reported_and_the_catalog_has_the_new_one(project, models_dir, workspace):
    targets = Dataset.open(workspace / "targets" / "fused")
    arrays, counts = targets.arrays(0), targets.manifest(0).counts
    data = {name: arrays.read(name) for name in arrays.names}
    targets.drop(0)
    other = data | {"lost_mass_S": data["lost_mass_S"] + 1}
    targets.commit(0, content=PartContent(data=other, counts=counts, attributes=arrays.attributes), seconds=0)
    catalog.fold(Workspace.open(workspace))
    flip(targets.folder / "part-00000.zarr" / "token_ids_T" / "c" / "0")
    code, output = fuseline("store", "repair", project, "-w", workspace, "--models", models_dir, "--full")
    assert code == 0, output
    assert "targets/fused part 0: made again, but different from before: lost_mass_S/c/0" in output
    assert targets.read(0, "lost_mass_S")[0].tolist() == data["lost_mass_S"].tolist()
    with catalog.reading(Workspace.open(workspace)) as connection:
        query = "SELECT epoch_us(committed_at) FROM parts WHERE (kind, name, part) = ('targets', 'fused', 0)"
        moments = [moment for (moment,) in connection.execute(query).fetchall()]
    assert moments == [pytest.approx(targets.manifest(0).producer["committed_at"] * 1e6, abs=2)], "the catalog must know the new one alone"


def test_the_plan_the_catalog_and_a_tokenizer_are_made_again(project, models_dir, workspace, fused):
    flip(workspace / "corpus" / "corpus" / "documents.parquet")
    (workspace / "catalog.duckdb").write_bytes(b"x" * 5000)
    tokenizer = sorted((workspace / "tokenizers").glob("*/"))[0]
    (tokenizer / "settings.json").write_text("{")
    code, output = fuseline("store", "repair", project, "-w", workspace, "--models", models_dir, "--full")
    assert code == 0, output
    assert verify(Workspace.open(workspace), full=True).findings == []
    assert contents(workspace) == contents(fused)


def test_what_another_recipe_made_is_left_and_reported(project, models_dir, workspace):
    other = Dataset.create(workspace / "vocab_maps" / "other--target", identity={"source": "a", "target": "b"})
    rules = pl.DataFrame({"source_id": [0], "target_id": [0], "rule": ["exact"]})
    other.commit(0, content=PartContent(data=rules, counts={}), seconds=0)
    catalog.fold(Workspace.open(workspace))
    flip(other.folder / "part-00000.parquet")
    code, output = fuseline("store", "repair", project, "-w", workspace, "--models", models_dir, "--full")
    assert code == 1
    assert "not repaired" in output
    assert "other--target" in output
    assert other.manifest_path(0).exists()


def test_a_recipe_that_asks_for_something_else_changes_nothing(project, models_dir, workspace):
    damage(workspace)
    before = sorted(workspace.glob("*/*/part-*"))
    recipe = project.with_name("other.toml")
    recipe.write_text(project.read_text().replace("[training]", "[distributions]\ntop_k = 5\n\n[training]", 1))
    code, output = fuseline("store", "repair", recipe, "-w", workspace, "--models", models_dir)
    assert code == 1
    assert "top_k: stored 10, asked for 5" in output
    assert sorted(workspace.glob("*/*/part-*")) == before


def test_the_other_commands_of_the_store_say_what_they_saw(workspace):
    code, output = fuseline("store", "verify", "-w", workspace)
    assert code == 0
    assert "5 datasets" in output or "6 datasets" in output
    assert "no problems" in output
    found = json.loads(fuseline("store", "verify", "-w", workspace, "--json")[1])
    assert found["findings"] == []
    assert found["parts"] > 10
    usage = json.loads(fuseline("store", "du", "-w", workspace, "--json")[1])
    assert usage["n_bytes"] == found["n_bytes"]
    assert "topk_logprobs_TK" in fuseline("store", "du", "-w", workspace)[1]
    code, output = fuseline("store", "gc", "-w", workspace)
    assert (code, output.strip()) == (0, "0 to remove, 0 B. Nothing to do.")
    with Workspace.open(workspace).coordinator():
        code, output = fuseline("store", "gc", "-w", workspace, "--delete")
        assert (code, "in use by" in output) == (1, True)
        assert fuseline("store", "verify", "-w", workspace)[0] == 0


def test_the_codec_of_the_recipe_reaches_distributions_and_targets(project, models_dir, fused, tmp_path):
    recipe = project.with_name("q8.toml")
    recipe.write_text(project.read_text().replace("[training]", '[distributions]\ncodec = "q8"\n\n[training]', 1))
    for stage in STAGES:
        code, output = fuseline(*stage, recipe, "-w", tmp_path / "q8", "--models", models_dir)
        assert code == 0, output
    for name in ("distributions/source", "targets/fused"):
        exact, coarse = (Dataset.open(root / name) for root in (fused, tmp_path / "q8"))
        assert exact.fingerprint != coarse.fingerprint
        (half,), (decoded,) = (dataset.read(0, "topk_logprobs_TK") for dataset in (exact, coarse))
        assert (half.dtype, decoded.dtype) == ("float16", "float32")
    code, output = fuseline("fuse", recipe, "-w", fused, "--models", models_dir)
    assert code == 1
    assert 'codec: stored "f16", asked for "q8"' in output
    assert verify(Workspace.open(tmp_path / "q8"), full=True).findings == []
