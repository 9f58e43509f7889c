"""Bytes per token of stored distributions, by array; and the rates at which a part is written and read.

python benchmarks/store.py WORKSPACE MODEL
"""

import argparse
import tempfile
import time
from pathlib import Path

from fuseline.store.dataset import Dataset, PartContent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("model")
    arguments = parser.parse_args()
    dataset = Dataset.open(arguments.workspace / "distributions" / arguments.model)
    by_array: dict[str, int] = {}
    tokens = 0
    for part in dataset.parts():
        manifest = dataset.manifest(part)
        tokens += manifest.counts["tokens"]
        for path, (size, _) in manifest.files.items():
            if path.endswith("zarr.json"):
                path = "metadata"
            by_array[path.split("/")[0]] = by_array.get(path.split("/")[0], 0) + size
    print(f"{arguments.model}: {tokens} tokens in {len(dataset.parts())} parts")
    for name, size in sorted(by_array.items(), key=lambda item: -item[1]):
        print(f"  {name:24} {size / tokens:6.2f} B/token")
    print(f"  {'all':24} {sum(by_array.values()) / tokens:6.2f} B/token")

    names = dataset.arrays(dataset.parts()[0]).names
    arrays = dict(zip(names, dataset.read(dataset.parts()[0], *names), strict=True))
    n = len(arrays["token_ids_T"])
    with tempfile.TemporaryDirectory() as folder:
        copy = Dataset.create(Path(folder) / "distributions" / "copy", identity={})
        started = time.perf_counter()
        copy.commit(0, content=PartContent(data=arrays, counts={"tokens": n}), seconds=0)
        written = time.perf_counter()
        copy.read(0, *names)
        read = time.perf_counter()
    print(
        f"one part of {n} tokens: written durably at {n / (written - started):,.0f} tokens/s, read at {n / (read - written):,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
