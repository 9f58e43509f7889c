"""Fusion: the sources' aligned distributions become one target distribution per position, stored as `targets/<name>`.

Fusion is a function of stored distributions, alignments and parameters; it is materialised so that the trainer reads one sequential stream.

Arrays of a part (T positions and S segments of the target's part, K entries; position j speaks of token j + 1 of its segment):

    token_ids_T, segment_offsets, doc_id_S, segment_S     the target's tokens
    topk_ids_TK, topk_logprobs_TK     the fused distribution, by falling probability; -inf where there are fewer than K entries
    tail_logprob_T                    log of the mass outside these entries
    source_T                          which source the distribution is from, by its place in the attribute `sources`; 255 for a mean
    source_S                          which source `mince` chose for the segment; 255 for `avgce`
    lost_mass_S                       mean over the segment's positions of the mass that the vocabulary map lost
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..store.arrays import Encoding
from ..store.dataset import Dataset, PartContent
from .config import AlignmentConfig, FusionConfig
from .positions import match_segments
from .projection import NO_GOLD, SourcePart, VocabularyMap, mix, project
from .rests import with_rests
from .vocabulary import target_ids

SEVERAL = 255  # in source_T and source_S: a mean of several sources


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionSource:
    """One source of a fusion. The target's own start is one, without maps: its alignment is the identity."""

    name: str
    distributions: Dataset
    alignment: Dataset | None = None
    vocabulary_map: Dataset | None = None


def fusion_identity(
    sources: list[FusionSource], *, alignment: AlignmentConfig, fusion: FusionConfig, top_k: int, codec: Encoding = "f16"
) -> dict[str, Any]:
    """What determines fused targets. The order of the sources does, since it breaks ties; their names do not."""
    return {
        "stage": "targets/1",
        "sources": [
            [dataset.fingerprint for dataset in (source.distributions, source.alignment, source.vocabulary_map) if dataset]
            for source in sources
        ],
        "gold_anchor": alignment.gold_anchor,
        **({} if alignment.collisions == "sum" else {"collisions": alignment.collisions}),
        **fusion.model_dump(include={"method", "unit", "metric"}),
        "top_k": top_k,
        **({} if codec == "f16" else {"codec": codec}),  # targets from before there was a choice have no such key
    }


def segment_costs(
    nll_S: NDArray[np.float64], *, n_scored_S: NDArray[Any], scored_bytes_S: NDArray[Any], metric: str
) -> NDArray[np.float64]:
    """How badly a model predicts each segment: bits per byte, or nats per token; inf where it predicts nothing."""
    amount_S = scored_bytes_S * np.log(2) if metric == "bpb" else n_scored_S
    return np.divide(nll_S, amount_S, out=np.full(len(nll_S), np.inf), where=amount_S > 0)


def source_weights(costs_NS: NDArray[np.float64], *, method: str) -> NDArray[np.float64]:
    """Weight of each of N sources in each segment (FuseLLM, arXiv 2401.10491, section 3.3).

    `mince`: 1 for the source with the lowest cost, the first of equals. `avgce`: softmax over the sources of exp(-cost). A source with
    infinite cost has weight 0; where all have, the first one has weight 1.
    """
    known_NS = np.isfinite(costs_NS)
    best_S = np.argmin(costs_NS, axis=0)
    one_hot_NS = (np.arange(len(costs_NS))[:, None] == best_S).astype(np.float64)
    if method == "mince":
        return one_hot_NS
    weights_NS = np.where(known_NS, np.exp(np.exp(-np.where(known_NS, costs_NS, 0))), 0)
    return np.where(known_NS.any(axis=0), weights_NS / np.maximum(weights_NS.sum(axis=0), 1e-300), one_hot_NS)


