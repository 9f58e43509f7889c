"""The methods by name: each makes, from the settings, the rule for one tensor. To add one: a file, and its name here and in `config`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .config import MergeConfig, Method
from .dare import dare
from .linear import linear
from .rule import Blocks, Rule
from .sce import sce
from .slerp import slerp
from .task_arithmetic import task_arithmetic
from .ties import ties
from .varm import varm


@dataclass(frozen=True, slots=True, kw_only=True)
class Merging:
    """One tensor to merge."""

    config: MergeConfig
    tensor: str  # its name, from which DARE draws
    models: Sequence[str]  # names, in the order of the blocks' rows
    blocks: Blocks  # the tensor in all models
    n_positions: int  # numbers in it, at least one

    @property
    def weights(self) -> list[float]:
        """Of the models."""
        return [self.config.weight_of(model) for model in self.models]

    @property
    def densities(self) -> list[float]:
        """Of the models."""
        return [self.config.density_of(model) for model in self.models]


def _dare(asked: Merging, *, elect: bool) -> Rule:
    config = asked.config
    return dare(
        densities=asked.densities,
        weights=asked.weights,
        normalize=config.normalizes,
        scale=config.scale,
        elect=elect,
        keys=[(config.seed, model, asked.tensor) for model in asked.models],
    )


METHODS: dict[Method, Callable[[Merging], Rule]] = {
    "linear": lambda asked: linear(weights=asked.weights, normalize=asked.config.normalizes),
    "slerp": lambda asked: slerp(asked.blocks, t=asked.config.t),
    "task_arithmetic": lambda asked: task_arithmetic(weights=asked.weights, normalize=asked.config.normalizes, scale=asked.config.scale),
    "ties": lambda asked: ties(
        asked.blocks,
        densities=asked.densities,
        weights=asked.weights,
        normalize=asked.config.normalizes,
        scale=asked.config.scale,
    ),
    "dare_linear": lambda asked: _dare(asked, elect=False),
    "dare_ties": lambda asked: _dare(asked, elect=True),
    "varm": lambda asked: varm(asked.blocks, n_positions=asked.n_positions),
    "sce": lambda asked: sce(
        asked.blocks, n_positions=asked.n_positions, density=asked.config.density_of(""), variant=asked.config.variant
    ),
}


def rule_of(config: MergeConfig, *, tensor: str, models: Sequence[str], blocks: Blocks, n_positions: int) -> Rule:
    """How the tensor of this name is merged; the arguments are those of `Merging`."""
    return METHODS[config.method](Merging(config=config, tensor=tensor, models=models, blocks=blocks, n_positions=n_positions))
