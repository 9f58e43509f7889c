"""What stored distributions take up, array by array; and both codecs beside the formats in use elsewhere, made from the same data.

    python benchmarks/store.py WORKSPACE MODEL

For each format: bytes per token; rates at which a part is written and flushed to the disk, and read as a whole (one process, files in the
page cache, best of three); and the time to read the top-k entries of one segment at random (median of 200). `fuseline q8` begins with the
same float16 values as the others, so that only its size and speed, not its fidelity, are measured here.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuseline.store import durable
from fuseline.store.arrays import CHUNK_ROWS
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.upkeep import usage
from fuseline.store.workspace import Workspace
from timer import timed, timer

PER_TOKEN = ("token_ids_T", "gold_logprob_T", "tail_logprob_T", "entropy_T", "topk_ids_TK", "topk_logprobs_TK")
Arrays = dict[str, np.ndarray]


class Fuseline:
    """A part of a fuseline dataset."""

    def __init__(self, folder: Path, *, codec: str) -> None:
        self.dataset, self.codec = Dataset.create(folder / "distributions" / "copy", identity={}), codec

    def write(self, arrays: Arrays) -> None:
        encodings = {"topk_logprobs_TK": self.codec, "tail_logprob_T": self.codec}
        content = PartContent(data=arrays, counts={"tokens": len(arrays["token_ids_T"])}, encodings=encodings)
        self.dataset.commit(0, content=content, seconds=0)

    def read(self) -> None:
        self.dataset.read(0, *PER_TOKEN)

    @cached_property
    def part(self):
        return self.dataset.arrays(0)

    def read_rows(self, start: int, end: int, segment: int) -> None:
        self.part.read("topk_ids_TK", start, end)
        self.part.read("topk_logprobs_TK", start, end)


class HuggingFace:
    """`datasets`, a row per segment, lists of int64 ids and float16 values: the published format of FuseLLM's distributions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "rows"

    def write(self, arrays: Arrays) -> None:
        offsets = pa.array(arrays["segment_offsets"].astype(np.int32))
        columns = {}
        for name in PER_TOKEN:
            array = arrays[name]
            values = pa.array(array.ravel().astype(np.int64) if array.dtype.kind == "u" else array.ravel())
            if array.ndim == 2:
                values = pa.ListArray.from_arrays(pa.array(np.arange(0, array.size + 1, array.shape[1], dtype=np.int32)), values)
            columns[name] = pa.ListArray.from_arrays(offsets, values)
        datasets.Dataset(pa.table(columns)).save_to_disk(self.folder)
        durable.publish(self.folder, to=self.folder.with_name("published"))

    @cached_property
    def rows(self):
        return datasets.load_from_disk(self.folder.with_name("published"))

    def read(self) -> None:
        for name in PER_TOKEN:
            values = self.rows.data.column(name).combine_chunks().flatten()
            np.array(values.flatten() if pa.types.is_list(values.type) else values)

    def read_rows(self, start: int, end: int, segment: int) -> None:
        row = self.rows.with_format("numpy")[segment]
        row["topk_ids_TK"], row["topk_logprobs_TK"]


