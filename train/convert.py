"""Weights between a Hugging Face folder's safetensors and a rank's shard of the Megatron-core model, one tensor at a time.

`RULES` is the whole mapping. A rule names a Megatron parameter, the Hugging Face tensors it is made of (names as on disk) and how their
rows or columns are dealt to the ranks; `split` and `join` of a layout are exact inverses, so a conversion there and back is bitwise equal.
Both sides rotate halves in rotary embedding, so no rows are permuted.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..store.errors import DataError
from ..store.weights import weight_files
from .architecture import Architecture


@dataclass(frozen=True, slots=True)
class Layout:
    """How full tensors become one rank's tensor, and the tensors of all ranks (in rank order) become the full ones again."""

    split: Callable[[Sequence[Tensor], Architecture, int, int], Tensor]  # full tensors, architecture, ranks, rank
    join: Callable[[Sequence[Tensor], Architecture], list[Tensor]]


def _split_vocabulary(full: Sequence[Tensor], architecture: Architecture, ranks: int, rank: int) -> Tensor:
    padding = architecture.padded_vocab_size(ranks) - architecture.vocab_size
    return F.pad(full[0], (0, 0, 0, padding)).chunk(ranks)[rank]


def _split_qkv(full: Sequence[Tensor], architecture: Architecture, ranks: int, rank: int) -> Tensor:
    """Each key/value head follows the query heads that share it: `q … q k v`, head group after head group."""
    groups = [tensor.unflatten(0, (architecture.n_kv_heads, -1)) for tensor in full]
    return torch.cat(groups, dim=1).chunk(ranks)[rank].flatten(0, 1)


def _join_qkv(shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
    grouped = torch.cat(list(shards)).unflatten(0, (architecture.n_kv_heads, -1))
    query_rows = architecture.n_heads // architecture.n_kv_heads * architecture.head_dim
    return [part.flatten(0, 1) for part in grouped.split([query_rows, architecture.head_dim, architecture.head_dim], dim=1)]


def _join_gate_up(shards: Sequence[Tensor], _: Architecture) -> list[Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[i] for half in halves]) for i in (0, 1)]


VOCABULARY = Layout(split=_split_vocabulary, join=lambda shards, architecture: [torch.cat(list(shards))[: architecture.vocab_size]])
REPLICATED = Layout(split=lambda full, *_: full[0], join=lambda shards, _: [shards[0]])
COLUMNS = Layout(split=lambda full, _, ranks, rank: full[0].chunk(ranks, 1)[rank], join=lambda shards, _: [torch.cat(list(shards), 1)])
QKV = Layout(split=_split_qkv, join=_join_qkv)
GATE_UP = Layout(split=lambda full, _, ranks, rank: torch.cat([tensor.chunk(ranks)[rank] for tensor in full]), join=_join_gate_up)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the mapping; `{}` stands for the layer's number."""

    megatron: str
    layout: Layout
    hf: tuple[str, ...]


_ATTENTION, _MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
RULES = (
    Rule("embedding.word_embeddings.weight", VOCABULARY, ("model.embed_tokens.weight",)),
    Rule("decoder.layers.{}.input_layernorm.weight", REPLICATED, ("model.layers.{}.input_layernorm.weight",)),
    Rule("decoder.layers.{}.self_attention.linear_qkv.weight", QKV, tuple(f"{_ATTENTION}.{x}_proj.weight" for x in "qkv")),
    Rule("decoder.layers.{}.self_attention.linear_qkv.bias", QKV, tuple(f"{_ATTENTION}.{x}_proj.bias" for x in "qkv")),
    Rule("decoder.layers.{}.self_attention.q_layernorm.weight", REPLICATED, (f"{_ATTENTION}.q_norm.weight",)),
    Rule("decoder.layers.{}.self_attention.k_layernorm.weight", REPLICATED, (f"{_ATTENTION}.k_norm.weight",)),
    Rule("decoder.layers.{}.self_attention.linear_proj.weight", COLUMNS, (f"{_ATTENTION}.o_proj.weight",)),
    Rule("decoder.layers.{}.pre_mlp_layernorm.weight", REPLICATED, ("model.layers.{}.post_attention_layernorm.weight",)),
    Rule("decoder.layers.{}.mlp.linear_fc1.weight", GATE_UP, (f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight")),
    Rule("decoder.layers.{}.mlp.linear_fc2.weight", COLUMNS, (f"{_MLP}.down_proj.weight",)),
    Rule("decoder.final_layernorm.weight", REPLICATED, ("model.norm.weight",)),
    Rule("output_layer.weight", VOCABULARY, ("lm_head.weight",)),
)
_BY_NAME = {rule.megatron: rule for rule in RULES}


def rule_of(name: str) -> tuple[Layout, list[str]]:
    """Layout of a Megatron parameter and the Hugging Face tensors it is made of."""
    layers = re.findall(r"(?<=\.layers\.)\d+", name)
    rule = _BY_NAME[re.sub(r"(?<=\.layers\.)\d+", "{}", name)]
    return rule.layout, [hf.format(*layers) for hf in rule.hf]


class WeightFiles:
    """The tensors of a Hugging Face folder, read one at a time from `model.safetensors` or its shards."""

    def __init__(self, folder: Path, *, stack: ExitStack) -> None:
        """Open the files until `stack` closes.

        Raises:
            DataError: there are no safetensors, or one cannot be read.
        """
        self.folder = folder
        self._file_of: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} cannot be read: {error}") from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        self._require(name)
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A whole tensor, in the dtype it is stored in."""
        self._require(name)
        return self._file_of[name].get_tensor(name)

    def _require(self, name: str) -> None:
        if name not in self._file_of:
            raise DataError(f"{self.folder} has no tensor {name}, which its config.json calls for.")


def load_weights(model: nn.Module, *, model_folder: Path, architecture: Architecture, ranks: int, rank: int) -> None:
    """Fill a rank's shard of the model from a Hugging Face folder; values are converted to the parameters' dtype.

    Raises:
        DataError: the tensors are not those that config.json describes; the text names the tensor and both sizes.
    """
    with ExitStack() as stack, torch.no_grad():
        files = WeightFiles(model_folder, stack=stack)
        _require_vocabulary(files, architecture=architecture)
        used = {"lm_head.weight"} if architecture.tied_embeddings else set()
        for name, parameter in model.named_parameters():
            layout, hf_names = rule_of(name)
            used.update(hf_names)
            shard = layout.split([files.read(hf) for hf in hf_names], architecture, ranks, rank)
            if shard.shape != parameter.shape:
                raise DataError(f"{model_folder}: {' + '.join(hf_names)} gives {tuple(shard.shape)}, config.json {tuple(parameter.shape)}.")
            parameter.copy_(shard)
        unknown = [name for name in files if name not in used and not name.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise DataError(f"{model_folder} has tensors that its config.json does not account for: {', '.join(sorted(unknown)[:5])}.")


def _require_vocabulary(files: WeightFiles, *, architecture: Architecture) -> None:
    for name in ["model.embed_tokens.weight"] if architecture.tied_embeddings else ["model.embed_tokens.weight", "lm_head.weight"]:
        rows, expected = files.shape(name)[0], architecture.vocab_size
        if rows != expected:
            raise DataError(f"{files.folder}: vocab_size ({expected}) of config.json must equal the rows of {name} ({rows}).")
