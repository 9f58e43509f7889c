"""The positions with a label, if some have none: stored as runs of positions, a few for each conversation.

Axes: S segments, T tokens of a part, R runs, P pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRuns:
    """Runs of positions that have a label, of all segments one after another."""

    first_S1: NDArray[np.int64]  # first run of each segment; S + 1 entries
    start_R: NDArray[np.int32]  # position in its segment
    end_R: NDArray[np.int32]  # its last position + 1

    @classmethod
    def of_mask(cls, mask_T: NDArray[Any], *, segment_offsets: NDArray[np.int64]) -> Self:
        """From a part's `label_mask_T`. A segment's last position has no label, because it has no next token."""
        has_label_T = mask_T.astype(np.bool_)
        lengths_S = np.diff(segment_offsets)
        has_label_T[segment_offsets[1:][lengths_S > 0] - 1] = False
        begins_T = np.zeros(len(has_label_T) + 1, np.bool_)
        begins_T[segment_offsets] = True
        before_T, after_T = np.roll(has_label_T, 1), np.append(has_label_T[1:], False)
        start_R = np.flatnonzero(has_label_T & (~before_T | begins_T[:-1]))
        end_R = np.flatnonzero(has_label_T & ~after_T) + 1
        first_S1 = np.searchsorted(start_R, segment_offsets)
        origin_R = np.repeat(segment_offsets[:-1], np.diff(first_S1))
        return cls(first_S1=first_S1, start_R=(start_R - origin_R).astype(np.int32), end_R=(end_R - origin_R).astype(np.int32))

    @classmethod
    def joined(cls, several: Sequence[Self]) -> Self:
        """Concatenate the labels of parts."""
        before = np.cumsum([0, *(len(runs.start_R) for runs in several)])
        firsts = [runs.first_S1[:-1] + n for runs, n in zip(several, before, strict=False)]
        return cls(
            first_S1=np.concatenate([*firsts, before[-1:]]),
            start_R=np.concatenate([runs.start_R for runs in several]),
            end_R=np.concatenate([runs.end_R for runs in several]),
        )

    @property
    def has_some_S(self) -> NDArray[np.bool_]:
        """Whether a segment has any label."""
        return np.diff(self.first_S1) > 0

    def has_some(self, segment_P: NDArray[np.int64], *, start_P: NDArray[np.int64], length_P: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether pieces have a label; `start_P` are their starts in their segments."""
        return _has_some(self.first_S1, self.start_R, self.end_R, segment_P, start_P, length_P)


@njit(cache=True, nogil=True)
def _has_some(first_S1: Any, start_R: Any, end_R: Any, segment_P: Any, start_P: Any, length_P: Any) -> Any:
    found_P = np.zeros(len(segment_P), np.bool_)
    for p in range(len(segment_P)):
        for r in range(first_S1[segment_P[p]], first_S1[segment_P[p] + 1]):
            if start_R[r] < start_P[p] + length_P[p] and end_R[r] > start_P[p]:
                found_P[p] = True
                break
    return found_P