class Parquet:
    """A row per token, zstd, row groups as large as fuseline's chunks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "part.parquet"

    def write(self, arrays: Arrays) -> None:
        columns = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(arrays[name].ravel()), arrays[name].shape[1])
            if arrays[name].ndim == 2
            else pa.array(arrays[name])
            for name in PER_TOKEN
        }
        temporary = durable.temporary_sibling(self.path)
        pq.write_table(pa.table(columns), temporary, compression="zstd", row_group_size=CHUNK_ROWS)
        durable.publish(temporary, to=self.path)

    @cached_property
    def file(self):
        return pq.ParquetFile(self.path)

    def read(self) -> None:
        table = pq.read_table(self.path, use_threads=False)
        for name in PER_TOKEN:
            values = table.column(name).combine_chunks()
            np.array(values.flatten() if pa.types.is_fixed_size_list(values.type) else values)

    def read_rows(self, start: int, end: int, segment: int) -> None:
        groups = list(range(start // CHUNK_ROWS, (end - 1) // CHUNK_ROWS + 1))
        table = self.file.read_row_groups(groups, columns=["topk_ids_TK", "topk_logprobs_TK"], use_threads=False)
        table.slice(start - groups[0] * CHUNK_ROWS, end - start).combine_chunks()


class Memmap:
    """Raw numpy files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "raw"

    def write(self, arrays: Arrays) -> None:
        temporary = durable.temporary_sibling(self.folder)
        temporary.mkdir()
        for name in PER_TOKEN:
            np.save(temporary / name, arrays[name])
        durable.publish(temporary, to=self.folder)

    def _open(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def read(self) -> None:
        for name in PER_TOKEN:
            np.array(self._open(name))

    def read_rows(self, start: int, end: int, segment: int) -> None:
        np.array(self._open("topk_ids_TK")[start:end])
        np.array(self._open("topk_logprobs_TK")[start:end])


FORMATS: dict[str, Callable[[Path], Fuseline | HuggingFace | Parquet | Memmap]] = {
    "fuseline f16": lambda folder: Fuseline(folder, codec="f16"),
    "fuseline q8": lambda folder: Fuseline(folder, codec="q8"),
    "datasets, lists": HuggingFace,
    "Parquet, zstd": Parquet,
    "numpy memmap": Memmap,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One format."""

    bytes_per_token: float
    write_rate: float  # tokens per second
    read_rate: float  # tokens per second
    row_seconds: float  # of one segment


def measure(make: Callable, arrays: Arrays) -> Measured:
    n_tokens, offsets = len(arrays["token_ids_T"]), arrays["segment_offsets"]
    write_seconds, read_seconds, row_seconds = [], [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            made = make(Path(folder))
            write_seconds.append(timed(lambda made=made: made.write(arrays)).wall)
            read_seconds.append(timed(made.read).wall)
            n_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            for segment in random.Random(0).choices(range(len(offsets) - 1), k=200):
                start, end = int(offsets[segment]), int(offsets[segment + 1])
                with timer() as took:
                    made.read_rows(start, end, segment)
                row_seconds.append(took.wall)
    return Measured(
        bytes_per_token=n_bytes / n_tokens,
        write_rate=n_tokens / min(write_seconds),
        read_rate=n_tokens / min(read_seconds),
        row_seconds=statistics.median(row_seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("model")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    workspace = Workspace.open(arguments.workspace)
    for item in usage(workspace):
        if (item.kind, item.name) == ("distributions", arguments.model):
            print(f"{arguments.model} as stored: {item.tokens} tokens in {item.parts} parts, {item.n_bytes / item.tokens:.2f} B/token")
            for name, n_bytes in sorted(item.arrays.items(), key=lambda entry: -entry[1]):
                print(f"  {name:24} {n_bytes / item.tokens:6.2f} B/token")
    dataset = Dataset.open(workspace.folder("distributions", arguments.model))
    part = max(dataset.parts(), key=lambda part: dataset.manifest(part).counts["tokens"])
    arrays = dict(zip((*PER_TOKEN, "segment_offsets"), dataset.read(part, *PER_TOKEN, "segment_offsets"), strict=True))
    print(f"part {part}, {len(arrays['token_ids_T'])} tokens, k = {arrays['topk_ids_TK'].shape[1]}; in brackets against `datasets`:")
    found = {name: measure(make, arrays) for name, make in FORMATS.items()}
    base = found["datasets, lists"]
    for name, item in found.items():
        print(
            f"  {name:16} {item.bytes_per_token:6.2f} B/token ({base.bytes_per_token / item.bytes_per_token:.2f}× smaller), "
            f"written at {item.write_rate / 1e3:,.0f}k tokens/s ({item.write_rate / base.write_rate:.2f}×), "
            f"read at {item.read_rate / 1e6:.1f}M tokens/s ({item.read_rate / base.read_rate:.2f}×), "
            f"a segment in {1e3 * item.row_seconds:.2f} ms ({item.row_seconds / base.row_seconds:.2f}×)"
        )


if __name__ == "__main__":
    main()
