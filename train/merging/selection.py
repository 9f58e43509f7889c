"""Selects the largest entries of tensors block by block: exactly the requested number, in memory independent of the tensor's size.

Non-negative floating-point numbers have the same order as their bits read as integers. So the threshold is found 16 bits at a time, from
histograms, with two passes over float32 (four over float64).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_DIGIT_BITS = 16
_N_DIGITS = 1 << _DIGIT_BITS
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True, slots=True)
class Cut:
    """The selection in one row: all entries above the threshold, and the first few that equal it."""

    threshold: float
    n_equal: int | None  # None: all of them

    def selector(self) -> Callable[[Tensor], Tensor]:
        """A function that says which of a block's scores are selected; call it once with each block, in order."""
        left = self.n_equal

        def select(scores_N: Tensor) -> Tensor:
            nonlocal left
            if left is None:
                return scores_N >= self.threshold
            selected_N = scores_N > self.threshold
            if left > 0:
                equal = torch.nonzero(scores_N == self.threshold).flatten()[:left]
                selected_N[equal] = True
                left -= len(equal)
            return selected_N

        return select


ALL, NONE = Cut(0.0, None), Cut(float("inf"), 0)


def find_cuts(scores: Callable[[], Iterator[Tensor]], *, densities: Sequence[float], nonzero: bool = False) -> list[Cut]:
    """The threshold of each row that selects the given share of its largest entries: int(density · entries) of them.

    Args:
        scores: returns the blocks, each (rows, positions), float32 or float64, non-negative; called once per pass.
        densities: one per row. If all are 1, everything is selected.
        nonzero: the share is of the entries above 0, and may be empty; otherwise it is of all entries, and at least one.
    """
    if all(density == 1 for density in densities):
        return [ALL] * len(densities)
    searches = [_Search(density, nonzero) for density in densities]
    while any(search.cut is None for search in searches):
        for block in scores():
            for search, scores_N in zip(searches, block, strict=True):
                search.look(scores_N)
        for search in searches:
            search.narrow()
    return [search.cut for search in searches if search.cut is not None]


@dataclass(slots=True)
class _Search:
    """Finds the threshold of one row."""

    density: float
    nonzero: bool
    cut: Cut | None = None
    _n_bits: int = 0  # of an entry, known after the first block
    _known: int = 0  # number of its leading bits that are known
    _prefix: int = 0  # the known bits
    _left: int = 0  # entries to select among those with this prefix
    _n_entries: int = 0
    _histogram: np.ndarray = field(default_factory=lambda: np.zeros(_N_DIGITS, np.int64))

    def look(self, scores_N: Tensor) -> None:
        """Count the next 16 bits of a block's entries that begin with the known bits."""
        bits_N = scores_N.view(_INTEGERS[scores_N.dtype])
        self._n_bits = 8 * bits_N.dtype.itemsize
        if self._known:
            bits_N = bits_N[bits_N >> (self._n_bits - self._known) == self._prefix]
        else:
            self._n_entries += int(torch.count_nonzero(bits_N)) if self.nonzero else len(bits_N)
        digits_N = (bits_N >> (self._n_bits - self._known - _DIGIT_BITS)) & (_N_DIGITS - 1)
        self._histogram += torch.bincount(digits_N, minlength=_N_DIGITS).numpy()

    def narrow(self) -> None:
        """Choose those 16 bits, after all blocks."""
        if not self._known:
            self._left = int(self.density * self._n_entries)
            if not self.nonzero:
                self._left = max(1, self._left)
            if self._left == 0:
                self.cut = NONE
                return
        at_least = np.cumsum(self._histogram[::-1])[::-1]  # entries with this digit or a larger one
        digit = int(np.flatnonzero(at_least >= self._left)[-1])
        self._left -= int(at_least[digit] - self._histogram[digit])
        self._prefix = self._prefix << _DIGIT_BITS | digit
        self._known += _DIGIT_BITS
        self._histogram[:] = 0
        if self._known == self._n_bits:
            bits = np.array([self._prefix], np.dtype(f"u{self._n_bits // 8}"))
            self.cut = Cut(float(bits.view(np.dtype(f"f{self._n_bits // 8}"))[0]), self._left)
