"""Whatever the small files of a workspace hold, every command ends with a message that names the file, and never with a traceback."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from fuseline.cli import main
from fuseline.store.dataset import PartContent
from fuseline.store.errors import FuselineError
from fuseline.store.fingerprint import fingerprint, sealed
from fuseline.store.journal import Journal, prepare, read_journals
from fuseline.store.json_files import decode_json
from fuseline.store.json_text import DEEPEST_JSON
from fuseline.store.verify import verify
from fuseline.store.workspace import Workspace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small import small_workspace

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "..", "../..", "/etc", "a/b", "\0", "\x1b[2J", "\ud800"]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5
)


@pytest.fixture(scope="module")
def made(tmp_path_factory, byte_level_folder) -> Path:
    """A small workspace with a run, its journal, and a training."""
    workspace = small_workspace(tmp_path_factory.mktemp("small") / "workspace", tokenizer_folder=byte_level_folder)
    with workspace.run("distributions", name="target", parameters={"a": 1}) as run:
        prepare(run.folder)
        with Journal(run.folder, worker="one") as journal:
            journal.begun(0)
            journal.committed(0)
            journal.failed(1, ValueError("x"))
    training = workspace.folder("runs", "fused")
    (training / "checkpoints" / "step-00000001").mkdir(parents=True)
    (training / "checkpoints" / "step-00000001" / "checksums-0.json").write_text("{}")
    (training / "job.json").write_text(json.dumps({"config": {"clm_weight": 1.0}}))
    (training / "machine.json").write_text(json.dumps({"dtype": "float32", "arithmetic": "float32", "threads": 2}))
    step = {"step": 1, "steps": 9, "loss": 1.5, "tokens": 10, "tokens_per_second": 2.0, "warning": None, "held_out_bpb": None}
    (training / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    evaluation = {"step": 1, "domain": "all", "nll": 1.0, "n_scored": 1, "scored_bytes": 2, "bpb": 0.7}
    (training / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    return workspace.root


RECORDS = [
    "corpus/corpus/dataset.json",
    "corpus/corpus/plan.json",
    "corpus/corpus/part-00000.json",
    "distributions/target/dataset.json",
    "distributions/target/part-00000.json",
    "vocab_maps/source--target/dataset.json",
    "targets/fused/dataset.json",
    "targets/fused/part-00001.json",
    "tokenizers/*/settings.json",
    "runs/*/run.json",
    "runs/*/workers/one.jsonl",
    "runs/fused/job.json",
    "runs/fused/machine.json",
    "runs/fused/metrics.jsonl",
    "runs/fused/evaluations.jsonl",
    "runs/fused/checkpoints/step-00000001/checksums-0.json",
    "repair.json",
    "workspace.json",
]


def run(*arguments: str) -> None:
    """A command in this process: it ends well, or with a message."""
    with contextlib.suppress(SystemExit, click.ClickException):
        main(list(arguments), standalone_mode=False)


COMMANDS = [
    ("status",),
    ("status", "--json"),
    ("store", "verify", "--full"),
    ("store", "gc"),
    ("store", "du"),
    ("store", "rebuild"),
    ("sql", "SELECT sum(gold_logprob), max(token) FROM positions"),
    ("sql", "SELECT sum(tail_logprob), max(source) FROM targets"),
    ("sql", "FROM texts"),
    ("report",),
]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where a value can be replaced in a document."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def replaced(document: Any, place: tuple, value: Any) -> Any:
    if not place:
        return value
    changed = copy.deepcopy(document)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if value is DELETED:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return changed


DELETED = object()


def resealed(record: Any, *, name: str) -> Any:
    """With the checksums that somebody who knows how they are made would write."""
    if isinstance(record, dict) and isinstance(record.get("identity"), dict) and name == "dataset.json":
        record["fingerprint"] = fingerprint(record["identity"])
    if isinstance(record, dict) and "checksum" in record:
        record.pop("checksum")
        record = sealed(record)
    return record


@pytest.mark.parametrize("pattern", RECORDS)
@settings(QUICK, max_examples=int(os.environ.get("EXAMPLES", "4")))
@given(data=st.data())
def test_wrong_values_in_a_record_end_with_a_message(made, tmp_path_factory, pattern, data):
    root = shared_copy(made, tmp_path_factory)
    (path,) = root.glob(pattern) if "*" in pattern else (root / pattern,)
    whole = path.read_bytes() if path.exists() else None
    document = json.loads(whole.splitlines()[0] if pattern.endswith(".jsonl") else whole) if whole else {"parts": [], "checksum": ""}
    place = data.draw(st.sampled_from(places(document)))
    value = data.draw(VALUES | (st.just(DELETED) if place else st.nothing()))
    try:
        changed = resealed(replaced(document, place, value), name=path.name)
    except UnicodeEncodeError:  # half a character cannot be sealed
        changed = replaced(document, place, value)
    try:
        path.write_bytes(json.dumps(changed).encode() + b"\n")
        for command in data.draw(st.lists(st.sampled_from(COMMANDS), min_size=2, max_size=2, unique=True)):
            run(*command, "-w", str(root))
    finally:
        path.unlink() if whole is None else path.write_bytes(whole)


GARBAGE: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: b"[" * 60_000,
    "deep objects": lambda: b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
    "deep and closed": lambda: b"[" * 60_000 + b"]" * 60_000,
    "not UTF-8": lambda: b'{"a": "\xff\xfe"}',
    "half a character": lambda: b'{"run": "\\ud800"}',
    "a number of many digits": lambda: b'{"a": ' + b"1" * 10_000 + b"}",
    "nothing": lambda: b"",
    "zeros": lambda: bytes(1000),
    "a list": lambda: b"[1, 2]\n",
    "infinity": lambda: b'{"step": 1e999, "at": NaN, "event": "begun", "part": Infinity}\n',
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_any_record_ends_with_a_message_and_is_found(made, tmp_path_factory, garbage):
    root = shared_copy(made, tmp_path_factory)
    for number, pattern in enumerate(RECORDS):
        (path,) = root.glob(pattern) if "*" in pattern else (root / pattern,)
        whole = path.read_bytes() if path.exists() else None
        try:
            path.write_bytes(GARBAGE[garbage]())
            run(*COMMANDS[(number + len(garbage)) % len(COMMANDS)], "-w", str(root))
            harmless = ("machine.json", "one.jsonl", "workspace.json", "job.json", "metrics.jsonl", "evaluations.jsonl")
            found = {finding.path for finding in verify(Workspace(root)).findings}  # its workspace.json may be the garbage
            assert path.name in harmless or path in found or path.parent in found
        finally:
            path.unlink() if whole is None else path.write_bytes(whole)


def shared_copy(made: Path, tmp_path_factory) -> Path:
    """One copy for all examples: each puts back what it has changed, and the catalog can be made again."""
    root = tmp_path_factory.getbasetemp() / "hostile"
    if not root.exists():
        shutil.copytree(made, root)
    return root


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_documents_are_read_up_to_a_depth(opening):
    closing = "]" if opening == "[" else "}"
    middle = "1" if opening != "[" else ""
    decode_json((opening * DEEPEST_JSON + middle + closing * DEEPEST_JSON).encode())
    with pytest.raises(ValueError, match="nested more than"):
        decode_json((opening * (DEEPEST_JSON + 1) + middle + closing * (DEEPEST_JSON + 1)).encode())
    decode_json(json.dumps({"text": "[{" * 5000, "more": ['"]}\\' * 5] * 50}).encode())


@QUICK
@given(value=VALUES)
def test_what_can_be_written_is_read_as_it_was(value):
    try:
        data = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    with contextlib.suppress(ValueError):  # a number of too many digits
        expected = repr(json.loads(data))
        assert repr(decode_json(data)) == expected


@QUICK
@given(lines=st.lists(st.binary(max_size=30) | VALUES.map(lambda value: json.dumps(value).encode()), max_size=6))
def test_any_lines_are_read_as_a_journal(tmp_path_factory, lines):
    folder = tmp_path_factory.getbasetemp() / "journal"
    (folder / "workers").mkdir(parents=True, exist_ok=True)
    (folder / "workers" / "one.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (state,) = read_journals(folder)
    assert state.host == ""


# Zarr metadata, with a manifest that was made to fit


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> tuple[Path, dict]:
    workspace = Workspace.create(tmp_path_factory.mktemp("zarr") / "workspace")
    dataset = workspace.dataset("targets", "x", identity={"stage": "x"})
    data = {"ids_T": np.arange(40_000, dtype=np.uint16) % 977, "logprob_TK": np.linspace(-9, 0, 80_000).reshape(-1, 2).astype(np.float32)}
    content = PartContent(data=data, counts={"tokens": 40_000}, attributes={"sources": []}, encodings={"logprob_TK": "q8"})
    dataset.commit(0, content=content, seconds=0)
    return dataset.folder, json.loads((dataset.folder / "part-00000.zarr" / "zarr.json").read_text())


def read_changed(folder: Path, changed: bytes, *, name: str = "zarr.json") -> None:
    """Read the part with one file replaced, and the manifest made to fit."""
    import zlib

    from fuseline.store.dataset import Dataset

    path, manifest = folder / "part-00000.zarr" / name, folder / "part-00000.json"
    whole, record = path.read_bytes(), manifest.read_text()
    try:
        path.write_bytes(changed)
        forged = json.loads(record)
        forged.pop("checksum")
        forged["files"][name] = [len(changed), zlib.crc32(changed)]
        manifest.write_text(json.dumps(sealed(forged)))
        with contextlib.suppress(FuselineError):
            arrays = Dataset.open(folder).arrays(0)
            for each in arrays.names:
                arrays.read(each)
                arrays.read(each, 100, 20_000)
    finally:
        path.write_bytes(whole)
        manifest.write_text(record)


@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_any_metadata_of_arrays_are_read_or_refused(part, data):
    folder, metadata = part
    place = data.draw(st.sampled_from(places(metadata)))
    value = data.draw(VALUES | (st.just(DELETED) if place else st.nothing()))
    read_changed(folder, json.dumps(replaced(metadata, place, value)).encode())


@pytest.mark.parametrize("rows", [10**12, 2**62, 2**64, 10**30, 39_999, 40_001, 0, -1])
@pytest.mark.parametrize("also", ["shape alone", "chunks too", "counts too"])
def test_shapes_of_any_size_take_no_memory(part, rows, also):
    import resource

    folder, metadata = part
    for entry in ({}, {"chunk_shape": rows}):
        changed = copy.deepcopy(metadata)
        for array in changed["consolidated_metadata"]["metadata"].values():
            array["shape"][0] = rows
            if entry or also == "chunks too":
                array["codecs"][0]["configuration"]["chunk_shape"][0] = rows
        manifest = folder / "part-00000.json"
        record = manifest.read_text()
        if also == "counts too":
            manifest.write_text(json.dumps({**json.loads(record), "counts": {"tokens": rows}}))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read_changed(folder, json.dumps(changed).encode())
        finally:
            manifest.write_text(record)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_any_bytes_of_a_shard_are_read_or_refused(part, data):
    """Also with the checksums of chunks and index made to fit, so that the decompressors and the index see the change."""
    import google_crc32c

    folder, _ = part
    name = data.draw(st.sampled_from(["ids_T/c/0", "logprob_TK/c/0/0"]))
    shard = bytearray((folder / "part-00000.zarr" / name).read_bytes())
    n_chunks = 3
    index_at = len(shard) - n_chunks * 16 - 4
    if data.draw(st.booleans()):
        place = data.draw(st.integers(index_at // 8, index_at // 8 + n_chunks * 2 - 1)) * 8 + index_at % 8
        number = data.draw(st.sampled_from([0, 1, 3, 4, 5, 2**31, 2**62, 2**63 - 1, 2**64 - 2, index_at]) | st.integers(0, len(shard)))
        shard[place : place + 8] = number.to_bytes(8, "little")
    else:
        offset, size = (int.from_bytes(shard[index_at + at : index_at + at + 8], "little") for at in (0, 8))
        for _ in range(data.draw(st.integers(1, 3))):
            at = offset + data.draw(st.integers(0, min(size, 40) - 5) | st.integers(0, size - 5))
            shard[at] = data.draw(st.integers(0, 255))
        shard[offset + size - 4 : offset + size] = google_crc32c.value(bytes(shard[offset : offset + size - 4])).to_bytes(4, "little")
    shard[-4:] = google_crc32c.value(bytes(shard[index_at:-4])).to_bytes(4, "little")
    read_changed(folder, bytes(shard), name=name)


def test_huge_files_are_not_read(made, tmp_path_factory):
    root = shared_copy(made, tmp_path_factory)
    for pattern in ("targets/fused/dataset.json", "targets/fused/part-00001.json"):
        path = root / pattern
        whole = path.read_bytes()
        try:
            os.truncate(path, 20 << 30)  # takes no room
            assert path in {finding.path for finding in verify(Workspace(root)).findings}  # its workspace.json may be the garbage
        finally:
            path.write_bytes(whole)
