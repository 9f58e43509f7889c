"""Weights that a training shows rounded, where the 16-bit format is slower to multiply than float32 (`store.machine`).

As with bfloat16 arithmetic, every forward pass and the export see weights rounded to bfloat16, and the optimizer moves masters in float32.
But the rounded weights lie in float32 parameters, so Megatron-core knows of one set of numbers, and the masters take turns with them.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class RoundedWeights:
    """The weights of a model, rounded to `dtype` except where their masters are asked for. Does nothing where they are of that dtype."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype) -> None:
        """Round the weights, which become the first masters: a training in bfloat16 arithmetic begins with them too."""
        self._dtype = dtype
        self._masters: list[tuple[Tensor, Tensor]] = []
        for parameter in (parameter.detach() for parameter in model.parameters() if parameter.dtype != dtype):
            parameter.copy_(parameter.to(dtype))
            self._masters.append((parameter, parameter.clone()))

    @contextlib.contextmanager
    def masters(self) -> Iterator[None]:
        """Let the parameters be the masters: for the optimizer's step, and for a checkpoint to be written or read."""
        for parameter, master in self._masters:
            parameter.copy_(master)
        try:
            yield
        finally:
            for parameter, master in self._masters:
                master.copy_(parameter)
                parameter.copy_(parameter.to(self._dtype))
