"""Finds the weight files of a model folder in the Hugging Face format, and their tensors.

The rules are those of transformers, which runs the models. Files that it would not load are refused here, before any computation.
"""

import math
import re
import struct
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import DataError
from .inside import OutsideFolder, inside, require_inside
from .json_text import parse_json
from .model_json import read_json
from .shown import listed, shown

# Suffixes of the names of input embeddings in published folders; their rows are the vocabulary.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_GIT_LFS = b"version https://git-lfs"
_LISTED = 4  # files that a message names
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "I32": 32,
    "U32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, by name: `model.safetensors`, else the files in `model.safetensors.index.json`.

    A folder may hold a second copy of the weights under other names (`consolidated.safetensors`), which is ignored.

    Raises:
        DataError: there are none, a file of the index is missing, or the folder holds an adapter (LoRA).
    """
    refuse_adapter(folder)
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists():
        require_inside(single, folder=folder)
        return [single]
    if not index.exists():
        raise DataError(_why_no_weights(folder))
    try:
        named = _named_in(index)
        absent = [name for name in named if not (folder / name).exists()]
    except OutsideFolder:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{index} cannot be read ({error}). Download it again.") from error
    if absent:
        raise DataError(f"{folder} lacks weights: {index.name} names {listed(absent, most=_LISTED)}. Download the missing files.")
    return [folder / name for name in named]


def _named_in(index: Path) -> list[str]:
    """The files that an index names, sorted; they are in its folder, but may be missing.

    Raises:
        OutsideFolder: a name leads out of the folder.
        OSError, ValueError: it cannot be read, or is not an index.
    """
    require_inside(index, folder=index.parent)
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no object weight_map with file names")
    names = [name for name in weight_map.values() if isinstance(name, str)]
    if len(names) < len(weight_map):
        raise ValueError(f"weight_map holds {shown(next(name for name in weight_map.values() if not isinstance(name, str)))}, not a name")
    for name in (unique := sorted(set(names))):
        inside(index.parent, name, what=f"weight_map of {index}")
        if not name.endswith(".safetensors"):
            raise ValueError(f"weight_map names {shown(name)}, not a *.safetensors file")
    return unique


def unread_shards(folder: Path) -> bool:
    """Whether the folder has both `model.safetensors` and an index of other files. transformers and fuseline read the former."""
    if not ((folder / _SINGLE).exists() and (folder / _INDEX).exists()):
        return False
    try:
        return any((folder / name).exists() for name in _named_in(folder / _INDEX) if name != _SINGLE)
    except (OSError, ValueError):
        return False


def refuse_adapter(folder: Path) -> None:
    """Raise DataError if the folder holds an adapter, alone or beside a model's weights: it changes the model's output."""
    found = [name for name in _ADAPTER if (folder / name).exists()]
    if not found:
        return
    raise DataError(
        f"{folder} holds an adapter ({found[0]}){_base_of_adapter(folder)}. Merge it in Python, and name the merged folder in the recipe: "
        f"from peft import AutoPeftModelForCausalLM; AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload()"
        ".save_pretrained('merged'); then copy the tokenizer's files into it. If the adapter does not belong to the model in the folder, "
        f"move {' and '.join(found)} out of it."
    )


def _base_of_adapter(folder: Path) -> str:
    try:
        name = read_json(folder / _ADAPTER[0])["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" of the base model {name:.100}" if isinstance(name, str) else ""


def _why_no_weights(folder: Path) -> str:
    """The error for a folder without `model.safetensors` and without an index."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    shards = [match for match in map(_SHARD.fullmatch, files) if match]
    if shards:
        width, total = len(shards[0][2]), int(shards[0][2])
        there = {int(match[1]) for match in shards}
        missing = (f"model-{i:0{width}d}-of-{total:0{width}d}.safetensors" for i in range(1, total + 1) if i not in there)
        n_files = 1 + total - sum(1 <= i <= total for i in there)
        some = listed([_INDEX, *islice(missing, _LISTED)], most=_LISTED, of=n_files)
        return f"{folder} has shards of a model but no {_INDEX}. Download {some} into it."
    if files:
        return (
            f"{folder} has no {_SINGLE} and no {_INDEX}, only {listed(files, most=_LISTED)}. If that is the model in the Hugging Face "
            f"format, rename it to {_SINGLE}; otherwise download the model in that format."
        )
    return (
        f"{folder} has no *.safetensors file. Weights in other formats (pickles) are not read: convert them first, with "
        "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) of transformers."
    )


def tensors_of(path: Path) -> dict[str, dict[str, Any]]:
    """Name to dtype, shape and offsets of each tensor of a safetensors file, from its header.

    A file that was cut short, for example by a broken download, has a valid header but too few bytes.

    Raises:
        DataError: the file is incomplete, not a safetensors file, or a git-lfs pointer.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            raise DataError(f"{path} is a git-lfs pointer, not the weights. Run `git lfs pull` in {path.parent}.")
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LARGEST_HEADER:
                raise ValueError(f"its header would have {length:,} bytes")
            header = file.read(min(length, size))
        tensors = {name: tensor for name, tensor in _header(header).items() if name != "__metadata__"}
        expected = 8 + length + _require_gapless(tensors)
    except (ValueError, struct.error) as error:
        raise DataError(f"{path} is cut short, or not a safetensors file ({error}). Download it again.") from error
    if size != expected:
        raise DataError(f"{path} must have {expected} bytes, but has {size}: it was cut short. Download it again.")
    return tensors


def _header(data: bytes) -> dict[str, Any]:
    """The header as an object; a repeated name is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("its header has a name twice")
        return found

    header = parse_json(data, object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header


def _require_gapless(tensors: dict[str, Any]) -> int:
    """Number of bytes of all tensors. They must follow each other without gaps, with the lengths given by dtype and shape.

    Raises:
        ValueError: they do not, or an entry does not describe a tensor.
    """
    places = []
    for name, tensor in tensors.items():
        match tensor:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if dtype in _DTYPE_BITS:
                n_bits = _DTYPE_BITS[dtype] * math.prod(shape) if all(type(side) is int and side >= 0 for side in shape) else -1
            case _:
                raise ValueError(f"the entry {shown(tensor)} of {shown(name)} does not describe a tensor")
        if 8 * (end - start) != n_bits:
            raise ValueError(f"the bytes {shown([start, end])} of {shown(name)} do not fit its dtype and shape {shown(shape)}")
        places.append((start, end, name))
    place = 0
    for start, end, name in sorted(places):
        if start != place:
            raise ValueError(f"{shown(name)} does not begin where the previous tensor ends")
        place = end
    return place
