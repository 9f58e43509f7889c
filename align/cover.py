"""The compiled loop of `cover`: a source's distribution at every target position, even inside its own tokens.

The target's tokens are read one after another, with a set of readings: source tokens that the text may be inside of, each with its
number of bytes read, and the boundary, where the source's own tokens of the text end too. Their masses sum to 1. At a position, the mass
of the boundary is spread over the source's entries there, and each reading predicts how the text continues: with the first piece, in the
target's vocabulary, of the rest of its token. Then the target's next token is read: readings that predicted it are kept, with their masses
divided by that token's probability, and the others are dropped. So the source's `internationally` still predicts `ly` after the target's
`international`, although the source itself does not predict it after its own token `international`.

It is the marginal over covers (Vieira et al. 2024, arXiv 2412.03719) within the stored entries. The path, the source's own next token in
the text, is always among the entries, with its stored probability. If the target's next token extends beyond the path, that token's mass is
the source's probability of the text up to its end, and the rest of the path's mass stays where the map puts it. So the product of the
probabilities of the text's target tokens is at least the source's probability of the text.

Axes: T target positions, U source positions, V source vocabulary, B bytes of its tokens, K stored entries, C entries of a projection,
H readings.
"""

from typing import Any

import numpy as np
from numba import njit

KEPT = 8  # readings besides the path that are kept when a token is read; more are lost (at most 6 occur in benchmarks/quality.py)
ROOM = KEPT + 3  # besides the stored entries: the readings, the path, the token after it, and the target's next token


@njit(cache=True)
def project_cover(
    topk_ids_UK: Any, topk_probs_UK: Any, gold_ids_U: Any, gold_probs_U: Any, read_logprob_U: Any, position_T: Any, ahead_T: Any,
    target_ids_V: Any, rest_ids_B: Any, buffer_B: Any, offsets_V1: Any, gold_ids_T: Any,
    ids_TC: Any, probs_TC: Any, n_T: Any, is_aligned_T: Any, mapped_T: Any, merged_T: Any, lost_T: Any, tail_T: Any,
) -> None:  # fmt: skip
    """Fill the arrays of a `Projection`, whose capacity C is at least K + ROOM."""
    n_most = topk_ids_UK.shape[1] + ROOM
    tokens_H, read_H, mass_H = np.zeros(n_most, np.int64), np.zeros(n_most, np.int64), np.zeros(n_most)
    says_H = np.zeros(n_most, np.int64)  # the target token with which each continues
    n, path, boundary, ended = 0, -1, 0.0, 0.0
    starts = True  # nothing has been read before this position
    for t in range(len(position_T)):
        u, ahead = position_T[t], ahead_T[t]
        if u < 0:
            starts = True
            continue
        if starts and ahead == 0:
            n, boundary, ended = 0, 1.0, 0.0
        elif starts:
            total = _mass_of_beginning(
                topk_ids_UK[u], topk_probs_UK[u], gold_ids_U[u], gold_probs_U[u], ahead, buffer_B, offsets_V1
            )  # fmt: skip
            if not total > 0:
                continue
            boundary, ended = 0.0, 0.0
            n, path = _begin(
                topk_ids_UK[u], topk_probs_UK[u], gold_ids_U[u], gold_probs_U[u], ahead, buffer_B, offsets_V1, 0, 1 / total,
                tokens_H, read_H, mass_H,
            )  # fmt: skip
        if ahead == 0:
            n, path, tail_T[t] = _spread(
                topk_ids_UK[u], topk_probs_UK[u], gold_ids_U[u], gold_probs_U[u], n, boundary, tokens_H, read_H, mass_H
            )  # fmt: skip
        is_aligned_T[t] = True

        # The source's probability of the text from here to the end of the target's next token.
        gold_id, along, beginning = gold_ids_T[t], 0.0, 1.0
        starts = gold_id < 0 or path < 0 or position_T[t + 1] < u
        if not starts:
            there, beyond = position_T[t + 1], ahead_T[t + 1]
            along = mass_H[path]
            if there > u:
                if there > u + 1:
                    along *= np.exp(read_logprob_U[there] - read_logprob_U[u + 1])
                if beyond > 0:
                    beginning = _mass_of_beginning(
                        topk_ids_UK[there], topk_probs_UK[there], gold_ids_U[there], gold_probs_U[there], beyond, buffer_B, offsets_V1
                    )  # fmt: skip
                    along *= min(1.0, beginning)
            starts = not along > 0
        ids_C, probs_C = ids_TC[t], probs_TC[t]
        n_entries, mapped, merged, lost = 0, 0.0, 0.0, ended
        for h in range(n):
            mass = mass_H[h]
            if h == path and not starts:
                if put(ids_C, probs_C, n_entries, gold_id, along):
                    n_entries, mapped = n_entries + 1, mapped + along
                else:
                    merged += along
                mass -= along
            target_id = _mapped(tokens_H[h], read_H[h], target_ids_V, rest_ids_B, offsets_V1)
            says_H[h] = target_id
            if mass <= 0:
                continue
            if target_id < 0:
                lost += mass
            elif put(ids_C, probs_C, n_entries, target_id, mass):
                n_entries, mapped = n_entries + 1, mapped + mass
            else:
                merged += mass
        n_T[t], mapped_T[t], merged_T[t], lost_T[t] = n_entries, mapped, merged, lost
        if starts:
            continue

        # Read the target's next token.
        n_read = np.int64(beyond) - np.int64(ahead)
        for step in range(u, there):
            n_read += offsets_V1[gold_ids_U[step] + 1] - offsets_V1[gold_ids_U[step]]
        total, boundary, ended, kept, path_token, path_mass = along, 0.0, 0.0, 0, tokens_H[path], mass_H[path]
        for h in range(n):
            if h == path or says_H[h] != gold_id:
                continue
            total += mass_H[h]
            left = offsets_V1[tokens_H[h] + 1] - offsets_V1[tokens_H[h]] - read_H[h] - n_read
            if left > 0 and kept < KEPT:
                tokens_H[kept], read_H[kept], mass_H[kept] = tokens_H[h], read_H[h] + n_read, mass_H[h]
                kept += 1
            elif left == 0 and beyond == 0:
                boundary += mass_H[h]  # other tokens with the same text; assume that the text continues as after the source's own token
            else:
                ended += mass_H[h]
        n, path = kept, -1
        if there == u:
            tokens_H[n], read_H[n], mass_H[n] = path_token, beyond, path_mass
            n, path = n + 1, n
        elif beyond == 0:
            boundary += along
        else:
            n, path = _begin(
                topk_ids_UK[there], topk_probs_UK[there], gold_ids_U[there], gold_probs_U[there], beyond, buffer_B, offsets_V1, n,
                along / beginning, tokens_H, read_H, mass_H,
            )  # fmt: skip
        for h in range(n):
            mass_H[h] /= total
        boundary, ended = boundary / total, ended / total


