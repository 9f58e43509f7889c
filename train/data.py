"""Reads fused targets as micro-batches. What a step trains on is a function of its number, the seed, the targets and the config.

Axes: T tokens of a part or a micro-batch, K stored entries of a distribution.

Position j of a segment predicts token j + 1 of the same segment, and the distribution stored at j is about that token. The last position
of a segment predicts nothing: no label, no target. Where a long segment is cut, the position before the cut keeps its label and target.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..store.dataset import Dataset
from ..store.errors import DataError, FingerprintMismatch
from .batch import MicroBatch
from .config import DEFAULT_EPOCHS, TrainingConfig, TrainJob
from .loss import IGNORED, SoftTargets
from .packing import BUFFER_PARTS, EpochPacks, Piece, pack_epoch

Pack = list[Piece]
_TARGET_ARRAYS = ("topk_ids_TK", "topk_logprobs_TK", "tail_logprob_T")


class TargetsData:
    """The batches of a run.

    The packs of all epochs follow each other; batch t is packs t·G … (t + 1)·G - 1. Where the last epoch ends within a batch, the batch is
    completed from the beginning of one more epoch, so every batch is full.
    """

    def __init__(self, dataset: Dataset, *, parts: list[int], vocab_size: int, config: TrainingConfig) -> None:
        """Index the packs: reads only the segment offsets of each part.

        Raises:
            DataError: a part is not there, or the parts hold no segment of two tokens or more.
        """
        absent = sorted(set(parts) - set(dataset.parts()))
        if absent:
            raise DataError(f"{dataset.folder} has no part {', '.join(map(str, absent[:5]))}. Run the fusion again.")
        self.config = config
        self._dataset = dataset
        self._vocab_size = vocab_size
        self._offsets = {part: dataset.read(part, "segment_offsets")[0].astype(np.int64) for part in parts}
        self._epochs: dict[int, EpochPacks] = {}
        self._parts = _PartCache(dataset, names=("token_ids_T", *(_TARGET_ARRAYS if config.uses_targets else ())))
        if not len(self._epoch(0)):
            raise DataError(f"{dataset.folder} has no segment of two tokens or more in its {len(parts)} parts: nothing to train on.")
        self.steps = config.steps or self._steps_of_epochs(config.epochs or DEFAULT_EPOCHS)

    @classmethod
    def of(cls, job: TrainJob, *, vocab_size: int) -> "TargetsData":
        """The batches of a job, whose targets must still be those it was made for."""
        dataset = Dataset.open(job.targets_folder)
        if dataset.fingerprint != job.targets_fingerprint:
            raise FingerprintMismatch(
                f"{job.targets_folder}: the fingerprint of the targets ({dataset.fingerprint[:12]}…) must equal the job's "
                f"({job.targets_fingerprint[:12]}…). Start the training again from the recipe."
            )
        return cls(dataset, parts=job.parts, vocab_size=vocab_size, config=job.config)

    def packs(self, step: int) -> list[Pack]:
        """The packs of a global batch; steps count from 0."""
        first = step * self.config.global_batch_size
        found: list[Pack] = []
        epoch = before = 0
        while len(found) < self.config.global_batch_size:
            index = self._epoch(epoch)
            wanted = range(max(0, first + len(found) - before), len(index))
            found += [index[pack] for pack in wanted[: self.config.global_batch_size - len(found)]]
            before += len(index)
            epoch += 1
        return found

    def named(self, packs: list[Pack]) -> str:
        """The documents in some packs, and where they are, for messages."""
        segments: dict[int, set[int]] = {}
        for piece in (piece for pack in packs for piece in pack):
            segments.setdefault(piece.part, set()).add(piece.segment)
        return "; ".join(self._named(part, sorted(numbers)[:8]) for part, numbers in sorted(segments.items())[:8])

    def _named(self, part: int, segments: list[int]) -> str:
        documents = sorted(set(self._dataset.read(part, "doc_id_S")[0][segments].tolist()))
        return f"documents {', '.join(map(str, documents))} (part {part}, segments {', '.join(map(str, segments))})"

    def micro_batches(self, step: int, *, data_rank: int) -> list[MicroBatch]:
        """A data-parallel rank's share of a global batch, on the CPU."""
        share = self.config.global_batch_size // self.config.data_parallel
        packs = self.packs(step)[data_rank * share : (data_rank + 1) * share]
        size = self.config.micro_batch_size
        return [self._micro_batch([piece for pack in packs[i : i + size] for piece in pack]) for i in range(0, share, size)]

    def _micro_batch(self, pieces: list[Piece]) -> MicroBatch:
        token_ids_T, labels_T = (np.concatenate(rows) for rows in zip(*map(self._tokens, pieces), strict=True))
        largest = int(token_ids_T.max())
        if largest >= self._vocab_size:
            raise DataError(f"token id ({largest}) of part {pieces[0].part} must be below the model's vocab_size ({self._vocab_size}).")
        return MicroBatch(
            token_ids_T=torch.from_numpy(token_ids_T),
            lengths=[piece.length for piece in pieces],
            labels_T=torch.from_numpy(labels_T),
            soft=self._soft_targets(pieces) if self.config.uses_targets else None,
        )

    def _tokens(self, piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        part_token_ids_T = self._parts[piece.part]["token_ids_T"]
        end = piece.start + piece.length
        token_ids_T = part_token_ids_T[piece.start : end].astype(np.int64)
        labels_T = np.append(token_ids_T[1:], IGNORED if piece.ends_segment else int(part_token_ids_T[end]))
        return token_ids_T, labels_T

    def _soft_targets(self, pieces: list[Piece]) -> SoftTargets:
        arrays = [self._distributions(piece) for piece in pieces]
        topk_ids_TK, topk_logprobs_TK, tail_logprob_T = (torch.from_numpy(np.concatenate(rows)) for rows in zip(*arrays, strict=True))
        return SoftTargets.from_logprobs(
            topk_ids_TK, topk_logprobs_NK=topk_logprobs_TK, tail_logprob_N=tail_logprob_T, tail=self.config.tail
        )

    def _distributions(self, piece: Piece) -> tuple[NDArray[Any], ...]:
        arrays = self._parts[piece.part]
        span = slice(piece.start, piece.start + piece.length)
        topk_ids_TK, topk_logprobs_TK, tail_logprob_T = (arrays[name][span] for name in _TARGET_ARRAYS)
        topk_logprobs_TK = topk_logprobs_TK.astype(np.float32)
        if piece.ends_segment:
            topk_logprobs_TK[-1] = -np.inf
        return topk_ids_TK.astype(np.int64), topk_logprobs_TK, tail_logprob_T.astype(np.float32)

    def _epoch(self, epoch: int) -> EpochPacks:
        if epoch not in self._epochs:
            self._epochs[epoch] = pack_epoch(self._offsets, sequence_length=self.config.sequence_length, seed=self.config.seed, epoch=epoch)
        return self._epochs[epoch]

    def _steps_of_epochs(self, epochs: int) -> int:
        return -(-sum(len(self._epoch(epoch)) for epoch in range(epochs)) // self.config.global_batch_size)


class _PartCache:
    """The arrays of the parts used last, decoded whole."""

    def __init__(self, dataset: Dataset, *, names: tuple[str, ...]) -> None:
        self._dataset = dataset
        self._names = names
        self._arrays: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()

    def __getitem__(self, part: int) -> dict[str, NDArray[Any]]:
        if part in self._arrays:
            self._arrays.move_to_end(part)
            return self._arrays[part]
        if len(self._arrays) >= 2 * BUFFER_PARTS:  # packs reach back into the buffer before
            self._arrays.popitem(last=False)
        self._arrays[part] = dict(zip(self._names, self._dataset.read(part, *self._names), strict=True))
        return self._arrays[part]


def prefetched(read: Callable[[int], Any], steps: range) -> Iterator[Any]:
    """`read(step)` of each step in order, read one step ahead in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="targets") as executor:
        following: Future[Any] | None = None
        for step in steps:
            current = following or executor.submit(read, step)
            following = executor.submit(read, step + 1) if step + 1 in steps else None
            yield current.result()
