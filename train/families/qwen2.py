"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from transformers import PretrainedConfig

from ..architecture import Architecture, Biases
from .llama import like_llama


def read(hf: PretrainedConfig) -> Architecture:
    """With `use_sliding_window`, the layers from `max_window_layers` on have a window."""
    return like_llama(hf, biases=Biases(qkv=True))
