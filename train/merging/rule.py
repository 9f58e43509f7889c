"""The interface of merge methods: a first pass over a tensor, if needed, and a rule that is then applied block by block.

Axes: M models, N positions of a flat tensor or of one of its blocks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Block(NamedTuple):
    """The same positions of one tensor in all models, in one floating-point dtype."""

    base_N: Tensor  # without a base, the first model
    models_MN: Tensor

    @property
    def deltas_MN(self) -> Tensor:
        """The task vectors, which are the changes from the base (arXiv:2212.04089, section 2)."""
        return self.models_MN - self.base_N


Blocks = Iterable[Block]  # of one tensor, in order; can be iterated several times


@dataclass(frozen=True, slots=True)
class Rule:
    """How one tensor is merged."""

    weights: tuple[float, ...]  # of the models in this tensor
    apply: Callable[[Block], Tensor]  # merged positions, (N,); called once with each block, in order


def moved(base_N: Tensor, change_N: Tensor) -> Tensor:
    """base + change; without a change exactly the base, even if it is -0."""
    return base_N - (0.0 - change_N)  # x - 0 is x for both zeros; x + 0 is not


def weighted_sum(values_MN: Tensor, *, weights: Sequence[float]) -> Tensor:
    """Σ_j w_j v_j, model by model, so that no second stack is in memory."""
    total_N = torch.zeros(values_MN.shape[1:], dtype=values_MN.dtype)
    for value_N, weight in zip(values_MN, weights, strict=True):
        total_N.add_(value_N, alpha=weight)
    return total_N


def mean_of_squares(blocks: Iterator[Tensor], *, n_positions: int) -> list[float]:
    """Mean over all positions of the squares of each row, in float64. numpy's summation order does not depend on the number of threads."""
    totals = sum(np.square(values_MN.numpy(), dtype=np.float64).sum(axis=-1) for values_MN in blocks)
    return [float(total) / n_positions for total in np.atleast_1d(totals)]


def shares(weights: Sequence[float], *, normalize: bool) -> tuple[float, ...]:
    """The weights, with `normalize` divided by their sum."""
    total = sum(weights) if normalize else 1.0
    return tuple(weight / total for weight in weights)


def shares_of_squares(squares: Sequence[float], *, least: float = 0.0) -> tuple[float, ...]:
    """Mean squares divided by their sum; equal shares where the sum is 0 or below `least`."""
    total = sum(squares)
    if total < least or total == 0:
        return tuple(1 / len(squares) for _ in squares)
    return tuple(square / total for square in squares)
