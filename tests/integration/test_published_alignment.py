"""The published ways to align, from a recipe to fused targets, side by side in one workspace."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fuseline.align.dtw import Side, Spellings, agreeing_positions, warp
from fuseline.align.vocabulary import target_ids
from fuseline.store import durable
from fuseline.store.dataset import Dataset
from fuseline.store.tokenizer import Tokenizer
from fuseline.store.workspace import Workspace
from support.workspaces import RECIPE, contents, write_project

WAYS = {
    "em": 'positions = "dtw"\ndtw_match = "em"\nvocabulary = "exact"',
    "fusellm": 'positions = "dtw"\nvocabulary = "mined_published"\ncollisions = "first"',
    "fusechat": 'positions = "dtw"\ndtw_match = "fusechat"\nvocabulary = "stat"',
    "spans": 'positions = "span"\nvocabulary = "stat"',
}
DATASETS = {
    "em": {"vocab_maps/source--target--exact", "alignments/source--target--dtw-em"},
    "fusellm": {"vocab_maps/source--target--mined_published", "alignments/source--target--dtw-mined-mined_published"},
    "fusechat": {
        "token_matches/source--target--dtw",
        "vocab_maps/source--target--stat-dtw",
        "alignments/source--target--dtw-fusechat-stat",
    },
    "spans": {"token_matches/source--target--span", "vocab_maps/source--target--stat-span", "alignments/source--target--span"},
}


def fuseline(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fuseline", *map(str, arguments)], capture_output=True, text=True, check=False)


def recipe_of(folder: Path, way: str) -> Path:
    return folder / f"{way}.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus_texts) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_project(folder, texts=corpus_texts)
    for way, alignment in WAYS.items():
        text = RECIPE.replace("[training]", f'[alignment]\n{alignment}\n\n[fusion]\nname = "{way}"\n\n[training]')
        recipe_of(folder, way).write_text(text)
    return folder


@pytest.fixture(scope="module")
def workspace(folder, models_dir) -> Workspace:
    """All ways, one after another; each adds its own and leaves the others' as they were."""
    path, before = folder / "workspace", {}
    for stage in (("ingest", "corpus"), ("ingest", "distributions")):
        result = fuseline(*stage, recipe_of(folder, "em"), "-w", path, "--models", models_dir)
        assert result.returncode == 0, result.stderr
    for way, datasets in DATASETS.items():
        before = contents(path)
        for stage in ("align", "fuse"):
            result = fuseline(stage, recipe_of(folder, way), "-w", path, "--models", models_dir)
            assert result.returncode == 0, result.stderr
        after = contents(path)
        assert {key: after[key] for key in before} == before
        assert {key.rsplit("/", 1)[0] for key in after.keys() - before.keys()} == datasets | {f"targets/{way}"}
    return Workspace.open(path)


def test_a_second_time_nothing_is_done(folder, models_dir, workspace):
    for way in WAYS:
        result = fuseline("align", recipe_of(folder, way), "-w", workspace.root, "--models", models_dir)
        lines = [line for line in result.stderr.splitlines() if line.startswith(("token matches", "vocabulary map", "alignment"))]
        assert len(lines) == len(DATASETS[way])
        assert all("nothing to do" in line for line in lines)


