"""How far apart two computations of one number may come out, by the arithmetic alone.

Each operation rounds to a nearest number of its format: it is off by at most u = eps / 2 of the result's size, and by u / sqrt(3) in the
mean square. Roundings are as often up as down, so that a chain of n of them is off by u sqrt(n / 3) (Higham and Mary 2019, "A new approach
to probabilistic rounding error analysis"). Two such chains, in another order or by another kernel, are off from each other by sqrt(2) times
that. Five times the mean square is exceeded once in a million comparisons of independent numbers.
"""

import math

import torch

_DEVIATIONS = 5
LANES = 8  # partial sums that torch keeps at least of a long sum, a vector of float32 with AVX2: the chain is as much shorter


def rounding(size: float | torch.Tensor, *, terms: float, averaged: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """Tolerance, absolute, between two computations of a number; never below the distance of neighbouring numbers.

    Args:
        size: largest absolute value of the number, or of what is summed up to it where that is larger.
        terms: of all sums on the way to it, one after the other.
        averaged: independent numbers of that size of which it is the mean.
        dtype: number format of the arithmetic.
    """
    size, eps = float(torch.as_tensor(size).detach().abs().max()), torch.finfo(dtype).eps
    return size * max(eps, _DEVIATIONS * eps / 2 * math.sqrt(2 * terms / 3 / averaged))


def stored(size: float, *, dtype: torch.dtype = torch.float16) -> float:
    """By how much a number of that size moves at most when it is stored in a number format."""
    return size * torch.finfo(dtype).eps / 2


def model_terms(*, layers: int, hidden: int, ffn: int, head_dim: int, length: int) -> int:
    """Terms of the sums on the way from a token to a logit of a transformer.

    Of a layer: two norms; queries, keys and values; scores; the softmax and the weighted values over positions; the output; the MLP's
    two products. At the end a norm and the output embedding. A gradient goes the way twice more, and sums over all positions.
    """
    layer = 2 * hidden + hidden + head_dim + 2 * length + hidden + hidden + ffn
    return layers * layer + 2 * hidden
