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

from typing import Any, NamedTuple

import numpy as np
from numba import njit

KEPT = 8  # readings besides the path that are kept when a token is read; more are lost (at most 6 occur in benchmarks/quality.py)
ROOM = KEPT + 3  # besides the stored entries: the readings, the path, the token after it, and the target's next token


class Entries(NamedTuple):
    """A source's stored distributions."""

    topk_ids_UK: Any
    topk_probs_UK: Any
    gold_ids_U: Any
    gold_probs_U: Any
    read_logprob_U: Any  # log-probability of the part's whole text up to each position


class Places(NamedTuple):
    """Where each target position lies in the source, and the target's next token there."""

    position_T: Any
    ahead_T: Any
    gold_ids_T: Any


class Pieces(NamedTuple):
    """The vocabulary map: the target token of each source token, and of each rest of one."""

    target_ids_V: Any
    rest_ids_B: Any
    buffer_B: Any
    offsets_V1: Any


class Filled(NamedTuple):
    """The arrays of a `Projection` that are filled."""

    ids_TC: Any
    probs_TC: Any
    n_T: Any
    is_aligned_T: Any
    mapped_T: Any
    merged_T: Any
    lost_T: Any
    tail_T: Any


class Readings(NamedTuple):
    """Source tokens that the text may be inside of."""

    tokens_H: Any
    read_H: Any  # bytes of each that are read
    mass_H: Any
    says_H: Any  # the target token with which each continues


@njit(cache=True)
def project_cover(entries: Entries, places: Places, pieces: Pieces, filled: Filled) -> None:
    """Fill the arrays of a `Projection`, whose capacity C is at least K + ROOM."""
    n_most = entries.topk_ids_UK.shape[1] + ROOM
    readings = Readings(np.zeros(n_most, np.int64), np.zeros(n_most, np.int64), np.zeros(n_most), np.zeros(n_most, np.int64))
    n, path, boundary, ended = 0, -1, 0.0, 0.0
    starts = True  # nothing has been read before this position
    for t in range(len(places.position_T)):
        u, ahead = places.position_T[t], places.ahead_T[t]
        if u < 0:
            starts = True
            continue
        if starts and ahead == 0:
            n, boundary, ended = 0, 1.0, 0.0
        elif starts:
            total = _mass_of_beginning(entries, u, ahead, pieces)
            if not total > 0:
                continue
            boundary, ended = 0.0, 0.0
            n, path = _begin(entries, u, ahead, pieces, 0, 1 / total, readings)
        if ahead == 0:
            n, path, filled.tail_T[t] = _spread(entries, u, n, boundary, readings)
        filled.is_aligned_T[t] = True
        along, beginning = 0.0, 1.0
        starts = places.gold_ids_T[t] < 0 or path < 0 or places.position_T[t + 1] < u
        if not starts:
            along, beginning = _along(entries, places, pieces, t, readings.mass_H[path])
            starts = not along > 0
        _say(t, n, -1 if starts else path, along, ended, readings, pieces, places, filled)
        if not starts:
            n, path, boundary, ended = _read(t, n, path, along, beginning, entries, places, pieces, readings)


@njit(cache=True)
def _along(entries: Entries, places: Places, pieces: Pieces, t: int, mass: float) -> Any:
    """What the source gives the text from position t to the end of the target's next token, and the mass of the last beginning in it."""
    u, there, beyond = places.position_T[t], places.position_T[t + 1], places.ahead_T[t + 1]
    along, beginning = mass, 1.0
    if there > u:
        if there > u + 1:
            along *= np.exp(entries.read_logprob_U[there] - entries.read_logprob_U[u + 1])
        if beyond > 0:
            beginning = _mass_of_beginning(entries, there, beyond, pieces)
            along *= min(1.0, beginning)
    return along, beginning


@njit(cache=True)
def _say(t: int, n: int, path: int, along: float, ended: float, readings: Readings, pieces: Pieces, places: Places, filled: Filled) -> None:
    """Write the distribution at position t: what each reading continues with. The path, if there is one, says the next token."""
    ids_C, probs_C = filled.ids_TC[t], filled.probs_TC[t]
    n_entries, mapped, merged, lost = 0, 0.0, 0.0, ended
    for h in range(n):
        mass = readings.mass_H[h]
        if h == path:
            if put(ids_C, probs_C, n_entries, places.gold_ids_T[t], along):
                n_entries, mapped = n_entries + 1, mapped + along
            else:
                merged += along
            mass -= along
        target_id = _mapped(readings.tokens_H[h], readings.read_H[h], pieces)
        readings.says_H[h] = target_id
        if mass <= 0:
            continue
        if target_id < 0:
            lost += mass
        elif put(ids_C, probs_C, n_entries, target_id, mass):
            n_entries, mapped = n_entries + 1, mapped + mass
        else:
            merged += mass
    filled.n_T[t], filled.mapped_T[t], filled.merged_T[t], filled.lost_T[t] = n_entries, mapped, merged, lost


