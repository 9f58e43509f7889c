"""`sce`: select, calculate, erase (FuseChat)."""

from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor

from .elected import elected
from .rule import Block, Blocks, Rule, mean_of_squares, moved, shares_of_squares
from .selection import find_cuts

_SMALLEST = 1e-6  # as in mergekit: a smaller sum of mean squares counts as 0, a smaller divisor as this


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
    weights = shares_of_squares(mean_of_squares(selected, n_positions=n_positions), least=least)
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
