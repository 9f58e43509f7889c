"""How much each source counts in a fusion: the cost of each source in each unit of text, and the resulting weights.

`mince`        all weight to the source with the lowest negative log-likelihood of the text (FuseLLM, arXiv 2401.10491, section 3.3)
`avgce`        softmax over the sources of exp(-cost), with the same cost (the same section)
`entropy`      softmax over the sources of -H, H the entropy of the source's distributions: more certain sources count more (multi-teacher
               distillation weighted by entropy, Cheng et al., ISCAS 2024)
`confidence`   the same with the min-entropy -log max p instead of H; for one token the weights are then proportional to the probabilities
               of the sources' most probable tokens
`fixed`        the recipe's weights

A cost is in bits per byte or nats per token of the whole unit; if the unit is one token, in nats. A source that left out some of a unit's
text is not compared on that unit, because the missing text might be the difficult part.

Axes: N sources, X units, S segments of a part, T its positions, C entries of a projection.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .projection import Projection


def units(unit: str, *, doc_id_S: NDArray[Any], lengths_S: NDArray[np.int64], pack_length: int) -> NDArray[np.int64]:
    """The unit of each segment, counted from 0.

    Args:
        unit: `segment`, `document` or `pack`.
        doc_id_S: document of each segment, ascending.
        lengths_S: target tokens of each segment.
        pack_length: most tokens of a pack. A pack takes consecutive segments while they fit; a longer segment is a separate pack.
    """
    if unit == "segment":
        return np.arange(len(lengths_S))
    if unit == "document":
        return np.unique(doc_id_S, return_inverse=True)[1].astype(np.int64)
    return _packs(np.asarray(lengths_S, np.int64), pack_length)


@njit(cache=True)
def _packs(lengths_S: Any, pack_length: int) -> Any:
    pack_S = np.zeros(len(lengths_S), np.int64)
    pack, filled = 0, 0
    for s in range(len(lengths_S)):
        if filled > 0 and filled + lengths_S[s] > pack_length:
            pack, filled = pack + 1, 0
        pack_S[s] = pack
        filled += lengths_S[s]
    return pack_S


def unit_costs(
    nats_S: NDArray[np.float64],
    *,
    has_read_S: NDArray[np.bool_],
    n_scored_S: NDArray[Any],
    scored_bytes_S: NDArray[Any],
    unit_S: NDArray[np.int64],
    metric: str,
) -> NDArray[np.float64]:
    """The cost of each unit of text for a source, [X]: bits per byte (`bpb`) or nats per token (`ce`).

    It is inf if the source has not read the whole unit, or predicts nothing in it.

    Args:
        nats_S: total nats of each segment.
        has_read_S: whether the source has read the segment; if not, nats, tokens and bytes are 0.
        n_scored_S: number of the source's scored tokens.
        scored_bytes_S: the bytes of these tokens.
        unit_S: the unit of each segment (`units`).
        metric: `bpb` or `ce`.
    """
    amount_S = scored_bytes_S * np.log(2) if metric == "bpb" else n_scored_S
    n_units = int(unit_S.max(initial=-1)) + 1
    nats_X, amount_X, left_out_X = (
        np.bincount(unit_S, weights=values_S, minlength=n_units) for values_S in (nats_S, amount_S, ~has_read_S)
    )
    return np.divide(nats_X, amount_X, out=np.full(n_units, np.inf), where=(amount_X > 0) & (left_out_X == 0))


def position_costs(projection: Projection, *, method: str) -> NDArray[np.float64]:
    """The cost of each position for a source, in nats, [T]; inf where it has no distribution.

    For `mince` and `avgce` it is the negative log-probability of the next target token: the same bytes for every source, so bits per byte
    and nats per token give the same order. For `entropy` and `confidence` it is that of the projected distribution, in which everything
    outside its entries counts as one event.
    """
    if method in ("mince", "avgce", "fixed"):
        return np.where(np.isfinite(projection.gold_logprob_T), -projection.gold_logprob_T.astype(np.float64), np.inf)
    probs_TC = _entries(projection)
    if method == "confidence":
        return np.where(projection.is_aligned_T, -np.log(np.maximum(probs_TC.max(axis=1, initial=0), 1e-300)), np.inf)
    rest_T = np.maximum(1 - probs_TC.sum(axis=1), 0)
    return np.where(projection.is_aligned_T, _surprise(probs_TC).sum(axis=1) + _surprise(rest_T), np.inf)


def _entries(projection: Projection) -> NDArray[np.float64]:
    """Probabilities of a projection's entries; 0 beyond them."""
    is_entry_TC = np.arange(projection.probs_TC.shape[1]) < projection.n_T[:, None]
    return np.where(is_entry_TC, projection.probs_TC, 0).astype(np.float64)


def _surprise(probs: NDArray[np.float64]) -> NDArray[np.float64]:
    return -probs * np.log(np.where(probs > 0, probs, 1))


def source_weights(costs_NX: NDArray[np.float64], *, method: str) -> NDArray[np.float64]:
    """Weight of each source in each unit, by its cost there.

    On equal costs `mince` takes the first. A source with infinite cost has weight 0; if all have infinite cost, the first has weight 1.
    """
    known_NX = np.isfinite(costs_NX)
    best_NX = (np.arange(len(costs_NX))[:, None] == np.argmin(costs_NX, axis=0)).astype(np.float64)
    if method == "mince":
        return best_NX
    lowest_X = costs_NX.min(axis=0)
    lowest_X = np.where(np.isfinite(lowest_X), lowest_X, 0)
    costs_NX = np.where(known_NX, costs_NX, lowest_X)
    scores_NX = np.exp(-costs_NX) if method == "avgce" else lowest_X - costs_NX  # shifted, so that the softmax does not underflow
    weights_NX = np.where(known_NX, np.exp(scores_NX), 0)
    return np.where(known_NX.any(axis=0), weights_NX / np.maximum(weights_NX.sum(axis=0), 1e-300), best_NX)


def fixed_weights(
    weights: Mapping[str, float], *, domain_weights: Mapping[str, Mapping[str, float]], names: Sequence[str], domain_S: Sequence[str | None]
) -> NDArray[np.float64]:
    """The recipe's weight of each source (by name) in each segment (by its document's domain), scaled to a sum of 1, [N, S]."""
    chosen = [domain_weights.get(domain or "", weights) for domain in domain_S]
    weights_NS = np.array([[of_domain.get(name, 0.0) for of_domain in chosen] for name in names]).reshape(len(names), len(chosen))
    return weights_NS / weights_NS.sum(axis=0)


def speaking_weights(weights_NT: NDArray[np.float64], *, is_aligned_NT: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The weights where only some sources have a distribution: they get the weights of the others, in proportion.

    Returns:
        weights [N, T], and the positions without a weighted source that has a distribution [T]; the weights there are 0.
    """
    weights_NT = np.where(is_aligned_NT, weights_NT, 0)
    total_T = weights_NT.sum(axis=0)
    return weights_NT / np.where(total_T == 0, 1, total_T), total_T == 0
