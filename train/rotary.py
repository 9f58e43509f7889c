"""Rotary position embeddings: frequencies, angles, and their application (arXiv:2104.09864, halves rotated as in transformers).

Axes: T tokens of a micro-batch, R rotated channels of a head, D channels of a head, H heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3's scaling: long wavelengths are scaled by the rope's `factor`, short ones are kept, those in between interpolated."""

    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """One set of frequencies; layers of a model may have different ones."""

    theta: float
    channels: int  # the first channels of each head; the rest is not rotated
    factor: float = 1.0  # positions are divided by it
    llama3: Llama3Scaling | None = None  # if frequencies are scaled differently

    def inverse_frequencies(self) -> Tensor:
        """Radians per position of the pairs of channels, float32 of R/2, on the CPU; bit for bit as in transformers."""
        exponents = torch.arange(0, self.channels, 2, dtype=torch.float) / self.channels
        frequencies = 1.0 / (self.theta**exponents)
        if self.llama3 is None:
            return frequencies / self.factor
        return self._scaled_as_llama3(frequencies, self.llama3)

    def _scaled_as_llama3(self, frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
        longest, shortest = (scaling.original_length / x for x in (scaling.low_freq_factor, scaling.high_freq_factor))
        wavelengths = 2 * math.pi / frequencies
        scaled = torch.where(wavelengths > longest, frequencies / self.factor, frequencies)
        keep = (scaling.original_length / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        interpolated = (1 - keep) * scaled / self.factor + keep * scaled
        return torch.where((wavelengths >= shortest) & (wavelengths <= longest), interpolated, scaled)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of the tokens of a micro-batch, in the dtype of the weights."""

    cos_T1R: Tensor
    sin_T1R: Tensor

    @classmethod
    def of(cls, positions_T: Tensor, *, inverse_frequencies: Tensor, dtype: torch.dtype) -> "Rotation":
        """Angles are computed in float32 for every dtype."""
        angles = positions_T[:, None].float() * inverse_frequencies
        angles_T1R = torch.cat((angles, angles), dim=-1)[:, None]
        return cls(angles_T1R.cos().to(dtype), angles_T1R.sin().to(dtype))

    def __call__(self, x_THD: Tensor) -> Tensor:
        """Queries or keys, rotated by the angles of their positions."""
        rotated, kept = x_THD.tensor_split([self.cos_T1R.shape[-1]], dim=-1)
        first, second = rotated.chunk(2, dim=-1)
        rotated = rotated * self.cos_T1R + torch.cat((-second, first), dim=-1) * self.sin_T1R
        return torch.cat((rotated, kept), dim=-1) if kept.shape[-1] else rotated
