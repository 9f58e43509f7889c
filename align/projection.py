"""Brings a source's distributions into the target's vocabulary and positions, and adds several of them up.

Compiled loops over positions: a position has a dozen entries, too few for array operations and too many positions for Python.

Axes: T positions of the target's part, U of the source's, V source vocabulary, K entries of a source position, C capacity of a sum.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .positions import UNALIGNED

NO_GOLD = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePart:
    """One source's part and how it lies to the target's."""

    topk_ids_UK: NDArray[Any]  # source ids
    topk_probs_UK: NDArray[np.float32]
    gold_ids_U: NDArray[np.int64]  # the source token that follows; anything at a segment's last position
    gold_logprob_U: NDArray[np.float64]  # its log-probability; NaN at a segment's last position
    target_ids_V: NDArray[np.int32] | None  # vocabulary map, -1 where unmapped; None for the identity
    position_T: NDArray[np.int32]  # position map, -1 where unaligned


@dataclass(frozen=True, slots=True)
class Mixture:
    """A weighted sum of distributions at each target position: up to C different tokens, unordered, and the mass that was lost."""

    ids_TC: NDArray[np.int32]
    probs_TC: NDArray[np.float64]
    n_T: NDArray[np.int64]
    lost_T: NDArray[np.float64]  # mass of tokens that the map does not know or that the anchor took the place of

    @classmethod
    def empty(cls, n_positions: int, *, capacity: int) -> Self:
        """A sum of nothing."""
        return cls(
            np.zeros((n_positions, capacity), np.int32),
            np.zeros((n_positions, capacity)),
            np.zeros(n_positions, np.int64),
            np.zeros(n_positions),
        )

    def add(self, source: SourcePart, *, weight_T: NDArray[np.float64], gold_ids_T: NDArray[np.int64], gold_anchor: bool) -> None:
        """Add a source's distributions, in the target's vocabulary, at the positions where it has one and its weight is not 0.

        Args:
            source: the source.
            weight_T: weight of the source at each target position.
            gold_ids_T: the target token that follows each position, -1 at the last of a segment.
            gold_anchor: give that token exactly the source's probability of its text, where the source has boundaries at both its ends.
        """
        anchor_T = gold_probabilities(source, gold_ids_T=gold_ids_T) if gold_anchor else np.full(len(self.n_T), np.nan)
        map_V = source.target_ids_V
        if map_V is None:
            map_V = np.arange(int(source.topk_ids_UK.max(initial=0)) + 1, dtype=np.int32)
        _add(
            self.ids_TC, self.probs_TC, self.n_T, self.lost_T, weight_T, source.position_T, source.topk_ids_UK, source.topk_probs_UK,
            source.gold_ids_U, map_V, gold_ids_T, anchor_T,
        )  # fmt: skip

    def top(self, k: int, *, gold_ids_T: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The k most probable tokens of each position, by falling probability; the gold token, where it has any mass, is always kept.

        Returns:
            ids [T, k] and probabilities [T, k], 0 where there are fewer.
        """
        ids_TK = np.zeros((len(self.n_T), k), np.int32)
        probs_TK = np.zeros((len(self.n_T), k))
        _top(self.ids_TC, self.probs_TC, self.n_T, gold_ids_T, ids_TK, probs_TK)
        return ids_TK, probs_TK


def gold_probabilities(source: SourcePart, *, gold_ids_T: NDArray[np.int64]) -> NDArray[np.float64]:
    """The source's probability of each target position's next token, [T]; NaN where the source has no boundary at one of its ends.

    It is the product of the source's probabilities of its own tokens in between (METHOD "gold anchor"; Minixhofer et al. 2025, arXiv
    2503.20083, on likelihoods between shared boundaries).
    """
    before_U = np.concatenate([[0.0], np.cumsum(np.nan_to_num(source.gold_logprob_U, nan=0.0))])
    here_T = source.position_T
    next_T = np.append(here_T[1:], UNALIGNED)
    known_T = (gold_ids_T != NO_GOLD) & (here_T != UNALIGNED) & (next_T > here_T)
    logprob_T = np.full(len(here_T), np.nan)
    logprob_T[known_T] = before_U[next_T[known_T]] - before_U[here_T[known_T]]
    return np.exp(logprob_T)


@njit(cache=True)
def _add(
    ids_TC: Any, probs_TC: Any, n_T: Any, lost_T: Any, weight_T: Any, position_T: Any, topk_ids_UK: Any, topk_probs_UK: Any,
    gold_ids_U: Any, target_ids_V: Any, gold_ids_T: Any, anchor_T: Any,
) -> None:  # fmt: skip
    for t in range(len(position_T)):
        u = position_T[t]
        weight = weight_T[t]
        if u < 0 or weight == 0:
            continue
        anchored = not np.isnan(anchor_T[t])
        for k in range(topk_ids_UK.shape[1]):
            source_id = topk_ids_UK[u, k]
            mass = weight * topk_probs_UK[u, k]
            target_id = target_ids_V[source_id] if source_id < len(target_ids_V) else -1
            if anchored and source_id == gold_ids_U[u]:
                # The first piece of the text that follows: what the anchor says takes its place.
                lost_T[t] += max(0.0, mass - weight * anchor_T[t])
                continue
            if target_id < 0 or (anchored and target_id == gold_ids_T[t]):
                lost_T[t] += mass
                continue
            _put(ids_TC[t], probs_TC[t], n_T, t, target_id, mass)
        if anchored:
            _put(ids_TC[t], probs_TC[t], n_T, t, gold_ids_T[t], weight * anchor_T[t])


@njit(cache=True, inline="always")
def _put(ids_C: Any, probs_C: Any, n_T: Any, t: int, token_id: int, mass: float) -> None:
    for c in range(n_T[t]):
        if ids_C[c] == token_id:
            probs_C[c] += mass
            return
    ids_C[n_T[t]] = token_id
    probs_C[n_T[t]] = mass
    n_T[t] += 1


@njit(cache=True)
def _top(ids_TC: Any, probs_TC: Any, n_T: Any, gold_ids_T: Any, ids_TK: Any, probs_TK: Any) -> None:
    k = ids_TK.shape[1]
    for t in range(len(n_T)):
        filled = 0
        for c in range(n_T[t]):
            token_id, prob = ids_TC[t, c], probs_TC[t, c]
            if prob <= 0:
                continue
            # Insertion by falling probability, ties by rising id; what falls off the end is dropped.
            place = filled
            while place > 0 and (probs_TK[t, place - 1] < prob or (probs_TK[t, place - 1] == prob and ids_TK[t, place - 1] > token_id)):
                if place < k:
                    probs_TK[t, place], ids_TK[t, place] = probs_TK[t, place - 1], ids_TK[t, place - 1]
                place -= 1
            if place < k:
                probs_TK[t, place], ids_TK[t, place] = prob, token_id
                filled = min(filled + 1, k)
        if gold_ids_T[t] >= 0:
            _keep_gold(ids_TC[t], probs_TC[t], n_T[t], gold_ids_T[t], ids_TK[t], probs_TK[t])


@njit(cache=True)
def _keep_gold(ids_C: Any, probs_C: Any, n: int, gold_id: int, ids_K: Any, probs_K: Any) -> None:
    for entry in range(len(ids_K)):
        if ids_K[entry] == gold_id and probs_K[entry] > 0:
            return
    for c in range(n):
        if ids_C[c] == gold_id and probs_C[c] > 0:
            ids_K[-1], probs_K[-1] = gold_id, probs_C[c]
