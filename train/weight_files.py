"""The safetensors files of a Hugging Face folder, read slice by slice and written tensor by tensor, so that no model is ever in memory.

The format is a length, a JSON header with the place of each tensor, and the tensors (https://github.com/huggingface/safetensors). All
shapes are known before the first tensor is, so the header can be written first.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..store import durable
from ..store.errors import DataError
from ..store.weights import weight_files

FILE_BYTES = 5_000_000_000  # a larger model is split into files of at most this size
# Ends of names of tensors in published folders that are no weights: transformers computes them anew.
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_HEADER_ALIGNMENT = 8
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, in the dtype it is stored in; indexing reads no more than is asked for."""

    shape: tuple[int, ...]
    _slice: Any

    def __getitem__(self, index: slice | tuple[slice, ...], /) -> Tensor:
        return self._slice[index]


class WeightFiles:
    """The tensors of a Hugging Face folder by name, in `model.safetensors` or its shards."""

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

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._file_of:
            raise DataError(f"{self.folder} has no tensor {name}, which its config.json calls for.")
        stored = self._file_of[name].get_slice(name)
        return StoredTensor(tuple(stored.get_shape()), stored)


def write_weights(tensors: Iterator[tuple[str, Tensor]], *, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, folder: Path) -> None:
    """Write tensors as `model.safetensors`, or as several files and their index; one tensor is in memory at a time.

    Args:
        tensors: on the CPU, in the order of `shapes`.
        shapes: of all of them.
        dtype: of all of them, float32 or bfloat16.
        folder: holds nothing of these names.
    """
    files = _dealt(shapes, dtype=dtype)
    for file_name, names in files.items():
        with (folder / file_name).open("xb") as file:
            file.write(_header({name: shapes[name] for name in names}, dtype=dtype))
            for expected in names:
                name, tensor = next(tensors)
                assert (name, tuple(tensor.shape), tensor.dtype) == (expected, tuple(shapes[expected]), dtype)
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            del tensor
    if len(files) > 1:
        weight_map = {name: file_name for file_name, names in files.items() for name in names}
        total = sum(_n_bytes(shape, dtype=dtype) for shape in shapes.values())
        durable.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _dealt(shapes: Mapping[str, Sequence[int]], *, dtype: torch.dtype) -> dict[str, list[str]]:
    """Names of the tensors of each file."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        n_bytes = _n_bytes(shape, dtype=dtype)
        if filled and filled + n_bytes > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += n_bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, start=1)}


def _header(shapes: Mapping[str, Sequence[int]], *, dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _n_bytes(shape, dtype=dtype)
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _n_bytes(shape: Sequence[int], *, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
