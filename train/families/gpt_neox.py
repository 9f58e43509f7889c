"""GPT-NeoX and Pythia: LayerNorm, biases, part of each head rotated, attention and MLP in parallel or in sequence."""

from transformers import PretrainedConfig

from ..architecture import Architecture, Attention, Biases, Norm
from ..layouts import COLUMNS, REPLICATED, ROWS, VOCABULARY, Rule
from . import fields

_LAYER = "gpt_neox.layers.{}"
RULES = {
    rule.megatron: rule
    for rule in (
        Rule("embedding.word_embeddings", VOCABULARY, ("gpt_neox.embed_in",)),
        Rule("decoder.layers.{}.input_layernorm", REPLICATED, (f"{_LAYER}.input_layernorm",)),
        # Queries, keys and values are interleaved by head, as in Megatron-core.
        Rule("decoder.layers.{}.self_attention.linear_qkv", ROWS, (f"{_LAYER}.attention.query_key_value",)),
        Rule("decoder.layers.{}.self_attention.linear_proj", COLUMNS, (f"{_LAYER}.attention.dense",)),
        Rule("decoder.layers.{}.pre_mlp_layernorm", REPLICATED, (f"{_LAYER}.post_attention_layernorm",)),
        Rule("decoder.layers.{}.mlp.linear_fc1", ROWS, (f"{_LAYER}.mlp.dense_h_to_4h",)),
        Rule("decoder.layers.{}.mlp.linear_fc2", COLUMNS, (f"{_LAYER}.mlp.dense_4h_to_h",)),
        Rule("decoder.final_layernorm", REPLICATED, ("gpt_neox.final_layer_norm",)),
        Rule("output_layer", VOCABULARY, ("embed_out",)),
    )
}


def read(hf: PretrainedConfig) -> Architecture:
    """GPT-NeoX; `use_parallel_residual` distinguishes the two forms."""
    head_dim = hf.hidden_size // hf.num_attention_heads
    return Architecture(
        model_type=hf.model_type,
        layers=(Attention(rope=fields.rope(hf.rope_parameters, head_dim=head_dim)),) * hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        n_heads=hf.num_attention_heads,
        n_kv_heads=hf.num_attention_heads,
        head_dim=head_dim,
        vocab_size=hf.vocab_size,
        max_length=hf.max_position_embeddings,
        norm=Norm(kind="layer", eps=hf.layer_norm_eps, bias=True),
        activation=fields.activation(hf.hidden_act),
        gated=False,
        biases=Biases(qkv=hf.attention_bias, attention_output=hf.attention_bias, mlp=True),
        parallel_residual=hf.use_parallel_residual,
        attention_scale=head_dim**-0.5,
        tied_embeddings=hf.tie_word_embeddings,
        rules=RULES,
    )
