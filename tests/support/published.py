"""What the published code of FuseLLM (arXiv 2401.10491) does with one segment, for parity: from our pieces, its results.

At a position that it cannot align it puts all mass on one token. Logits go through unchanged, and of several source tokens on one target
token the first counts.

Axes: T target positions, U source positions, K entries of a source position, V source vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from fuseline.align.dtw import Match, Matches, Side, Spellings, agreeing_positions, warp
from fuseline.align.projection import SourcePart, VocabularyMap, project
from numpy.typing import NDArray

OneHot = Literal["published", "next"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The published alignment of one segment: its path, and each target position's aligned entries."""

    matches: Matches
    ids: list[list[int]]
    logits: list[list[float]]


def align_published(
    source_ids_U: NDArray[np.integer],
    *,
    topk_ids_UK: NDArray[np.integer],
    topk_logits_UK: NDArray[np.floating],
    target_ids_T: NDArray[np.integer],
    spellings: Spellings,
    match: Match,
    agreeing_ids_V: NDArray[np.int32],
    entry_ids_V: NDArray[np.int32],
    one_hot: OneHot = "published",
) -> Reference:
    """Align one segment as the published code does.

    Args:
        source_ids_U: the source's tokens.
        topk_ids_UK: entries of its distributions, by falling logit.
        topk_logits_UK: their logits.
        target_ids_T: the target's tokens.
        spellings: of both vocabularies.
        match: which matched tokens agree, `em` or `mined`.
        agreeing_ids_V: the map after which tokens agree in `mined`.
        entry_ids_V: the map of the entries: of spellings for EM, of the nearest for MinED; -1 where unmapped.
        one_hot: which token an unaligned position has, with logit 1: itself, as published, which is off by one; or the `next` one.
            The last position has no next one, and then no entries.
    """
    source = Side(token_ids_T=source_ids_U, offsets=np.array([0, len(source_ids_U)]), bos_id=None)
    target = Side(token_ids_T=target_ids_T, offsets=np.array([0, len(target_ids_T)]), bos_id=None)
    matches = warp(source, target=target, source_segment_of_S=np.array([0]), spellings=spellings)
    position_T = agreeing_positions(matches, source=source, target=target, spellings=spellings, match=match, target_ids_V=agreeing_ids_V)
    # `project` speaks of probabilities and may not drop any: entries are handed to it as falling numbers, which it gives back by place.
    k = topk_ids_UK.shape[1]
    places_UK = np.broadcast_to(np.arange(k, 0, -1, dtype=np.float32), topk_ids_UK.shape)
    projection = project(
        SourcePart(
            topk_ids_UK=topk_ids_UK,
            topk_probs_UK=np.ascontiguousarray(places_UK),
            gold_ids_U=np.zeros(len(source_ids_U), np.int64),
            gold_logprob_U=np.full(len(source_ids_U), np.nan),
            vocabulary=VocabularyMap.of_tokens(entry_ids_V),
            position_T=position_T,
        ),
        gold_ids_T=np.full(len(target_ids_T), -1, np.int64),
        gold_anchor=False,
        collisions="first",
    )
    ids: list[list[int]] = []
    logits: list[list[float]] = []
    following = [*target_ids_T[1:].tolist(), None]
    for t, (u, n) in enumerate(zip(position_T.tolist(), projection.n_T.tolist(), strict=True)):
        if u >= 0:
            ids.append(projection.ids_TC[t, :n].tolist())
            logits.append(topk_logits_UK[u][k - projection.probs_TC[t, :n].astype(int)].tolist())
            continue
        token_id = int(target_ids_T[t]) if one_hot == "published" else following[t]
        ids.append([] if token_id is None else [token_id])
        logits.append([] if token_id is None else [1.0])
    return Reference(matches=matches, ids=ids, logits=logits)
