"""The shape of a Hugging Face model of the Llama family, read from its `config.json` before any weight is touched."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..store.errors import DataError, UsageError
from .config import TrainingConfig

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama-3's frequency scaling: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What the trainer needs to know of a Llama-like decoder."""

    model_type: str
    n_layers: int
    hidden_size: int
    ffn_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: RopeScaling | None

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding in training: the vocabulary, padded to a multiple of the ranks that share it."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel


def read_architecture(model_folder: Path, *, training: TrainingConfig) -> Architecture:
    """Read `config.json` and check that this trainer can train such a model, cut over `training.tensor_parallel` ranks.

    Raises:
        DataError: the folder has no readable config.json, or the model has a part that is not supported.
        UsageError: tensor_parallel or sequence_length does not fit the model.
    """
    hf = _read_config(model_folder)
    _refuse_unsupported(hf, model_folder=model_folder, sequence_length=training.sequence_length)
    architecture = Architecture(
        model_type=hf.model_type,
        n_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        n_heads=hf.num_attention_heads,
        n_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        vocab_size=hf.vocab_size,
        norm_eps=hf.rms_norm_eps,
        tied_embeddings=hf.tie_word_embeddings,
        qkv_bias=hf.model_type == "qwen2",
        qk_norm=hf.model_type == "qwen3",
        rope_theta=hf.rope_parameters["rope_theta"],
        rope_scaling=_rope_scaling(hf, model_folder=model_folder),
    )
    for name, size in (
        ("attention heads", architecture.n_heads),
        ("key/value heads", architecture.n_kv_heads),
        ("intermediate_size", architecture.ffn_size),
    ):
        if size % training.tensor_parallel:
            raise UsageError(f"tensor_parallel ({training.tensor_parallel}) must divide the model's {name} ({size}): {model_folder}")
    return architecture


def _read_config(model_folder: Path) -> PretrainedConfig:
    path = model_folder / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as the configuration of a model: {error}") from error
    if model_type not in SUPPORTED:
        raise DataError(f"{path}: model_type {model_type!r} cannot be trained. Supported: {', '.join(SUPPORTED)}.")
    return AutoConfig.from_pretrained(model_folder)


def _refuse_unsupported(hf: PretrainedConfig, *, model_folder: Path, sequence_length: int) -> None:
    wanted: dict[str, Any] = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False}
    for name, value in wanted.items():
        found = getattr(hf, name, value)
        if found != value:
            raise DataError(f"{model_folder / 'config.json'}: {name} ({found}) must be {value}: models with another cannot be trained.")
    window = getattr(hf, "sliding_window", None)
    if window is not None and window < sequence_length:
        raise UsageError(
            f"sequence_length ({sequence_length}) must not exceed sliding_window ({window}) of {model_folder}: "
            "windowed attention is not supported, and within the window it is plain attention"
        )
    if sequence_length > hf.max_position_embeddings:
        raise UsageError(
            f"sequence_length ({sequence_length}) must not exceed max_position_embeddings ({hf.max_position_embeddings}) of {model_folder}"
        )


def _rope_scaling(hf: PretrainedConfig, *, model_folder: Path) -> RopeScaling | None:
    rope = hf.rope_parameters
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "llama3":
        raise DataError(f"{model_folder / 'config.json'}: rope_type {rope['rope_type']!r} cannot be trained. Supported: default, llama3.")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_length=rope["original_max_position_embeddings"],
    )
