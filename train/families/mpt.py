"""MPT: ALiBi instead of position embeddings, LayerNorm without biases, queries, keys and values stacked in one tensor."""

import math

from transformers import PretrainedConfig

from ..architecture import Architecture, Attention, Norm
from ..layouts import COLUMNS, REPLICATED, ROWS, STACKED_QKV, VOCABULARY, Rule
from . import fields

_BLOCK = "transformer.blocks.{}"
RULES = {
    rule.megatron: rule
    for rule in (
        Rule("embedding.word_embeddings", VOCABULARY, ("transformer.wte",)),
        Rule("decoder.layers.{}.input_layernorm", REPLICATED, (f"{_BLOCK}.norm_1",)),
        Rule("decoder.layers.{}.self_attention.linear_qkv", STACKED_QKV, (f"{_BLOCK}.attn.Wqkv",)),
        Rule("decoder.layers.{}.self_attention.linear_proj", COLUMNS, (f"{_BLOCK}.attn.out_proj",)),
        Rule("decoder.layers.{}.pre_mlp_layernorm", REPLICATED, (f"{_BLOCK}.norm_2",)),
        Rule("decoder.layers.{}.mlp.linear_fc1", ROWS, (f"{_BLOCK}.ffn.up_proj",)),
        Rule("decoder.layers.{}.mlp.linear_fc2", COLUMNS, (f"{_BLOCK}.ffn.down_proj",)),
        Rule("decoder.final_layernorm", REPLICATED, ("transformer.norm_f",)),
        Rule("output_layer", VOCABULARY, ("lm_head",)),
    )
}


def read(hf: PretrainedConfig) -> Architecture:
    """MPT as transformers runs it, which supports only part of its configuration."""
    attention = hf.attn_config
    fields.require(hf, expansion_ratio=4, no_bias=True, logit_scale=None)
    fields.require(attention, attn_type="multihead_attention", clip_qkv=None, prefix_lm=False, qk_ln=False, alibi=True)
    head_dim = hf.d_model // hf.n_heads
    return Architecture(
        model_type=hf.model_type,
        layers=(Attention(alibi_slopes=alibi_slopes(hf.n_heads, largest_exponent=attention.alibi_bias_max)),) * hf.n_layers,
        hidden_size=hf.d_model,
        ffn_size=4 * hf.d_model,
        n_heads=hf.n_heads,
        n_kv_heads=hf.n_heads,
        head_dim=head_dim,
        vocab_size=hf.vocab_size,
        max_length=hf.max_seq_len,
        norm=Norm(kind="layer", eps=hf.layer_norm_epsilon),
        activation="gelu",
        gated=False,
        attention_scale=head_dim**-0.5 if attention.softmax_scale is None else attention.softmax_scale,
        tied_embeddings=hf.tie_word_embeddings,
        rules=RULES,
    )


def alibi_slopes(n_heads: int, *, largest_exponent: int) -> tuple[float, ...]:
    """Negative powers of 2 with evenly spaced exponents; if the number of heads is not a power of 2, every other one comes first."""
    n = 2 ** math.ceil(math.log2(n_heads))
    slopes = [2.0 ** -(largest_exponent * (i + 1) / n) for i in range(n)]
    return tuple(slopes if n == n_heads else (slopes[1::2] + slopes[::2])[:n_heads])
