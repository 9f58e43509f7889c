"""`linear`: the mean of the models' weights."""

from collections.abc import Sequence

from torch import Tensor

from .rule import Block, Rule, moved, weighted_sum


def linear(*, weights: Sequence[float], normalize: bool) -> Rule:
    """Weighted mean Σ_j w_j θ_j / Σ_j w_j, or without `normalize` the weighted sum (arXiv:2203.05482, section 2, "uniform soup").

    The mean is computed as θ_1 + Σ_j (w_j / Σ w) (θ_j - θ_1), so that the mean of equal models is that model to the bit.
    """
    if not normalize:
        return Rule(tuple(weights), lambda block: weighted_sum(block.models_MN, weights=weights))
    total = sum(weights)
    shares = tuple(weight / total for weight in weights)

    def apply(block: Block) -> Tensor:
        first_N = block.models_MN[0]
        return moved(first_N, weighted_sum(block.models_MN[1:] - first_N, weights=shares[1:]))

    return Rule(shares, apply)
