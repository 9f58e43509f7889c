"""`verify` tells all damage by path, and no damage where there is none; `gc` takes only what nobody needs; `du` adds up."""

import json
import os
import pickle
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zarr
from fuseline.store import catalog, durable, upkeep
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.errors import DamagedPart, FuselineError, NewerPart
from fuseline.store.fingerprint import sealed
from fuseline.store.status import dataset_statuses
from fuseline.store.upkeep import delete, leftovers, usage
from fuseline.store.verify import verify
from fuseline.store.workspace import Workspace
from support.small import small_workspace


@pytest.fixture(scope="module")
def made(tmp_path_factory, byte_level_folder) -> Path:
    return small_workspace(tmp_path_factory.mktemp("small") / "workspace", tokenizer_folder=byte_level_folder).root


@pytest.fixture
def workspace(made, tmp_path) -> Workspace:
    return Workspace.open(Path(shutil.copytree(made, tmp_path / "workspace")))


def problems(workspace: Workspace, *, full: bool = False) -> list[tuple[str, str]]:
    return [(str(finding.path.relative_to(workspace.root)), finding.problem) for finding in verify(workspace, full=full).findings]


def dataset(workspace: Workspace, path: str) -> Dataset:
    return Dataset.open(workspace.root / path)


@pytest.mark.parametrize("full", [False, True])
def test_nothing_is_wrong_with_a_sound_workspace(workspace, full):
    found = verify(workspace, full=full)
    assert found.findings == []
    assert (found.datasets, found.parts) == (6, 11)
    assert found.n_bytes == sum(item.n_bytes for item in usage(workspace)) > 0


def read_all(workspace: Workspace) -> dict[str, object]:
    """Everything that readers get of all datasets; what they refuse to read is None."""
    found: dict[str, object] = {}
    for item in workspace.datasets():
        for part in item.parts():
            try:
                key, manifest = f"{item.kind}/{item.name}/{part}", item.manifest(part)
                found[f"{key}/counts"] = manifest.counts
                if manifest.payload.endswith(".parquet"):
                    found[key] = item.table(part).rows()
                    continue
                arrays = item.arrays(part)
            except FuselineError:
                continue
            found[f"{key}/attributes"] = dict(arrays.attributes)
            for name in arrays.names:
                try:
                    found[f"{key}/{name}"] = arrays.read(name).tobytes()
                except DamagedPart:
                    continue
    return found


def test_a_flipped_bit_in_any_file_is_reported_and_nothing_is_silently_wrong(workspace):
    """Every file of every kind of payload, and the small files around them, at several random places."""
    for folder in ("targets", "alignments", "vocab_maps", "distributions/target"):  # what is left has every kind of file
        shutil.rmtree(workspace.root / folder)
    catalog.fold(workspace)
    assert problems(workspace) == []
    reference, generator = read_all(workspace), random.Random(0)
    files = [path for kind in ("corpus", "distributions") for path in sorted((workspace.root / kind).rglob("*")) if path.is_file()]
    files = [path for path in files if "part-00001" not in str(path)]
    assert len(files) > 25
    for path in files:
        whole = path.read_bytes()
        for bit in generator.sample(range(8 * len(whole)), 3):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            found = problems(workspace, full=True)
            assert found, (path, bit)
            assert any(str(path) in f"{workspace.root}/{where}: {problem}" for where, problem in found), (path, found)
            if path.name == "dataset.json":
                with pytest.raises(DamagedPart, match="Remove"):
                    list(workspace.datasets())
            else:
                read = read_all(workspace)
                assert {key: value for key, value in read.items() if value != reference[key]} == {}, (path, bit)
        path.write_bytes(whole)
    assert problems(workspace, full=True) == []


