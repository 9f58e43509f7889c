"""The safetensors files of a Hugging Face folder, read slice by slice and written block by block, so that no whole model is in memory.

The format is a length, a JSON header with the offsets of each tensor, and the tensors (https://github.com/huggingface/safetensors). All
shapes are known before the first tensor, so the header can be written first.
"""

import json
import math
import os
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..store import durable
from ..store.errors import DataError
from ..store.weights import tensors_of, weight_files

FILE_BYTES = 5_000_000_000  # a larger model is split into files of at most this size
# Suffixes of tensors in published folders that are not weights: transformers computes them itself.
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_HEADER_ALIGNMENT = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, in its stored dtype; indexing reads only the requested part."""

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

    @property
    def names(self) -> Collection[str]:
        """The names of all stored tensors."""
        return self._file_of.keys()

    def __getitem__(self, name: str) -> StoredTensor:
        stored_name = stored_as(name, names=self.names)
        if stored_name is None:
            raise DataError(f"{self.folder} has no tensor {name}, but its config.json describes it. Download the model again.")
        stored = self._file_of[stored_name].get_slice(stored_name)
        return StoredTensor(tuple(stored.get_shape()), stored)


def stored_as(name: str, *, names: Container[str]) -> str | None:
    """The name under which a folder stores a tensor; None if it does not."""
    return next((spelling for spelling in spellings(name) if spelling in names), None)


def spellings(name: str) -> tuple[str, ...]:
    """The names under which transformers finds a tensor: the prefix of the base model may be missing (`layers.0…` for
    `model.layers.0…`), and GPT-NeoX's output layer may have the name of other models."""
    return (name, name.partition(".")[2], name.replace("embed_out.", "lm_head."))


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """A tensor in a file, read in pieces with plain reads, because pages of a mapped file would count as this process's memory."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    _descriptor: int
    _offset: int  # bytes

    @property
    def n_positions(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def read(self, start: int, stop: int) -> Tensor:
        """Positions `start` to `stop`, in file order, (stop - start,)."""
        piece = torch.empty(stop - start, dtype=self.dtype)
        buffer = memoryview(piece.view(torch.uint8).numpy().data)
        done = 0
        while done < len(buffer):
            n_bytes = os.preadv(self._descriptor, [buffer[done:]], self._offset + start * self.dtype.itemsize + done)
            if n_bytes == 0:
                raise DataError(f"{self.path} became shorter while it was read. Wait until no other program writes it.")
            done += n_bytes
        return piece


def flat_tensors(folder: Path, *, stack: ExitStack) -> dict[str, FlatTensor]:
    """The tensors of a Hugging Face folder by name, in files that stay open until `stack` closes.

    Raises:
        DataError: there are no safetensors, one cannot be read, or the dtype of a tensor is not supported.
    """
    found = {}
    for path in weight_files(folder):
        tensors = tensors_of(path)
        start = path.stat().st_size - max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        descriptor = stack.enter_context(path.open("rb")).fileno()
        for name, tensor in tensors.items():
            if tensor["dtype"] not in _DTYPES:
                raise DataError(
                    f"{path}: the dtype of {name} ({tensor['dtype']}) must be one of {', '.join(_DTYPES)}: convert the model first."
                )
            found[name] = FlatTensor(path, tuple(tensor["shape"]), _DTYPES[tensor["dtype"]], descriptor, start + tensor["data_offsets"][0])
    return found


class WeightWriter:
    """Writes tensors as `model.safetensors`, or as several files with an index, piece by piece, in any order and from several threads."""

    def __init__(self, *, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype], folder: Path, stack: ExitStack) -> None:
        """Write the headers, and set the lengths of the files.

        Args:
            shapes: of all tensors, in file order.
            dtypes: of all tensors.
            folder: has no files with these names.
            stack: closes the files.
        """
        self._dtypes = dtypes
        self._sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        self._places: dict[str, tuple[int, int]] = {}  # file descriptor, and offset in the file
        files = _dealt(self._sizes)
        for file_name, names in files.items():
            file = stack.enter_context((folder / file_name).open("xb"))
            header = _header({name: shapes[name] for name in names}, dtypes=dtypes, sizes=self._sizes)
            file.write(header)
            file.flush()
            end = len(header)
            for name in names:
                self._places[name] = (file.fileno(), end)
                end += self._sizes[name]
            file.truncate(end)
        if len(files) > 1:
            weight_map = {name: file_name for file_name, names in files.items() for name in names}
            index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": weight_map}
            durable.write_json(folder / "model.safetensors.index.json", index)

    def write(self, name: str, piece: Tensor, *, start: int = 0) -> None:
        """Write the numbers of a tensor from position `start` on; `piece` is on the CPU and has the tensor's dtype."""
        assert piece.dtype == self._dtypes[name]
        descriptor, offset = self._places[name]
        begin = start * piece.dtype.itemsize
        assert begin + piece.nbytes <= self._sizes[name]
        data = memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], offset + begin + done)


def write_weights(
    tensors: Iterator[tuple[str, Tensor]], *, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype], folder: Path
) -> None:
    """Write whole tensors; only one is in memory at a time.

    Args:
        tensors: all of `shapes`, on the CPU.
        shapes: of all tensors.
        dtypes: of all tensors.
        folder: has no weights.
    """
    left = set(shapes)
    with ExitStack() as stack:
        writer = WeightWriter(shapes=shapes, dtypes=dtypes, folder=folder, stack=stack)
        for name, tensor in tensors:
            assert tuple(tensor.shape) == tuple(shapes[name])
            left.remove(name)
            writer.write(name, tensor)
            del tensor
    assert not left


def _dealt(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of the tensors of each file."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, n_bytes in sizes.items():
        if filled and filled + n_bytes > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += n_bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, start=1)}


def _header(shapes: Mapping[str, Sequence[int]], *, dtypes: Mapping[str, torch.dtype], sizes: Mapping[str, int]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + sizes[name]
        entries[name] = {"dtype": _CODES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
