"""One tensor of several models, read block by block from their files."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import torch
from torch import Tensor

from ...store.errors import DataError
from .plan import PlannedTensor, ranges
from .rule import Block


class FileBlocks:
    """The blocks of one tensor in all models. Each iteration reads them again, usually from the system's file cache."""

    def __init__(self, tensor: PlannedTensor, *, has_base: bool, models: Sequence[str], stopped: threading.Event) -> None:
        """`models` are their names, for messages; reading ends when `stopped` is set."""
        self._tensor, self._has_base, self._models, self._stopped = tensor, has_base, models, stopped
        all_dtypes = {tensor.reference.dtype, *(model.dtype for model in tensor.models)}
        self._dtype = torch.float64 if torch.float64 in all_dtypes else torch.float32
        self._is_checked = False

    def __iter__(self) -> Iterator[Block]:
        for start, stop in ranges(0, self._tensor.n_merged):
            if self._stopped.is_set():
                raise CancelledError
            models_MN = torch.empty((len(self._tensor.models), stop - start), dtype=self._dtype)
            for row_N, model in zip(models_MN, self._tensor.models, strict=True):
                row_N.copy_(model.read(start, stop))
            base_N = self._tensor.reference.read(start, stop).to(self._dtype) if self._has_base else models_MN[0]
            if not self._is_checked:
                self._check(base_N, models_MN)
            yield Block(base_N, models_MN)
        self._is_checked = True

    def _check(self, base_N: Tensor, models_MN: Tensor) -> None:
        rows = [*((f"model {name}", row_N) for name, row_N in zip(self._models, models_MN, strict=True)), ("the base", base_N)]
        for label, values_N in rows:
            if not is_finite(values_N):
                kind = "NaN" if values_N.isnan().any() else "an infinite number"
                raise DataError(f"{self._tensor.name} of {label} holds {kind} and cannot be merged. Check whether its training was stable.")


def is_finite(values_N: Tensor) -> bool:
    """Whether all numbers are finite."""
    least, most = torch.aminmax(values_N)
    return bool(torch.isfinite(least) & torch.isfinite(most))