@pytest.mark.parametrize("path", ["targets/fused/dataset.json", "corpus/corpus/plan.json", "distributions/target/part-00001.json"])
def test_a_small_file_cut_short_at_any_length_is_reported(workspace, path):
    whole = (workspace.root / path).read_bytes()
    for n_left in range(0, len(whole.rstrip()), max(1, len(whole) // 12)):
        (workspace.root / path).write_bytes(whole[:n_left])
        assert any(path in f"{where}: {problem}" for where, problem in problems(workspace))


def test_a_part_that_the_catalog_knows_and_that_is_gone_is_reported(workspace):
    fused = dataset(workspace, "targets/fused")
    fused.drop(0)
    shutil.rmtree(workspace.root / "distributions" / "source" / "part-00001.zarr")
    found = verify(workspace)
    assert found.lost_parts == {("targets", "fused", 0), ("distributions", "source", 1)}
    assert "is missing: the catalog lists this part" in dict(problems(workspace))["targets/fused/part-00000.json"]


@pytest.mark.parametrize("share", [None, 0, 0.001, 0.02, 0.3, 0.6, 0.9])
def test_a_missing_or_truncated_catalog_is_reported_and_made_again(workspace, share):
    path, tables = workspace.catalog_path, _tables(workspace)
    if share is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    found = problems(workspace, full=True)
    assert [where for where, _ in found] == ["catalog.duckdb"]
    durable.remove(path)
    catalog.fold(workspace)
    assert problems(workspace, full=True) == []
    assert _tables(workspace) == tables


def test_datasets_that_do_not_fit_together_are_reported(workspace):
    shutil.rmtree(workspace.root / "distributions" / "source")
    catalog.fold(workspace)
    found = dict(problems(workspace))
    for name in ("alignments/source--target", "targets/fused"):
        assert "was made from a dataset that no longer exists here" in found[f"{name}/dataset.json"]
    shutil.rmtree(next((workspace.root / "tokenizers").glob("*/")))
    assert any("needs the tokenizer" in problem for _, problem in problems(workspace))


def test_another_corpus_of_the_same_name_is_reported(workspace):
    shutil.rmtree(workspace.root / "corpus")
    workspace.dataset("corpus", "corpus", identity={"context_length": 32, "segmented_for": []})
    catalog.fold(workspace)
    texts = [problem for where, problem in problems(workspace) if where == "distributions/target/dataset.json"]
    assert any("was made from a different corpus than the current corpus/corpus" in text for text in texts)


def recommit(workspace: Workspace, path: str, **changes) -> None:
    """Part 0 of a dataset with other arrays or counts, committed as if a stage had made it so."""
    item = dataset(workspace, path)
    arrays, manifest = item.arrays(0), item.manifest(0)
    group = zarr.open_group(item.folder / manifest.payload, mode="r")  # also where the counts do not fit
    data = {name: np.asarray(group[name]) for name in arrays.names}
    counts = manifest.counts | {name: value for name, value in changes.items() if name in manifest.counts}
    data |= {name: value for name, value in changes.items() if name in data}
    item.drop(0)
    item.commit(0, content=PartContent(data=data, counts=counts, attributes=arrays.attributes), seconds=0)


def test_targets_with_other_counts_than_the_target_models_are_reported(workspace):
    recommit(workspace, "targets/fused", tokens=3)
    ((where, problem),) = problems(workspace)
    assert where == "targets/fused/part-00000.json"
    assert "has 3 tokens, but distributions/target has" in problem


def test_contents_that_make_no_sense_are_reported_by_reading_everything(workspace):
    item = dataset(workspace, "distributions/target")
    (offsets, ids_T) = item.read(0, "segment_offsets", "token_ids_T")
    too_large = ids_T.copy()
    too_large[3] = 60_000
    for change, message in [
        ({"segment_offsets": offsets[::-1].copy()}, "segment_offsets must rise from 0"),
        ({"token_ids_T": ids_T[:-1]}, "the array token_ids_T cannot be read (it has"),
        ({"token_ids_T": too_large}, "has the id 60000, which must be below vocab_size"),
        ({"topk_ids_TK": np.zeros((2, 3), np.uint16)}, "the array topk_ids_TK cannot be read (it has 2 rows"),
    ]:
        recommit(workspace, "distributions/target", **{"segment_offsets": offsets, "token_ids_T": ids_T} | change)
        assert problems(workspace) == []
        ((where, problem),) = problems(workspace, full=True)
        assert where == "distributions/target/part-00000.json"
        assert message in problem
        if "topk_ids_TK" in change:
            break


def test_sources_of_targets_that_make_no_sense_are_reported_by_reading_everything(workspace):
    names = ("weight_SN", "lost_SN", "source_S")
    weight_SN, lost_SN, source_S = dataset(workspace, "targets/fused").read(0, *names)
    for change, message in [
        ({"weight_SN": weight_SN / 2}, "weight_SN must sum to 1 over the sources"),
        ({"lost_SN": lost_SN + 0.25}, "mapped_SN, merged_SN, lost_SN and tail_SN must sum to 1"),
        ({"source_S": np.full_like(source_S, 7)}, "source_S has the source 7, but there are 2 sources"),
        ({"weight_SN": weight_SN[:, :1]}, "weight_SN has 1 columns, but there are 2 sources"),
        ({"lost_SN": lost_SN[:1]}, "the array lost_SN cannot be read (it has 1 rows"),
    ]:
        recommit(workspace, "targets/fused", **dict(zip(names, (weight_SN, lost_SN, source_S), strict=True)) | change)
        assert problems(workspace) == []
        ((where, problem),) = problems(workspace, full=True)
        assert where == "targets/fused/part-00000.json"
        assert message in problem


def counted_matches(workspace: Workspace, rows: list[tuple[int, int, int]]) -> Dataset:
    """Token matches of part 0 with these rows, and a vocabulary map that was made from them."""
    source, target = (dataset(workspace, f"distributions/{name}") for name in ("source", "target"))
    identity = {"source": source.fingerprint, "target": target.fingerprint, "positions": "span"}
    matches = workspace.dataset("token_matches", "source--target--span", identity=identity, description={"corpus": "corpus"})
    table = pl.DataFrame(rows, schema={"source_id": pl.UInt32, "target_id": pl.UInt32, "count": pl.UInt64}, orient="row")
    matches.commit(0, content=PartContent(data=table, counts={"tokens": target.manifest(0).counts["tokens"]}), seconds=0)
    tokenizer = target.identity["tokenizer"]
    identity = {"source": tokenizer, "target": tokenizer, "matches": matches.fingerprint}
    vocab_map = workspace.dataset("vocab_maps", "source--target--stat-span", identity=identity)
    rules = pl.DataFrame({"source_id": [0, 1], "target_id": [0, None], "rule": ["stat", "none"]})
    vocab_map.commit(0, content=PartContent(data=rules, counts={"mapped": 1}), seconds=0)
    catalog.fold(workspace)
    return matches


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(1, 2, 3), (1, 3, 1), (2, 2, 1)], None),
        ([(1, 2, 3), (1, 3, 0)], "a pair of tokens has count 0"),
        ([(1, 2, 3), (1, 2, 1)], "a pair of tokens has several rows"),
    ],
)
def test_counts_of_matches_that_make_no_sense_are_reported(workspace, rows, message):
    counted_matches(workspace, rows)
    assert problems(workspace) == []
    found = problems(workspace, full=True)
    assert [(where, message in problem) for where, problem in found] == (
        [("token_matches/source--target--span/part-00000.json", True)] if message else []
    )


