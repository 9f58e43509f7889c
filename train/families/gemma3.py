"""Gemma 3, text only: Gemma with four norms a layer, normalised queries and keys, and layers with a window among global ones."""

from transformers import PretrainedConfig

from ..architecture import Architecture, Attention, Biases, Norm
from ..layouts import REPLICATED, Rule
from . import fields
from .llama import RULES as LLAMA
from .llama import like_llama

_LAYER = "model.layers.{}"
RULES = LLAMA | {
    rule.megatron: rule
    for rule in (
        Rule("decoder.layers.{}.post_attention_layernorm", REPLICATED, (f"{_LAYER}.post_attention_layernorm",)),
        Rule("decoder.layers.{}.pre_mlp_layernorm", REPLICATED, (f"{_LAYER}.pre_feedforward_layernorm",)),
        Rule("decoder.layers.{}.post_mlp_layernorm", REPLICATED, (f"{_LAYER}.post_feedforward_layernorm",)),
    )
}


def read(hf: PretrainedConfig) -> Architecture:
    """Windowed and global layers have separate rotary frequencies."""
    fields.require(hf, use_bidirectional_attention=False, attn_logit_softcapping=None, final_logit_softcapping=None)
    return like_llama(
        hf,
        layers=tuple(_attention(hf, kind) for kind in hf.layer_types),
        norm=Norm(kind="rms", eps=hf.rms_norm_eps, zero_centered=True),
        activation=fields.activation(hf.hidden_activation),
        biases=Biases(qkv=hf.attention_bias, attention_output=hf.attention_bias),
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        embedding_scale=hf.hidden_size**0.5,
        qk_norm=True,
        post_norms=True,
        rules=RULES,
    )


def _attention(hf: PretrainedConfig, kind: str) -> Attention:
    rope = fields.rope(hf.rope_parameters[kind], head_dim=hf.head_dim)
    return Attention(rope=rope, window=hf.sliding_window if kind == "sliding_attention" else None)