@njit(cache=True)
def _read(
    t: int, n: int, path: int, along: float, beginning: float, entries: Entries, places: Places, pieces: Pieces, readings: Readings
) -> Any:
    """Read the target's next token: keep the readings that predicted it. Returns their number, the path, and the other masses."""
    tokens_H, read_H, mass_H, says_H = readings
    u, ahead, there, beyond = places.position_T[t], places.ahead_T[t], places.position_T[t + 1], places.ahead_T[t + 1]
    offsets_V1, gold_id = pieces.offsets_V1, places.gold_ids_T[t]
    n_read = np.int64(beyond) - np.int64(ahead)
    for step in range(u, there):
        n_read += offsets_V1[entries.gold_ids_U[step] + 1] - offsets_V1[entries.gold_ids_U[step]]
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
            boundary += mass_H[h]  # other tokens of the same text, which is taken to go on as after the source's own
        else:
            ended += mass_H[h]
    n, path = kept, -1
    if there == u:
        tokens_H[n], read_H[n], mass_H[n] = path_token, beyond, path_mass
        n, path = n + 1, n
    elif beyond == 0:
        boundary += along
    else:
        n, path = _begin(entries, there, beyond, pieces, n, along / beginning, readings)
    for h in range(n):
        mass_H[h] /= total
    return n, path, boundary / total, ended / total


@njit(cache=True)
def _spread(entries: Entries, u: int, n: int, boundary: float, readings: Readings) -> Any:
    """Add the entries of a source position. Returns how many readings there are, which is the path, and the mass outside the entries."""
    tokens_H, read_H, mass_H, _ = readings
    gold_id, gold_prob = entries.gold_ids_U[u], entries.gold_probs_U[u]
    path, tail = -1, boundary
    for entry in range(entries.topk_ids_UK.shape[1]):
        prob = entries.topk_probs_UK[u, entry]
        if entries.topk_ids_UK[u, entry] == gold_id and not np.isnan(gold_prob):
            path, prob = n, gold_prob
        tokens_H[n], read_H[n], mass_H[n] = entries.topk_ids_UK[u, entry], 0, boundary * prob
        tail -= mass_H[n]
        n += 1
    if path < 0 and not np.isnan(gold_prob):
        tokens_H[n], read_H[n], mass_H[n] = gold_id, 0, boundary * gold_prob
        tail -= mass_H[n]
        n, path = n + 1, n
    return n, path, max(0.0, tail)


@njit(cache=True)
def _begin(entries: Entries, u: int, n_bytes: int, pieces: Pieces, n: int, scale: float, readings: Readings) -> Any:
    """Add the entries of a source position that begin as the next token. Returns how many readings there are, and which is the path."""
    tokens_H, read_H, mass_H, _ = readings
    gold_id = entries.gold_ids_U[u]
    for entry in range(entries.topk_ids_UK.shape[1]):
        token = entries.topk_ids_UK[u, entry]
        if token != gold_id and _begin_equal(token, gold_id, n_bytes, pieces.buffer_B, pieces.offsets_V1):
            tokens_H[n], read_H[n], mass_H[n] = token, n_bytes, scale * entries.topk_probs_UK[u, entry]
            n += 1
    tokens_H[n], read_H[n], mass_H[n] = gold_id, n_bytes, scale * entries.gold_probs_U[u]
    return n + 1, n


@njit(cache=True)
def _mass_of_beginning(entries: Entries, u: int, n_bytes: int, pieces: Pieces) -> float:
    """The mass of the entries that `_begin` adds, unscaled; NaN if nothing follows."""
    gold_id, total = entries.gold_ids_U[u], entries.gold_probs_U[u]
    for entry in range(entries.topk_ids_UK.shape[1]):
        token = entries.topk_ids_UK[u, entry]
        if token != gold_id and _begin_equal(token, gold_id, n_bytes, pieces.buffer_B, pieces.offsets_V1):
            total += entries.topk_probs_UK[u, entry]
    return total


@njit(cache=True, inline="always")
def _begin_equal(token: int, other: int, n_bytes: int, buffer_B: Any, offsets_V1: Any) -> bool:
    if token + 1 >= len(offsets_V1) or offsets_V1[token + 1] - offsets_V1[token] < n_bytes:
        return False
    a, b = offsets_V1[token], offsets_V1[other]
    return bool(np.all(buffer_B[a : a + n_bytes] == buffer_B[b : b + n_bytes]))


@njit(cache=True, inline="always")
def _mapped(token: int, read: int, pieces: Pieces) -> int:
    """The target token with which the text of a source token continues after its first bytes; -1 if the map has none."""
    if token >= len(pieces.target_ids_V):
        return -1
    if read == 0:
        return pieces.target_ids_V[token]
    place = pieces.offsets_V1[token] + read
    return pieces.rest_ids_B[place] if place < pieces.offsets_V1[token + 1] else -1


@njit(cache=True, inline="always")
def put(ids_C: Any, probs_C: Any, n: int, token_id: int, mass: float) -> bool:
    """Add mass to a target token among the first n entries, or as a new entry; return whether it is new."""
    for c in range(n):
        if ids_C[c] == token_id:
            probs_C[c] += mass
            return False
    ids_C[n], probs_C[n] = token_id, mass
    return True
