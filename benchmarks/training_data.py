"""Reading batches of fused targets: the rate of `TargetsData` with that of decoding the same arrays, and what indexing many parts takes.

    python benchmarks/training_data.py [--parts 8] [--top-k 10] [--sequence-length 2048] [--index-parts 1400] [--epochs 2]

Rates are by the processor's time, so that other work on the machine counts less: give it one thread by OMP_NUM_THREADS=1. Segments are as
long as short texts are (log-normal, about 250 tokens); what the targets say makes no difference but to how they are compressed.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from fuseline.store.dataset import Dataset, PartContent
from fuseline.train.config import TrainingConfig
from fuseline.train.data import TargetsData
from fuseline.train.order import PackOrder, SegmentIndex
from timer import timer

VOCABULARY = 49_152
PART_TOKENS = 1_000_000
NAMES = ("token_ids_T", "topk_ids_TK", "topk_logprobs_TK", "tail_logprob_T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--index-parts", type=int, default=1400)
    parser.add_argument("--data-parallel", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = random_targets(Path(folder), parts=arguments.parts, k=arguments.top_k)
        n_tokens = sum(dataset.manifest(part).counts["tokens"] for part in dataset.parts())
        for packing in ("isolated", "concatenated"):
            for ranks in arguments.data_parallel:
                raw = seconds_of(dataset.parts(), work=lambda part: dataset.read(part, *NAMES))
                config = TrainingConfig(packing=packing, sequence_length=arguments.sequence_length, data_parallel=ranks)
                data = TargetsData(dataset, parts=dataset.parts(), vocab_size=VOCABULARY, config=config)
                data.micro_batches(0, data_rank=0)  # compiles
                data = TargetsData(dataset, parts=dataset.parts(), vocab_size=VOCABULARY, config=config)
                before = psutil.Process().memory_info().rss
                seconds = seconds_of(range(data.steps), work=lambda step, data=data: data.micro_batches(step, data_rank=0))
                held = (psutil.Process().memory_info().rss - before) / 1e6
                print(
                    f"{packing}, 1 of {ranks} ranks: {n_tokens / seconds / 1e6:.1f}M tokens/s of the global batch, "
                    f"{raw / seconds:.2f} of decoding alone ({n_tokens / raw / 1e6:.1f}M tokens/s); memory +{held:.0f} MB",
                    flush=True,
                )
        opened = seconds_of(dataset.parts(), work=lambda part: dataset.read(part, "segment_offsets")) / arguments.parts
        print(f"opening a part and reading its offsets: {opened * 1e3:.1f} ms")
    offsets = {part: offsets_of(part) for part in range(arguments.index_parts)}
    before = psutil.Process().memory_info().rss
    with timer() as took:
        index = SegmentIndex.of(offsets)
    print(f"index of {arguments.index_parts} parts, {len(index.length_S) / 1e6:.1f}M segments: {took.processor:.2f} s more")
    for packing in ("isolated", "concatenated"):
        order = PackOrder(index, packing=packing, sequence_length=arguments.sequence_length, seed=0)
        order.n_packs(1)  # compiles
        counted = seconds_of([0], work=order.n_packs)
        middle = order.n_packs(0) // 2
        found = seconds_of([middle], work=lambda first, order=order: order.packs(first, first + 128))
        fill = index.length_S.sum(dtype=np.int64) / order.n_packs(0) / arguments.sequence_length
        print(f"  {packing}: {counted:.2f} s to count an epoch's packs, {found * 1e3:.0f} ms to a batch in its middle, {fill:.2%} full")
    print(f"  memory +{(psutil.Process().memory_info().rss - before) / 1e6:.0f} MB")


def offsets_of(part: int) -> np.ndarray:
    lengths = np.random.default_rng(part).lognormal(5.2, 0.8, PART_TOKENS // 200).astype(int).clip(2, 2048)
    ends = np.concatenate([[0], lengths.cumsum()])
    return ends[ends <= PART_TOKENS]


def random_targets(folder: Path, *, parts: int, k: int) -> Dataset:
    generator = np.random.default_rng(0)
    dataset = Dataset.create(folder / "targets" / "random", identity={})
    for part in range(parts):
        offsets = offsets_of(part)
        n = int(offsets[-1])
        # Likely ids are more frequent, and likelihoods fall fast, as real ones do.
        ids_TK = (generator.random((n, k)) ** 4 * VOCABULARY).astype(np.uint16)
        logprobs_TK = -np.cumsum(generator.exponential(1.2, (n, k)), axis=1)
        arrays = {
            "token_ids_T": (generator.random(n) ** 4 * VOCABULARY).astype(np.uint16),
            "segment_offsets": offsets,
            "topk_ids_TK": ids_TK,
            "topk_logprobs_TK": logprobs_TK.astype(np.float16),
            "tail_logprob_T": logprobs_TK[:, -1].astype(np.float16),
        }
        dataset.commit(part, content=PartContent(data=arrays, counts={"tokens": n}), seconds=0)
    return dataset


def seconds_of(items: Iterable[int], *, work: Callable[[int], Any]) -> float:
    """Of the processor, for all items; what the work gives is not kept."""
    with timer() as took:
        for item in items:
            work(item)
    return took.processor


if __name__ == "__main__":
    main()
