"""Ensembles of the outputs of several models: exact, without a common tokenizer, and from stored likelihoods alone.

The bytes at which tokens of all models end cut a text into chunks, and a model's probability of a chunk is the product of those of its
tokens. In one document, with M models and the chunks c_1, c_2, …, the ensemble says

    P(c_j) = Σ_m w_mj p_m(c_j),    w_mj ∝ Π_{i<j} p_m(c_i)^η

so it knows nothing of what follows. η = 0 is `uniform`, the mean of the models; η = 1 is `bayes`, the Bayesian mixture, which costs at most
log₂ M bits more per document than the best model. `oracle_document` and `oracle_token` are bounds of what choosing could reach: the model
with the highest probability of each document, or of each chunk.

A chunk is scored where all of its tokens are, under every model: not the first of a segment, which models without bos say nothing of.

Axes: M models, C chunks of a part, S segments, T tokens of one model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..store.dataset import Dataset, PartContent
from ..store.tokenizer import Tokenizer

Rule = Literal["uniform", "bayes", "oracle_document", "oracle_token"]
_ETA: dict[str, float] = {"uniform": 0.0, "bayes": 1.0}


def ensemble_identity(members: Sequence[Dataset], *, rule: Rule) -> dict[str, Any]:
    """What determines an ensemble: the likelihoods of its members."""
    return {"stage": "ensembles/1", "rule": rule, "members": [member.fingerprint for member in members]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One model's tokens of a part."""

    doc_id_S: NDArray[Any]
    segment_S: NDArray[Any]
    n_bytes_S: NDArray[Any]
    offsets: NDArray[np.int64]  # where the segments start, and the end of the last
    ends_T: NDArray[np.int64]  # byte of its segment at which each token ends
    logprob_T: NDArray[np.float64]  # of each token; NaN where it is not scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """The chunks of the segments that all models have read, in order."""

    doc_id_S: NDArray[Any]
    segment_S: NDArray[Any]
    n_bytes_S: NDArray[np.int64]
    offsets: NDArray[np.int64]  # where the chunks of each segment start, and the end of the last
    ends_C: NDArray[np.int64]  # byte of its segment at which each chunk ends
    bytes_C: NDArray[np.int64]
    logprob_MC: NDArray[np.float64]  # NaN where a chunk is not scored

    @property
    def doc_id_C(self) -> NDArray[Any]:
        """Document of each chunk."""
        return np.repeat(self.doc_id_S, np.diff(self.offsets))


class EnsembleStage:
    """Makes `ensembles/<rule>--<split>`. Pickles as its arguments.

    Arrays of a part: `doc_id_S, segment_S, n_bytes_S, segment_offsets` (of chunks), `byte_ends_C, logprob_C` (NaN where not scored), and
    `nll_S` (nats), `n_scored_S` (chunks), `scored_bytes_S`, as likelihoods of a model have them.
    """

    def __init__(self, dataset: Dataset, *, members: Sequence[Dataset], tokenizer_folders: Sequence[Path], rule: Rule) -> None:
        """`members` are likelihoods of the same split, `tokenizer_folders` those of their tokenizers."""
        self.dataset, self.members, self.tokenizer_folders, self.rule = dataset, list(members), list(tokenizer_folders), rule

    def compute(self, part: int) -> PartContent:
        """Mix one part."""
        tokens = [
            read_tokens(member, part, tokenizer=Tokenizer.load(folder))
            for member, folder in zip(self.members, self.tokenizer_folders, strict=True)
        ]
        chunks = shared_chunks(tokens)
        logprob_C = mixed(chunks, rule=self.rule)
        is_scored_C = np.isfinite(logprob_C)
        arrays = {
            "doc_id_S": chunks.doc_id_S,
            "segment_S": chunks.segment_S,
            "n_bytes_S": chunks.n_bytes_S.astype(np.uint32),
            "segment_offsets": chunks.offsets,
            "byte_ends_C": chunks.ends_C.astype(np.uint32),
            "logprob_C": logprob_C,
            "nll_S": -_sums(np.where(is_scored_C, logprob_C, 0), chunks.offsets),
            "n_scored_S": _sums(is_scored_C, chunks.offsets).astype(np.uint32),
            "scored_bytes_S": _sums(np.where(is_scored_C, chunks.bytes_C, 0), chunks.offsets).astype(np.uint32),
        }
        counts = {"segments": len(chunks.doc_id_S), "documents": len(np.unique(chunks.doc_id_S)), "tokens": len(logprob_C)}
        return PartContent(data=arrays, counts=counts, attributes={"quarantined": []})


def read_tokens(dataset: Dataset, part: int, *, tokenizer: Tokenizer) -> Tokens:
    """The tokens of a part of distributions or likelihoods."""
    names = ("token_ids_T", "segment_offsets", "doc_id_S", "segment_S", "n_bytes_S", "gold_logprob_T")
    arrays = dataset.arrays(part)
    token_ids_T, offsets, doc_id_S, segment_S, n_bytes_S, gold_logprob_T = (arrays.read(name) for name in names)
    offsets = offsets.astype(np.int64)
    stored_ends_T = arrays.read_if_there("byte_ends_T")
    if stored_ends_T is None:
        ends_T = tokenizer.byte_ends(token_ids_T, segment_offsets=offsets, n_bytes_S=n_bytes_S)
    else:
        ends_T = np.maximum(stored_ends_T.astype(np.int64), 0)
    logprob_T = np.concatenate([[np.nan], gold_logprob_T[:-1]]).astype(np.float64)  # position j speaks of token j + 1
    first = offsets[:-1][np.diff(offsets) > 0]
    logprob_T[first] = np.nan
    if tokenizer.prepends_bos:  # the token after it is the first of the text
        logprob_T[first[np.diff(offsets)[np.diff(offsets) > 0] > 1] + 1] = np.nan
    return Tokens(doc_id_S=doc_id_S, segment_S=segment_S, n_bytes_S=n_bytes_S, offsets=offsets, ends_T=ends_T, logprob_T=logprob_T)


