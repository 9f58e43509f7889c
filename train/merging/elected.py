"""The disjoint merge of TIES: of the task vectors, those parts that have the elected sign."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .rule import weighted_sum


def elected(
    deltas_MN: Tensor, *, weights: Sequence[float], votes: Sequence[float] | None = None, normalize: bool, least: float = 0.0
) -> Tensor:
    """Disjoint merge: Σ_j w_j m_j δ_j, with `normalize` divided by Σ_j w_j m_j, where m_j says that w_j δ_j has the elected sign.

    Args:
        deltas_MN: the task vectors.
        weights: w_j.
        votes: v_j; the elected sign is that of Σ_j v_j δ_j, and positive where this is exactly 0, as in mergekit. By default the weights.
        normalize: whether to divide.
        least: a smaller divisor is taken as this.
    """
    sign_N = (weighted_sum(deltas_MN, weights=votes or weights) >= 0).to(deltas_MN.dtype).mul_(2).sub_(1)
    total_N, divisor_N = torch.zeros_like(sign_N), torch.zeros_like(sign_N)
    for delta_N, weight in zip(deltas_MN, weights, strict=True):
        agreeing_N = (delta_N * weight).mul_(sign_N).clamp_(min=0)  # w_j m_j |δ_j|, which is faster than with masks
        total_N.add_(agreeing_N)
        divisor_N.add_(agreeing_N > 0, alpha=weight)
    total_N.mul_(sign_N)
    if not normalize:
        return total_N
    divisor_N.masked_fill_(divisor_N == 0, 1)
    return total_N.div_(divisor_N.clamp_(min=least) if least else divisor_N)
