"""The sources of a fusion: their stored data, read part by part and projected onto the target's positions and tokens.

Axes: T positions of the target's part, U of the source's, V source vocabulary, K entries of a position, S segments.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..store.dataset import Dataset
from .projection import NO_GOLD, Collisions, Projection, SourcePart, VocabularyMap, project
from .rests import with_rests
from .vocabulary import target_ids


@dataclass(frozen=True, kw_only=True)
class FusionSource:
    """One source of a fusion. The target's own start is a source without maps: its alignment is the identity."""

    name: str
    distributions: Dataset
    alignment: Dataset | None = None
    vocabulary_map: Dataset | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_vocabulary"}

    @cached_property
    def _vocabulary(self) -> VocabularyMap | None:
        if self.vocabulary_map is None:
            return None
        table = self.vocabulary_map.table(0)
        return with_rests(table) if "rest_target_ids" in table.columns else VocabularyMap.of_tokens(target_ids(table))

    def read(self, part: int) -> SourcePart:
        """The distributions of a part, with their maps to the target's part."""
        token_ids_U, topk_ids_UK, topk_logprobs_UK, gold_logprob_U = self.distributions.read(
            part, "token_ids_T", "topk_ids_TK", "topk_logprobs_TK", "gold_logprob_T"
        )
        position_T, ahead_T = np.arange(len(token_ids_U), dtype=np.int32), None
        if self.alignment is not None:
            arrays = self.alignment.arrays(part)
            position_T = arrays.read("source_position_T")
            ahead_T = arrays.read_if_there("ahead_T")  # only of `cover`
        return SourcePart(
            topk_ids_UK=topk_ids_UK,
            topk_probs_UK=probabilities(topk_logprobs_UK),
            gold_ids_U=np.append(token_ids_U[1:], 0).astype(np.int64),
            gold_logprob_U=gold_logprob_U.astype(np.float64),
            vocabulary=self._vocabulary,
            position_T=position_T,
            ahead_T=ahead_T,
        )

    def project(self, part: int, *, gold_ids_T: NDArray[np.int64], gold_anchor: bool, collisions: Collisions = "sum") -> Projection:
        """A part at the target's positions, over its vocabulary; the arguments are as in `projection.project`."""
        return project(self.read(part), gold_ids_T=gold_ids_T, gold_anchor=gold_anchor, collisions=collisions)


def probabilities(logprobs_UK: NDArray[Any]) -> NDArray[np.float32]:
    """Probabilities of stored entries, scaled if their sum exceeds 1 after the codec's rounding (`q8`: by at most 1 %)."""
    probs_UK = np.exp(logprobs_UK.astype(np.float32))
    _scale_to_one(probs_UK)
    return probs_UK


@njit(cache=True)
def _scale_to_one(probs_UK: Any) -> None:
    for u in range(len(probs_UK)):
        total = np.float32(0)
        for prob in probs_UK[u]:
            total += prob
        if total > 1:
            for k in range(probs_UK.shape[1]):
                probs_UK[u, k] /= total


def gold_ids(token_ids_T: NDArray[Any], *, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The token after each position, -1 at the last position of a segment."""
    gold_ids_T = np.append(token_ids_T[1:], 0).astype(np.int64)
    gold_ids_T[offsets[1:][np.diff(offsets) > 0] - 1] = NO_GOLD
    return gold_ids_T
