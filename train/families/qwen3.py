"""Qwen 3: Llama with queries and keys normalised per head."""

from transformers import PretrainedConfig

from ..architecture import Architecture, Biases
from . import fields
from .llama import like_llama


def read(hf: PretrainedConfig) -> Architecture:
    """With `use_sliding_window`, the layers from `max_window_layers` on have a window."""
    rope = fields.rope(hf.rope_parameters, head_dim=fields.head_dim(hf))
    biases = Biases(qkv=hf.attention_bias, attention_output=hf.attention_bias)
    return like_llama(hf, layers=fields.layers_by_type(hf, rope=rope), biases=biases, qk_norm=True)
