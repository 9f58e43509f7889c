"""A micro-batch, the input of one forward pass. Axes: T tokens, N = T positions, K stored entries of a distribution."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import itemgetter

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

from .loss import IGNORED, SoftTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Packed sequences of one forward pass, laid end to end as one row of T tokens."""

    token_ids_T: Tensor  # int64
    lengths: Sequence[int]  # runs of tokens that attend to each other, in order; positions restart in each
    labels_T: Tensor  # int64 next token, or IGNORED
    soft: SoftTargets | None
    weights_T: Tensor | None = None  # float32 weight of each position in the losses; None: all 1

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on a device. From pinned memory the copies do not wait, and run in order with the device's next work."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), lengths=self.lengths)

    def pinned(self) -> "MicroBatch":
        """The same batch in pinned memory, from which a GPU can copy directly."""
        return self._each(lambda tensor: tensor.pin_memory(), lengths=self.lengths)

    def split(self, n_lengths: Sequence[int]) -> "list[MicroBatch]":
        """Split into batches with the next `n` of `lengths` each, which share this batch's memory."""
        ends = list(accumulate(n_lengths))
        found, start = [], 0
        for first, stop in zip([0, *ends], ends, strict=False):
            lengths = self.lengths[first:stop]
            rows = slice(start, start + sum(lengths))
            found.append(self._each(itemgetter(rows), lengths=lengths))
            start = rows.stop
        return found

    def padded(self, multiple: int) -> "MicroBatch":
        """The same batch, padded to a multiple of T with one more segment of tokens without labels."""
        n = -len(self.token_ids_T) % multiple
        if not n:
            return self
        wider = self._each(lambda tensor: F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, n)), lengths=[*self.lengths, n])
        return replace(wider, labels_T=F.pad(self.labels_T, (0, n), value=IGNORED))

    def _each(self, change: Callable[[Tensor], Tensor], *, lengths: Sequence[int]) -> "MicroBatch":
        return MicroBatch(
            token_ids_T=change(self.token_ids_T),
            lengths=lengths,
            labels_T=change(self.labels_T),
            soft=None if self.soft is None else self.soft.each(change),
            weights_T=None if self.weights_T is None else change(self.weights_T),
        )
