"""`slerp`: between the base and one model, along a great circle."""

import math

from torch import Tensor

from .rule import Block, Blocks, Rule, moved

_NEARLY_PARALLEL = 0.9995  # cosine above which slerp is linear, as in mergekit: the sine of the angle is too small as a divisor
_SHORTEST = 1e-8  # a shorter tensor has no direction


def slerp(blocks: Blocks, *, t: float) -> Rule:
    """Spherical interpolation between the base (t = 0) and one model (t = 1), each tensor taken as one vector (Shoemake 1985, section 3.3).

    With Ω the angle between them: sin((1 - t) Ω) / sin Ω · base + sin(t Ω) / sin Ω · model. Nearly parallel ones are interpolated linearly.
    The angle is computed in float64.
    """
    aa = bb = ab = 0.0
    for block in blocks:
        a_N, b_N = block.base_N.double().numpy(), block.models_MN[0].double().numpy()
        aa, bb, ab = aa + float((a_N * a_N).sum()), bb + float((b_N * b_N).sum()), ab + float((a_N * b_N).sum())
    lengths = [length if length > _SHORTEST else 1.0 for length in (math.sqrt(aa), math.sqrt(bb))]
    cosine = ab / (lengths[0] * lengths[1])
    if abs(cosine) > _NEARLY_PARALLEL:
        return Rule((t,), lambda block: _on_the_line(block, t=t))
    angle = math.acos(cosine)
    of_base, of_model = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return Rule((of_model,), lambda block: of_base * block.base_N + of_model * block.models_MN[0])


def _on_the_line(block: Block, *, t: float) -> Tensor:
    """Interpolate from the nearer end, which is exact."""
    if t < 0.5:
        return moved(block.base_N, t * block.deltas_MN[0])
    return moved(block.models_MN[0], (t - 1) * block.deltas_MN[0])
