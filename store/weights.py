"""Which files of a model folder in the Hugging Face format hold its weights."""

import json
from pathlib import Path

from .errors import DataError


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
