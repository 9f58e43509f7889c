"""Reads configuration fields that several families share. A ValueError names the unsupported field and the supported values."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from ..architecture import Attention
from ..rotary import Llama3Scaling, Rope

_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")


def require(hf: object, **wanted: Any) -> None:
    """Raise unless each field has the one value that the trainer supports; a missing field counts as that value."""
    for name, value in wanted.items():
        found = getattr(hf, name, value)
        if found != value:
            raise ValueError(f"{name} ({found}) must be {value}: models with other values cannot be trained.")


def activation(name: str) -> str:
    """A name in `transformers.activations.ACT2FN`, if it is a function without parameters that the parity tests cover."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"The activation ({name}) must be one of {', '.join(_ACTIVATIONS)}: models with others cannot be trained.")
    return name


def head_dim(hf: PretrainedConfig) -> int:
    """Channels of an attention head."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def rope(parameters: Mapping[str, Any], *, head_dim: int) -> Rope:
    """The rotary embedding of one entry of `rope_parameters`."""
    kind = parameters["rope_type"]
    channels = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if kind == "default":
        return Rope(theta=parameters["rope_theta"], channels=channels)
    if kind == "linear":
        return Rope(theta=parameters["rope_theta"], channels=channels, factor=parameters["factor"])
    if kind == "llama3":
        scaling = Llama3Scaling(
            low_freq_factor=parameters["low_freq_factor"],
            high_freq_factor=parameters["high_freq_factor"],
            original_length=parameters["original_max_position_embeddings"],
        )
        return Rope(theta=parameters["rope_theta"], channels=channels, factor=parameters["factor"], llama3=scaling)
    raise ValueError(f"rope_type {kind!r} cannot be trained. Supported: default, linear, llama3.")


def layers_by_type(hf: PretrainedConfig, *, rope: Rope) -> tuple[Attention, ...]:
    """Attention of layers that only differ in the window, which the layers have that are sliding in `layer_types`."""
    unknown = set(hf.layer_types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types ({', '.join(sorted(unknown))}) must be sliding_attention or full_attention.")
    return tuple(Attention(rope=rope, window=hf.sliding_window if kind == "sliding_attention" else None) for kind in hf.layer_types)