def test_a_map_whose_matches_are_gone_is_reported(workspace):
    matches = counted_matches(workspace, [(1, 2, 3)])
    shutil.rmtree(matches.folder)
    catalog.fold(workspace)
    assert (
        "was made from a dataset that no longer exists here"
        in dict(problems(workspace))["vocab_maps/source--target--stat-span/dataset.json"]
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"source_id": [0, 2], "target_id": [0, None], "rule": ["exact", "none"]}, "source_id must count from 0 to 1"),
        ({"source_id": [0, 1], "target_id": [0, None], "rule": ["exact", "mined"]}, "token 1 has a target_id that contradicts"),
    ],
)
def test_a_vocabulary_map_that_makes_no_sense_is_reported(workspace, columns, message):
    vocab_map = dataset(workspace, "vocab_maps/source--target")
    vocab_map.drop(0)
    vocab_map.commit(0, content=PartContent(data=pl.DataFrame(columns), counts={"mapped": 1}), seconds=0)
    assert problems(workspace) == []
    ((_, problem),) = problems(workspace, full=True)
    assert message in problem


def test_text_that_is_not_its_documents_is_reported(workspace):
    corpus = dataset(workspace, "corpus/corpus")
    table, counts = corpus.table(0), corpus.manifest(0).counts
    corpus.drop(0)
    corpus.commit(0, content=PartContent(data=table.with_columns(text=pl.col("text") + "!"), counts=counts), seconds=0)
    assert problems(workspace) == []
    ((_, problem),) = problems(workspace, full=True)
    assert "the text of document 0 does not hash to its sha256" in problem


