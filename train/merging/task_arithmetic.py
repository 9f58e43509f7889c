"""`task_arithmetic`: the sum of the task vectors δ_j = θ_j - θ_0."""

from collections.abc import Sequence

from .rule import Rule, moved, shares, weighted_sum


def task_arithmetic(*, weights: Sequence[float], normalize: bool, scale: float) -> Rule:
    """θ_0 + λ Σ_j w_j δ_j, with `normalize` divided by Σ_j w_j (arXiv:2212.04089, section 2)."""
    of_models = shares(weights, normalize=normalize)
    return Rule(of_models, lambda block: moved(block.base_N, scale * weighted_sum(block.deltas_MN, weights=of_models)))
