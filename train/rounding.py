"""Weights rounded to a 16-bit format, for a training that multiplies in float32 because it is faster (`store.machine`).

As with bfloat16 arithmetic, every forward pass and the export use weights rounded to bfloat16, and the optimizer updates float32 masters.
But here the parameters are float32 too: they hold the rounded weights in forward and backward passes, and the masters in between.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class RoundedWeights:
    """The weights of a model, rounded to `dtype` except while their masters are in use. Does nothing if they already have that dtype."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype) -> None:
        """Round the weights and use them as the first masters, as in bfloat16 arithmetic."""
        self._dtype = dtype
        self._masters: list[tuple[Tensor, Tensor]] = []
        for parameter in (parameter.detach() for parameter in model.parameters() if parameter.dtype != dtype):
            parameter.copy_(parameter.to(dtype))
            self._masters.append((parameter, parameter.clone()))

    @contextlib.contextmanager
    def masters(self) -> Iterator[None]:
        """Let the parameters hold the masters, for the optimizer's step and for reading or writing a checkpoint."""
        for parameter, master in self._masters:
            parameter.copy_(master)
        try:
            yield
        finally:
            for parameter, master in self._masters:
                master.copy_(parameter)
                parameter.copy_(parameter.to(self._dtype))