@njit(cache=True)
def _spread(
    topk_ids_K: Any, topk_probs_K: Any, gold_id: int, gold_prob: float, n: int, boundary: float, tokens_H: Any, read_H: Any, mass_H: Any
) -> Any:
    """Add the entries of a source position; return the number of readings, the index of the path, and the mass outside the entries."""
    path, tail = -1, boundary
    for entry in range(len(topk_ids_K)):
        prob = topk_probs_K[entry]
        if topk_ids_K[entry] == gold_id and not np.isnan(gold_prob):
            path, prob = n, gold_prob
        tokens_H[n], read_H[n], mass_H[n] = topk_ids_K[entry], 0, boundary * prob
        tail -= mass_H[n]
        n += 1
    if path < 0 and not np.isnan(gold_prob):
        tokens_H[n], read_H[n], mass_H[n] = gold_id, 0, boundary * gold_prob
        tail -= mass_H[n]
        n, path = n + 1, n
    return n, path, max(0.0, tail)


@njit(cache=True)
def _begin(
    topk_ids_K: Any, topk_probs_K: Any, gold_id: int, gold_prob: float, n_bytes: int, buffer_B: Any, offsets_V1: Any, n: int,
    scale: float, tokens_H: Any, read_H: Any, mass_H: Any,
) -> Any:  # fmt: skip
    """Add the entries of a source position that begin like the next token; return the number of readings and the index of the path."""
    for entry in range(len(topk_ids_K)):
        token = topk_ids_K[entry]
        if token != gold_id and _begin_equal(token, gold_id, n_bytes, buffer_B, offsets_V1):
            tokens_H[n], read_H[n], mass_H[n] = token, n_bytes, scale * topk_probs_K[entry]
            n += 1
    tokens_H[n], read_H[n], mass_H[n] = gold_id, n_bytes, scale * gold_prob
    return n + 1, n


@njit(cache=True)
def _mass_of_beginning(
    topk_ids_K: Any, topk_probs_K: Any, gold_id: int, gold_prob: float, n_bytes: int, buffer_B: Any, offsets_V1: Any
) -> float:
    """The mass of the entries that `_begin` adds, unscaled; NaN if there is no next token."""
    total = gold_prob
    for entry in range(len(topk_ids_K)):
        if topk_ids_K[entry] != gold_id and _begin_equal(topk_ids_K[entry], gold_id, n_bytes, buffer_B, offsets_V1):
            total += topk_probs_K[entry]
    return total


@njit(cache=True, inline="always")
def _begin_equal(token: int, other: int, n_bytes: int, buffer_B: Any, offsets_V1: Any) -> bool:
    if token + 1 >= len(offsets_V1) or offsets_V1[token + 1] - offsets_V1[token] < n_bytes:
        return False
    a, b = offsets_V1[token], offsets_V1[other]
    return bool(np.all(buffer_B[a : a + n_bytes] == buffer_B[b : b + n_bytes]))


@njit(cache=True, inline="always")
def _mapped(token: int, read: int, target_ids_V: Any, rest_ids_B: Any, offsets_V1: Any) -> int:
    """The target token with which the text of a source token continues after its first bytes; -1 if it is unmapped."""
    if token >= len(target_ids_V):
        return -1
    if read == 0:
        return target_ids_V[token]
    place = offsets_V1[token] + read
    return rest_ids_B[place] if place < offsets_V1[token + 1] else -1


@njit(cache=True, inline="always")
def put(ids_C: Any, probs_C: Any, n: int, token_id: int, mass: float) -> bool:
    """Add mass to a target token among the first n entries, or as a new entry; return whether it is new."""
    for c in range(n):
        if ids_C[c] == token_id:
            probs_C[c] += mass
            return False
    ids_C[n], probs_C[n] = token_id, mass
    return True
