"""The cost of a training: parameters, operations and bytes, from the headers of the weights and the architecture.

Estimates of memory follow Korthikanti et al. (arXiv:2205.05198, section 4) for layers with a gated MLP and fused attention.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from ..store.weights import tensors_of, weight_files
from .architecture import Architecture
from .config import TrainingConfig
from .weight_files import BUFFERS, stored_as

_MOMENTS, _MASTER = 8, 4  # bytes per parameter, of AdamW; float32 weights are their own masters, but are stored twice
_ITEM = {"float32": 4, "bfloat16": 2}
_GRADIENT = 4  # gradients are summed in float32


def count_parameters(model_folder: Path, *, architecture: Architecture) -> int:
    """The number of parameters in a model's safetensors, without copies."""
    tensors = {name: tensor for path in weight_files(model_folder) for name, tensor in tensors_of(path).items()}
    if architecture.tied_embeddings and stored_as(architecture.embeddings, names=tensors) is not None:
        tensors.pop(stored_as(architecture.head, names=tensors) or "", None)  # a copy of the embeddings
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if not name.endswith(BUFFERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of one training. Bytes and operations are estimates; parameters are counted."""

    parameters: int
    state_bytes: int  # per rank: weights, gradients, optimizer
    activation_bytes: int  # per rank, at the end of a forward pass
    checkpoint_bytes: int
    export_bytes: int

    @property
    def rank_bytes(self) -> int:
        """Memory of one rank."""
        return self.state_bytes + self.activation_bytes

    @classmethod
    def of(cls, model_folder: Path, *, architecture: Architecture, config: TrainingConfig, arithmetic: str) -> "Cost":
        """The cost of training a model that computes in the number format `arithmetic`."""
        parameters, item = count_parameters(model_folder, architecture=architecture), _ITEM[arithmetic]
        state = _MOMENTS + (0 if arithmetic == "float32" else _MASTER)
        whole = item + _GRADIENT + (0 if arithmetic == config.dtype else _MASTER)  # masters of rounded weights are not sharded
        shard = parameters / config.tensor_parallel
        return cls(
            parameters=parameters,
            state_bytes=round(shard * (whole + state / config.data_parallel)),
            activation_bytes=_activation_bytes(architecture, config=config, item=item),
            checkpoint_bytes=parameters * (item + _MASTER + _MOMENTS),
            export_bytes=parameters * _ITEM[config.dtype],
        )


def step_flops(architecture: Architecture, *, parameters: int, lengths: list[int]) -> float:
    """Floating-point operations of forward and backward over segments of these lengths, not counting recomputation.

    6 for each token and each multiplied parameter, and 12 for each channel of attention and each pair of tokens in which one sees the
    other: about length² / 2 pairs, fewer in a layer with a window.
    """
    looked_up = 0 if architecture.tied_embeddings else architecture.vocab_size * architecture.hidden_size
    channels = architecture.n_heads * architecture.head_dim
    seen = [(length, min(length, layer.window or length)) for layer in architecture.layers for length in lengths]
    pairs = sum(window * (2 * length - window) for length, window in seen) / 2
    return 6.0 * (parameters - looked_up) * sum(lengths) + 12.0 * channels * pairs


def _activation_bytes(architecture: Architecture, *, config: TrainingConfig, item: int) -> int:
    tokens, ranks = config.micro_batch_size * config.sequence_length, config.tensor_parallel
    heads = architecture.n_heads + architecture.n_kv_heads
    mlp = (4 if architecture.gated else 2) * architecture.ffn_size  # gate, up, activation and product; or up and activation
    split = 2 * heads * architecture.head_dim + mlp
    layer = 6 * architecture.hidden_size / (ranks if config.sequence_parallel else 1) + split / ranks
    layers = architecture.hidden_size * architecture.n_layers + layer if config.recompute else layer * architecture.n_layers
    logits = architecture.padded_vocab_size(ranks) / ranks
    return round(tokens * item * (layers + logits))
