"""Converts weights between a Hugging Face folder and a rank's shard of the Megatron-core model, one tensor at a time.

A rank reads only its own rows or columns of each tensor. In the other direction, shards are gathered on the CPU of the group's first rank.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..store.errors import DataError
from .architecture import Architecture
from .layouts import VOCABULARY
from .runtime import Runtime
from .weight_files import WeightFiles, stored_as


def load_weights(model: nn.Module, *, model_folder: Path, architecture: Architecture, ranks: int, rank: int) -> None:
    """Load a rank's shard of the model from a Hugging Face folder; values are converted to the parameters' dtype.

    Raises:
        DataError: a tensor is missing or does not have the shape in config.json; the text names the tensor and both sizes.
    """
    with ExitStack() as stack, torch.no_grad():
        files = WeightFiles(model_folder, stack=stack)
        for name, parameter in model.named_parameters():
            layout, hf_names = architecture.rule_of(name)
            if architecture.tied_embeddings and hf_names == [architecture.embeddings]:
                hf_names = [_stored_embeddings(files, architecture=architecture)]
            sources = [files[hf_name] for hf_name in hf_names]
            if layout is VOCABULARY and sources[0].shape[0] != architecture.vocab_size:
                raise DataError(
                    f"{model_folder}: vocab_size ({architecture.vocab_size}) of config.json must equal the rows of {hf_names[0]} "
                    f"({sources[0].shape[0]})."
                )
            shard = layout.split(sources, architecture, ranks, rank)
            if shard.shape != parameter.shape:
                raise DataError(
                    f"{model_folder}: {' + '.join(hf_names)} has the shape {tuple(shard.shape)}, config.json {tuple(parameter.shape)}."
                )
            parameter.copy_(shard)


def _stored_embeddings(files: WeightFiles, *, architecture: Architecture) -> str:
    """The tensor with tied embeddings: a folder may store the embeddings or the output layer."""
    stored = [name for name in (architecture.embeddings, architecture.head) if stored_as(name, names=files.names) is not None]
    return stored[0] if stored else architecture.embeddings


def full_shapes(model: nn.Module, *, architecture: Architecture, ranks: int) -> dict[str, torch.Size]:
    """Shapes of the whole tensors under their Hugging Face names, in the order of `gathered`; nothing is computed."""
    shapes: dict[str, torch.Size] = {}
    for name, parameter in model.named_parameters():
        layout, hf_names = architecture.rule_of(name)
        shards = [torch.empty_like(parameter, device="meta")] * ranks
        shapes |= {hf: full.shape for hf, full in zip(hf_names, layout.join(shards, architecture), strict=True)}
    return shapes


def gathered(model: nn.Module, *, architecture: Architecture, runtime: Runtime) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under their Hugging Face names, on the CPU of the tensor-parallel group's first rank.

    The other ranks get nothing, but must iterate too. A tensor may share the parameter's memory.
    """
    for name, parameter in model.named_parameters():
        layout, hf_names = architecture.rule_of(name)
        shards = _gathered_shards(parameter.detach(), runtime=runtime)
        if shards:
            yield from zip(hf_names, layout.join(shards, architecture), strict=True)


def _gathered_shards(shard: Tensor, *, runtime: Runtime) -> list[Tensor]:
    """A parameter's shards in rank order on the first rank, nothing on the others; only one is on the device at a time."""
    if runtime.tensor_rank:
        dist.send(shard.contiguous(), group=runtime.tensor_group, group_dst=0)
        return []
    shards = [shard.cpu()]
    for rank in range(1, runtime.tensor_parallel):
        received = torch.empty_like(shard, memory_format=torch.contiguous_format)
        dist.recv(received, group=runtime.tensor_group, group_src=rank)
        shards.append(received.cpu())
    return shards