def test_a_manifest_of_another_part_or_of_the_future_is_reported(workspace):
    folder = workspace.root / "targets" / "fused"
    shutil.copy(folder / "part-00000.json", folder / "part-00007.json")
    record = json.loads((folder / "part-00001.json").read_text())
    del record["checksum"]
    (folder / "part-00001.json").write_text(json.dumps(sealed(record | {"schema_version": 99})))
    found = dict(problems(workspace))
    assert "is the manifest of part 0" in found["targets/fused/part-00007.json"]
    assert "was written by a newer fuseline" in found["targets/fused/part-00001.json"]
    assert ("targets", "fused", 1) not in verify(workspace).lost_parts, "what this version cannot read is not damaged"
    (newer,) = [finding for finding in verify(workspace).findings if finding.path.name == "part-00001.json"]
    assert newer.remedy == "Use that version."


def test_a_finding_says_its_path_once(workspace):
    fused = workspace.root / "targets" / "fused"
    (fused / "part-00000.json").write_text("{")
    shutil.copy(workspace.root / "distributions" / "target" / "part-00001.json", fused / "part-00001.json")
    (workspace.root / "distributions" / "source" / "dataset.json").unlink()
    (workspace.root / "corpus" / "corpus" / "plan.json").write_text("{}")
    found = verify(workspace).findings
    for path in ("targets/fused/part-00000.json", "distributions/source/dataset.json", "corpus/corpus/plan.json"):
        assert any(finding.path == workspace.root / path for finding in found)
    for finding in found:
        assert str(finding.path) not in finding.problem
        assert "Remove" not in finding.problem
        assert finding.remedy


@pytest.mark.parametrize("text", ["{}", "[]", "3", "{", '{"run": "x", "status": "done"}'])
def test_a_record_of_a_run_that_lacks_something_is_reported(workspace, text):
    record = workspace.root / "runs" / "1" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(text)
    for read in (dataset_statuses, catalog.fold):
        with pytest.raises(DamagedPart, match=r"run\.json cannot be read .* Remove it: it is only a record"):
            read(workspace)


def test_an_error_keeps_its_remedy_on_its_way_from_a_worker():
    error = pickle.loads(pickle.dumps(NewerPart("x was written by a newer fuseline.", remedy="Use that version.")))
    assert (str(error), error.problem, error.remedy) == (
        "x was written by a newer fuseline. Use that version.",
        "x was written by a newer fuseline.",
        "Use that version.",
    )


def test_damaged_tokenizers_are_reported(workspace):
    (folder,) = (workspace.root / "tokenizers").glob("*/")
    table = pl.read_parquet(folder / "token_bytes.parquet")
    table.with_columns(bytes=pl.lit(b"x")).write_parquet(folder / "token_bytes.parquet")
    assert problems(workspace) == []
    assert "token_bytes.parquet does not match" in problems(workspace, full=True)[0][1]
    settings = (folder / "settings.json").read_text()
    (folder / "settings.json").write_text(settings.replace("false", "true"))
    assert "not to its name" in problems(workspace)[0][1]
    (folder / "settings.json").unlink()
    assert "is not the tokenizer" in problems(workspace)[0][1]


