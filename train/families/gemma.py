"""Gemma 1: Llama with scaled embeddings, norm weights stored minus 1, and a gelu."""

from transformers import PretrainedConfig

from ..architecture import Architecture, Biases, Norm
from . import fields
from .llama import like_llama


def read(hf: PretrainedConfig) -> Architecture:
    """Gemma 1; transformers reads `gelu` in old configurations as its tanh approximation, with which these models were trained."""
    fields.require(hf, use_bidirectional_attention=None)
    return like_llama(
        hf,
        norm=Norm(kind="rms", eps=hf.rms_norm_eps, zero_centered=True),
        biases=Biases(qkv=hf.attention_bias, attention_output=hf.attention_bias),
        embedding_scale=hf.hidden_size**0.5,
    )
