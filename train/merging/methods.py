"""The merge methods by name: from the settings to the rule for one tensor."""

from collections.abc import Sequence

from .config import MergeConfig
from .interpolation import linear, slerp
from .rule import Blocks, Rule
from .task_vectors import dare, task_arithmetic, ties
from .variation import sce, varm


def rule_of(config: MergeConfig, *, tensor: str, models: Sequence[str], blocks: Blocks, n_positions: int) -> Rule:
    """The rule for the tensor with this name.

    Args:
        config: the method and its settings.
        tensor: its name, part of DARE's seed.
        models: names, in the order of the blocks' rows.
        blocks: the tensor in all models.
        n_positions: numbers in it, at least one.
    """
    weights = [config.weight_of(model) for model in models]
    match config.method:
        case "linear":
            return linear(weights=weights, normalize=config.normalizes)
        case "slerp":
            return slerp(blocks, t=config.t)
        case "task_arithmetic":
            return task_arithmetic(weights=weights, normalize=config.normalizes, scale=config.scale)
        case "ties":
            densities = [config.density_of(model) for model in models]
            return ties(blocks, densities=densities, weights=weights, normalize=config.normalizes, scale=config.scale)
        case "dare_linear" | "dare_ties":
            return dare(
                densities=[config.density_of(model) for model in models],
                weights=weights,
                normalize=config.normalizes,
                scale=config.scale,
                elect=config.method == "dare_ties",
                keys=[(config.seed, model, tensor) for model in models],
            )
        case "varm":
            return varm(blocks, n_positions=n_positions)
        case "sce":
            return sce(blocks, n_positions=n_positions, density=config.density_of(""), variant=config.variant)
