"""The contribution of each source to each segment of fused targets: small arrays beside the targets, for SQL queries on who won and why.

Axes: N sources, S segments of a part, T its positions, C entries of a projection. Arrays are float32; NaN where undefined:

    cost_SN             cost of the source in the unit of the segment (`weights`); with unit `token`, the mean
    weight_SN           its weight by the method, as a mean over the segment's positions
    share_SN            its weight in the fused result, as a mean over the segment's positions: including weight from silent sources
    n_spoken_SN         positions at which it has a distribution (uint32)
    mapped_SN, merged_SN, lost_SN, tail_SN     what became of its probability on the way to the target's tokens (`projection`): means over
                        these positions, which sum to 1
    agreement_SN        share of these positions at which its most probable target token is that of the target's own start
    nll_SN              nats of the segment's text under the source, token by token in its own vocabulary: before the map
    gold_nll_SN         nats of the next target tokens, at these positions, under the mapped distribution; like nll_SN, for conversations
                        only of the assistant's tokens
    n_gold_SN           number of these tokens: those with any probability (uint32)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .projection import Projection

NAMES = (
    "cost_SN", "weight_SN", "share_SN", "n_spoken_SN", "mapped_SN", "merged_SN", "lost_SN", "tail_SN", "agreement_SN", "nll_SN",
    "gold_nll_SN", "n_gold_SN",
)  # fmt: skip


def contributions(
    projections: Sequence[Projection],
    *,
    offsets: NDArray[np.int64],
    costs_NT: NDArray[np.float64],
    weights_NT: NDArray[np.float64],
    shares_NT: NDArray[np.float64],
    nll_NS: NDArray[np.float64],
    is_label_T: NDArray[np.bool_] | None = None,
) -> dict[str, NDArray[Any]]:
    """The arrays above, by name.

    Args:
        projections: one per source; the first is the target's own start.
        offsets: where the target's segments start, and the end of the last.
        costs_NT: cost of each source at each position, inf where unknown.
        weights_NT: weights by the method.
        shares_NT: weights in the fused result.
        nll_NS: nats of each segment under each source, NaN if it has not read the segment.
        is_label_T: positions before the tokens that count in these nats; None for all.
    """
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in NAMES}
    everywhere_T = np.ones(offsets[-1], np.bool_)
    own_favourite_T = favourites(projections[0])
    for projection, cost_T, weight_T, share_T, nll_S in zip(projections, costs_NT, weights_NT, shares_NT, nll_NS, strict=True):
        is_aligned_T = projection.is_aligned_T
        has_gold_T = np.isfinite(projection.gold_logprob_T)
        if is_label_T is not None:
            has_gold_T &= is_label_T
        favourite_T = favourites(projection)
        has_favourites_T = is_aligned_T & (favourite_T >= 0) & (own_favourite_T >= 0)
        found = {
            "cost_SN": means(cost_T, where_T=np.isfinite(cost_T), offsets=offsets),
            "weight_SN": means(weight_T, where_T=everywhere_T, offsets=offsets),
            "share_SN": means(share_T, where_T=everywhere_T, offsets=offsets),
            "n_spoken_SN": sums(is_aligned_T, offsets=offsets).astype(np.uint32),
            "mapped_SN": means(projection.mapped_T, where_T=is_aligned_T, offsets=offsets),
            "merged_SN": means(projection.merged_T, where_T=is_aligned_T, offsets=offsets),
            "lost_SN": means(projection.lost_T, where_T=is_aligned_T, offsets=offsets),
            "tail_SN": means(projection.tail_T, where_T=is_aligned_T, offsets=offsets),
            "agreement_SN": means(favourite_T == own_favourite_T, where_T=has_favourites_T, offsets=offsets),
            "nll_SN": nll_S.astype(np.float32),
            "gold_nll_SN": sums(np.where(has_gold_T, -projection.gold_logprob_T, 0), offsets=offsets).astype(np.float32),
            "n_gold_SN": sums(has_gold_T, offsets=offsets).astype(np.uint32),
        }
        for name, column_S in found.items():
            columns[name].append(column_S)
    return {name: np.stack(found, axis=1) for name, found in columns.items()}


def favourites(projection: Projection) -> NDArray[np.int32]:
    """The most probable token of each position, [T], the lowest id on ties; -1 if there is none."""
    ids_T = np.full(len(projection.n_T), -1, np.int32)
    _favourites(projection.ids_TC, projection.probs_TC, projection.n_T, ids_T)
    return ids_T


def sums(values_T: NDArray[Any], *, offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum over each segment, [S]."""
    return _sums(values_T, offsets)


def means(values_T: NDArray[Any], *, where_T: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean over some positions of each segment, [S]; NaN if there are none."""
    return _means(values_T, where_T, offsets)


@njit(cache=True)
def _favourites(ids_TC: Any, probs_TC: Any, n_T: Any, found_T: Any) -> None:
    for t in range(len(n_T)):
        highest = np.float32(0)
        for c in range(n_T[t]):
            prob, token_id = probs_TC[t, c], ids_TC[t, c]
            if prob > highest or (prob == highest and prob > 0 and token_id < found_T[t]):
                highest, found_T[t] = prob, token_id


@njit(cache=True)
def _sums(values_T: Any, offsets: Any) -> Any:
    found_S = np.zeros(len(offsets) - 1)
    for s in range(len(found_S)):
        for t in range(offsets[s], offsets[s + 1]):
            found_S[s] += values_T[t]
    return found_S


@njit(cache=True)
def _means(values_T: Any, where_T: Any, offsets: Any) -> Any:
    found_S = np.full(len(offsets) - 1, np.nan, np.float32)
    for s in range(len(found_S)):
        total, n = 0.0, 0
        for t in range(offsets[s], offsets[s + 1]):
            if where_T[t]:
                total += values_T[t]
                n += 1
        if n:
            found_S[s] = total / n
    return found_S
