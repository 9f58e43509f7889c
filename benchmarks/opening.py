"""What it takes to open a part and to read rows of it: run it in two checkouts to compare them.

    python benchmarks/opening.py

Each figure is the median of many rounds, in microseconds. The store is small: what is done once for each part and file is
most of it.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.workspace import Workspace
from timer import timed

TOKENS, K, ROUNDS = 20_000, 10, 200


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.create(Path(folder) / "workspace")
        rng = np.random.default_rng(0)
        dataset = workspace.dataset("targets", "fused", identity={"a": 1}, description={"corpus": "c", "vocab_size": 49_152})
        arrays = {
            "token_ids_T": rng.integers(0, 49_152, TOKENS).astype(np.uint16),
            "topk_ids_TK": rng.integers(0, 49_152, (TOKENS, K)).astype(np.uint16),
            "topk_logprobs_TK": rng.normal(size=(TOKENS, K)).astype(np.float16),
            "segment_offsets": np.array([0, TOKENS]),
        }
        dataset.commit(0, content=PartContent(data=arrays, counts={"tokens": TOKENS, "segments": 1}), seconds=1.0)
        part = dataset.arrays(0)
        part.read("topk_ids_TK", 0, 10)
        show("open a dataset", lambda: Dataset.open(dataset.folder))
        show("read a manifest", lambda: dataset.manifest(0))
        show("open a part", lambda: dataset.arrays(0))
        show("open a part and read 100 rows", lambda: dataset.arrays(0).read("topk_ids_TK", 5_000, 5_100))
        show("read 100 rows of an open part", lambda: part.read("topk_ids_TK", 5_000, 5_100))
        show("read a whole array", lambda: part.read("topk_logprobs_TK"))


def show(what: str, work: Callable[[], object]) -> None:
    """Print the median time of some work."""
    seconds = [timed(work).wall for _ in range(ROUNDS)]
    print(f"{what}: {statistics.median(seconds) * 1e6:.0f} us")


if __name__ == "__main__":
    main()
