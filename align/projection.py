"""Projects a source's distributions into the target's vocabulary and positions, and mixes several sources.

The loops over positions are compiled: a position has a dozen entries, too few for array operations, and there are too many positions for
Python. The position map gives the source position for a target position, the vocabulary map the target token for a source token.

The text is known, and the source's probability of each of its tokens is stored. So with the gold anchor the next target token of the text
has exactly the source's probability of its text, if both its ends are source positions (Minixhofer et al. 2025, arXiv 2503.20083, on
likelihoods between shared boundaries). Other mass that was mapped to it, or to its beginning, is lost. `cover` always has the anchor, loses
less and covers every position: `cover.py`.

Axes: T positions of the target's part, U of the source's, V source vocabulary, B bytes of all its tokens one after another, K entries of a
source position, C capacity of a projection, N sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numba import njit
from numba.typed import List
from numpy.typing import NDArray

from .cover import ROOM, Entries, Filled, Pieces, Places, project_cover, put

NO_GOLD = -1
Collisions = Literal["sum", "first"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyMap:
    """The map from a source's tokens to the target's vocabulary."""

    target_ids_V: NDArray[np.int32]  # target token of each source token, -1 if unmapped
    # For `cover`: the same for the rest of each token after its first n bytes, at offsets_V1[v] + n; else empty.
    rest_ids_B: NDArray[np.int32]
    buffer_B: NDArray[np.uint8]
    offsets_V1: NDArray[np.int64]

    @classmethod
    def of_tokens(cls, target_ids_V: NDArray[np.int32]) -> "VocabularyMap":
        """A map of whole tokens."""
        return cls(
            target_ids_V=target_ids_V,
            rest_ids_B=np.zeros(0, np.int32),
            buffer_B=np.zeros(0, np.uint8),
            offsets_V1=np.zeros(len(target_ids_V) + 1, np.int64),
        )


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """One source's part and its maps to the target's part."""

    topk_ids_UK: NDArray[Any]  # source ids, by falling probability
    topk_probs_UK: NDArray[np.float32]
    gold_ids_U: NDArray[np.int64]  # the next source token; undefined at a segment's last position
    gold_logprob_U: NDArray[np.float64]  # its log-probability; NaN at a segment's last position
    vocabulary: VocabularyMap | None  # None for the identity
    position_T: NDArray[np.int32]  # position map, -1 where the source has no distribution
    ahead_T: NDArray[np.uint16] | None = None  # bytes that the target position has read beyond the source position; None for none

    @cached_property
    def read_logprob_U(self) -> NDArray[np.float64]:
        """The source's log-probability of the part's whole text up to each position."""
        return np.concatenate([[0.0], np.cumsum(np.nan_to_num(self.gold_logprob_U, nan=0.0))[:-1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A source's distributions at each target position, over the target's vocabulary.

    mapped + merged + lost + tail is 1 at positions where the source has a distribution, and each is 0 elsewhere.
    """

    ids_TC: NDArray[np.int32]  # the first n_T entries of each row, all different, in any order
    probs_TC: NDArray[np.float32]
    n_T: NDArray[np.int32]
    is_aligned_T: NDArray[np.bool_]  # the source has a distribution here
    mapped_T: NDArray[np.float32]  # first mass on its target token
    merged_T: NDArray[np.float32]  # mass added to a target token that already had some
    lost_T: NDArray[np.float32]  # mass of tokens that are unmapped, that end unexpectedly, or that the anchor displaces
    tail_T: NDArray[np.float32]  # mass outside the stored entries
    gold_logprob_T: NDArray[np.float32]  # of the next target token; -inf without mass, NaN if unaligned or without a next token


