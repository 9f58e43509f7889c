"""Parts: what is committed comes back to the bit, and what is damaged is reported, never read."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zarr
from fuseline.store import durable
from fuseline.store.arrays import decode_q8, encode_q8, id_dtype
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.errors import DamagedPart, FingerprintMismatch
from fuseline.store.fingerprint import differences, fingerprint
from fuseline.store.workspace import Workspace

IDENTITY = {"stage": "test/1", "top_k": 10, "nested": {"a": [1, 2], "b": None}}
RNG = np.random.default_rng(0)
ARRAYS = {
    "ids_T": RNG.integers(1, 600, 40_000).astype(np.uint16),  # several chunks
    "wide_T": RNG.integers(1, 2**31, 300).astype(np.uint32),
    "logprobs_TK": RNG.normal(size=(300, 5)).astype(np.float16),
}


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return Dataset.create(tmp_path / "distributions" / "model", identity=IDENTITY)


def commit(dataset: Dataset, part: int = 0, **arrays) -> None:
    dataset.commit(part, content=PartContent(data=arrays or ARRAYS, counts={"documents": 1}), seconds=0.5)


@pytest.mark.parametrize("shape", [(0,), (1,), (16_384,), (16_385,), (40_000,), (0, 3), (7, 0), (0, 0), (100, 3), (20_000, 2)])
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int32", "int64", "float16", "float32", "float64"]
)
def test_arrays_come_back_to_the_bit(tmp_path, dtype, shape):
    dataset = Dataset.create(tmp_path / "kind" / "name", identity=IDENTITY)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.frombuffer(np.random.default_rng(size).bytes(size), np.uint8)
    array = (raw % 2 if dtype == "bool" else raw).view(dtype).reshape(shape)
    commit(dataset, array_TK=array, zeros_T=np.zeros(shape, dtype))
    found, zeros = dataset.read(0, "array_TK", "zeros_T")
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert (zeros.dtype, zeros.shape, zeros.any()) == (array.dtype, array.shape, False)


def test_special_floats_come_back(dataset):
    array = np.array([np.nan, np.inf, -np.inf, -0.0, 6e-8, 65504], np.float16)
    commit(dataset, array_T=array)
    assert dataset.read(0, "array_T")[0].tobytes() == array.tobytes()


def test_log_probabilities_are_stored_as_asked_and_read_as_numbers(dataset):
    logprobs_TK = -RNG.gamma(1.5, 2, (20_000, 3)).astype(np.float32)
    logprobs_TK[5:9, 2] = -np.inf
    arrays = {"exact_TK": logprobs_TK, "half_TK": logprobs_TK, "coarse_TK": logprobs_TK, "ids_T": ARRAYS["ids_T"]}
    for part, encodings in enumerate([{"half_TK": "f16"}, {"half_TK": "f16", "coarse_TK": "q8"}]):
        dataset.commit(part, content=PartContent(data=arrays, counts={}, encodings=encodings), seconds=0)
    exact, half, coarse = dataset.read(1, "exact_TK", "half_TK", "coarse_TK")
    assert exact.tobytes() == logprobs_TK.tobytes()
    assert half.tobytes() == logprobs_TK.astype(np.float16).tobytes()
    assert (coarse.dtype, coarse.shape) == (np.float32, logprobs_TK.shape)
    assert coarse.tobytes() == decode_q8(encode_q8(logprobs_TK)).tobytes()
    assert dataset.arrays(1).read("coarse_TK", 17_000, 17_010).tobytes() == coarse[17_000:17_010].tobytes()
    assert dataset.manifest(1).schema_version == 2, "a fuseline from before q8 would take its codes for numbers, and must refuse"
    stored = zarr.open_group(dataset.folder / "part-00001.zarr", mode="r")
    assert stored["coarse_TK"].dtype == np.uint8
    assert dict(stored["coarse_TK"].attrs) == {"encoding": "q8"}
    assert dict(stored["half_TK"].attrs) == {}


def test_metadata_of_a_part_are_small(dataset):
    commit(dataset, **{f"array_{index}_T": ARRAYS["ids_T"] for index in range(13)})  # as many as distributions have
    n_bytes = sum(path.stat().st_size for path in (dataset.folder / "part-00000.zarr").rglob("zarr.json"))
    assert n_bytes < 25_000


def test_attributes_and_the_manifest_say_what_was_committed(dataset):
    content = PartContent(
        data=ARRAYS, counts={"documents": 2, "tokens": 40_000}, attributes={"quarantined": [{"doc_id": 3, "reason": "ü"}]}
    )
    manifest = dataset.commit(5, content=content, seconds=1.23456)
    assert manifest == dataset.manifest(5)
    assert (manifest.part, manifest.payload, manifest.counts) == (5, "part-00005.zarr", content.counts)
    assert (manifest.fingerprint, manifest.producer["seconds"]) == (fingerprint(IDENTITY), 1.235)
    assert manifest.n_bytes == sum(path.stat().st_size for path in (dataset.folder / manifest.payload).rglob("*") if path.is_file())
    assert dataset.arrays(5).attributes == content.attributes


def test_tables_come_back_to_the_bit(dataset):
    schema = {"doc_id": pl.Int64, "text": pl.String, "raw": pl.Binary, "target_id": pl.UInt32}
    table = pl.DataFrame([(1, "\0 \r\n 漢字 👩‍👩‍👧‍👦", b"\xff\0", None), (2, "", b"", 7)], schema=schema, orient="row")
    for part, content in enumerate([table, table[:0]]):
        dataset.commit(part, content=PartContent(data=content, counts={}), seconds=0)
        assert dataset.table(part).equals(content)
        assert dataset.table(part).schema == table.schema


def test_parts_are_those_with_a_manifest(dataset):
    for part in (3, 0, 12):
        commit(dataset, part)
    shutil.copytree(dataset.folder / "part-00003.zarr", dataset.folder / "part-00007.zarr")
    shutil.copy(dataset.folder / "part-00003.json", dataset.folder / ".tmp-1-part-00008.json")
    assert dataset.parts() == [0, 3, 12]
    with pytest.raises(DamagedPart, match=r"part-00007\.json cannot be read"):
        dataset.read(7, "ids_T")


def test_a_payload_without_manifest_is_left_alone_and_never_read(dataset):
    left = dataset.folder / "part-00000.zarr"
    (left / "other_T" / "c").mkdir(parents=True)
    (left / "other_T" / "c" / "0").write_bytes(b"half a shard, or what another worker is about to name")
    commit(dataset)
    assert dataset.manifest(0).payload == "part-00000.1.zarr"
    assert (left / "other_T" / "c" / "0").exists()
    assert [array.tobytes() for array in dataset.read(0, *ARRAYS)] == [array.tobytes() for array in ARRAYS.values()]
    assert not list(dataset.folder.glob(".tmp-*"))


@pytest.mark.parametrize("data", [ARRAYS, pl.DataFrame({"text": ["a", "b"]})], ids=["arrays", "table"])
def test_a_payload_of_the_same_content_is_adopted(dataset, data):
    content = PartContent(data=data, counts={})
    payload = dataset.folder / dataset.commit(0, content=content, seconds=0).payload
    (dataset.folder / "part-00000.json").unlink()
    inode = payload.stat().st_ino
    os.utime(payload, (0, 0))
    assert dataset.commit(0, content=content, seconds=0).payload == payload.name
    assert payload.stat().st_ino == inode
    assert payload.stat().st_mtime > 0, "it counts as new, so that nobody collects it"
    assert sorted(path.name for path in dataset.folder.iterdir()) == ["dataset.json", "part-00000.json", payload.name]


def test_a_second_commit_leaves_the_first(dataset):
    commit(dataset)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in dataset.folder.rglob("*") if path.is_file()}
    commit(dataset, ids_T=np.zeros(3))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in dataset.folder.rglob("*") if path.is_file()} == before


# Damage


def shards(dataset: Dataset) -> dict[str, object]:
    payload = dataset.folder / "part-00000.zarr"
    return {name: next(path for path in (payload / name / "c").rglob("*") if path.is_file()) for name in ARRAYS}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_flipped_bit_in_a_shard_is_reported(dataset, name):
    commit(dataset)
    path = shards(dataset)[name]
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 40):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedPart, match=rf"part-00000\.zarr: the array {name} cannot be read .* store repair RECIPE -w .* --full"):
            dataset.read(0, name)


@pytest.mark.parametrize("n_left", [0, 1, 4, 100, -1, None])
def test_a_missing_or_short_shard_is_reported_and_not_read_as_zeros(dataset, n_left):
    commit(dataset)
    path = shards(dataset)["ids_T"]
    if n_left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:n_left])
    with pytest.raises(DamagedPart, match=r"part-00000\.zarr/ids_T/c/0 .* missing or cut short"):
        dataset.read(0, "ids_T")
    assert dataset.read(0, "wide_T")[0].tolist() == ARRAYS["wide_T"].tolist()


def test_a_missing_array_is_reported(dataset):
    commit(dataset)
    shutil.rmtree(dataset.folder / "part-00000.zarr" / "ids_T")
    with pytest.raises(DamagedPart, match="ids_T"):
        dataset.read(0, "ids_T")
    with pytest.raises(DamagedPart, match="never_T"):
        dataset.read(0, "never_T")


def test_a_flipped_bit_in_the_metadata_is_reported(dataset):
    commit(dataset)
    path = dataset.folder / "part-00000.zarr" / "zarr.json"
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 100):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedPart, match=r"zarr\.json"):
            dataset.read(0, "wide_T")


def test_a_missing_payload_is_reported(dataset):
    commit(dataset)
    shutil.rmtree(dataset.folder / "part-00000.zarr")
    with pytest.raises(DamagedPart, match=r"part-00000\.zarr.*store repair RECIPE -w .* --full"):
        dataset.read(0, "ids_T")


def test_a_flipped_bit_in_a_table_is_reported(dataset):
    """Parquet as Polars writes it has no checksums: most flipped bits would change the text silently."""
    table = pl.DataFrame({"text": ["".join(random.Random(row).choices("abc def", k=300)) for row in range(50)]})
    dataset.commit(0, content=PartContent(data=table, counts={}), seconds=0)
    path = dataset.folder / "part-00000.parquet"
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 60):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedPart, match=r"part-00000\.parquet"):
            dataset.table(0)
    for n_left in (0, len(whole) // 2, None):
        path.unlink() if n_left is None else path.write_bytes(whole[:n_left])
        with pytest.raises(DamagedPart, match=r"part-00000\.parquet"):
            dataset.table(0)


def test_a_truncated_manifest_is_reported_at_any_length(dataset):
    commit(dataset)
    path = dataset.folder / "part-00000.json"
    whole = path.read_bytes()
    for n_left in range(0, len(whole.rstrip()), 7):
        path.write_bytes(whole[:n_left])
        with pytest.raises(DamagedPart, match=r"part-00000\.json cannot be read"):
            dataset.read(0, "ids_T")


@pytest.mark.parametrize("record", ["[]", "{}", '{"files": 3}', "null", '"x"'])
def test_a_manifest_of_other_json_is_reported(dataset, record):
    commit(dataset)
    (dataset.folder / "part-00000.json").write_text(record)
    with pytest.raises(DamagedPart, match=r"part-00000\.json cannot be read"):
        dataset.manifest(0)


def test_a_manifest_of_another_dataset_is_reported(dataset, tmp_path):
    other = Dataset.create(tmp_path / "distributions" / "other", identity=IDENTITY | {"top_k": 32})
    commit(other)
    for path in other.folder.glob("part-*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, dataset.folder / path.name)
    with pytest.raises(FingerprintMismatch, match=r"part-00000\.json belongs to another dataset"):
        dataset.read(0, "ids_T")


# Identity


def test_another_identity_is_refused_and_shows_each_key(dataset):
    asked = {"stage": "test/1", "top_k": 32, "nested": {"a": [1, 3], "b": None}, "codec": "f16"}
    with pytest.raises(FingerprintMismatch) as error:
        Dataset.create(dataset.folder, identity=asked)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[1:4] == [
        "codec: stored nothing, asked for \"f16\"",
        "nested.a: stored [1, 2], asked for [1, 3]",
        "top_k: stored 10, asked for 32",
    ]  # fmt: skip
    assert "distributions/model" in lines[0]
    assert str(dataset.folder) in lines[-1]
    assert Dataset.open(dataset.folder).identity == IDENTITY


def test_the_same_identity_in_another_order_is_the_same(dataset):
    reordered = {"nested": {"b": None, "a": [1, 2]}, "top_k": 10, "stage": "test/1"}
    assert Dataset.create(dataset.folder, identity=reordered).fingerprint == dataset.fingerprint
    assert differences(IDENTITY, reordered) == []


@pytest.mark.parametrize(
    ("left", "right"),
    [({"a": 1}, {"a": "1"}), ({"a": 1}, {"a": True}), ({"a": None}, {}), ({"a": [1, 2]}, {"a": [2, 1]}), ({"a": {}}, {"a": None})],
)  # fmt: skip
def test_what_differs_has_another_fingerprint(left, right):
    assert fingerprint(left) != fingerprint(right)
    assert differences(left, right)


def test_a_description_does_not_determine_the_identity(dataset, tmp_path):
    again = Dataset.create(dataset.folder, identity=IDENTITY, description={"from": "elsewhere"})
    assert again.fingerprint == dataset.fingerprint
    described = Dataset.create(tmp_path / "x" / "y", identity=IDENTITY, description={"from": "here"})
    assert (described.kind, described.name, described.description) == ("x", "y", {"from": "here"})


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"identity": {}, "description": {}}'])
def test_a_broken_dataset_record_is_reported(dataset, text):
    (dataset.folder / "dataset.json").write_text(text)
    with pytest.raises(DamagedPart, match=r"dataset\.json cannot be read"):
        Dataset.open(dataset.folder)


def test_an_edited_dataset_record_is_reported(dataset):
    path = dataset.folder / "dataset.json"
    record = json.loads(path.read_text())
    record["identity"]["top_k"] = 32
    path.write_text(json.dumps(record))
    with pytest.raises(DamagedPart, match="changed by hand"):
        Dataset.open(dataset.folder)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (262_144, "uint32")])
def test_ids_get_the_smallest_type_that_holds_the_highest(vocab_size, dtype):
    assert id_dtype(vocab_size) == np.dtype(dtype)
    assert np.array([vocab_size - 1]).astype(id_dtype(vocab_size))[0] == vocab_size - 1


def test_a_coordinator_sweeps_what_was_interrupted_and_keeps_what_was_committed(tmp_path):
    workspace = Workspace.create(tmp_path / "workspace")
    dataset = workspace.dataset("distributions", "model", identity=IDENTITY)
    commit(dataset)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    def of_the_dead(path: Path) -> Path:
        return path.with_name(durable.temporary_sibling(path).name.replace(str(os.getpid()), str(process.pid), 1))

    (of_the_dead(dataset.folder / "part-00001.zarr") / "ids_T").mkdir(parents=True)
    for path in (dataset.folder / "part-00001.json", workspace.root / "workspace.json", workspace.root / "tokenizers" / "digest"):
        path.parent.mkdir(exist_ok=True)
        of_the_dead(path).write_text("{")
    of_the_living = durable.temporary_sibling(dataset.folder / "part-00002.json")
    of_the_living.write_text("{")
    (workspace.root / "corpus" / "broken").mkdir(parents=True)
    (workspace.root / "corpus" / "broken" / "dataset.json").write_text("{")  # no reason not to become the coordinator
    with workspace.coordinator():
        assert sorted(path.name for path in dataset.folder.iterdir()) == [
            of_the_living.name, "dataset.json", "part-00000.json", "part-00000.zarr"
        ]  # fmt: skip
        assert list(workspace.root.rglob(".tmp-*")) == [of_the_living]
    shutil.rmtree(workspace.root / "corpus")
    assert [found.name for found in workspace.datasets()] == ["model"]


def test_a_payload_that_is_gone_is_reported_by_its_path(tmp_path):
    dataset = Dataset.create(tmp_path / "distributions" / "model", identity={})
    dataset.commit(3, content=PartContent(data={"x": np.arange(3)}, counts={}), seconds=0)
    dataset.require_payload(3)
    shutil.rmtree(dataset.folder / "part-00003.zarr")
    with pytest.raises(DamagedPart, match=r"part-00003\.zarr"):
        dataset.require_payload(3)
