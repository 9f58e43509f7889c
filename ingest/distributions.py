"""The stage that computes one model's next-token distributions, or only likelihoods, for a corpus part.

Arrays of a part (T tokens, S segments, K entries; position j predicts token j + 1 of its segment):

    token_ids_T, segment_offsets          the segments as the model reads them, with bos if it was trained with one
    doc_id_S, segment_S, n_bytes_S        document and number of each segment, and the length of its text in UTF-8
    byte_ends_T                           byte of its segment at which each token ends: for conversations, and if the tokenizer rewrote
                                          some text (NFC)
    label_mask_T                          for conversations: whether the next token is the assistant's (bool)
    nll_S, n_scored_S, scored_bytes_S     negative log-likelihood (nats) of the tokens after the first, their number and their bytes
    gold_logprob_T                        log-probability of the next token; NaN at a segment's last position
    topk_ids_TK, topk_logprobs_TK, tail_logprob_T, entropy_T     if top_k > 0

A text's first token is not scored, even if bos predicts it, because models without bos do not predict it and all models must be compared
on the same tokens. In conversations only the assistant's tokens are scored, including end-of-turn tokens, which count no bytes.
"""

import contextlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ..store.arrays import Encoding, id_dtype
from ..store.dataset import Dataset, PartContent
from ..store.errors import FuselineError
from ..store.tokenizer import NOT_LOSSLESS, EncodedSegments, Tokenizer
from .chat.marked_text import segments_of
from .chat.reader import ConversationsReader
from .chat.readings import ChatReading
from .models import ModelFolder

if TYPE_CHECKING:  # torch is loaded to run a model, not to read a recipe
    from .forward import CausalModel, NextTokenDistributions


class DistributionsConfig(BaseModel):
    """The `[distributions]` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    top_k: int = Field(10, ge=1, le=1024, description="entries of each next-token distribution that are stored")
    codec: Encoding = Field(
        "f16", description="encoding of log-probabilities: `f16` (error 5e-8 nats), or `q8` (5e-5 nats) in 14 % fewer bytes"
    )


def forward_choices(*, split: str, dtype: str, top_k: int, codec: Encoding) -> dict[str, Any]:
    """The part of the identity of distributions that the recipe alone determines."""
    return {"stage": "distributions/1", "split": split, "dtype": dtype, "top_k": top_k, "codec": codec}


def distributions_identity(
    model: ModelFolder, *, corpus: Dataset, split: str, dtype: str, top_k: int, codec: Encoding = "f16", chat: ChatReading | None = None
) -> dict[str, Any]:
    """What determines a model's distributions on a corpus; not its name, the batch size or the device."""
    identity = forward_choices(split=split, dtype=dtype, top_k=top_k, codec=codec) | {
        "corpus": corpus.fingerprint,
        "weights": model.weights_digest,
        "tokenizer": model.tokenizer.digest,
    }
    if model.tokenizer.rewrites:  # it decides which documents are left out
        identity["equivalence"] = 1
    if chat is not None:
        identity["chat"] = chat.reader(model.tokenizer).identity
    return identity


def arithmetic_of_parts(dataset: Dataset, *, dtype: str) -> str | None:
    """The number format of the parts of a dataset without its `dataset.json`; None if no part can be read."""
    for part in dataset.parts():
        with contextlib.suppress(FuselineError):
            return str(dataset.arrays(part).attributes.get("arithmetic", dtype))
    return None


