"""`ties`: what is left of the task vectors after trimming, where they agree on the sign."""

from collections.abc import Sequence

from torch import Tensor

from .elected import elected
from .rule import Block, Blocks, Rule, moved
from .selection import find_cuts


def ties(blocks: Blocks, *, densities: Sequence[float], weights: Sequence[float], normalize: bool, scale: float) -> Rule:
    """Trim, elect, and disjoint merge (arXiv:2306.01708, section 4.2).

    Of each δ_j the share `densities[j]` of largest magnitude is kept, tensor by tensor (the paper: of the whole model), at least one
    position; of equal ones the first. The rest is `elected`.
    """
    cuts = find_cuts(lambda: (block.deltas_MN.abs() for block in blocks), densities=densities)
    kept = [cut.selector() for cut in cuts]

    def apply(block: Block) -> Tensor:
        deltas_MN = block.deltas_MN
        for delta_N, select in zip(deltas_MN, kept, strict=True):
            delta_N.mul_(select(delta_N.abs()))
        return moved(block.base_N, scale * elected(deltas_MN, weights=weights, normalize=normalize))

    return Rule(tuple(weights), apply)
