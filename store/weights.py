"""Which files of a model folder in the Hugging Face format hold its weights, and which tensors are in them."""

import json
import struct
from pathlib import Path
from typing import Any

from .errors import DataError

# Ends of the names of input embeddings in published folders; their rows are the vocabulary.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, by name: `model.safetensors`, else those that its index names, else all there are.

    A folder may hold a second copy of the weights in files of other names (`consolidated.safetensors`).

    Raises:
        DataError: there are none, or one that the index names is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise DataError(f"{folder} has no *.safetensors file. Weights in other formats (pickles) are not read: convert them first.")
        return files
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} cannot be read ({error}). Download it again.") from error
    absent = [name for name in named if not (folder / name).exists()]
    if absent:
        raise DataError(f"{folder} lacks weights: {index.name} names {', '.join(absent)}. Download the model again.")
    return [folder / name for name in named]


def tensors_of(path: Path) -> dict[str, dict[str, Any]]:
    """Name to dtype, shape and place of each tensor of a safetensors file, from its header.

    A file that was cut short, by a broken download say, has a sound header and too few bytes.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = file.read(min(length, size))
        tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, struct.error, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is cut short, or not a safetensors file ({error}). Download it again.") from error
    if size != expected:
        raise DataError(f"{path} must have {expected} bytes, and has {size}: it was cut short. Download it again.")
    return tensors