def test_it_finds_nothing_wrong_while_parts_are_being_committed(workspace):
    """Nor does it touch anything."""
    before = {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}
    item = workspace.dataset(
        "distributions", "busy", identity={"corpus": dataset(workspace, "corpus/corpus").fingerprint, "tokenizer": "x"}
    )
    tokenizer = next((workspace.root / "tokenizers").glob("*/"))
    shutil.copytree(tokenizer, tokenizer.with_name("x"))
    stop = threading.Event()

    def commit() -> None:
        part = 0
        while not stop.is_set():
            item.commit(part, content=PartContent(data={"nll_S": np.arange(3.0)}, counts={"segments": 3}), seconds=0)
            part += 1

    thread = threading.Thread(target=commit)
    thread.start()
    try:
        for _ in range(4):
            found = [where for where, _ in problems(workspace, full=True) if not where.startswith("tokenizers/x")]
            assert found == []
    finally:
        stop.set()
        thread.join()
    assert item.parts()
    assert {path: path.read_bytes() for path in before} == before


# Upkeep


def aged(path: Path) -> Path:
    for each in [path, *path.rglob("*")]:
        os.utime(each, (1e9, 1e9))
    return path


def test_gc_lists_what_nothing_refers_to_and_leaves_the_rest(workspace):
    reference = read_all(workspace)
    for folder in workspace.root.glob("*/*"):
        aged(folder)
    assert leftovers(workspace) == []
    fused = workspace.root / "targets" / "fused"
    expected = {
        aged(Path(shutil.copytree(fused / "part-00000.zarr", fused / "part-00000.1.zarr"))): "no manifest names it",
        aged(Path(shutil.copytree(fused / "part-00000.zarr", fused / "part-00009.zarr"))): "no manifest names it",
        aged(Path(shutil.copytree(next((workspace.root / "tokenizers").glob("*/")), workspace.root / "tokenizers" / "0"))): "no dataset",
    }
    (fused / "part-00001.zarr" / "stray").write_bytes(b"12345")
    expected[aged(fused / "part-00001.zarr") / "stray"] = "does not list it"
    (fused / ".tmp-12-old").write_bytes(b"")
    expected[aged(fused / ".tmp-12-old")] = "its writer is dead"
    shutil.copytree(fused / "part-00000.zarr", fused / "part-00010.zarr")
    aged(fused / "part-00010.zarr")
    (fused / "part-00010.zarr" / "zarr.json").touch()  # just written: its manifest may be about to come
    durable.temporary_sibling(fused / "part-00011.json").write_bytes(b"{")
    found = leftovers(workspace)
    assert {leftover.path for leftover in found} == expected.keys()
    assert all(expected[leftover.path] in leftover.why for leftover in found)
    assert next(leftover for leftover in found if leftover.path.name == "stray").n_bytes == 5
    delete(workspace, found)
    assert leftovers(workspace) == []
    assert not any(path.exists() for path in expected)
    assert (fused / "part-00010.zarr").exists()
    assert read_all(workspace) == reference
    assert problems(workspace, full=True) == []


def test_gc_keeps_what_a_manifest_that_cannot_be_read_may_name_and_what_has_come_to_be_named(workspace):
    fused = workspace.root / "targets" / "fused"
    aged(fused)
    (fused / "part-00000.json").write_text("{")
    assert leftovers(workspace) == []
    manifest = (fused / "part-00001.json").read_bytes()
    (fused / "part-00001.json").unlink()
    found = leftovers(workspace)
    assert [leftover.path.name for leftover in found] == ["part-00001.zarr"]
    (fused / "part-00001.json").write_bytes(manifest)
    delete(workspace, found)
    assert (fused / "part-00001.zarr").exists()


