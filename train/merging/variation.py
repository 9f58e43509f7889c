"""Weights of the models computed from how far each has moved from the base, tensor by tensor (FuseChat)."""

from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor

from .rule import Block, Blocks, Rule, mean_of_squares, moved, weighted_sum
from .selection import find_cuts
from .task_vectors import elected

_SMALLEST = 1e-6  # as in mergekit: a smaller sum of mean squares counts as 0, a smaller divisor as this


def varm(blocks: Blocks, *, n_positions: int) -> Rule:
    """Variation ratio merge: θ_0 + Σ_j w_j δ_j, w_j ∝ mean(δ_j²) over the tensor (FuseChat 1.0, arXiv:2402.16107, on merging).

    If nothing moved, the weights are equal.
    """
    weights = _shares(mean_of_squares((block.deltas_MN for block in blocks), n_positions=n_positions))
    return Rule(weights, lambda block: moved(block.base_N, weighted_sum(block.deltas_MN, weights=weights)))


def sce(blocks: Blocks, *, n_positions: int, density: float, variant: Literal["fuseai", "mergekit"]) -> Rule:
    """Select, calculate, erase (FuseChat, arXiv:2408.07990, on merging).

    The share `density` of the positions at which the models differ is selected, by the highest variance of δ_j over j; on ties the first.
    w_j ∝ Σ δ_j² over the selected positions. Then θ_0 + Σ_j w_j m_j δ_j / Σ_j w_j m_j, where m_j says that δ_j has the sign of Σ_j δ_j; a
    sum of exactly 0 counts as positive.

    In the form of FuseAI's code all positions move. In mergekit's form only the selected ones move, the weights are equal if Σ_j mean(δ_j²)
    is below 1e-6 (after selection), and the divisor is at least 1e-6; so the result depends on the scale of the δ_j.
    """
    (cut,) = find_cuts(lambda: (_variance(block.deltas_MN)[None] for block in blocks), densities=[density], nonzero=True)
    selected = _selected(blocks, select=cut.selector())
    least = _SMALLEST if variant == "mergekit" else 0.0
    weights = _shares(mean_of_squares(selected, n_positions=n_positions), least=least)
    select = cut.selector()

    def apply(block: Block) -> Tensor:
        deltas_MN = block.deltas_MN
        if variant == "mergekit":
            deltas_MN *= select(_variance(deltas_MN))
        merged_N = elected(deltas_MN, weights=weights, votes=[1.0] * len(weights), normalize=True, least=least)
        return moved(block.base_N, merged_N)

    return Rule(weights, apply)


def _selected(blocks: Blocks, *, select: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    for block in blocks:
        deltas_MN = block.deltas_MN
        yield deltas_MN * select(_variance(deltas_MN))


def _variance(deltas_MN: Tensor) -> Tensor:
    """Variance over the models, uncorrected; exactly 0 if they are equal."""
    others_MN = deltas_MN[1:] - deltas_MN[0]  # the first is 0 in this form
    mean_N = others_MN.sum(dim=0).div_(len(deltas_MN))
    return others_MN.sub_(mean_N).square_().sum(dim=0).add_(mean_N.square_()).div_(len(deltas_MN))


def _shares(squares: list[float], *, least: float = 0.0) -> tuple[float, ...]:
    total = sum(squares)
    if total < least or total == 0:
        return tuple(1 / len(squares) for _ in squares)
    return tuple(square / total for square in squares)
