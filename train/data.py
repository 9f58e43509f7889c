"""Reads fused targets as micro-batches. The batch of a step is a function of its number, the seed, the targets and the config.

Axes: T tokens of a step or a micro-batch, K stored entries of a distribution, S segments, P pieces.

Position j of a segment predicts token j + 1 of the same segment, and the distribution stored at j is for that token. The last position of
a segment has no next token, so it has no target and no label. One exception: in `concatenated` packs its label is the first token of the
next segment, as in every training that joins and cuts texts, including the published one. The last position of a pack keeps label and
target if its segment continues. If the targets have an array `label_mask_T`, positions where it is 0 have neither, and pieces without any
label are left out (`packing`): every pack, and so every step, has a label.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..store.corpus_plan import Domains, require_domains
from ..store.dataset import Dataset, as_ranges
from ..store.errors import DataError, FingerprintMismatch, UsageError
from .batch import MicroBatch
from .blocks import Blocks
from .config import TrainingConfig, TrainJob
from .labels import LabelRuns
from .loss import IGNORED, SoftTargets
from .order import PackOrder, SegmentIndex
from .packing import Packs
from .reading import Reading

PREFETCHED_STEPS = 3  # batches that are ready or being read during a step: 148 bytes per token each, with ten entries
_MASK = "label_mask_T"
_TARGET_ARRAYS = ("topk_ids_TK", "topk_logprobs_TK", "tail_logprob_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The part of a segment that is in a pack."""

    part: int
    segment: int  # number in its part
    length: int  # tokens


