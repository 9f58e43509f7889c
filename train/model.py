"""The target model on Megatron-core: a GPTModel whose loss is the fusion loss, over packed segments that do not see each other.

Axes: T tokens of a micro-batch, V columns of the vocabulary on this rank, H heads on this rank, D channels of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

from .architecture import Architecture
from .batch import MicroBatch
from .convert import REPLICATED, rule_of
from .loss import fusion_loss
from .megatron import GPTModel, MegatronModule, ModuleSpec, PackedSeqParams, RotaryEmbedding, TransformerConfig, get_gpt_layer_local_spec
from .runtime import Runtime


class FusionModel(GPTModel):
    """A GPTModel that is called with a micro-batch and gives the losses of its positions."""

    def __init__(self, architecture: Architecture, *, runtime: Runtime, max_length: int, recompute: bool) -> None:
        """Build this rank's shard, with weights that are still to be loaded."""
        config = _transformer_config(architecture, runtime=runtime, recompute=recompute)
        super().__init__(
            config=config,
            transformer_layer_spec=_layer_spec(config),
            vocab_size=architecture.padded_vocab_size(runtime.tensor_parallel),
            max_sequence_length=max_length,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
        )
        self.rotary_pos_emb = _Rotary(architecture, config=config)
        self.unpadded_vocab_size = architecture.vocab_size
        self.tensor_group = runtime.tensor_group
        self.loss_chunk_elements = runtime.loss_chunk_elements
        for name, parameter in self.named_parameters():
            # Megatron-core marks them while it initialises them. Without the mark the gradient's norm leaves out all ranks but the first.
            parameter.tensor_model_parallel = rule_of(name)[0] is not REPLICATED

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Losses of each position in nats, float32: `ce_T`, and `soft_T` or None (see `loss.fusion_loss`)."""
        return super().forward(batch.token_ids_T[None], None, None, labels=batch, packed_seq_params=packed_segments(batch.lengths))

    def logits(self, batch: MicroBatch) -> Tensor:
        """This rank's columns of the logits, (T, V)."""
        return super().forward(batch.token_ids_T[None], None, None, packed_seq_params=packed_segments(batch.lengths))[0]

    def compute_language_model_loss(self, labels: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Megatron-core's hook for the loss; the logits come as (T, 1, V)."""
        return fusion_loss(
            logits[:, 0],
            labels_N=labels.labels_T,
            soft=labels.soft,
            group=self.tensor_group,
            vocab_size=self.unpadded_vocab_size,
            chunk_elements=self.loss_chunk_elements,
        )


def packed_segments(lengths: Sequence[int]) -> PackedSeqParams:
    """Megatron-core's description of segments that lie end to end. Its offsets stay on the CPU, where the layers read them."""
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets, max_seqlen_q=longest, max_seqlen_kv=longest)


def _transformer_config(architecture: Architecture, *, runtime: Runtime, recompute: bool) -> TransformerConfig:
    recomputing = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if recompute else {}
    return TransformerConfig(
        num_layers=architecture.n_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.n_heads,
        num_query_groups=architecture.n_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        perform_initialization=False,  # the weights are loaded
        calculate_per_token_loss=True,  # gradients are summed over ranks, not averaged: the losses are divided by global counts
        **recomputing,
        **runtime.model_settings,
    )


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    spec.submodules.self_attention.submodules.core_attention = _SegmentAttention
    return spec


class _SegmentAttention(MegatronModule):
    """Causal attention within each packed segment by torch's fused kernel; costs the sum of the squared lengths."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any) -> None:
        super().__init__(config=config)

    def forward(
        self, query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, attention_mask: None, *, packed_seq_params: PackedSeqParams, **_: Any
    ) -> Tensor:
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        segments = zip(*(x_THD.transpose(0, 1).split(lengths, dim=1) for x_THD in (query_THD, key_THD, value_THD)), strict=True)
        grouped = query_THD.shape[1] != key_THD.shape[1]
        outputs = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=grouped)[0].transpose(0, 1)
            for q, k, v in segments
        ]
        return torch.cat(outputs).flatten(1)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: attention has no weights."""
        return {}


class _Rotary(RotaryEmbedding):
    """Rotary frequencies that stay on their device, with Llama-3 scaling by the model's own numbers (Megatron-core fixes three of them)."""

    inv_freq: Tensor  # float32; not a buffer, so it stays so in a bfloat16 model

    def __init__(self, architecture: Architecture, *, config: TransformerConfig) -> None:
        super().__init__(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=architecture.rope_theta,
            use_cpu_initialization=config.use_cpu_initialization,
        )
        scaling = architecture.rope_scaling
        if scaling is not None:
            self.inv_freq = self._apply_scaling(
                self.inv_freq,
                factor=scaling.factor,
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
                original_max_position_embeddings=scaling.original_length,
            )

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles of positions offset … offset + max_seq_len - 1, (positions, 1, 1, D)."""
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]
