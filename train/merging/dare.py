"""`dare_linear` and `dare_ties`: a random share of each task vector."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .elected import elected
from .rule import Block, Rule, moved, shares, weighted_sum

_DRAWS = 1 << 32  # numbers a draw can be


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
        keys: what the draws of each model are made from, say seed, model and tensor. They depend on nothing else, not on the blocks.
    """
    generators = [np.random.Philox(key=_key(key)) for key in keys]
    of_models = shares(weights, normalize=normalize)

    def apply(block: Block) -> Tensor:
        deltas_MN = block.deltas_MN
        for delta_N, density, generator in zip(deltas_MN, densities, generators, strict=True):
            if density < 1:
                delta_N.mul_(_drawn(generator, n=len(delta_N), density=density)).div_(density)
        if elect:
            return moved(block.base_N, scale * elected(deltas_MN, weights=weights, normalize=normalize))
        return moved(block.base_N, scale * weighted_sum(deltas_MN, weights=of_models))

    return Rule(tuple(weights) if elect else of_models, apply)


def _key(parts: Sequence[str | int]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(list(parts)).encode()).digest()[:16], "little")


def _drawn(generator: np.random.Philox, *, n: int, density: float) -> Tensor:
    """Which of the next n positions are kept. Each draw of the generator serves two of them, so n must be even but in the last block."""
    draws_N = generator.random_raw((n + 1) // 2).view(np.uint32)[:n]
    return torch.from_numpy(draws_N < np.uint32(min(round(density * _DRAWS), _DRAWS - 1)))
