"""Compares the model that config.json describes with the stored weights, before transformers builds it.

transformers fills missing weights with random numbers, and makes buffers (masks, tables of positions) from config.json alone. Numbers
that are each within the limits of `model_sizes` can need terabytes together. On torch's device `meta` the model takes no memory, and
0.03 seconds for SmolLM2-135M.
"""

import math
from pathlib import Path
from typing import Any

from .errors import DataError
from .transformers_folder import invalid_config, read_config
from .weights import tensors_of, weight_files

_MOST_FACTOR = 2  # times what is stored: an output layer may be stored as the embeddings alone
_HARMLESS = 1 << 28  # parameters; for fewer, another check names the real mistake
_HARMLESS_BUFFERS = 1 << 30  # bytes


def described_model(folder: Path, *, readable: Path) -> tuple[Any, Any]:
    """The class and the configuration of the model that config.json describes.

    Args:
        folder: the model's folder, for messages and for the weights.
        readable: the folder as `for_transformers` gives it. No code in it is run.

    Raises:
        DataError: the configuration is invalid, is not of a causal language model, or describes a far larger model than the weights hold.
    """
    import torch  # only here, as transformers: their import takes seconds
    import transformers
    from transformers.initialization import no_init_weights

    config = read_config(readable, of=folder)
    kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise invalid_config(folder, f"model_type ({config.model_type!r}) must be a causal language model")
    try:
        if kind.config_class is config.sub_configs.get("text_config"):  # as AutoModelForCausalLM does
            config = config.get_text_config()
        with torch.device("meta"), no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # model classes raise any exception
        raise invalid_config(folder, error) from error
    _require_stored(
        folder,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )
    return kind, config


def _require_stored(folder: Path, *, n_parameters: int, buffer_bytes: int) -> None:
    files = weight_files(folder)
    stored = sum(math.prod(tensor["shape"]) for path in files for tensor in tensors_of(path).values())
    if n_parameters > max(_MOST_FACTOR * stored, _HARMLESS):
        raise DataError(
            f"{folder}/config.json describes {n_parameters:,} parameters, but the weights hold {stored:,}. Download the model again."
        )
    stored_bytes = sum(path.stat().st_size for path in files)
    if buffer_bytes > max(stored_bytes, _HARMLESS_BUFFERS):
        raise DataError(
            f"{folder}/config.json describes buffers (masks, tables of positions) of {buffer_bytes:,} bytes, but the weights have "
            f"{stored_bytes:,}. Download the model again."
        )