class DistributionsStage:
    """Makes `distributions/<model>` (top_k > 0) or `evaluations/<model>` (top_k = 0). It pickles as its arguments."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        corpus: Dataset,
        model_folder: Path,
        tokenizer_folder: Path,
        dtype: str,
        trust_remote_code: bool,
        top_k: int,
        codec: Encoding = "f16",
        chat: ChatReading | None = None,
        context_length: int | None = None,
    ) -> None:
        """`chat` says how conversations are read, if the corpus holds conversations.

        A segment of more than `context_length` tokens is left out. The default is the corpus's; only a model's own rendering exceeds it.
        """
        self.dataset, self.corpus, self.model_folder, self.tokenizer_folder = dataset, corpus, model_folder, tokenizer_folder
        self.dtype, self.trust_remote_code, self.top_k, self.codec = dtype, trust_remote_code, top_k, codec
        self.chat, self.context_length = chat, context_length or corpus.identity["context_length"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in {"model", "tokenizer", "_reader"}}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, from the store."""
        return Tokenizer.load(self.tokenizer_folder)

    @cached_property
    def model(self) -> "CausalModel":
        """The model, loaded for the first part."""
        from .forward import CausalModel

        folder, remote_code = self.model_folder, self.trust_remote_code
        return CausalModel(folder, dtype=self.dtype, arithmetic=self.arithmetic, trust_remote_code=remote_code)

    @property
    def arithmetic(self) -> str:
        """The number format of the forward passes, chosen when the dataset was begun.

        Datasets of earlier versions have no record of it; they were computed in `dtype`.
        """
        return str(self.dataset.description.get("arithmetic", self.dtype))

    @cached_property
    def _reader(self) -> ConversationsReader | None:
        return None if self.chat is None else self.chat.reader(self.tokenizer)

    def compute(self, part: int) -> PartContent:
        """Tokenize and run one part of the corpus.

        A document is left out if the tokenizer cannot represent it, it does not fit the context, or its logits are not finite. The reason
        is stored in the part's attributes under `quarantined`.
        """
        table = self.corpus.table(part)
        read = self._read(table)
        reasons = self._unusable(read, doc_id_S=table["doc_id"].to_numpy())
        keep_S = ~np.isin(table["doc_id"].to_numpy(), list(reasons))
        table, read = table.filter(pl.Series(keep_S)), read.select(keep_S)
        encoded = read.encoded
        offsets = encoded.segment_offsets
        found = self.model.distributions([encoded.token_ids_T[start:end] for start, end in pairwise(offsets)], top_k=self.top_k)

        gold_T = np.where(_is_last(offsets), 0, found.gold_logprob_T).astype(np.float64)
        finite_T = np.isfinite(gold_T) & np.isfinite(found.entropy_T)
        bad_docs = np.unique(table["doc_id"].to_numpy()[_segment_sums(~finite_T, offsets) > 0])
        reasons |= {int(doc_id): "the model's logits are not finite" for doc_id in bad_docs}
        keep_S = ~np.isin(table["doc_id"].to_numpy(), bad_docs)
        keep_T = np.repeat(keep_S, np.diff(offsets))
        per_token = self._per_token(found) | {"token_ids_T": encoded.token_ids_T}
        if encoded.byte_ends_T is not None:
            per_token["byte_ends_T"] = encoded.byte_ends_T
        if self.chat is not None:
            per_token["label_mask_T"] = read.is_scored_T
        per_segment = {
            "doc_id_S": table["doc_id"].to_numpy(),
            "segment_S": table["segment"].to_numpy(),
            "n_bytes_S": encoded.n_bytes_S.astype(np.uint32),
            "n_scored_S": _segment_sums(read.is_scored_T, offsets).astype(np.uint32),
            "scored_bytes_S": read.scored_bytes_S.astype(np.uint32),
            "nll_S": -_segment_sums(gold_T * read.is_scored_T, offsets),
        }
        arrays = {name: array[keep_T] for name, array in per_token.items()} | {name: array[keep_S] for name, array in per_segment.items()}
        arrays["segment_offsets"] = encoded.select(keep_S).segment_offsets
        quarantined = [{"doc_id": doc_id, "reason": reason} for doc_id, reason in sorted(reasons.items())]
        counts = {
            "documents": len(np.unique(arrays["doc_id_S"])),
            "segments": len(arrays["doc_id_S"]),
            "tokens": len(arrays["token_ids_T"]),
            "quarantined": len(quarantined),
        }
        attributes: dict[str, Any] = {"quarantined": quarantined}
        if self.arithmetic != self.dtype:  # in case `dataset.json` is lost
            attributes["arithmetic"] = self.arithmetic
        return PartContent(data=arrays, counts=counts, attributes=attributes, encodings=self._encodings)

    def _read(self, table: pl.DataFrame) -> "_Read":
        if self._reader is None:
            encoded = self.tokenizer.encode_segments(table["text"].to_list())
            return _Read.of_text(encoded, tokenizer=self.tokenizer)
        conversations = self._reader.encode(segments_of(table))
        offsets = conversations.segments.segment_offsets
        return _Read(
            encoded=conversations.segments,
            is_scored_T=conversations.label_mask_T,
            scored_bytes_S=_segment_sums(conversations.scored_bytes_T, offsets),
            reasons=[conversations.reasons.get(s) for s in range(len(offsets) - 1)],
        )

    @property
    def _encodings(self) -> dict[str, Encoding]:
        # The gold log-probabilities stay exact: the gold anchor and the likelihoods use them.
        exact: dict[str, Encoding] = {"gold_logprob_T": "f16", "entropy_T": "f16"}
        return exact | {name: self.codec for name in ("topk_logprobs_TK", "tail_logprob_T") if self.top_k}

    def _unusable(self, read: "_Read", *, doc_id_S: NDArray[Any]) -> dict[int, str]:
        """Documents that cannot be run, with the reasons."""
        reasons = {}
        lengths_S = np.diff(read.encoded.segment_offsets)
        for s in np.flatnonzero(lengths_S > self.context_length):
            reasons[int(doc_id_S[s])] = f"a segment has {lengths_S[s]} tokens, more than context_length ({self.context_length})"
        return reasons | {doc_id: reason for doc_id, reason in zip(doc_id_S.tolist(), read.reasons, strict=True) if reason is not None}

    def _per_token(self, found: "NextTokenDistributions") -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {
            "gold_logprob_T": found.gold_logprob_T,
            "entropy_T": found.entropy_T,
        }
        if self.top_k:
            arrays |= {
                "topk_ids_TK": found.topk_ids_TK.astype(id_dtype(self.model.vocab_size)),
                "topk_logprobs_TK": found.topk_logprobs_TK,
                "tail_logprob_T": found.tail_logprob_T,
            }
        return arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """Segments as a model reads them."""

    encoded: EncodedSegments
    is_scored_T: NDArray[np.bool_]  # whether the token after the position is scored
    scored_bytes_S: NDArray[np.int64]
    reasons: list[str | None]  # why a segment cannot be run

    @classmethod
    def of_text(cls, encoded: EncodedSegments, *, tokenizer: Tokenizer) -> "_Read":
        """In plain text, all tokens except the first are scored, with or without bos."""
        offsets = encoded.segment_offsets
        n_bos = int(tokenizer.prepends_bos)
        is_scored_T = ~_is_last(offsets)
        is_scored_T[offsets[:-1][np.diff(offsets) > 0]] &= not n_bos
        ends_T: NDArray[Any] | None = encoded.byte_ends_T
        if ends_T is None:
            ends_T = tokenizer.byte_ends(encoded.token_ids_T, segment_offsets=offsets, n_bytes_S=encoded.n_bytes_S)
        first_bytes_S = encoded.n_bytes_S.copy()  # of the first token; of the whole text if there is no second
        has_scored_S = np.diff(offsets) - 1 - n_bos > 0
        first_bytes_S[has_scored_S] = ends_T[offsets[:-1][has_scored_S] + n_bos]
        return cls(
            encoded=encoded,
            is_scored_T=is_scored_T,
            scored_bytes_S=encoded.n_bytes_S - first_bytes_S,
            reasons=[None if ok else NOT_LOSSLESS for ok in encoded.is_lossless_S.tolist()],
        )

    def select(self, keep_S: NDArray[np.bool_]) -> "_Read":
        """Only the segments for which `keep_S` is true."""
        keep_T = np.repeat(keep_S, np.diff(self.encoded.segment_offsets))
        return _Read(
            encoded=self.encoded.select(keep_S),
            is_scored_T=self.is_scored_T[keep_T],
            scored_bytes_S=self.scored_bytes_S[keep_S],
            reasons=[reason for reason, keep in zip(self.reasons, keep_S.tolist(), strict=True) if keep],
        )


def _is_last(offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which positions are the last of their segment, and have no gold token."""
    is_last_T = np.zeros(offsets[-1], np.bool_)
    is_last_T[offsets[1:][np.diff(offsets) > 0] - 1] = True
    return is_last_T


def _segment_sums(values_T: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[Any]:
    """Sum of each segment's values, computed per segment, so that a value that is not finite affects only its own segment."""
    return np.array([values_T[start:end].sum() for start, end in pairwise(offsets)])