class FusionStage:
    """Fuses the parts of several sources. Pickles as its arguments."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        sources: list[FusionSource],
        alignment: AlignmentConfig,
        fusion: FusionConfig,
        top_k: int,
        codec: Encoding = "f16",
    ) -> None:
        """`sources[0]` is the target's own start, whose tokens and positions the result has."""
        assert sources[0].alignment is None
        self.dataset, self.sources, self.alignment, self.fusion = dataset, sources, alignment, fusion
        self.top_k, self.codec = top_k, codec

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_vocabularies"}

    @cached_property
    def _vocabularies(self) -> list[VocabularyMap | None]:
        return [self._vocabulary(source.vocabulary_map) if source.vocabulary_map else None for source in self.sources]

    def _vocabulary(self, dataset: Dataset) -> VocabularyMap:
        table = dataset.table(0)
        return with_rests(table) if self.alignment.positions == "cover" else VocabularyMap.of_tokens(target_ids(table))

    def compute(self, part: int) -> PartContent:
        """Fuse one part."""
        own = self.sources[0].distributions
        token_ids_T, offsets, doc_id_S, segment_S = own.read(part, "token_ids_T", "segment_offsets", "doc_id_S", "segment_S")
        lengths_S = np.diff(offsets)
        gold_ids_T = _gold_ids(token_ids_T, offsets=offsets)
        weights_NS = source_weights(self._costs(part, doc_id_S=doc_id_S, segment_S=segment_S), method=self.fusion.method)
        parts = [self._source_part(index, part=part, n_positions=len(token_ids_T)) for index in range(len(self.sources))]
        alignment = self.alignment
        projections = [
            project(source, gold_ids_T=gold_ids_T, gold_anchor=alignment.gold_anchor, collisions=alignment.collisions) for source in parts
        ]
        weights_NT = np.repeat(weights_NS, lengths_S, axis=1) * [projection.is_aligned_T for projection in projections]
        total_T = weights_NT.sum(axis=0)
        weights_NT[0, total_T == 0] = 1  # no chosen source speaks here: the target's own start does
        weights_NT /= np.where(total_T == 0, 1, total_T)
        ids_TK, probs_TK, tail_T = mix(projections, weights_NT=weights_NT, top_k=self.top_k, gold_ids_T=gold_ids_T)

        used_NT = weights_NT > 0
        source_T = np.where(used_NT.sum(axis=0) == 1, used_NT.argmax(axis=0), SEVERAL).astype(np.uint8)
        lost_T = (weights_NT * [projection.lost_T for projection in projections]).sum(axis=0)
        lost_before = np.concatenate([[0], np.cumsum(lost_T)])
        with np.errstate(divide="ignore"):
            arrays = {
                "token_ids_T": token_ids_T,
                "segment_offsets": offsets,
                "doc_id_S": doc_id_S,
                "segment_S": segment_S,
                "topk_ids_TK": ids_TK.astype(parts[0].topk_ids_UK.dtype),
                "topk_logprobs_TK": np.log(probs_TK),
                "tail_logprob_T": np.log(tail_T),
                "source_T": source_T,
                "source_S": (weights_NS.argmax(axis=0) if self.fusion.method == "mince" else np.full(len(lengths_S), SEVERAL)).astype(
                    np.uint8
                ),
                "lost_mass_S": (np.diff(lost_before[offsets]) / np.maximum(lengths_S, 1)).astype(np.float32),
            }
        counts = {"segments": len(lengths_S), "tokens": len(token_ids_T)}
        counts |= {f"from_{source.name}": int((source_T == index).sum()) for index, source in enumerate(self.sources)}
        return PartContent(
            data=arrays,
            counts=counts,
            attributes={"sources": [source.name for source in self.sources]},
            encodings={"topk_logprobs_TK": self.codec, "tail_logprob_T": self.codec},
        )

    def _costs(self, part: int, *, doc_id_S: NDArray[Any], segment_S: NDArray[Any]) -> NDArray[np.float64]:
        costs_NS = np.full((len(self.sources), len(doc_id_S)), np.inf)
        for index, source in enumerate(self.sources):
            source_doc_id_S, source_segment_S, nll_S, n_scored_S, scored_bytes_S = source.distributions.read(
                part, "doc_id_S", "segment_S", "nll_S", "n_scored_S", "scored_bytes_S"
            )
            place_S = match_segments(
                source_doc_id_S=source_doc_id_S, source_segment_S=source_segment_S, target_doc_id_S=doc_id_S, target_segment_S=segment_S
            )
            costs_S = segment_costs(nll_S, n_scored_S=n_scored_S, scored_bytes_S=scored_bytes_S, metric=self.fusion.metric)
            costs_NS[index, place_S >= 0] = costs_S[place_S[place_S >= 0]]
        return costs_NS

    def _source_part(self, index: int, *, part: int, n_positions: int) -> SourcePart:
        source = self.sources[index]
        token_ids_U, topk_ids_UK, topk_logprobs_UK, gold_logprob_U = source.distributions.read(
            part, "token_ids_T", "topk_ids_TK", "topk_logprobs_TK", "gold_logprob_T"
        )
        position_T, ahead_T = np.arange(n_positions, dtype=np.int32), None
        if source.alignment and self.alignment.positions == "cover":
            position_T, ahead_T = source.alignment.read(part, "source_position_T", "ahead_T")
        elif source.alignment:
            (position_T,) = source.alignment.read(part, "source_position_T")
        return SourcePart(
            topk_ids_UK=topk_ids_UK,
            topk_probs_UK=np.exp(topk_logprobs_UK.astype(np.float32)),
            gold_ids_U=np.append(token_ids_U[1:], 0).astype(np.int64),
            gold_logprob_U=gold_logprob_U.astype(np.float64),
            vocabulary=self._vocabularies[index],
            position_T=position_T,
            ahead_T=ahead_T,
        )


def _gold_ids(token_ids_T: NDArray[Any], *, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The token that follows each position, -1 at the last position of a segment."""
    gold_ids_T = np.append(token_ids_T[1:], 0).astype(np.int64)
    gold_ids_T[offsets[1:][np.diff(offsets) > 0] - 1] = NO_GOLD
    return gold_ids_T
