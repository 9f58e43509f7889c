"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from transformers import PretrainedConfig

from ..architecture import Architecture, Biases
from . import fields
from .llama import like_llama


def read(hf: PretrainedConfig) -> Architecture:
    """With `use_sliding_window`, the layers from `max_window_layers` on have a window."""
    rope = fields.rope(hf.rope_parameters, head_dim=fields.head_dim(hf))
    return like_llama(hf, layers=fields.layers_by_type(hf, rope=rope), biases=Biases(qkv=True))
