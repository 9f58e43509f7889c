"""Fusion: the sources' aligned distributions become one target distribution per position, stored as `targets/<name>`.

Fusion is a function of stored distributions, alignments and parameters. It is stored so that the trainer reads one sequential stream.

Arrays of a part (T positions and S segments of the target's part, K entries, N sources; position j predicts token j + 1 of its segment):

    token_ids_T, segment_offsets, doc_id_S, segment_S     the target's tokens
    label_mask_T                      for conversations: whether the next token is the assistant's, and trained on (bool)
    topk_ids_TK, topk_logprobs_TK     the fused distribution, by falling probability; -inf beyond the entries if there are fewer than K
    tail_logprob_T                    log of the mass outside these entries
    source_T                          source of the distribution, as an index into the attribute `sources`; 255 for a mean,
                                      254 for all mass on one token (the attribute `one_hot` says which)
    source_S                          the source with all the weight in the segment; 255 if several have weight
    lost_mass_S                       mean over the segment's positions of the mass that the vocabulary map lost
    gold_nll_S, n_gold_S              nats of the text's tokens under the fused distributions, and how many have any probability; for
                                      conversations only of the assistant's tokens
    …_SN                              the contribution of each source to each segment (`contributions`)

The weights of the sources, and the units of text, are in `weights`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..store.arrays import Encoding
from ..store.dataset import Dataset, PartContent
from ..store.targets import ONE_HOT, SEVERAL
from .config import AlignmentConfig, FusionConfig
from .contributions import contributions, means, sums
from .positions import match_segments
from .projection import NO_GOLD, Projection, mix
from .sources import FusionSource, gold_ids
from .weights import fixed_weights, position_costs, source_weights, speaking_weights, unit_costs, units

_ONE_HOT_TOKEN = {"target": "", "one_hot": "next token", "one_hot_published": "this token"}  # no model's name has a space


def fusion_choices(
    names: Sequence[str], *, alignment: AlignmentConfig, fusion: FusionConfig, top_k: int, codec: Encoding = "f16"
) -> dict[str, Any]:
    """The part of the identity of fused targets that the recipe alone determines; `names` are those of the sources, in order.

    A setting without effect is None: the metric if each token is a unit, the pack length without packs, and weights if the method computes
    them. Only the ratio of weights counts.
    """
    is_fixed = fusion.method == "fixed"
    return {
        "stage": "targets/2",
        **alignment.model_dump(include={"gold_anchor", "collisions"}),
        **fusion.model_dump(include={"method", "unit", "fallback"}),
        "metric": None if fusion.unit == "token" else fusion.metric,  # with method `fixed` too: `cost_SN` is in it
        "pack_length": fusion.pack_length if fusion.unit == "pack" else None,
        "weights": _scaled(fusion.weights, names=names) if is_fixed else None,
        "domain_weights": {domain: _scaled(of, names=names) for domain, of in fusion.domain_weights.items()} if is_fixed else None,
        "top_k": top_k,
        "codec": codec,
    }


def fusion_identity(
    sources: list[FusionSource], *, alignment: AlignmentConfig, fusion: FusionConfig, top_k: int, codec: Encoding = "f16"
) -> dict[str, Any]:
    """What determines fused targets. This includes the order of the sources, which breaks ties, but not their names."""
    names = [source.name for source in sources]
    return fusion_choices(names, alignment=alignment, fusion=fusion, top_k=top_k, codec=codec) | {
        "sources": [
            [dataset.fingerprint for dataset in (source.distributions, source.alignment, source.vocabulary_map) if dataset]
            for source in sources
        ],
    }


def _scaled(weights: Mapping[str, float], *, names: Sequence[str]) -> list[float]:
    """Weights in the order of the sources, which sum to 1."""
    total = sum(weights.get(name, 0.0) for name in names)
    return [weights.get(name, 0.0) / total for name in names]


class FusionStage:
    """Fuses the parts of several sources. It pickles as its arguments."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        sources: list[FusionSource],
        alignment: AlignmentConfig,
        fusion: FusionConfig,
        top_k: int,
        codec: Encoding = "f16",
        corpus: Dataset | None = None,
    ) -> None:
        """`sources[0]` is the target's own start; the result has its tokens and positions.

        Weights by domain need `corpus`, and unit `pack` needs `fusion.pack_length`.
        """
        assert sources[0].alignment is None
        assert fusion.unit != "pack" or fusion.pack_length
        self.dataset, self.sources, self.alignment, self.fusion = dataset, sources, alignment, fusion
        self.top_k, self.codec, self.corpus = top_k, codec, corpus

    def compute(self, part: int) -> PartContent:
        """Fuse one part."""
        own = self.sources[0].distributions
        token_ids_T, offsets, doc_id_S, segment_S = own.read(part, "token_ids_T", "segment_offsets", "doc_id_S", "segment_S")
        gold_ids_T = gold_ids(token_ids_T, offsets=offsets)
        how: dict[str, Any] = self.alignment.model_dump(include={"gold_anchor", "collisions"})
        projections = [source.project(part, gold_ids_T=gold_ids_T, **how) for source in self.sources]
        likelihoods = [_Likelihood(source.distributions, part, doc_id_S=doc_id_S, segment_S=segment_S) for source in self.sources]
        costs_NT = self._costs(projections, likelihoods, offsets=offsets, doc_id_S=doc_id_S)
        weights_NT = self._weights(costs_NT, part=part, offsets=offsets, doc_id_S=doc_id_S)
        shares_NT, is_silent_T = speaking_weights(weights_NT, is_aligned_NT=np.array([each.is_aligned_T for each in projections]))
        stand_in = self._fall_back(shares_NT, is_silent_T, token_ids_T=token_ids_T, gold_ids_T=gold_ids_T)
        ids_TK, probs_TK, tail_T = mix(
            [*projections, stand_in],
            weights_NT=np.vstack([shares_NT, stand_in.is_aligned_T]),
            top_k=self.top_k,
            gold_ids_T=gold_ids_T,
        )
        gold_prob_T = _probabilities_of(gold_ids_T, ids_TK, probs_TK)
        is_label_T = own.arrays(part).read_if_there("label_mask_T")
        if is_label_T is not None:
            gold_prob_T[~is_label_T] = 0
        used_NT = shares_NT > 0
        source_T = np.where(used_NT.sum(axis=0) == 1, used_NT.argmax(axis=0), SEVERAL)
        source_T[stand_in.is_aligned_T] = ONE_HOT
        lost_T = (shares_NT * [each.lost_T for each in projections]).sum(axis=0)
        with np.errstate(divide="ignore"):
            arrays = {
                "token_ids_T": token_ids_T,
                "segment_offsets": offsets,
                "doc_id_S": doc_id_S,
                "segment_S": segment_S,
                "topk_ids_TK": ids_TK.astype(own.arrays(part).read("topk_ids_TK", 0, 0).dtype),
                "topk_logprobs_TK": np.log(probs_TK),
                "tail_logprob_T": np.log(tail_T),
                "source_T": source_T.astype(np.uint8),
                "source_S": _only_sources(weights_NT, offsets=offsets),
                "lost_mass_S": np.nan_to_num(means(lost_T, where_T=np.ones(len(lost_T), np.bool_), offsets=offsets)),
                "gold_nll_S": sums(-np.log(np.where(gold_prob_T > 0, gold_prob_T, 1)), offsets=offsets).astype(np.float32),
                "n_gold_S": sums(gold_prob_T > 0, offsets=offsets).astype(np.uint32),
            }
        if is_label_T is not None:
            arrays["label_mask_T"] = is_label_T
        nll_NS = np.array([each.nll_S for each in likelihoods])
        arrays |= contributions(
            projections,
            offsets=offsets,
            costs_NT=costs_NT,
            weights_NT=weights_NT,
            shares_NT=shares_NT,
            nll_NS=nll_NS,
            is_label_T=is_label_T,
        )
        counts = {"segments": len(doc_id_S), "tokens": len(token_ids_T)}
        counts |= {f"from_{source.name}": int((source_T == index).sum()) for index, source in enumerate(self.sources)}
        return PartContent(
            data=arrays,
            counts=counts,
            attributes={"sources": [source.name for source in self.sources], "one_hot": _ONE_HOT_TOKEN[self.fusion.fallback]},
            encodings={"topk_logprobs_TK": self.codec, "tail_logprob_T": self.codec},
        )

    def _costs(
        self, projections: Sequence[Projection], likelihoods: "Sequence[_Likelihood]", *, offsets: NDArray[np.int64], doc_id_S: NDArray[Any]
    ) -> NDArray[np.float64]:
        """The cost of each source at each position: of the position, or of its unit."""
        if self.fusion.unit == "token":
            return np.array([position_costs(projection, method=self.fusion.method) for projection in projections])
        lengths_S = np.diff(offsets)
        unit_S = units(self.fusion.unit, doc_id_S=doc_id_S, lengths_S=lengths_S, pack_length=self.fusion.pack_length or 0)
        costs_NX = [each.costs(self.fusion, unit_S=unit_S) for each in likelihoods]
        return np.repeat(np.array(costs_NX)[:, unit_S], lengths_S, axis=1)

    def _weights(
        self, costs_NT: NDArray[np.float64], *, part: int, offsets: NDArray[np.int64], doc_id_S: NDArray[Any]
    ) -> NDArray[np.float64]:
        if self.fusion.method != "fixed":
            return source_weights(costs_NT, method=self.fusion.method)
        domains: dict[int, str | None] = {}
        if self.fusion.domain_weights:
            assert self.corpus is not None
            domains = dict(self.corpus.table(part).select("doc_id", "domain").iter_rows())
        weights_NS = fixed_weights(
            self.fusion.weights,
            domain_weights=self.fusion.domain_weights,
            names=[source.name for source in self.sources],
            domain_S=[domains.get(doc_id) for doc_id in doc_id_S.tolist()],
        )
        return np.repeat(weights_NS, np.diff(offsets), axis=1)

    def _fall_back(
        self, shares_NT: NDArray[np.float64], is_silent_T: NDArray[np.bool_], *, token_ids_T: NDArray[Any], gold_ids_T: NDArray[np.int64]
    ) -> Projection:
        """Where no chosen source has a distribution, use the target's own start, or put all mass on one token.

        The reference code puts it on the token at the position, although the distribution is for the next one (FuseAI `packing`); FuseChat
        corrects that by shifting. The last position of a segment has no next token: there the target's own start is used.
        """
        ids_T = token_ids_T.astype(np.int32) if self.fusion.fallback == "one_hot_published" else gold_ids_T.astype(np.int32)
        is_one_hot_T = is_silent_T & (self.fusion.fallback != "target") & (ids_T != NO_GOLD)
        shares_NT[0, is_silent_T & ~is_one_hot_T] = 1
        return _one_hot(ids_T, where_T=is_one_hot_T)


