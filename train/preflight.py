"""Checks for problems that would stop a training later, before anything large is loaded."""

import math
import shutil
from pathlib import Path

from ..store.dataset import Dataset
from ..store.errors import DataError, UsageError
from ..store.tokenizer import Tokenizer
from . import records
from .config import TrainingConfig, TrainJob
from .cost import Cost
from .data import TargetsData
from .families import read_architecture
from .reading import Reading

_ID_ARRAYS = ("token_ids_T", "topk_ids_TK")


def preflight(job: TrainJob) -> Cost:
    """Check that model, tokenizer, targets and settings fit each other, and that the disk has enough space.

    Reads config.json, the tokenizer, the headers of the weights, and the ids of the first part of the targets.

    Returns:
        The cost of the training.

    Raises:
        DataError: the model's vocabulary is too small for the ids of tokenizer or targets, or the model is not supported.
        UsageError: the settings do not fit the model, or the disk is too small for the checkpoints and the export.
    """
    architecture = read_architecture(job.model_folder, training=job.config)
    _require_vocabulary(job.model_folder, vocab_size=architecture.vocab_size)
    _require_target_ids(job, vocab_size=architecture.vocab_size)
    arithmetic = records.arithmetic_of(job.run_folder, dtype=job.config.dtype)
    cost = Cost.of(job.model_folder, architecture=architecture, config=job.config, arithmetic=arithmetic)
    _require_disk(job, cost=cost)
    return cost


def planned_reading(job: TrainJob) -> Reading:
    """How much of its data a training will read, and how often.

    Raises:
        DataError: targets are missing, or have nothing to learn.
    """
    vocab_size = read_architecture(job.model_folder, training=job.config).vocab_size
    return TargetsData.of(job, vocab_size=vocab_size).reading


def _require_vocabulary(model_folder: Path, *, vocab_size: int) -> None:
    """Raise DataError if the model's tokenizer has ids without an embedding in the model."""
    if not (model_folder / "tokenizer.json").exists():
        return
    largest = Tokenizer.from_model_folder(model_folder).largest_id
    if largest >= vocab_size:
        raise DataError(
            f"vocab_size ({vocab_size}) of {model_folder / 'config.json'} must be above the largest id of its tokenizer ({largest}): "
            "the tokenizer belongs to another model, or tokens were added without resizing the model."
        )


def require_memory(cost: Cost, *, config: TrainingConfig, free: int) -> None:
    """Raise UsageError if a rank's weights, gradients and optimizer state alone take more than its `free` bytes.

    Activations are not counted: their estimate is too rough to refuse a run.
    """
    if cost.state_bytes > free:
        raise UsageError(
            f"Weights, gradients and optimizer state of a rank take {cost.state_bytes / 1e9:.1f} GB, but it has {free / 1e9:.1f} GB free: "
            f"raise tensor_parallel ({config.tensor_parallel}) or "
            f"data_parallel ({config.data_parallel}), on more devices, or train in bfloat16."
        )


def _require_target_ids(job: TrainJob, *, vocab_size: int) -> None:
    dataset = Dataset.open(job.targets_folder)
    part = min(job.parts)
    if part not in dataset.parts():
        return  # `TrainingData` reports which are missing
    for name in _ID_ARRAYS if job.config.uses_targets else _ID_ARRAYS[:1]:
        (ids,) = dataset.read(part, name)
        largest = int(ids.max(initial=0))
        if largest >= vocab_size:
            raise DataError(
                f"vocab_size ({vocab_size}) of {job.model_folder} must be above the largest id ({largest}) in {name} of part {part} of "
                f"{dataset.folder}: these targets are for another model."
            )


def _require_disk(job: TrainJob, *, cost: Cost) -> None:
    kept = len(records.checkpoint_steps(job.run_folder))
    config = job.config
    written = math.ceil(config.steps / config.checkpoint_every) if config.steps and not config.checkpoint_minutes else math.inf
    new = int(max(min(config.keep_checkpoints + 1, written) - kept, 1))  # a new one is written before the oldest is removed
    needed = new * cost.checkpoint_bytes + cost.export_bytes
    place = next(folder for folder in (job.run_folder, *job.run_folder.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(
            f"The disk of {place} has {free / 1e9:.1f} GB free, but the training {job.config.name} needs {needed / 1e9:.1f} GB: "
            f"{new} checkpoints of {cost.checkpoint_bytes / 1e9:.1f} GB each, and the exported model. Free some space, lower "
            f"keep_checkpoints ({job.config.keep_checkpoints}), or choose another workspace."
        )