def project(source: SourcePart, *, gold_ids_T: NDArray[np.int64], gold_anchor: bool, collisions: Collisions = "sum") -> Projection:
    """Project a source's distributions onto the target's positions and tokens.

    Args:
        source: the source.
        gold_ids_T: the target token after each position, -1 at the last of a segment.
        gold_anchor: give the next target token the source's probability of its text; see the module.
        collisions: how to combine several source tokens on one target token: their `sum`, or only the `first`, most probable one (the
            published code of FuseLLM).
    """
    n, k = len(source.position_T), source.topk_ids_UK.shape[1]
    vocabulary = source.vocabulary or VocabularyMap.of_tokens(np.arange(int(source.topk_ids_UK.max(initial=0)) + 1, dtype=np.int32))
    capacity = k + (1 if source.ahead_T is None else ROOM)  # one more for the next token
    projection = Projection(
        ids_TC=np.zeros((n, capacity), np.int32),
        probs_TC=np.zeros((n, capacity), np.float32),
        n_T=np.zeros(n, np.int32),
        is_aligned_T=np.zeros(n, np.bool_),
        mapped_T=np.zeros(n, np.float32),
        merged_T=np.zeros(n, np.float32),
        lost_T=np.zeros(n, np.float32),
        tail_T=np.zeros(n, np.float32),
        gold_logprob_T=np.full(n, np.nan, np.float32),
    )
    filled = Filled(**{name: getattr(projection, name) for name in Filled._fields})
    entries = Entries(
        topk_ids_UK=source.topk_ids_UK,
        topk_probs_UK=source.topk_probs_UK,
        gold_ids_U=source.gold_ids_U,
        gold_probs_U=np.exp(source.gold_logprob_U),
        read_logprob_U=source.read_logprob_U,
    )
    if source.ahead_T is None:
        _project(entries, source.position_T, gold_ids_T, vocabulary.target_ids_V, gold_anchor, collisions == "first", filled)
    else:
        assert gold_anchor
        assert collisions == "sum"
        places = Places(position_T=source.position_T, ahead_T=source.ahead_T, gold_ids_T=gold_ids_T)
        project_cover(entries, places, Pieces(**{name: getattr(vocabulary, name) for name in Pieces._fields}), filled)
    _look_up(projection.ids_TC, projection.probs_TC, projection.n_T, projection.is_aligned_T, gold_ids_T, projection.gold_logprob_T)
    return projection


