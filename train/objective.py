"""The loss of a step: both losses, weighted, as means over the positions of the whole global batch (METHOD: λ · CLM + (1 - λ) · fusion).

Axes: T positions of a micro-batch.
"""

import torch
from torch import Tensor

from .batch import MicroBatch
from .config import TrainingConfig
from .loss import IGNORED


class Objective:
    """λ of each step, the weights of positions, and the sums for the means.

    With weights w, the mean of a loss l over the positions where it is defined is Σ w l / Σ w. Both sums run over all micro-batches of all
    ranks, so a mean does not depend on how the batch is divided.
    """

    def __init__(self, config: TrainingConfig, *, steps: int) -> None:
        """`steps` is the number of steps of the run."""
        self._config, self._steps = config, steps

    def clm_weight(self, step: int) -> float:
        """λ of a step, counted from 0: constant, or linear from the first step to the last."""
        start, end = self._config.clm_weight, self._config.clm_weight_end
        if end is None or self._steps == 1:
            return start
        return start + (end - start) * step / (self._steps - 1)

    def weights(self, batch: MicroBatch) -> Tensor:
        """Σ w over the positions with a label, and over those with a fused target; float64, [2]."""
        weights_T = torch.ones_like(batch.labels_T, dtype=torch.float64) if batch.weights_T is None else batch.weights_T.double()
        has_label_T = batch.labels_T != IGNORED
        n_targets = weights_T.new_zeros(()) if batch.soft is None else weights_T[batch.soft.is_known_N()].sum()
        return torch.stack([weights_T[has_label_T].sum(), n_targets])

    def loss(self, ce_T: Tensor, soft_T: Tensor | None, *, batch: MicroBatch, step: int, total_weights: Tensor) -> tuple[Tensor, Tensor]:
        """A micro-batch's share of the loss, and of the two means.

        Args:
            ce_T: cross-entropy with the label at each position, 0 without a label (nats).
            soft_T: with the fused target, None without fusion.
            batch: the micro-batch, on the same device.
            step: counts from 0.
            total_weights: `weights` summed over the global batch, [2].

        Returns:
            The loss to backpropagate, and its contribution to the means of both losses: float64, [2], detached.
        """
        total_weights = torch.where(total_weights > 0, total_weights, 1.0)
        clm = _weighted(ce_T, batch) / total_weights[0]
        if soft_T is None:
            return clm, torch.stack([clm.detach(), torch.zeros_like(clm)])
        if self._config.fusion_loss == "kl":
            assert batch.soft is not None
            soft_T = soft_T - batch.soft.temperature**2 * batch.soft.entropy_N()
        fusion = _weighted(soft_T, batch) / total_weights[1]
        weight = self.clm_weight(step)
        return weight * clm + (1 - weight) * fusion, torch.stack([clm, fusion]).detach()

    def total(self, *, clm: float, fusion: float | None, step: int) -> float:
        """The loss of a step from its two means."""
        if fusion is None:
            return clm
        weight = self.clm_weight(step)
        return weight * clm + (1 - weight) * fusion


def _weighted(loss_T: Tensor, batch: MicroBatch) -> Tensor:
    return (loss_T if batch.weights_T is None else loss_T * batch.weights_T).sum(dtype=torch.float64)
