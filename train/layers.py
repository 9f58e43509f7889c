"""Norms and the decoder layer of all families. Megatron-core's norms do not support sequence parallelism without CUDA."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from .architecture import Architecture, Norm
from .attention import SegmentAttention
from .megatron import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules, get_gpt_layer_local_spec
from .runtime import Runtime


class Normalisation(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32 at least."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.size = (hidden_size,)
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype)) if norm.bias else None
        for parameter in self.parameters():
            # Each rank sees a share of the tokens; with this mark `finalize_model_grads` sums the gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.norm.kind == "layer":
            return F.layer_norm(x, self.size, self.weight, self.bias, self.norm.eps)
        if not self.norm.zero_centered:
            return F.rms_norm(x, self.size, self.weight, self.norm.eps)
        wide = torch.promote_types(x.dtype, torch.float32)  # 1 + weight must not be rounded to bfloat16
        return F.rms_norm(x.to(wide), self.size, 1 + self.weight.to(wide), self.norm.eps).type_as(x)


class DecoderLayer(TransformerLayer):
    """Attention and MLP with their residuals, in the order and with the norms of the Architecture."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, architecture: Architecture, **place: Any
    ) -> None:
        super().__init__(config, submodules, **place)
        self.parallel_residual = architecture.parallel_residual

        def post_norm() -> nn.Module:
            return Normalisation(config, config.hidden_size, config.layernorm_epsilon, norm=architecture.norm)

        self.post_attention_layernorm = post_norm() if architecture.post_norms else nn.Identity()
        self.post_mlp_layernorm = post_norm() if architecture.post_norms else nn.Identity()
        # Megatron-core's switch adds biases to all linear layers or to none.
        for linear, wanted in (
            (self.self_attention.linear_qkv, architecture.biases.qkv),
            (self.self_attention.linear_proj, architecture.biases.attention_output),
            (self.mlp.linear_fc1, architecture.biases.mlp),
            (self.mlp.linear_fc2, architecture.biases.mlp),
        ):
            if not wanted:
                linear.register_parameter("bias", None)

    def forward(self, hidden_states: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> tuple[Tensor, None]:
        attended = self.self_attention(self.input_layernorm(hidden_states), None, packed_seq_params=packed_seq_params)
        after = hidden_states + self.post_attention_layernorm(_with_bias(*attended))
        read = hidden_states if self.parallel_residual else after
        return after + self.post_mlp_layernorm(_with_bias(*self.mlp(self.pre_mlp_layernorm(read)))), None


def _with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias


def layer_spec(architecture: Architecture, *, runtime: Runtime) -> ModuleSpec:
    """Megatron-core's layer without Transformer Engine, with our norms, attention core and residuals."""
    spec = get_gpt_layer_local_spec(qk_layernorm=architecture.qk_norm)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    spec.module, spec.params = DecoderLayer, {"architecture": architecture}
    layer.input_layernorm = layer.pre_mlp_layernorm = norm_spec(architecture)
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm_spec(architecture)
    attention.core_attention = ModuleSpec(SegmentAttention, params={"architecture": architecture, "runtime": runtime})
    return spec


def norm_spec(architecture: Architecture) -> ModuleSpec:
    """The model's norm."""
    return ModuleSpec(Normalisation, params={"norm": architecture.norm})