def mix(
    projections: Sequence[Projection], *, weights_NT: NDArray[np.float64], top_k: int, gold_ids_T: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """The weighted sum of several sources' distributions at each position.

    Args:
        projections: one per source, with the same positions.
        weights_NT: weight of each source at each position; they sum to at most 1.
        top_k: entries to keep.
        gold_ids_T: the token after each position, -1 at the last of a segment. It is always kept if it has any mass.

    Returns:
        ids [T, top_k] and probabilities [T, top_k] of the most probable tokens by falling probability (ties by rising id; 0 beyond the
        last token), and the mass outside them [T].
    """
    ids_TK = np.zeros((weights_NT.shape[1], top_k), np.int32)
    probs_TK = np.zeros((weights_NT.shape[1], top_k))
    _mix(
        List([projection.ids_TC for projection in projections]),
        List([projection.probs_TC for projection in projections]),
        List([projection.n_T for projection in projections]),
        weights_NT, gold_ids_T, sum(projection.ids_TC.shape[1] for projection in projections), ids_TK, probs_TK,
    )  # fmt: skip
    return ids_TK, probs_TK, np.maximum(1 - probs_TK.sum(axis=1), 0)


@njit(cache=True)
def _project(
    entries: Entries, position_T: Any, gold_ids_T: Any, target_ids_V: Any, gold_anchor: bool, only_first: bool, filled: Filled
) -> None:
    ids_TC, probs_TC, n_T, is_aligned_T, mapped_T, merged_T, lost_T, tail_T = filled
    topk_ids_UK, topk_probs_UK, read_logprob_U = entries.topk_ids_UK, entries.topk_probs_UK, entries.read_logprob_U
    for t in range(len(position_T)):
        u, gold_id = position_T[t], gold_ids_T[t]
        if u < 0:
            continue
        is_anchored = gold_anchor and gold_id >= 0 and position_T[t + 1] > u
        along = np.exp(read_logprob_U[position_T[t + 1]] - read_logprob_U[u]) if is_anchored else 0.0
        ids_C, probs_C = ids_TC[t], probs_TC[t]
        n, mapped, merged, lost = 0, 0.0, 0.0, 0.0
        for entry in range(topk_ids_UK.shape[1]):
            source_id, mass = topk_ids_UK[u, entry], topk_probs_UK[u, entry]
            if mass <= 0:
                continue
            target_id = target_ids_V[source_id] if source_id < len(target_ids_V) else -1
            if is_anchored and source_id == entries.gold_ids_U[u]:
                lost += max(0.0, mass - along)
            elif target_id < 0 or (is_anchored and target_id == gold_id) or (only_first and _is_among(target_id, ids_C, n)):
                lost += mass
            elif put(ids_C, probs_C, n, target_id, mass):
                n, mapped = n + 1, mapped + mass
            else:
                merged += mass
        if is_anchored:  # no other mass is on that token
            ids_C[n], probs_C[n] = gold_id, along
            n, mapped = n + 1, mapped + along
        is_aligned_T[t], n_T[t], mapped_T[t], merged_T[t], lost_T[t] = True, n, mapped, merged, lost
        tail_T[t] = max(0.0, 1.0 - mapped - merged - lost)


@njit(cache=True, inline="always")
def _is_among(token_id: int, ids_C: Any, n: int) -> bool:
    for c in range(n):  # noqa: SIM110  # the compiler knows no generators
        if ids_C[c] == token_id:
            return True
    return False


@njit(cache=True)
def _look_up(ids_TC: Any, probs_TC: Any, n_T: Any, is_aligned_T: Any, gold_ids_T: Any, gold_logprob_T: Any) -> None:
    for t in range(len(n_T)):
        if gold_ids_T[t] < 0 or not is_aligned_T[t]:
            continue
        gold_logprob_T[t] = -np.inf
        for c in range(n_T[t]):
            if ids_TC[t, c] == gold_ids_T[t]:
                gold_logprob_T[t] = np.log(probs_TC[t, c])


@njit(cache=True)
def _mix(
    ids_NTC: Any, probs_NTC: Any, n_NT: Any, weights_NT: Any, gold_ids_T: Any, capacity: int, ids_TK: Any, probs_TK: Any
) -> None:  # fmt: skip
    ids_C, probs_C = np.zeros(capacity, np.int32), np.zeros(capacity)
    for t in range(weights_NT.shape[1]):
        n = 0
        for source in range(len(ids_NTC)):
            weight = weights_NT[source, t]
            if weight <= 0:
                continue
            ids_TC, probs_TC, n_before = ids_NTC[source], probs_NTC[source], n
            if weight == 1 and n == 0:  # all others have no weight
                _top(ids_TC[t], probs_TC[t], n_NT[source][t], gold_ids_T[t], ids_TK[t], probs_TK[t])
                break
            for c in range(n_NT[source][t]):
                token_id, mass = ids_TC[t, c], weight * probs_TC[t, c]
                place = 0 if n_before else n  # a projection has each token once
                while place < n and ids_C[place] != token_id:
                    place += 1
                if place == n:
                    ids_C[n], probs_C[n] = token_id, 0.0
                    n += 1
                probs_C[place] += mass
        _top(ids_C, probs_C, n, gold_ids_T[t], ids_TK[t], probs_TK[t])


@njit(cache=True)
def _top(ids_C: Any, probs_C: Any, n: int, gold_id: int, ids_K: Any, probs_K: Any) -> None:
    k, filled, gold_prob, has_gold = len(ids_K), 0, 0.0, False
    for c in range(n):
        token_id, prob = ids_C[c], probs_C[c]
        if prob <= 0:
            continue
        if token_id == gold_id:
            gold_prob = prob
        # Insertion by falling probability, ties by rising id; entries beyond the end are dropped.
        place = filled
        while place > 0 and (probs_K[place - 1] < prob or (probs_K[place - 1] == prob and ids_K[place - 1] > token_id)):
            if place < k:
                probs_K[place], ids_K[place] = probs_K[place - 1], ids_K[place - 1]
            place -= 1
        if place < k:
            probs_K[place], ids_K[place] = prob, token_id
            filled = min(filled + 1, k)
    for entry in range(filled):
        has_gold = has_gold or ids_K[entry] == gold_id
    if gold_prob > 0 and not has_gold:
        ids_K[k - 1], probs_K[k - 1] = gold_id, gold_prob
