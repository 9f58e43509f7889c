"""Causal attention within packed segments: over the whole segment, within a window, or with ALiBi.

Axes: T tokens of a micro-batch, H query heads on this rank, G key/value heads on this rank, D channels of a head, L tokens of a segment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .architecture import Architecture, Attention
from .megatron import MegatronModule, PackedSeqParams, TransformerConfig
from .rotary import Rope, Rotation
from .runtime import Runtime


@dataclass
class Segments(PackedSeqParams):
    """Segments laid end to end, prepared for all layers; made once per micro-batch, so that no layer waits for the device."""

    lengths: Sequence[int] = ()
    rotations: Mapping[Rope, Rotation] = field(default_factory=dict)
    masks: dict[tuple[int, Attention], Tensor] = field(default_factory=dict)  # by length, shared by layers with the same attention

    @classmethod
    def of(cls, lengths: Sequence[int], *, inverse_frequencies: Mapping[Rope, Tensor], runtime: Runtime) -> "Segments":
        """Offsets and angles on the device; positions start at 0 in each segment. Does not wait for the device."""
        offsets = runtime.moved(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32))
        n_tokens = sum(lengths)
        starts_T = offsets[:-1].repeat_interleave(offsets.diff(), output_size=n_tokens)
        positions_T = torch.arange(n_tokens, device=runtime.device) - starts_T
        rotations = {
            rope: Rotation.of(positions_T, inverse_frequencies=values, dtype=runtime.dtype) for rope, values in inverse_frequencies.items()
        }
        return cls(qkv_format="thd", cu_seqlens_q=offsets, max_seqlen_q=max(lengths), lengths=lengths, rotations=rotations)


class SegmentAttention(MegatronModule):
    """The core of a layer's attention: Megatron-core passes it queries, keys and values without positions."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        architecture: Architecture,
        runtime: Runtime,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.attention: Attention = architecture.layers[layer_number - 1]
        self.scale = architecture.attention_scale
        self.at_once = runtime.has_flash_attention(architecture.head_dim) and self.attention.alibi_slopes is None
        slopes = torch.tensor(self.attention.alibi_slopes or (), dtype=torch.float32)
        self.slopes_H = slopes.chunk(runtime.tensor_parallel)[runtime.tensor_rank].to(runtime.device) if len(slopes) else None

    def forward(
        self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, attention_mask: None, *, packed_seq_params: Segments, **_: Any
    ) -> Tensor:
        segments = packed_seq_params
        if self.attention.rope is not None:
            rotate = segments.rotations[self.attention.rope]
            query_THD, key_TGD = rotate(query_THD), rotate(key_TGD)
        attend = self._all_at_once if self.at_once else self._one_by_one
        return attend(query_THD, key_TGD, value_TGD, segments)

    def _all_at_once(self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, segments: Segments) -> Tensor:
        """One FlashAttention call for all segments."""
        offsets, longest, window = segments.cu_seqlens_q, segments.max_seqlen_q, self.attention.window
        output_THD = varlen_attn(
            query_THD,
            key_TGD,
            value_TGD,
            offsets,
            offsets,
            longest,
            longest,
            scale=self.scale,
            window_size=(-1 if window is None else window - 1, 0),  # tokens to the left and to the right, excluding the token itself
            enable_gqa=query_THD.shape[1] != key_TGD.shape[1],
        )
        assert isinstance(output_THD, Tensor)  # not a tuple with auxiliary outputs
        return output_THD

    def _one_by_one(self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, segments: Segments) -> Tensor:
        """One call per segment, so that the cost is the sum of the squared lengths."""
        parts = zip(*(x.transpose(0, 1).split(segments.lengths, dim=1) for x in (query_THD, key_TGD, value_TGD)), strict=True)
        grouped = query_THD.shape[1] != key_TGD.shape[1]
        outputs = []
        for q, k, v in parts:
            mask = self._mask(q, masks=segments.masks)
            output = F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    def _mask(self, query_HLD: Tensor, *, masks: dict[tuple[int, Attention], Tensor]) -> Tensor | None:
        """The mask: values added to the scores, or which scores are kept; None if plain causal attention is the same."""
        length = query_HLD.shape[1]
        window = length if self.attention.window is None else self.attention.window
        if self.slopes_H is None and length <= window:
            return None
        key = (length, self.attention)
        if key not in masks:
            masks[key] = self._made_mask(query_HLD, length=length, window=window)
        return masks[key]

    def _made_mask(self, query_HLD: Tensor, *, length: int, window: int) -> Tensor:
        positions_L = torch.arange(length, device=query_HLD.device)
        distance_LL = positions_L[:, None] - positions_L
        seen_LL = (distance_LL >= 0) & (distance_LL < window)
        if self.slopes_H is None:
            return seen_LL
        bias_HLL = -self.slopes_H[:, None, None] * distance_LL
        return bias_HLL.masked_fill(~seen_LL, -torch.inf).to(query_HLD.dtype)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Empty: attention has no weights."""
        return {}
