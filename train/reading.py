"""How much of its data a training reads, and how often: counted before it starts, for the user."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .config import DEFAULT_EPOCHS, TrainingConfig
from .labels import LabelRuns
from .order import PackOrder

_WORTH_SAYING = 0.1  # share of the sequences that are read one extra time, because batches are rounded up


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The reading of one training; a sequence is a pack."""

    segments: int
    without_labels: int  # segments that are left out
    tokens_left_out: int  # in the first epoch: in these segments, and in sequences that would have no label
    sequences: int  # of the first epoch
    wanted: int | None  # sequences of all epochs; None if the number of steps is given
    batch: int  # sequences of a step
    steps: int

    @classmethod
    def of(cls, order: PackOrder, *, config: TrainingConfig, labels: LabelRuns | None) -> "Reading":
        """Count the packs of all epochs."""
        length_S = order.index.length_S
        epochs = None if config.steps else config.epochs or DEFAULT_EPOCHS
        wanted = None if epochs is None else sum(order.n_packs(epoch) for epoch in range(epochs))
        if labels is not None:
            without = int(np.count_nonzero(~labels.has_some_S))
        else:
            without = 0 if config.packing == "concatenated" else int(np.count_nonzero(length_S < 2))
        return cls(
            segments=len(length_S),
            without_labels=without,
            tokens_left_out=order.tokens_left_out(),
            sequences=order.n_packs(0),
            wanted=wanted,
            batch=config.global_batch_size,
            steps=config.steps or -(-(wanted or 0) // config.global_batch_size),
        )

    def remarks(self) -> Iterator[str]:
        """Notes for the user, as sentences."""
        if self.without_labels:
            yield f"{self.without_labels:,} of {self.segments:,} segments have no token to learn and are left out"
        elif self.tokens_left_out:
            yield f"{self.tokens_left_out:,} tokens of long segments are left out: their sequence has no token to learn"
        read = self.steps * self.batch
        if self.sequences < self.batch:
            yield (
                f"the corpus has {_count(self.sequences, 'sequence')}, but a step takes {self.batch}: each step reads every document "
                f"{self.batch / self.sequences:.1f} times. Lower training.global_batch_size ({self.batch}) to {self.sequences} or less, or "
                "use a larger corpus"
            )
        elif self.wanted is None and read > (1 + _WORTH_SAYING) * self.sequences:
            yield (
                f"{_count(self.steps, 'step')} of {_count(self.batch, 'sequence')} read the corpus "
                f"({_count(self.sequences, 'sequence')}) {read / self.sequences:.1f} times"
            )
        elif self.wanted is not None and read > (1 + _WORTH_SAYING) * self.wanted:
            extra = read - self.wanted
            yield (
                f"the epochs have {_count(self.wanted, 'sequence')}, but {_count(self.steps, 'step')} of {self.batch} read {read}: "
                f"{_count(extra, 'sequence')} {'is' if extra == 1 else 'are'} read one extra time. Lower training.global_batch_size "
                f"({self.batch})"
            )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
