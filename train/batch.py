"""The unit that goes through the model at once. Axes: T tokens, N = T positions, K stored entries of a distribution."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

from .loss import IGNORED, SoftTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Packed sequences of one forward pass, laid end to end as one row of T tokens."""

    token_ids_T: Tensor  # int64
    lengths: Sequence[int]  # tokens of each segment, in order; positions restart at each, and each attends only within itself
    labels_T: Tensor  # int64 next token of the segment, or IGNORED
    soft: SoftTargets | None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on a device."""
        soft = None
        if self.soft is not None:
            tail_mass_N = None if self.soft.tail_mass_N is None else self.soft.tail_mass_N.to(device)
            soft = SoftTargets(
                topk_ids_NK=self.soft.topk_ids_NK.to(device), topk_masses_NK=self.soft.topk_masses_NK.to(device), tail_mass_N=tail_mass_N
            )
        moved = {name: getattr(self, name).to(device) for name in ("token_ids_T", "labels_T")}
        return replace(self, **moved, soft=soft)

    def padded(self, multiple: int) -> "MicroBatch":
        """The same batch with one more segment, of tokens that teach nothing, where T is not a multiple."""
        n = -len(self.token_ids_T) % multiple
        if not n:
            return self
        soft = None
        if self.soft is not None:
            ids_NK, masses_NK = (F.pad(x, (0, 0, 0, n)) for x in (self.soft.topk_ids_NK, self.soft.topk_masses_NK))
            tail_mass_N = None if self.soft.tail_mass_N is None else F.pad(self.soft.tail_mass_N, (0, n))
            soft = SoftTargets(topk_ids_NK=ids_NK, topk_masses_NK=masses_NK, tail_mass_N=tail_mass_N)
        return MicroBatch(
            token_ids_T=F.pad(self.token_ids_T, (0, n)),
            lengths=[*self.lengths, n],
            labels_T=F.pad(self.labels_T, (0, n), value=IGNORED),
            soft=soft,
        )
