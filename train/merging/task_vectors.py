"""Sums of task vectors δ_j = θ_j - θ_0: whole, trimmed (TIES), or a random share (DARE)."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .rule import Block, Blocks, Rule, moved, weighted_sum
from .selection import find_cuts

_DRAWS = 1 << 32  # number of values of a draw


def task_arithmetic(*, weights: Sequence[float], normalize: bool, scale: float) -> Rule:
    """θ_0 + λ Σ_j w_j δ_j, with `normalize` divided by Σ_j w_j (arXiv:2212.04089, section 2)."""
    shares = _shares(weights, normalize=normalize)
    return Rule(shares, lambda block: moved(block.base_N, scale * weighted_sum(block.deltas_MN, weights=shares)))


def ties(blocks: Blocks, *, densities: Sequence[float], weights: Sequence[float], normalize: bool, scale: float) -> Rule:
    """Trim, elect, and disjoint merge (arXiv:2306.01708, section 4.2).

    The share `densities[j]` of each δ_j with the largest magnitude is kept, per tensor (in the paper: per model), at least one position;
    on ties the first. The rest is `elected`.
    """
    cuts = find_cuts(lambda: (block.deltas_MN.abs() for block in blocks), densities=densities)
    kept = [cut.selector() for cut in cuts]

    def apply(block: Block) -> Tensor:
        deltas_MN = block.deltas_MN
        for delta_N, select in zip(deltas_MN, kept, strict=True):
            delta_N.mul_(select(delta_N.abs()))
        return moved(block.base_N, scale * elected(deltas_MN, weights=weights, normalize=normalize))

    return Rule(tuple(weights), apply)


def dare(
    *,
    densities: Sequence[float],
    weights: Sequence[float],
    normalize: bool,
    scale: float,
    elect: bool,
    keys: Sequence[Sequence[str | int]],
) -> Rule:
    """Drop and rescale (arXiv:2311.03099, section 3.2): each position of δ_j is kept with probability `densities[j]`, and divided by it.

    Then the sum of `task_arithmetic`, or with `elect` the disjoint merge of `ties`.

    Args:
        keys: the seeds of each model's draws, such as seed, model and tensor. The draws depend on nothing else, not on the blocks.
    """
    generators = [np.random.Philox(key=_key(key)) for key in keys]
    shares = _shares(weights, normalize=normalize)

    def apply(block: Block) -> Tensor:
        deltas_MN = block.deltas_MN
        for delta_N, density, generator in zip(deltas_MN, densities, generators, strict=True):
            if density < 1:
                delta_N.mul_(_drawn(generator, n=len(delta_N), density=density)).div_(density)
        if elect:
            return moved(block.base_N, scale * elected(deltas_MN, weights=weights, normalize=normalize))
        return moved(block.base_N, scale * weighted_sum(deltas_MN, weights=shares))

    return Rule(tuple(weights) if elect else shares, apply)


def elected(
    deltas_MN: Tensor, *, weights: Sequence[float], votes: Sequence[float] | None = None, normalize: bool, least: float = 0.0
) -> Tensor:
    """Disjoint merge: Σ_j w_j m_j δ_j, with `normalize` divided by Σ_j w_j m_j, where m_j says that w_j δ_j has the elected sign.

    Args:
        deltas_MN: the task vectors.
        weights: w_j.
        votes: v_j; the elected sign is that of Σ_j v_j δ_j, and positive if this is exactly 0, as in mergekit. By default the weights.
        normalize: whether to divide.
        least: smallest divisor.
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


def _shares(weights: Sequence[float], *, normalize: bool) -> tuple[float, ...]:
    total = sum(weights) if normalize else 1.0
    return tuple(weight / total for weight in weights)


def _key(parts: Sequence[str | int]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(list(parts)).encode()).digest()[:16], "little")


def _drawn(generator: np.random.Philox, *, n: int, density: float) -> Tensor:
    """Which of the next n positions are kept. Each draw of the generator serves two of them, so n must be even except in the last block."""
    draws_N = generator.random_raw((n + 1) // 2).view(np.uint32)[:n]
    return torch.from_numpy(draws_N < np.uint32(min(round(density * _DRAWS), _DRAWS - 1)))