class TargetsData:
    """The batches of a run.

    The packs of all epochs follow each other; batch t is packs t·G … (t + 1)·G - 1. If the last epoch ends inside a batch, the batch is
    filled from the beginning of one more epoch, so every batch is full. Any batch can be found without the previous ones. A data-parallel
    rank decodes the blocks of its share of the packs; if its share is only a few packs per step, these are all blocks.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        parts: list[int],
        vocab_size: int,
        config: TrainingConfig,
        domains: Domains | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Index the segments. Reads only the segment offsets and label masks of each part, and for weights by domain the documents' ids.

        Args:
            dataset: fused targets; for a training on text alone, any dataset with the tokens.
            parts: the parts to train on.
            vocab_size: of the model; ids must be below it.
            config: how to train.
            domains: of the corpus's documents; required with `domain_weights`.
            pin_memory: put batches into pinned memory, from which a GPU can copy while it computes.

        Raises:
            DataError: parts are missing, or they hold no segment of two tokens or more, or no segment with a label.
            UsageError: a weight is for a domain that the corpus does not have.
        """
        missing = dataset.missing(parts)
        if missing:
            raise DataError(
                f"{dataset.folder} lacks {len(missing)} of the {len(parts)} parts to train on ({as_ranges(missing)}). Run the recipe again."
            )
        self.config, self._dataset, self._vocab_size, self._pin_memory = config, dataset, vocab_size, pin_memory
        offsets = {part: dataset.read(part, "segment_offsets")[0].astype(np.int64) for part in parts}
        self.index = SegmentIndex.of(offsets)
        if int(self.index.length_S.max(initial=0)) < 2:
            raise DataError(f"{dataset.folder} has no segment of two tokens or more in its {len(parts)} parts: nothing to train on.")
        self._has_mask = _MASK in dataset.arrays(parts[0]).names
        labels = self._labels_of(dataset, offsets=offsets) if self._has_mask else None
        self._weight_S = self._weights(dataset, parts=parts, domains=domains) if config.domain_weights else None
        names = ("token_ids_T", *((_MASK,) if self._has_mask else ()), *(_TARGET_ARRAYS if config.uses_targets else ()))
        self._blocks = Blocks(dataset, index=self.index, names=names)
        self._order = PackOrder(self.index, packing=config.packing, sequence_length=config.sequence_length, seed=config.seed, labels=labels)
        self.reading = Reading.of(self._order, config=config, labels=labels)
        self.steps = self.reading.steps

    @classmethod
    def of(cls, job: TrainJob, *, vocab_size: int, pin_memory: bool = False) -> "TargetsData":
        """The batches of a job. Its targets must not have changed."""
        dataset = Dataset.open(job.targets_folder)
        if dataset.fingerprint != job.targets_fingerprint:
            raise FingerprintMismatch(
                f"{job.targets_folder}: the fingerprint of the targets ({dataset.fingerprint[:12]}…) must equal the job's "
                f"({job.targets_fingerprint[:12]}…). Start the training from the recipe again."
            )
        domains = Domains.of(job.corpus_folder) if job.config.domain_weights and job.corpus_folder else None
        return cls(dataset, parts=job.parts, vocab_size=vocab_size, config=job.config, domains=domains, pin_memory=pin_memory)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the batches besides the job: whether tokens without labels are left out."""
        return {"segments_without_labels": self.reading.without_labels} if self.reading.tokens_left_out else {}

    def packs(self, step: int) -> list[list[Piece]]:
        """The packs of a global batch; steps count from 0."""
        packs = self._packs(step)
        block_P = packs.block_P
        number_P = self.index.number_B[block_P] + packs.segment_P - self.index.first_B1[block_P]
        columns = (self.index.part_B[block_P], number_P, packs.length_P)
        pieces = [Piece(part=part, segment=segment, length=n) for part, segment, n in zip(*(c.tolist() for c in columns), strict=True)]
        return [pieces[first:stop] for first, stop in zip(packs.offsets_N1, packs.offsets_N1[1:], strict=False)]

    def named(self, packs: list[list[Piece]]) -> str:
        """The documents in some packs and their places, for messages."""
        segments: dict[int, set[int]] = {}
        for piece in (piece for pack in packs for piece in pack):
            segments.setdefault(piece.part, set()).add(piece.segment)
        return "; ".join(self._named(part, sorted(numbers)[:8]) for part, numbers in sorted(segments.items())[:8])

    def _named(self, part: int, segments: list[int]) -> str:
        documents = sorted(set(self._dataset.read(part, "doc_id_S")[0][segments].tolist()))
        return f"documents {', '.join(map(str, documents))} (part {part}, segments {', '.join(map(str, segments))})"

    def micro_batches(self, step: int, *, data_rank: int) -> list[MicroBatch]:
        """A data-parallel rank's share of a global batch, on the CPU.

        Raises:
            DataError: a token's id is not in the model's vocabulary.
            DamagedPart: targets cannot be read.
        """
        share = self.config.global_batch_size // self.config.data_parallel
        packs = self._packs(step)[data_rank * share : (data_rank + 1) * share]
        rows, following_P = self._blocks.gather(packs)
        token_ids_T = rows["token_ids_T"].astype(np.int64)
        self._require_known(token_ids_T, packs=packs)
        counts_T = rows[_MASK].astype(np.bool_) if self._has_mask else None
        labels_T = self._labels(token_ids_T, packs=packs, following_P=following_P)
        if counts_T is not None:
            labels_T[~counts_T] = IGNORED
        weight_P = None if self._weight_S is None else self._weight_S[packs.segment_P]
        whole = MicroBatch(
            token_ids_T=torch.from_numpy(token_ids_T),
            lengths=self._lengths(packs),
            labels_T=torch.from_numpy(labels_T),
            soft=self._soft_targets(rows, packs=packs, counts_T=counts_T) if self.config.uses_targets else None,
            weights_T=None if weight_P is None else torch.from_numpy(np.repeat(weight_P, packs.length_P)),
        )
        size = self.config.micro_batch_size
        n_lengths = packs.offsets_N1 if self.config.packing == "isolated" else np.arange(len(packs) + 1)
        whole = whole.pinned() if self._pin_memory else whole
        return whole.split([int(n_lengths[min(i + size, share)] - n_lengths[i]) for i in range(0, share, size)])

    def _packs(self, step: int) -> Packs:
        size = self.config.global_batch_size
        return self._order.packs(step * size, (step + 1) * size)

    def _lengths(self, packs: Packs) -> list[int]:
        """Lengths of the runs of tokens that see each other."""
        if self.config.packing == "isolated":
            return packs.length_P.tolist()
        return np.add.reduceat(packs.length_P, packs.offsets_N1[:-1]).tolist()

    def _labels(self, token_ids_T: NDArray[np.int64], *, packs: Packs, following_P: NDArray[np.int64]) -> NDArray[np.int64]:
        last_P = np.cumsum(packs.length_P) - 1
        labels_T = np.append(token_ids_T[1:], IGNORED)
        joins_P = np.zeros(len(last_P), np.bool_)
        if self.config.packing == "concatenated":
            joins_P = packs.ends_segment_P.copy()
            joins_P[packs.offsets_N1[1:] - 1] = False
        labels_T[last_P[~joins_P]] = np.where(packs.ends_segment_P, IGNORED, following_P)[~joins_P]
        return labels_T

    def _soft_targets(self, rows: dict[str, NDArray[Any]], *, packs: Packs, counts_T: NDArray[np.bool_] | None) -> SoftTargets:
        ids_TK, logprobs_TK, tail_logprob_T = (torch.from_numpy(rows[name]) for name in _TARGET_ARRAYS)
        is_known_T = np.ones(len(logprobs_TK), np.bool_) if counts_T is None else counts_T
        is_known_T[np.cumsum(packs.length_P)[packs.ends_segment_P] - 1] = False
        logprobs_TK = logprobs_TK.float()
        logprobs_TK[torch.from_numpy(~is_known_T)] = -torch.inf
        return SoftTargets.from_logprobs(
            ids_TK.long(),
            topk_logprobs_NK=logprobs_TK,
            tail_logprob_N=tail_logprob_T,
            tail=self.config.tail,
            temperature=self.config.temperature,
        )

    def _require_known(self, token_ids_T: NDArray[np.int64], *, packs: Packs) -> None:
        place = int(token_ids_T.argmax())
        if token_ids_T[place] >= self._vocab_size:
            piece = int(np.searchsorted(np.cumsum(packs.length_P), place, side="right"))
            part = self.index.part_B[packs.block_P[piece]]
            raise DataError(f"token id ({token_ids_T[place]}) of part {part} must be below the model's vocab_size ({self._vocab_size}).")

    def _weights(self, dataset: Dataset, *, parts: list[int], domains: Domains | None) -> NDArray[np.float32]:
        """The weight of each segment, by its document's domain."""
        if domains is None:
            raise UsageError("training.domain_weights must be empty, because there is no corpus with the documents' domains.")
        require_domains(self.config.domain_weights, field="training.domain_weights", known=domains.names)
        weights = np.array([self.config.domain_weights.get(name, 1.0) for name in domains.names], np.float32)
        return np.concatenate([weights[domains.codes(dataset.read(part, "doc_id_S")[0])] for part in sorted(parts)])

    @staticmethod
    def _labels_of(dataset: Dataset, *, offsets: Mapping[int, NDArray[np.int64]]) -> LabelRuns:
        found = [LabelRuns.of_mask(dataset.read(part, _MASK)[0], segment_offsets=starts) for part, starts in sorted(offsets.items())]
        labels = LabelRuns.joined(found)
        if not labels.has_some_S.any():
            raise DataError(
                f"{dataset.folder}: its {len(labels.has_some_S)} segments have no token to learn, so there is nothing to train on. "
                "In conversations, only the assistant's tokens are learned: corpus.context_length may be too short for the other messages."
            )
        return labels


def prefetched(read: Callable[[int], Any], steps: range, *, begin: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """`read(step)` for each step in order, in a thread that reads up to PREFETCHED_STEPS steps ahead and calls `begin` first."""
    ahead: deque[Future[Any]] = deque()
    to_read = iter(steps)
    executor = ThreadPoolExecutor(1, thread_name_prefix="targets", initializer=begin)
    try:
        for _ in steps:
            ahead.extend(executor.submit(read, step) for step in islice(to_read, PREFETCHED_STEPS + 1 - len(ahead)))
            yield ahead.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
