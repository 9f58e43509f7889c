"""Llama 1 to 3, and models with the same architecture."""

from typing import Any

from transformers import PretrainedConfig

from ..architecture import Architecture, Attention, Biases, Norm
from ..layouts import COLUMNS, GATE_UP, QKV, REPLICATED, VOCABULARY, Rule
from . import fields

_ATTENTION, _MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
RULES = {
    rule.megatron: rule
    for rule in (
        Rule("embedding.word_embeddings", VOCABULARY, ("model.embed_tokens",)),
        Rule("decoder.layers.{}.input_layernorm", REPLICATED, ("model.layers.{}.input_layernorm",)),
        Rule("decoder.layers.{}.self_attention.linear_qkv", QKV, tuple(f"{_ATTENTION}.{x}_proj" for x in "qkv")),
        Rule("decoder.layers.{}.self_attention.q_layernorm", REPLICATED, (f"{_ATTENTION}.q_norm",)),
        Rule("decoder.layers.{}.self_attention.k_layernorm", REPLICATED, (f"{_ATTENTION}.k_norm",)),
        Rule("decoder.layers.{}.self_attention.linear_proj", COLUMNS, (f"{_ATTENTION}.o_proj",)),
        Rule("decoder.layers.{}.pre_mlp_layernorm", REPLICATED, ("model.layers.{}.post_attention_layernorm",)),
        Rule("decoder.layers.{}.mlp.linear_fc1", GATE_UP, (f"{_MLP}.gate_proj", f"{_MLP}.up_proj")),
        Rule("decoder.layers.{}.mlp.linear_fc2", COLUMNS, (f"{_MLP}.down_proj",)),
        Rule("decoder.final_layernorm", REPLICATED, ("model.norm",)),
        Rule("output_layer", VOCABULARY, ("lm_head",)),
    )
}


def read(hf: PretrainedConfig) -> Architecture:
    """Llama, with or without biases."""
    biases = Biases(qkv=hf.attention_bias, attention_output=hf.attention_bias, mlp=hf.mlp_bias)
    return like_llama(hf, biases=biases)


def like_llama(hf: PretrainedConfig, **differences: Any) -> Architecture:
    """Llama's architecture with some fields replaced."""
    head_dim = fields.head_dim(hf)
    as_llama: dict[str, Any] = {
        "model_type": hf.model_type,
        "hidden_size": hf.hidden_size,
        "ffn_size": hf.intermediate_size,
        "n_heads": hf.num_attention_heads,
        "n_kv_heads": hf.num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": hf.vocab_size,
        "max_length": hf.max_position_embeddings,
        "norm": Norm(kind="rms", eps=hf.rms_norm_eps),
        "gated": True,
        "attention_scale": head_dim**-0.5,
        "tied_embeddings": hf.tie_word_embeddings,
        "rules": RULES,
    }
    if "activation" not in differences:
        as_llama["activation"] = fields.activation(hf.hidden_act)
    if "layers" not in differences:
        as_llama["layers"] = (Attention(rope=fields.rope(hf.rope_parameters, head_dim=head_dim)),) * hf.num_hidden_layers
    return Architecture(**as_llama | differences)