@pytest.mark.parametrize("moment", ["listed", "about to be renamed", "renamed"])
@pytest.mark.parametrize("kind", ["zarr", "parquet"])
def test_gc_keeps_a_payload_that_a_worker_takes_up_meanwhile(workspace, monkeypatch, moment, kind):
    """The worker begins to take it up when it is listed, when the last check is done, or when it is set aside: the part is there."""
    item = workspace.dataset("targets", "other", identity={"stage": "x"})
    data = {"nll_S": np.arange(3.0)} if kind == "zarr" else pl.DataFrame({"nll": [0.0, 1.0]})

    def commit() -> None:
        item.commit(0, content=PartContent(data=data, counts={"segments": 3}), seconds=0)

    commit()
    item.manifest_path(0).unlink()
    payload = aged(item.folder / f"part-00000.{kind}")
    found = [leftover for leftover in leftovers(workspace) if leftover.path == payload]
    assert found
    module, name = {"listed": (upkeep, "leftovers"), "about to be renamed": (Path, "rename"), "renamed": (Path, "rename")}[moment]
    real = getattr(module, name)

    def disturbed(*arguments):
        monkeypatch.setattr(module, name, real)
        if moment == "about to be renamed":
            commit()
        result = real(*arguments)
        if moment != "about to be renamed":
            commit()
        return result

    monkeypatch.setattr(module, name, disturbed)
    delete(workspace, found)
    assert item.parts() == [0]
    item.table(0) if kind == "parquet" else item.read(0, "nll_S")
    assert list(item.folder.glob(".tmp-*")) == []


def test_usage_adds_up(workspace):
    for item in usage(workspace):
        folder = workspace.folder(item.kind, item.name)
        assert item.n_bytes == sum(path.stat().st_size for path in folder.glob("part-*[tr]/**/*") if path.is_file()) + sum(
            path.stat().st_size for path in folder.glob("part-*.parquet")
        )
        assert sum(item.arrays.values()) == item.n_bytes
    by_name = {(item.kind, item.name): item for item in usage(workspace)}
    assert by_name["corpus", "corpus"].arrays.keys() == {"table"}
    assert by_name["distributions", "target"].arrays.keys() >= {"metadata", "topk_ids_TK", "segment_offsets"}
    assert by_name["distributions", "target"].tokens == by_name["targets", "fused"].tokens > 0


def test_the_catalog_made_again_equals_one_of_many_folds(workspace, tmp_path, byte_level_folder):
    """Parts that come one by one, and one that is dropped and made again in between."""
    grown = Workspace.create(tmp_path / "grown")
    catalog.fold(grown)
    for item in workspace.datasets():
        folder = grown.folder(item.kind, item.name)
        folder.mkdir(parents=True)
        for path in item.folder.iterdir():
            if not path.name.startswith("part-"):
                shutil.copy(path, folder)
        for part in item.parts():
            for path in item.folder.glob(f"part-{part:05d}.*"):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
            catalog.fold(grown)
    fused = dataset(grown, "targets/fused")
    manifest = fused.manifest_path(0).read_bytes()
    fused.manifest_path(0).unlink()
    catalog.fold(grown)
    fused.manifest_path(0).write_bytes(manifest)
    shutil.copytree(workspace.root / "tokenizers", grown.root / "tokenizers")
    catalog.fold(grown)
    assert _tables(grown) == _tables(workspace)
    durable.remove(grown.catalog_path)
    catalog.fold(grown)
    assert _tables(grown) == _tables(workspace)


def _tables(workspace: Workspace) -> dict[str, list[str]]:
    with catalog.reading(workspace) as connection:
        names = [name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall() if name != "migrations"]
        tables = {name: sorted(map(repr, connection.execute(f"SELECT * FROM {name}").fetchall())) for name in names}
    assert tables["segments"]
    assert tables["parts"]
    return tables
