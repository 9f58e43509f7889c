"""How the tensors of a Hugging Face model are divided among tensor-parallel ranks, and form Megatron-core parameters.

`split` and `join` of a layout are exact inverses, so a round trip is bitwise equal. `split` reads only the rank's own rows or columns of a
tensor. Both sides rotate halves in rotary embedding, so no rows are permuted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor


class Source(Protocol):
    """A tensor, or one in a file from which only the requested part is read."""

    @property
    def shape(self) -> Sequence[int]:
        """Available without reading."""
        ...

    def __getitem__(self, index: slice | tuple[slice, ...], /) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The model's sizes that a layout needs."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int

    def padded_vocab_size(self, ranks: int) -> int:
        """Rows of the embedding in training: the vocabulary, padded to a multiple of its ranks."""
        return -(-self.vocab_size // ranks) * ranks


@dataclass(frozen=True, slots=True)
class Layout:
    """Converts full tensors to one rank's tensor, and the tensors of all ranks (in rank order) back to the full ones."""

    split: Callable[[Sequence[Source], Sizes, int, int], Tensor]  # full tensors, sizes, ranks, rank
    join: Callable[[Sequence[Tensor], Sizes], list[Tensor]]


def _split_rows(full: Sequence[Source], _: Sizes, ranks: int, rank: int) -> Tensor:
    n = full[0].shape[0] // ranks
    return full[0][rank * n : (rank + 1) * n]


def _split_columns(full: Sequence[Source], _: Sizes, ranks: int, rank: int) -> Tensor:
    n = full[0].shape[1] // ranks
    return full[0][:, rank * n : (rank + 1) * n]


def _split_vocabulary(full: Sequence[Source], sizes: Sizes, ranks: int, rank: int) -> Tensor:
    n = sizes.padded_vocab_size(ranks) // ranks
    first, end = (min(row, sizes.vocab_size) for row in (rank * n, (rank + 1) * n))
    return F.pad(full[0][first:end], (0, 0, 0, n - (end - first)))


def _split_gate_up(full: Sequence[Source], sizes: Sizes, ranks: int, rank: int) -> Tensor:
    return torch.cat([_split_rows([tensor], sizes, ranks, rank) for tensor in full])


def _join_gate_up(shards: Sequence[Tensor], _: Sizes) -> list[Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[i] for half in halves]) for i in (0, 1)]


def _split_qkv(full: Sequence[Source], sizes: Sizes, ranks: int, rank: int) -> Tensor:
    """Each key/value head follows its query heads: `q … q k v`, head group after head group."""
    n_groups = sizes.n_kv_heads // ranks
    groups = [_split_rows([tensor], sizes, ranks, rank).unflatten(0, (n_groups, -1)) for tensor in full]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _join_qkv(shards: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    grouped = torch.cat(list(shards)).unflatten(0, (sizes.n_kv_heads, -1))
    query_rows = sizes.n_heads // sizes.n_kv_heads * sizes.head_dim
    return [part.flatten(0, 1) for part in grouped.split([query_rows, sizes.head_dim, sizes.head_dim], dim=1)]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Consecutive rows of a source, as a source."""

    source: Source
    first: int
    n: int

    @property
    def shape(self) -> Sequence[int]:
        return (self.n, *self.source.shape[1:])

    def __getitem__(self, index: slice | tuple[slice, ...], /) -> Tensor:
        assert isinstance(index, slice)
        start, stop, _ = index.indices(self.n)
        return self.source[self.first + start : self.first + stop]


def _split_stacked_qkv(full: Sequence[Source], sizes: Sizes, ranks: int, rank: int) -> Tensor:
    n_q, n_kv = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    return _split_qkv([_Rows(full[0], 0, n_q), _Rows(full[0], n_q, n_kv), _Rows(full[0], n_q + n_kv, n_kv)], sizes, ranks, rank)


# Whole on every rank.
REPLICATED = Layout(split=lambda full, *_: full[0][:], join=lambda shards, _: [shards[0]])
ROWS = Layout(split=_split_rows, join=lambda shards, _: [torch.cat(list(shards))])
COLUMNS = Layout(split=_split_columns, join=lambda shards, _: [torch.cat(list(shards), 1)])
# Rows, padded to the same number on each rank.
VOCABULARY = Layout(split=_split_vocabulary, join=lambda shards, sizes: [torch.cat(list(shards))[: sizes.vocab_size]])
# A rank's rows of each of two tensors, one after the other.
GATE_UP = Layout(split=_split_gate_up, join=_join_gate_up)
# A rank's heads of queries, keys and values, head group after head group.
QKV = Layout(split=_split_qkv, join=_join_qkv)
# The same from one tensor with all queries, then all keys, then all values.
STACKED_QKV = Layout(split=_split_stacked_qkv, join=lambda shards, sizes: [torch.cat(_join_qkv(shards, sizes))])


@dataclass(frozen=True, slots=True)
class Rule:
    """The Hugging Face modules of a Megatron-core module; `{}` is the layer's number. Weights and biases follow the same rule."""

    megatron: str
    layout: Layout
    hf: tuple[str, ...]

    def layout_of(self, kind: str) -> Layout:
        """Layout of the module's `weight` or `bias`: if the weight's columns are divided, every rank adds the bias to the sum."""
        return REPLICATED if kind == "bias" and self.layout is COLUMNS else self.layout
