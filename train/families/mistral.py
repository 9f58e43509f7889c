"""Mistral: Llama, with a sliding window in the first versions."""

from transformers import PretrainedConfig

from ..architecture import Architecture
from .llama import like_llama


def read(hf: PretrainedConfig) -> Architecture:
    """Every layer has the window, if there is one."""
    return like_llama(hf)
