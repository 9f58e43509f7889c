"""The target model on Megatron-core: a GPTModel with the fusion loss, over packed segments that do not see each other.

Axes: T tokens of a micro-batch, V columns of the vocabulary on this rank.
"""

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from .architecture import Architecture
from .attention import Segments
from .batch import MicroBatch
from .layers import layer_spec, norm_spec
from .layouts import REPLICATED
from .loss import fusion_loss
from .megatron import GPTModel, TransformerBlockSubmodules, TransformerConfig
from .runtime import Runtime


class FusionModel(GPTModel):
    """A GPTModel that takes a micro-batch and returns the losses of its positions."""

    def __init__(self, architecture: Architecture, *, runtime: Runtime, recompute: bool) -> None:
        """Build this rank's shard, without loading the weights."""
        config = _transformer_config(architecture, runtime=runtime, recompute=recompute)
        layers = [layer_spec(architecture, runtime=runtime)] * architecture.n_layers
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_spec(architecture)),
            vocab_size=architecture.padded_vocab_size(runtime.tensor_parallel),
            max_sequence_length=architecture.max_length,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="none",  # attention applies the rotary embedding
        )
        self.architecture, self.runtime = architecture, runtime
        ropes = {layer.rope for layer in architecture.layers if layer.rope is not None}
        # Not buffers, because these would be rounded in a bfloat16 model.
        self._inverse_frequencies = {rope: rope.inverse_frequencies().to(runtime.device) for rope in ropes}
        # As in transformers, the factor is first rounded to the dtype of the weights.
        scale = architecture.embedding_scale
        self._embedding_scale = None if scale is None else torch.tensor(scale, dtype=torch.float32).to(runtime.dtype).item()
        for name, parameter in self.named_parameters():
            # Megatron-core sets this mark during initialisation. Without it, the gradient's norm counts only the first rank.
            parameter.tensor_model_parallel = architecture.rule_of(name)[0] is not REPLICATED

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Losses of each position in nats, float32: `ce_T`, and `soft_T` or None (see `loss.fusion_loss`)."""
        n = len(batch.token_ids_T)
        batch = batch.padded(self.runtime.sequence_ranks)
        ce_T, soft_T = super().forward(
            None, None, None, decoder_input=self._embedded(batch), labels=batch, packed_seq_params=self._segments(batch)
        )
        return ce_T[:n], None if soft_T is None else soft_T[:n]

    def logits(self, batch: MicroBatch) -> Tensor:
        """This rank's columns of the logits, (T, V)."""
        n = len(batch.token_ids_T)
        batch = batch.padded(self.runtime.sequence_ranks)
        return super().forward(None, None, None, decoder_input=self._embedded(batch), packed_seq_params=self._segments(batch))[0, :n]

    def compute_language_model_loss(self, labels: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Megatron-core's hook for the loss; the logits come as (T, 1, V)."""
        return fusion_loss(
            logits.squeeze(1),
            labels_N=labels.labels_T,
            soft=labels.soft,
            group=self.runtime.tensor_group,
            vocab_size=self.architecture.vocab_size,
            chunk_elements=self.runtime.loss_chunk_elements,
        )

    def _embedded(self, batch: MicroBatch) -> Tensor:
        hidden_states = self.embedding(batch.token_ids_T[None], None)
        return hidden_states if self._embedding_scale is None else hidden_states * self._embedding_scale

    def _segments(self, batch: MicroBatch) -> Segments:
        return Segments.of(batch.lengths, inverse_frequencies=self._inverse_frequencies, runtime=self.runtime)


def _transformer_config(architecture: Architecture, *, runtime: Runtime, recompute: bool) -> TransformerConfig:
    recomputing = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if recompute else {}
    biases = architecture.biases
    return TransformerConfig(
        num_layers=architecture.n_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.n_heads,
        num_query_groups=architecture.n_kv_heads,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm.eps,
        gated_linear_unit=architecture.gated,
        activation_func=ACT2FN[architecture.activation].forward,  # a function, because Megatron-core would ask a module for its shards
        add_bias_linear=biases.qkv or biases.attention_output or biases.mlp,  # then the layers remove unwanted ones
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,  # the weights are loaded later
        calculate_per_token_loss=True,  # gradients are summed over ranks, not averaged, because the losses are divided by global counts
        **recomputing,
        **runtime.model_settings,
    )
