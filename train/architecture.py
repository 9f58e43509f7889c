"""The architecture of a decoder as the trainer builds it. `families/` reads it from `config.json` before it reads any weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .layouts import Layout, Rule, Sizes
from .rotary import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Settings of all normalisations of a model."""

    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = False
    zero_centered: bool = False  # the weights are stored minus 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Biases:
    """Which linear layers add a bias."""

    qkv: bool = False
    attention_output: bool = False
    mlp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's causal attention."""

    rope: Rope | None = None
    window: int | None = None  # positions that a position sees, including itself; None: all before it
    alibi_slopes: tuple[float, ...] | None = None  # per head: its scores fall by this per position of distance (arXiv:2108.12409)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture(Sizes):
    """Everything that the trainer needs to know about a decoder."""

    model_type: str
    layers: tuple[Attention, ...]
    hidden_size: int
    ffn_size: int
    max_length: int  # positions that the model was made for
    norm: Norm
    activation: str  # transformers' name
    gated: bool  # the activation of one half of fc1's output multiplies the other half
    attention_scale: float
    tied_embeddings: bool  # the output layer is the embeddings
    rules: Mapping[str, Rule]  # by Megatron-core module
    biases: Biases = Biases()
    qk_norm: bool = False
    post_norms: bool = False  # the outputs of attention and MLP are also normalised before they are added
    parallel_residual: bool = False  # attention and MLP read the same hidden states
    embedding_scale: float | None = None

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    def rule_of(self, name: str) -> tuple[Layout, list[str]]:
        """Layout of a Megatron-core parameter, and its Hugging Face tensors."""
        module, kind = name.rsplit(".", 1)
        layers = re.findall(r"(?<=\.layers\.)\d+", module)
        rule = self.rules[re.sub(r"(?<=\.layers\.)\d+", "{}", module)]
        return rule.layout_of(kind), [f"{hf.format(*layers)}.{kind}" for hf in rule.hf]

    @property
    def tensor_names(self) -> set[str]:
        """The Hugging Face tensors of all parameters, including an output layer that may be a copy of the embeddings."""
        biased = {
            "linear_qkv": self.biases.qkv,
            "linear_proj": self.biases.attention_output,
            "linear_fc1": self.biases.mlp,
            "linear_fc2": self.biases.mlp,
        }
        names = set()
        for path, rule in self.rules.items():
            module = path.rpartition(".")[2]
            if module in ("q_layernorm", "k_layernorm") and not self.qk_norm:
                continue
            has_bias = biased.get(module, module.endswith("layernorm") and self.norm.bias)
            layers = range(self.n_layers if "{}" in path else 1)
            names |= {f"{hf.format(layer)}.{kind}" for hf in rule.hf for layer in layers for kind in ["weight", *["bias"] * has_bias]}
        return names

    @property
    def embeddings(self) -> str:
        """The Hugging Face tensor of the embeddings."""
        return self.rule_of("embedding.word_embeddings.weight")[1][0]

    @property
    def head(self) -> str:
        """The Hugging Face tensor of the output layer; if it is tied to the embeddings, the copy that some folders hold."""
        return self.rule_of("output_layer.weight")[1][0]
