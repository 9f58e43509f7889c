"""Qwen 3: Llama with queries and keys normalised per head."""

from transformers import PretrainedConfig

from ..architecture import Architecture, Biases
from .llama import like_llama


def read(hf: PretrainedConfig) -> Architecture:
    """With `use_sliding_window`, the layers from `max_window_layers` on have a window."""
    return like_llama(hf, biases=Biases(qkv=hf.attention_bias, attention_output=hf.attention_bias), qk_norm=True)
