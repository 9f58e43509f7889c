"""`varm`: weights of the models by how far each moved, tensor by tensor (FuseChat 1.0)."""

from .rule import Blocks, Rule, mean_of_squares, moved, shares_of_squares, weighted_sum


def varm(blocks: Blocks, *, n_positions: int) -> Rule:
    """Variation ratio merge: θ_0 + Σ_j w_j δ_j, w_j ∝ mean(δ_j²) over the tensor (FuseChat 1.0, arXiv:2402.16107, on merging).

    Where nothing moved the weights are equal.
    """
    weights = shares_of_squares(mean_of_squares((block.deltas_MN for block in blocks), n_positions=n_positions))
    return Rule(weights, lambda block: moved(block.base_N, weighted_sum(block.deltas_MN, weights=weights)))
