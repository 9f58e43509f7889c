"""Projects a source's distributions into the target's vocabulary and positions, and mixes several of them.

Compiled loops over positions: a position has a dozen entries, too few for array operations and too many positions for Python.

Three things say what a source means at a target position. The position map says which source position speaks there, and how many bytes
the target has read beyond it (`cover`). The vocabulary map says with which target token the text of a source token goes on. And the text
itself is known: what the source gave it, token by token, is stored. So:

- Where the target is ahead of the source position, inside the source token that follows, only the entries that agree with what the target
  has read since count, and they are conditioned on that (Vieira et al. 2024, arXiv 2412.03719, on covers; here over the stored entries).
- Gold anchor: the source token that follows in the text is always an entry, with its stored probability, though it be outside the top k.
  What leads on along the text as far as the target's next token goes is that token's; the rest of it stays where the map puts it.

With both, the probabilities of the text's target tokens multiply to no less than what the source gave the text.

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

NO_GOLD = -1
Collisions = Literal["sum", "first"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyMap:
    """Where a source's tokens lie in the target's vocabulary."""

    target_ids_V: NDArray[np.int32]  # target token of each source token, -1 where unmapped
    # For `cover`: the same for what is left of each token after its first n bytes, at offsets_V1[v] + n; else empty.
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
    """One source's part and how it lies to the target's."""

    topk_ids_UK: NDArray[Any]  # source ids, by falling probability
    topk_probs_UK: NDArray[np.float32]
    gold_ids_U: NDArray[np.int64]  # the source token that follows; anything at a segment's last position
    gold_logprob_U: NDArray[np.float64]  # its log-probability; NaN at a segment's last position
    vocabulary: VocabularyMap | None  # None for the identity
    position_T: NDArray[np.int32]  # position map, -1 where the source says nothing
    ahead_T: NDArray[np.uint16] | None = None  # bytes that the target position has read beyond the source position; None for none

    @cached_property
    def read_logprob_U(self) -> NDArray[np.float64]:
        """Log-probability that the source gave to all the part's text up to each position."""
        return np.concatenate([[0.0], np.cumsum(np.nan_to_num(self.gold_logprob_U, nan=0.0))[:-1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A source's distributions at each target position, over the target's vocabulary.

    Of a position's probability, mapped + merged + lost + tail is 1 where the source speaks, and each is 0 elsewhere.
    """

    ids_TC: NDArray[np.int32]  # the first n_T entries of each row, all different, in no order
    probs_TC: NDArray[np.float32]
    n_T: NDArray[np.int32]
    is_aligned_T: NDArray[np.bool_]  # the source speaks here
    mapped_T: NDArray[np.float32]  # mass that came first to its target token
    merged_T: NDArray[np.float32]  # mass that joined a target token that had some
    lost_T: NDArray[np.float32]  # mass of tokens that the map does not know, or of colliding ones where only the first counts
    tail_T: NDArray[np.float32]  # mass outside the stored entries
    gold_logprob_T: NDArray[np.float32]  # of the target token that follows; -inf without mass, NaN where unaligned or nothing follows


def project(source: SourcePart, *, gold_ids_T: NDArray[np.int64], gold_anchor: bool, collisions: Collisions = "sum") -> Projection:
    """Bring a source's distributions to the target's positions and tokens.

    Args:
        source: the source.
        gold_ids_T: the target token that follows each position, -1 at the last of a segment.
        gold_anchor: give the text that follows exactly what the source gave it.
        collisions: what becomes of several source tokens on one target token: their `sum`, or only the `first`, most probable one (the
            published code of FuseLLM).
    """
    n, k = len(source.position_T), source.topk_ids_UK.shape[1]
    vocabulary = source.vocabulary or VocabularyMap.of_tokens(np.arange(int(source.topk_ids_UK.max(initial=0)) + 1, dtype=np.int32))
    ahead_T = np.zeros(n, np.uint16) if source.ahead_T is None else source.ahead_T
    projection = Projection(
        ids_TC=np.zeros((n, k + 2), np.int32),  # two more: the token that follows, and what the rest of it is mapped to
        probs_TC=np.zeros((n, k + 2), np.float32),
        n_T=np.zeros(n, np.int32),
        is_aligned_T=np.zeros(n, np.bool_),
        mapped_T=np.zeros(n, np.float32),
        merged_T=np.zeros(n, np.float32),
        lost_T=np.zeros(n, np.float32),
        tail_T=np.zeros(n, np.float32),
        gold_logprob_T=np.full(n, np.nan, np.float32),
    )
    _project(
        source.topk_ids_UK, source.topk_probs_UK, source.gold_ids_U, np.exp(source.gold_logprob_U), source.read_logprob_U,
        source.position_T, ahead_T, vocabulary.target_ids_V, vocabulary.rest_ids_B, vocabulary.buffer_B, vocabulary.offsets_V1,
        gold_ids_T, gold_anchor, collisions == "first",
        projection.ids_TC, projection.probs_TC, projection.n_T, projection.is_aligned_T, projection.mapped_T, projection.merged_T,
        projection.lost_T, projection.tail_T, projection.gold_logprob_T,
    )  # fmt: skip
    return projection


def mix(
    projections: Sequence[Projection], *, weights_NT: NDArray[np.float64], top_k: int, gold_ids_T: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """The weighted sum of several sources' distributions at each position.

    Args:
        projections: the sources', with the same positions.
        weights_NT: weight of each source at each position; at most 1 in sum.
        top_k: entries to keep.
        gold_ids_T: the token that follows each position, -1 at the last of a segment. Where it has any mass it is always kept.

    Returns:
        ids [T, top_k] and probabilities [T, top_k] of the most probable tokens by falling probability (ties by rising id; 0 where there are
        fewer), and the mass outside of them [T].
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
    topk_ids_UK: Any, topk_probs_UK: Any, gold_ids_U: Any, gold_probs_U: Any, read_logprob_U: Any, position_T: Any, ahead_T: Any,
    target_ids_V: Any, rest_ids_B: Any, buffer_B: Any, offsets_V1: Any, gold_ids_T: Any, gold_anchor: bool, only_first: bool,
    ids_TC: Any, probs_TC: Any, n_T: Any, is_aligned_T: Any, mapped_T: Any, merged_T: Any, lost_T: Any, tail_T: Any, gold_logprob_T: Any,
) -> None:  # fmt: skip
    capacity = topk_ids_UK.shape[1] + 1
    ids_K, probs_K = np.zeros(capacity, np.int64), np.zeros(capacity)  # the entries that count at the position at hand
    other_ids_K, other_probs_K = np.zeros(capacity, np.int64), np.zeros(capacity)
    n, last_u, last_ahead = 0, -1, 0
    for t in range(len(position_T)):
        u, ahead = position_T[t], ahead_T[t]
        if u < 0:
            last_u = -1
            continue
        total = 1.0
        if ahead > 0 and u == last_u:  # still inside the same source token: what agrees with the target token read since
            n, total = _keep_tokens(
                ids_K, probs_K, n, gold_ids_T[t - 1], gold_ids_U[u], last_ahead, target_ids_V, rest_ids_B, offsets_V1
            )  # fmt: skip
        else:
            n = _entries(topk_ids_UK[u], topk_probs_UK[u], gold_ids_U[u], gold_probs_U[u], gold_anchor, ids_K, probs_K)
            if ahead > 0:
                n, total = _keep_bytes(ids_K, probs_K, n, gold_ids_U[u], ahead, buffer_B, offsets_V1)
        last_u, last_ahead = u, ahead
        if total <= 0:  # no entry agrees with the text
            last_u = -1
            continue
        gold_id = gold_ids_T[t]
        along = -1.0  # probability of going on along the text as far as the target's next token goes, through source positions after this
        is_anchored = gold_anchor and gold_id >= 0 and position_T[t + 1] >= u
        if is_anchored and position_T[t + 1] > u:
            there, beyond = position_T[t + 1], ahead_T[t + 1]
            along = np.exp(read_logprob_U[there] - read_logprob_U[u]) / total
            if beyond > 0:
                n_there = _entries(
                    topk_ids_UK[there], topk_probs_UK[there], gold_ids_U[there], gold_probs_U[there], True, other_ids_K, other_probs_K
                )
                along *= _keep_bytes(other_ids_K, other_probs_K, n_there, gold_ids_U[there], beyond, buffer_B, offsets_V1)[1]
        is_aligned_T[t] = True
        stored = 0.0
        for entry in range(n):
            source_id, mass = ids_K[entry], probs_K[entry] / total
            if mass <= 0:
                continue
            stored += mass
            if is_anchored and source_id == gold_ids_U[u]:
                on_gold = mass if along < 0 else min(along, mass)
                _put(ids_TC, probs_TC, n_T, mapped_T, merged_T, lost_T, t, gold_id, on_gold, only_first)
                mass -= on_gold
                if mass <= 0:
                    continue
            target_id = _mapped(source_id, ahead, target_ids_V, rest_ids_B, offsets_V1)
            if target_id < 0:
                lost_T[t] += mass
            else:
                _put(ids_TC, probs_TC, n_T, mapped_T, merged_T, lost_T, t, target_id, mass, only_first)
        tail_T[t] = max(0.0, 1.0 - stored)
        if gold_id >= 0:
            gold_logprob_T[t] = -np.inf
            for c in range(n_T[t]):
                if ids_TC[t, c] == gold_id:
                    gold_logprob_T[t] = np.log(probs_TC[t, c])


@njit(cache=True)
def _entries(topk_ids_K: Any, topk_probs_K: Any, gold_id: int, gold_prob: float, gold_anchor: bool, ids_K: Any, probs_K: Any) -> int:
    """Copy a position's entries, and with them the token that follows; how many there are."""
    n = len(topk_ids_K)
    has_gold = not gold_anchor or np.isnan(gold_prob)
    for entry in range(n):
        ids_K[entry], probs_K[entry] = topk_ids_K[entry], topk_probs_K[entry]
        if not has_gold and topk_ids_K[entry] == gold_id:
            probs_K[entry] = gold_prob
            has_gold = True
    if has_gold:
        return n
    ids_K[n], probs_K[n] = gold_id, gold_prob
    return n + 1


@njit(cache=True)
def _keep_bytes(ids_K: Any, probs_K: Any, n: int, gold_id: int, ahead: int, buffer_B: Any, offsets_V1: Any) -> Any:
    """Keep the entries that begin with the first bytes of the token that follows; how many, and their mass."""
    start = offsets_V1[gold_id]
    kept, total = 0, 0.0
    for entry in range(n):
        token = ids_K[entry]
        if token + 1 >= len(offsets_V1) or offsets_V1[token + 1] - offsets_V1[token] < ahead:
            continue
        agrees = True
        for b in range(ahead):
            if buffer_B[offsets_V1[token] + b] != buffer_B[start + b]:
                agrees = False
                break
        if agrees:
            ids_K[kept], probs_K[kept] = token, probs_K[entry]
            total += probs_K[entry]
            kept += 1
    return kept, total


@njit(cache=True)
def _keep_tokens(
    ids_K: Any, probs_K: Any, n: int, read_id: int, gold_id: int, ahead: int, target_ids_V: Any, rest_ids_B: Any, offsets_V1: Any
) -> Any:
    """Keep the entries that go on with the target token that was read; how many, and their mass."""
    kept, total = 0, 0.0
    for entry in range(n):
        token = ids_K[entry]
        if token == gold_id or _mapped(token, ahead, target_ids_V, rest_ids_B, offsets_V1) == read_id:
            ids_K[kept], probs_K[kept] = token, probs_K[entry]
            total += probs_K[entry]
            kept += 1
    return kept, total


@njit(cache=True, inline="always")
def _mapped(token: int, ahead: int, target_ids_V: Any, rest_ids_B: Any, offsets_V1: Any) -> int:
    """The target token with which the text of a source token goes on after its first bytes; -1 where the map knows none."""
    if token >= len(target_ids_V):
        return -1
    if ahead == 0:
        return target_ids_V[token]
    place = offsets_V1[token] + ahead
    return rest_ids_B[place] if place < offsets_V1[token + 1] else -1


@njit(cache=True, inline="always")
def _put(
    ids_TC: Any, probs_TC: Any, n_T: Any, mapped_T: Any, merged_T: Any, lost_T: Any, t: int, token_id: int, mass: float, only_first: bool
) -> None:  # fmt: skip
    for c in range(n_T[t]):
        if ids_TC[t, c] == token_id:
            if only_first:
                lost_T[t] += mass
            else:
                probs_TC[t, c] += mass
                merged_T[t] += mass
            return
    ids_TC[t, n_T[t]] = token_id
    probs_TC[t, n_T[t]] = mass
    mapped_T[t] += mass
    n_T[t] += 1


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
            for c in range(n_NT[source][t]):
                token_id, mass = ids_NTC[source][t, c], weight * probs_NTC[source][t, c]
                place = 0
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
        # Insertion by falling probability, ties by rising id; what falls off the end is dropped.
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
