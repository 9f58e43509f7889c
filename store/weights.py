"""Which files of a model folder in the Hugging Face format hold its weights, and which tensors are in them.

The rules are those of transformers, which runs the models: what it would not load is refused here, before anything is computed.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any

from .errors import DataError
from .model_json import read_json

# Ends of the names of input embeddings in published folders; their rows are the vocabulary.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_GIT_LFS = b"version https://git-lfs"
_LISTED = 4  # files that a message names


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, by name: `model.safetensors`, else those that `model.safetensors.index.json` names.

    A folder may hold a second copy of the weights in files of other names (`consolidated.safetensors`).

    Raises:
        DataError: there are none, one that the index names is missing, or the folder holds an adapter (LoRA).
    """
    refuse_adapter(folder)
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists():
        return [single]
    if not index.exists():
        raise DataError(_why_no_weights(folder))
    try:
        named = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} cannot be read ({error}). Download it again.") from error
    absent = [name for name in named if not (folder / name).exists()]
    if absent:
        raise DataError(f"{folder} lacks weights: {index.name} names {_listed(absent)}. Download the missing files.")
    return [folder / name for name in named]


def unread_shards(folder: Path) -> bool:
    """Whether an index names other files than `model.safetensors`, which is there too: transformers reads that, and so does fuseline."""
    if not ((folder / _SINGLE).exists() and (folder / _INDEX).exists()):
        return False
    try:
        return any((folder / name).exists() for name in set(read_json(folder / _INDEX)["weight_map"].values()) - {_SINGLE})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def refuse_adapter(folder: Path) -> None:
    """Raise DataError if the folder holds an adapter, beside the weights of a model or alone: it changes what the model says."""
    found = [name for name in _ADAPTER if (folder / name).exists()]
    if not found:
        return
    raise DataError(
        f"{folder} holds an adapter ({found[0]}){_base_of_adapter(folder)}. Merge it in Python, and name the merged folder in the recipe: "
        f"from peft import AutoPeftModelForCausalLM; AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload()"
        ".save_pretrained('merged'); then copy the tokenizer's files into it. If the folder holds a whole model to which the adapter does "
        f"not belong, move {' and '.join(found)} out of it."
    )


def _base_of_adapter(folder: Path) -> str:
    try:
        return f" of the base model {read_json(folder / _ADAPTER[0])['base_model_name_or_path']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _why_no_weights(folder: Path) -> str:
    """The refusal of a folder with neither `model.safetensors` nor an index."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    shards = [match for match in map(_SHARD.fullmatch, files) if match]
    if shards:
        width, total = len(shards[0][2]), int(shards[0][2])
        there = {int(match[1]) for match in shards}
        missing = [f"model-{i:0{width}d}-of-{total:0{width}d}.safetensors" for i in range(1, total + 1) if i not in there]
        return f"{folder} has shards of a model and no {_INDEX}. Download {_listed([_INDEX, *missing])} into it."
    if files:
        return (
            f"{folder} has no {_SINGLE} and no {_INDEX}, only {_listed(files)}. If that is the model in the Hugging Face format, rename it "
            f"to {_SINGLE}; otherwise download the model in that format."
        )
    return (
        f"{folder} has no *.safetensors file. Weights in other formats (pickles) are not read: convert them first, with "
        "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) of transformers."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def tensors_of(path: Path) -> dict[str, dict[str, Any]]:
    """Name to dtype, shape and place of each tensor of a safetensors file, from its header.

    A file that was cut short, by a broken download say, has a sound header and too few bytes.

    Raises:
        DataError: the file is not whole, not a safetensors file, or the pointer of git-lfs to one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            raise DataError(f"{path} is a pointer of git-lfs, not the weights. Run `git lfs pull` in {path.parent}.")
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
