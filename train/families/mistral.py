"""Mistral: Llama, with a sliding window in the first versions."""

from transformers import PretrainedConfig

from ..architecture import Architecture, Attention
from . import fields
from .llama import like_llama


def read(hf: PretrainedConfig) -> Architecture:
    """Every layer has the window, if there is one."""
    rope = fields.rope(hf.rope_parameters, head_dim=fields.head_dim(hf))
    return like_llama(hf, layers=(Attention(rope=rope, window=hf.sliding_window),) * hf.num_hidden_layers)