class _Likelihood:
    """How well one source predicts each segment of the target's part, S, and how certain it is."""

    def __init__(self, distributions: Dataset, part: int, *, doc_id_S: NDArray[Any], segment_S: NDArray[Any]) -> None:
        self._distributions, self._part = distributions, part
        source_doc_id_S, source_segment_S, self._nll, self._n_scored, self._scored_bytes = distributions.read(
            part, "doc_id_S", "segment_S", "nll_S", "n_scored_S", "scored_bytes_S"
        )
        self._place_S = match_segments(
            source_doc_id_S=source_doc_id_S, source_segment_S=source_segment_S, target_doc_id_S=doc_id_S, target_segment_S=segment_S
        )

    @property
    def nll_S(self) -> NDArray[np.float64]:
        """Nats of each segment; NaN if the source left it out."""
        return self._at_segments(self._nll, missing=np.nan)

    def costs(self, fusion: FusionConfig, *, unit_S: NDArray[np.int64]) -> NDArray[np.float64]:
        """The source's cost of each unit by the fusion's method and metric."""
        nats = self._surety(fusion.method) if fusion.method in ("entropy", "confidence") else self._nll
        return unit_costs(
            self._at_segments(nats, missing=0),
            has_read_S=self._place_S >= 0,
            n_scored_S=self._at_segments(self._n_scored, missing=0),
            scored_bytes_S=self._at_segments(self._scored_bytes, missing=0),
            unit_S=unit_S,
            metric=fusion.metric,
        )

    def _at_segments(self, values: NDArray[Any], *, missing: float) -> NDArray[np.float64]:
        return np.append(values.astype(np.float64), missing)[self._place_S]  # -1 (no segment) selects the last value

    def _surety(self, method: str) -> NDArray[np.float64]:
        """Entropy or min-entropy over the scored tokens of each of the source's segments."""
        offsets, n_scored = self._distributions.read(self._part, "segment_offsets", "n_scored_S")
        if method == "entropy":
            (nats_U,) = self._distributions.read(self._part, "entropy_T")
        else:
            (logprobs_UK,) = self._distributions.read(self._part, "topk_logprobs_TK")
            nats_U = -logprobs_UK.astype(np.float64).max(axis=1)
        is_label_U = self._distributions.arrays(self._part).read_if_there("label_mask_T")
        if is_label_U is not None:
            return sums(np.where(is_label_U, nats_U, 0), offsets=offsets)
        before = np.concatenate([[0.0], np.cumsum(nats_U, dtype=np.float64)])
        last = np.maximum(offsets[1:] - 1, 0)  # no next token there; the scored tokens are the last ones
        return before[last] - before[np.maximum(last - n_scored.astype(np.int64), 0)]


