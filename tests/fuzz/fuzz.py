"""Fuzzes the readers that parse bytes of strangers' files, with atheris:

    pip install atheris
    python tests/fuzz/fuzz.py manifest|shard|safetensors|gguf|journal [-max_total_time=600] [corpus folder]

A reader gives what it read or raises a FuselineError; anything else is a finding, and so is a run of more than 2 GB or 25 seconds.
"""

import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import google_crc32c
import numcodecs.zstd
import numpy as np

with atheris.instrument_imports(include=["fuseline.store", "fuseline.ingest.gguf_file"], enable_loader_override=False):
    from fuseline.ingest.gguf_file import GgufFile
    from fuseline.store import journal
    from fuseline.store.dataset import Dataset, PartContent
    from fuseline.store.errors import FuselineError
    from fuseline.store.fingerprint import sealed
    from fuseline.store.trainings import checkpoint_damage, read_metrics
    from fuseline.store.weights import tensors_of, weight_files

HERE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
Target = tuple[Callable[[bytes], None], list[bytes]]


def manifest() -> Target:
    """The manifest of a part; mutations that are JSON objects get a right checksum, so that they are looked into."""
    dataset = Dataset.create(HERE / "targets" / "fused", identity={"a": 1})
    arrays = {"token_ids_T": np.arange(50, dtype=np.uint16), "segment_offsets": np.array([0, 20, 50])}
    dataset.commit(0, content=PartContent(data=arrays, counts={"tokens": 50, "segments": 2}), seconds=1.0)
    path = dataset.manifest_path(0)

    def run(data: bytes) -> None:
        try:
            record = json.loads(data)
            record.pop("checksum", None)
            data = json.dumps(sealed(record)).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
        path.write_bytes(data)
        part = dataset.arrays(0)
        for name in part.names:
            part.read(name)

    return run, [path.read_bytes()]


def shard() -> Target:
    """The metadata of a part's arrays and the bytes of one of them, with right checksums of what is mutated."""
    dataset = Dataset.create(HERE / "targets" / "fused", identity={"a": 1})
    dataset.commit(0, content=PartContent(data={"token_ids_T": np.arange(3000, dtype=np.uint16)}, counts={"tokens": 3000}), seconds=1.0)
    folder = dataset.folder / dataset.manifest(0).payload
    metadata, (stored,) = (
        folder / "zarr.json",
        (path for path in (folder / "token_ids_T").rglob("*") if path.is_file() and "json" not in path.name),
    )

    def with_checksum(data: bytes) -> bytes:
        return data + google_crc32c.value(data).to_bytes(4, "little")

    def run(data: bytes) -> None:
        said, _, rest = data.partition(b"\x00\x00\x00")
        chunk, _, index = rest.partition(b"\x00\x00\x00\x00\x00\x01")
        metadata.write_bytes(said)
        stored.write_bytes(with_checksum(chunk) + with_checksum(index))
        record = json.loads(dataset.manifest_path(0).read_bytes())
        record.pop("checksum")
        from fuseline.store.checksums import checksums

        record["files"] = {name: list(facts) for name, facts in checksums(folder).items()}
        dataset.manifest_path(0).write_text(json.dumps(sealed(record)))
        part = dataset.arrays(0)
        for name in part.names:
            part.read(name)
            part.read(name, 1, 2)

    chunk = numcodecs.zstd.compress(np.arange(3000, dtype="<u2").tobytes())
    index = struct.pack("<QQ", 0, len(chunk) + 4)
    return run, [metadata.read_bytes() + b"\x00\x00\x00" + chunk + b"\x00\x00\x00\x00\x00\x01" + index]


def safetensors() -> Target:
    """A file of weights, and an index that names it."""
    folder = HERE / "model"
    folder.mkdir()
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "lm_head.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    ).encode()

    def run(data: bytes) -> None:
        is_index = data[:1] == b"{"
        for name in ("model.safetensors", "model.safetensors.index.json"):
            (folder / name).unlink(missing_ok=True)
        (folder / ("model.safetensors.index.json" if is_index else "model.safetensors")).write_bytes(data)
        for path in weight_files(folder):
            tensors_of(path)

    index = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}).encode()
    return run, [struct.pack("<Q", len(header)) + header + bytes(16), index]


def gguf() -> Target:
    """A file of the demo's kind."""
    text = lambda value: struct.pack("<Q", len(value)) + value  # noqa: E731
    field = text(b"a.b") + struct.pack("<I", 9) + struct.pack("<IQ", 8, 2) + text(b"x") + text(b"y")
    tensor = text(b"blk.0.w") + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
    seed = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + field + tensor

    def run(data: bytes) -> None:
        GgufFile(data)

    return run, [seed + bytes(-len(seed) % 32) + bytes(68)]


def journals() -> Target:
    """What workers and trainers write of themselves: journals, metrics, checksums of a checkpoint."""
    run_folder = HERE / "run"
    checkpoint = run_folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    journal.prepare(run_folder)
    lines = [{"event": "started", "at": 1.0, "host": "h", "pid": 1}, {"event": "begun", "at": 2.0, "part": 3}]
    lines += [
        {"event": "failed", "at": 3.0, "part": 3, "reason": "x"},
        {"event": "committed", "at": 4.0, "part": 4},
        {"event": "ended", "at": 5.0},
    ]

    def run(data: bytes) -> None:
        (run_folder / "workers" / "worker-1.jsonl").write_bytes(data)
        (run_folder / "metrics.jsonl").write_bytes(data)
        (checkpoint / "checksums-0.json").write_bytes(data)
        list(journal.read_journals(run_folder))
        checkpoint_damage(checkpoint)
        read_metrics(run_folder)

    return run, ["".join(json.dumps(line) + "\n" for line in lines).encode(), b'{"a": [1, 2]}\n']


TARGETS = {"manifest": manifest, "shard": shard, "safetensors": safetensors, "gguf": gguf, "journal": journals}


def main() -> None:
    target, *options = sys.argv[1:]
    run, seeds = TARGETS[target]()
    corpus = HERE / "seeds"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            run(data)
        except FuselineError:
            return

    folders = [option for option in options if not option.startswith("-")]
    options = [option for option in options if option.startswith("-")]
    limits = ["-rss_limit_mb=2048", "-timeout=25", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, *options, *(folders or []), str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