def test_the_stored_maps_are_those_of_the_methods(workspace):
    """The stages join the parts of the methods, which have tests of their own, with the stored tokens."""
    source, target = (Dataset.open(workspace.folder("distributions", name)) for name in ("source", "target"))
    tokenizers = [Tokenizer.load(workspace.folder("tokenizers", dataset.identity["tokenizer"])) for dataset in (source, target)]
    spellings = Spellings.of_tokenizers(tokenizers[0], target=tokenizers[1])
    counted = []
    for part in target.parts():
        sides = []
        for dataset, tokenizer in zip((source, target), tokenizers, strict=True):
            token_ids_T, offsets = dataset.read(part, "token_ids_T", "segment_offsets")
            sides.append(Side(token_ids_T=token_ids_T, offsets=offsets, bos_id=tokenizer.roles["bos"] if tokenizer.prepends_bos else None))
        n_segments = len(sides[1].offsets) - 1
        matches = warp(sides[0], target=sides[1], source_segment_of_S=np.arange(n_segments), spellings=spellings)
        for name, match, map_name in (
            ("dtw-em", "em", None),
            ("dtw-mined-mined_published", "mined", "mined_published"),
            ("dtw-fusechat-stat", "fusechat", "stat-dtw"),
        ):
            map_V = target_ids(Dataset.open(workspace.folder("vocab_maps", f"source--target--{map_name}")).table(0)) if map_name else None
            expected_T = agreeing_positions(matches, source=sides[0], target=sides[1], spellings=spellings, match=match, target_ids_V=map_V)
            alignment = Dataset.open(workspace.folder("alignments", f"source--target--{name}"))
            position_T, n_aligned_S, cost_S = alignment.read(part, "source_position_T", "n_aligned_S", "cost_S")
            assert position_T.tolist() == expected_T.tolist()
            assert n_aligned_S.sum() == (expected_T >= 0).sum() > len(expected_T) / 4
            assert cost_S.tolist() == matches.cost_S.tolist()
        source_P, target_P = matches.pairs()
        counted.append(pl.DataFrame({"source_id": sides[0].token_ids_T[source_P], "target_id": sides[1].token_ids_T[target_P]}))
    total = pl.concat(counted).group_by("source_id", "target_id").len()
    stored = workspace.sql(
        "SELECT source_id, target_id, sum(count) AS count FROM token_matches WHERE name = 'source--target--dtw' GROUP BY ALL"
    )
    assert dict(zip(stored.select("source_id", "target_id").rows(), stored["count"], strict=True)) == {
        (source_id, target_id): count for source_id, target_id, count in total.iter_rows()
    }
    rows = workspace.sql("SELECT * FROM vocab_map_entries WHERE name = 'source--target--stat-dtw' AND rule = 'stat'")
    assert len(rows) > 20
    most = stored.group_by("source_id").agg(pl.max("count"))
    assert rows.join(most, on="source_id", suffix="_most").filter(pl.col("count") != pl.col("count_most")).is_empty()


def test_collisions_are_dropped_as_asked(workspace):
    """Of several tokens on one the first is kept, and the others' mass is lost; elsewhere it joins the first's."""
    masses = {}
    for name in WAYS:
        targets = Dataset.open(workspace.folder("targets", name))
        rows = [targets.read(part, "n_spoken_SN", "merged_SN", "lost_SN") for part in targets.parts()]
        spoken_S, merged_S, lost_S = (np.concatenate([row[i][:, 1] for row in rows]) for i in range(3))
        assert spoken_S.sum() > 0
        masses[name] = (np.nansum(merged_S), np.nansum(lost_S))
    assert masses["fusellm"][0] == 0
    assert masses["fusellm"][1] > 0
    assert masses["fusechat"][0] > 0
    assert masses["spans"][0] > 0


def test_everything_is_found_in_order_and_repaired_when_it_is_lost(folder, models_dir, workspace):
    result = fuseline("store", "verify", "--full", "-w", workspace.root)
    assert result.returncode == 0, result.stdout + result.stderr
    before = contents(workspace.root)
    for name in DATASETS["fusechat"]:
        durable.remove(workspace.root / name / Dataset.open(workspace.root / name).manifest(0).payload)
    result = fuseline("store", "repair", recipe_of(folder, "fusechat"), "-w", workspace.root, "--models", models_dir)
    assert result.returncode == 0, result.stdout + result.stderr
    assert contents(workspace.root) == before


def test_a_plan_and_the_status_name_the_matches(folder, models_dir, workspace):
    result = fuseline("run", recipe_of(folder, "spans"), "--dry-run", "-w", workspace.root, "--models", models_dir)
    assert result.returncode == 0, result.stderr
    assert "token matches source--target" in result.stdout
    assert "source--target--span" in fuseline("status", "-w", workspace.root).stdout