@njit(cache=True)
def _probabilities_of(gold_ids_T: Any, ids_TK: Any, probs_TK: Any) -> Any:
    found_T = np.zeros(len(ids_TK))
    for t in range(len(ids_TK)):
        for k in range(ids_TK.shape[1]):
            if ids_TK[t, k] == gold_ids_T[t]:
                found_T[t] += probs_TK[t, k]
    return found_T


def _only_sources(weights_NT: NDArray[np.float64], *, offsets: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The source with all the weight in each segment, or SEVERAL if there are several."""
    has_weight_NS = np.array([sums(weight_T > 0, offsets=offsets) > 0 for weight_T in weights_NT])
    return np.where(has_weight_NS.sum(axis=0) == 1, has_weight_NS.argmax(axis=0), SEVERAL).astype(np.uint8)


def _one_hot(ids_T: NDArray[np.int32], *, where_T: NDArray[np.bool_]) -> Projection:
    """An artificial source with all mass on one token, at some positions."""
    mass_T, nothing_T = where_T.astype(np.float32), np.zeros(len(ids_T), np.float32)
    return Projection(
        ids_TC=np.maximum(ids_T, 0)[:, None],
        probs_TC=mass_T[:, None],
        n_T=where_T.astype(np.int32),
        is_aligned_T=where_T,
        mapped_T=mass_T,
        merged_T=nothing_T,
        lost_T=nothing_T,
        tail_T=nothing_T,
        gold_logprob_T=nothing_T,
    )
