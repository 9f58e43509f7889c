"""The model families that can be trained, one module each: how to read `config.json`, and where each tensor goes.

To add a family, write a module with a `read` that returns the `Architecture` of a configuration and refuses unsupported fields by name,
list it in `FAMILIES`, and add tiny configurations to `tests/unit/test_train_convert.py`, which compares it with transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig

from ...store.errors import DataError, UsageError
from ...store.model_json import read_json
from ...store.shown import shown
from ...store.tied import is_tied
from ...store.transformers_folder import completed_config
from ...store.weights import tensors_of, weight_files
from ..architecture import Architecture
from ..config import TrainingConfig
from ..weight_files import BUFFERS, spellings
from . import gemma, gemma3, gpt_neox, llama, mistral, mpt, qwen2, qwen3

FAMILIES: Mapping[str, Callable[[PretrainedConfig], Architecture]] = {
    "gemma": gemma.read,
    "gemma3_text": gemma3.read,
    "gpt_neox": gpt_neox.read,
    "llama": llama.read,
    "mistral": mistral.read,
    "mpt": mpt.read,
    "qwen2": qwen2.read,
    "qwen3": qwen3.read,
}


def read_architecture(model_folder: Path, *, training: TrainingConfig) -> Architecture:
    """Read `config.json` and check that the model can be trained on `training.tensor_parallel` ranks.

    Whether the output layer is the embeddings depends on the stored tensors too (`store.tied`).

    Raises:
        DataError: the folder has no readable config.json, or the model is not supported.
        UsageError: tensor_parallel or sequence_length does not fit the model.
    """
    path = model_folder / "config.json"
    try:
        model_type = read_json(path).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as the configuration of a model: {error}") from error
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise DataError(f"{path}: model_type {shown(model_type)} cannot be trained. Supported: {', '.join(FAMILIES)}.")
    try:
        architecture = FAMILIES[model_type](completed_config(model_folder))
    except DataError:
        raise
    except (KeyError, AttributeError) as error:
        raise DataError(f"{path} lacks a field that {model_type} models need: {error}") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DataError(f"{path}: {error}") from error
    _require_fit(architecture, model_folder=model_folder, training=training)
    _require_known_tensors(architecture, model_folder=model_folder)
    return replace(architecture, tied_embeddings=is_tied(model_folder, says_tied=architecture.tied_embeddings))


def _require_fit(architecture: Architecture, *, model_folder: Path, training: TrainingConfig) -> None:
    for name, size in (
        ("attention heads", architecture.n_heads),
        ("key/value heads", architecture.n_kv_heads),
        ("MLP's inner size", architecture.ffn_size),
    ):
        if size % training.tensor_parallel:
            raise UsageError(f"tensor_parallel ({training.tensor_parallel}) must divide the model's {name} ({size}): {model_folder}")
    if training.sequence_length > architecture.max_length:
        raise UsageError(
            f"sequence_length ({training.sequence_length}) must be at most the number of positions of {model_folder} "
            f"({architecture.max_length})"
        )


def _require_known_tensors(architecture: Architecture, *, model_folder: Path) -> None:
    """Raise DataError for tensors that the configuration does not describe: the trainer would drop them."""
    known = {spelling for name in architecture.tensor_names for spelling in spellings(name)}
    stored = [name for path in weight_files(model_folder) for name in tensors_of(path)]
    unknown = sorted(name for name in stored if name not in known and not name.endswith(BUFFERS))
    if unknown:
        raise DataError(
            f"{model_folder} has {len(unknown)} tensors that its config.json does not describe; training would drop them: "
            f"{', '.join(unknown[:5])}. Use it as a source, or save the model again without them."
        )