def shared_chunks(tokens: Sequence[Tokens]) -> Chunks:
    """Cut the segments that all models have read at the bytes at which tokens of all models end."""
    keys_MS = [_segment_keys(each) for each in tokens]
    common = keys_MS[0]
    for key_S in keys_MS[1:]:
        common = common[np.isin(common, key_S)]
    places_MS = [np.flatnonzero(np.isin(key_S, common)) for key_S in keys_MS]
    n_bytes_S = tokens[0].n_bytes_S[places_MS[0]].astype(np.int64)
    base_S = np.concatenate([[0], np.cumsum(n_bytes_S + 1)])  # sets the segments' byte ranges apart
    positions = [_positions(each, place_S, base_S) for each, place_S in zip(tokens, places_MS, strict=True)]
    shared_C = positions[0][0]
    for position_T, _ in positions:
        shared_C = np.intersect1d(shared_C, position_T)
    segment_C = np.searchsorted(base_S, shared_C, side="right") - 1
    keep_C = shared_C > base_S[segment_C]  # no chunk ends at byte 0, where a bos does
    shared_C, segment_C = shared_C[keep_C], segment_C[keep_C]
    offsets = np.searchsorted(segment_C, np.arange(len(n_bytes_S) + 1))
    ends_C = shared_C - base_S[segment_C]
    starts_C = np.concatenate([[0], ends_C[:-1]])[: len(ends_C)]
    starts_C[offsets[:-1][np.diff(offsets) > 0]] = 0
    return Chunks(
        doc_id_S=tokens[0].doc_id_S[places_MS[0]],
        segment_S=tokens[0].segment_S[places_MS[0]],
        n_bytes_S=n_bytes_S,
        offsets=offsets,
        ends_C=ends_C,
        bytes_C=ends_C - starts_C,
        logprob_MC=_only_where_all_score(np.stack([_per_chunk(*each, shared_C=shared_C) for each in positions])),
    )


def mixed(chunks: Chunks, *, rule: Rule) -> NDArray[np.float64]:
    """The ensemble's log-probability of each chunk; NaN where a chunk is not scored."""
    is_scored_C = np.isfinite(chunks.logprob_MC[0])
    logprob_MC = chunks.logprob_MC[:, is_scored_C]
    _, document_C = np.unique(chunks.doc_id_C[is_scored_C], return_inverse=True)
    if rule == "oracle_token":
        found_C = logprob_MC.max(axis=0, initial=-np.inf)
    elif rule == "oracle_document":
        total_MD = np.stack([np.bincount(document_C, weights=each_C) for each_C in logprob_MC])
        found_C = logprob_MC[total_MD.argmax(axis=0)[document_C], np.arange(logprob_MC.shape[1])] if logprob_MC.size else logprob_MC[0]
    else:
        logweight_MC = _ETA[rule] * _said_before(logprob_MC, document_C=document_C)
        logweight_MC -= np.logaddexp.reduce(logweight_MC, axis=0)
        found_C = np.logaddexp.reduce(logweight_MC + logprob_MC, axis=0)
    all_C = np.full(len(is_scored_C), np.nan)
    all_C[is_scored_C] = found_C
    return all_C


def _said_before(logprob_MC: NDArray[np.float64], *, document_C: NDArray[np.int64]) -> NDArray[np.float64]:
    """Σ_{i<j} log p_m(c_i) over the chunks before each in its document."""
    before_MC = np.zeros_like(logprob_MC)
    starts = np.flatnonzero(np.diff(document_C, prepend=-1))
    stops = [*starts[1:], logprob_MC.shape[1]][: len(starts)]  # none of nothing
    for start, stop in zip(starts, stops, strict=True):
        before_MC[:, start + 1 : stop] = np.cumsum(logprob_MC[:, start : stop - 1], axis=1)
    return before_MC


def _segment_keys(tokens: Tokens) -> NDArray[np.int64]:
    return tokens.doc_id_S.astype(np.int64) << 24 | tokens.segment_S.astype(np.int64)  # a document has fewer segments than 2^24


def _positions(tokens: Tokens, place_S: NDArray[np.int64], base_S: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where each token of some segments ends, counted over these segments; and its log-probability."""
    base_of_S = np.full(len(tokens.doc_id_S), -1, np.int64)
    base_of_S[place_S] = base_S[:-1]
    base_T = np.repeat(base_of_S, np.diff(tokens.offsets))
    keep_T = base_T >= 0
    return (tokens.ends_T + base_T)[keep_T], tokens.logprob_T[keep_T]


def _per_chunk(position_T: NDArray[np.int64], logprob_T: NDArray[np.float64], *, shared_C: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of the log-probabilities of the tokens in each chunk; NaN with one that is not scored."""
    chunk_T = np.searchsorted(shared_C, position_T)  # a text ends with a token of each model, so there is one
    found_C: NDArray[np.float64] = np.bincount(chunk_T, weights=logprob_T, minlength=len(shared_C)).astype(np.float64)
    return found_C[: len(shared_C)]


def _only_where_all_score(logprob_MC: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isnan(logprob_MC).any(axis=0), np.nan, logprob_MC)


def _sums(values_C: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[Any]:
    """Sum over the chunks of each segment."""
    total = np.concatenate([[0], np.cumsum(values_C, dtype=np.float64)])
    return total[offsets[1:]] - total[offsets[:-1]]
