"""Checks that the trainer's starting model gives the same likelihoods as the model of the target's stored distributions.

If the two read the model differently (another output layer, another rotation, rounded norms), training has no error but its targets belong
to another model. So before the first step, the trainer's likelihoods of some tokens are compared with the stored ones.

Axes: T tokens of a probe.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..store.dataset import Dataset
from .batch import MicroBatch
from .config import TrainingConfig, TrainJob
from .loss import IGNORED
from .runtime import Runtime

_PROBED = 1024  # most tokens: a tenth of a second for a model of 100M parameters on a CPU
_LEAST = 100  # least tokens, so that rounding averages out
_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # largest relative error of one rounding
_STORED = _UNIT["float16"]  # as `gold_logprob_T` is


@dataclass(frozen=True, slots=True, kw_only=True)
class StartCheck:
    """How far the trainer's start is from the stored distributions."""

    tokens: int
    difference: float  # mean of the absolute differences of log-probabilities, nats
    tolerance: float  # explained by rounding

    @property
    def warning(self) -> str | None:
        """The warning for the user, if rounding does not explain the difference."""
        if self.difference <= self.tolerance:
            return None
        return (
            f"The training does not start from the model of the target's stored distributions: the log-probabilities of {self.tokens} "
            f"tokens differ by {self.difference:.3g} nats on average, but rounding explains at most {self.tolerance:.3g}. "
            "Stop the training. Compare config.json and the tensors of the model's folder, and report this if both are right"
        )


def check_start(model: nn.Module, *, job: TrainJob, runtime: Runtime, n_layers: int) -> StartCheck | None:
    """Compare the log-probabilities of some tokens with the stored ones; None if none are stored. Every rank must call it.

    Args:
        model: a FusionModel before its first step.
        job: has the folder of the start's distributions.
        runtime: the device.
        n_layers: of the model.

    Raises:
        DataError: the distributions cannot be read.
    """
    if job.start_folder is None or not (job.start_folder / "dataset.json").exists():
        return None
    dataset = Dataset.open(job.start_folder)
    if dataset.fingerprint != job.tokens_fingerprint or min(job.parts) not in dataset.parts():
        return None
    ids, gold = _probe(dataset, part=min(job.parts), config=job.config)
    stored_T = np.concatenate(gold) if gold else np.zeros(0)
    if len(stored_T) < _LEAST:
        return None
    with torch.no_grad():
        ce_T, _ = model(_batch(ids).to(runtime.device))
    last_T = np.zeros(len(stored_T), np.bool_)
    last_T[np.cumsum([len(segment) for segment in ids]) - 1] = True
    is_known_T = np.isfinite(stored_T) & ~last_T
    difference_T = np.abs(-ce_T.float().cpu().numpy() - stored_T)[is_known_T]
    return StartCheck(
        tokens=len(difference_T),
        difference=float(difference_T.mean()),
        tolerance=_tolerance(
            [str(dataset.identity["dtype"]), job.config.dtype], n_layers=n_layers, mean_logprob=float(-stored_T[is_known_T].mean())
        ),
    )


def _probe(dataset: Dataset, *, part: int, config: TrainingConfig) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float64]]]:
    """Token ids and stored log-probabilities of the first segments, each cut as in training."""
    token_ids_T, offsets, gold_T = dataset.read(part, "token_ids_T", "segment_offsets", "gold_logprob_T")
    left = min(_PROBED, max(_LEAST + 1, config.micro_batch_size * config.sequence_length))  # as many as a step takes
    ids, gold = [], []
    for start, end in pairwise(offsets.tolist()):
        stop = min(end, start + config.sequence_length, start + left)
        if stop - start > 1:
            ids.append(token_ids_T[start:stop].astype(np.int64))
            gold.append(gold_T[start:stop].astype(np.float64))
            left -= stop - start
    return ids, gold


def _batch(ids: list[NDArray[np.int64]]) -> MicroBatch:
    return MicroBatch(
        token_ids_T=torch.from_numpy(np.concatenate(ids)),
        lengths=[len(segment) for segment in ids],
        labels_T=torch.from_numpy(np.concatenate([np.append(segment[1:], IGNORED) for segment in ids])),
        soft=None,
    )


def _tolerance(dtypes: list[str], *, n_layers: int, mean_logprob: float) -> float:
    """Mean absolute difference of log-probabilities, in nats, that rounding explains.

    A layer rounds the hidden states about four times (two normalisations, two sums), the output layer once more. The errors are
    independent, so they add up as a square root, in each of the two computations. They are relative to logits, whose spread is about that
    of the log-probabilities, at least one nat. The stored values are rounded again.
    """
    relative = math.hypot(*(_UNIT[dtype] * math.sqrt(4 * n_layers + 1) for dtype in dtypes))
    return relative * (1 + mean_logprob) + _STORED * mean_logprob
