"""The input of every stage that compares two models' tokens of a corpus: both sides of a part, and their tokenizers.

Axes: T tokens or positions of a part, S segments of the target's part.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..store.dataset import Dataset
from ..store.tokenizer import Tokenizer
from .dtw import Matches, Side, Spellings, warp
from .positions import UNALIGNED, Ends, cover_positions, match_segments, span_positions

_READ = ("token_ids_T", "segment_offsets", "doc_id_S", "segment_S", "n_bytes_S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One model's tokens of a part."""

    side: Side
    doc_id_S: NDArray[Any]
    segment_S: NDArray[Any]
    n_bytes_S: NDArray[Any]
    tokenizer: Tokenizer
    stored_ends_T: NDArray[Any] | None  # byte ends, if the tokenizer rewrote text

    def byte_ends(self, *, dummy_prefix: bool) -> NDArray[np.int64]:
        """Byte of its segment at which each token ends: as stored if the tokenizer rewrote text, else from the tokens' lengths."""
        if self.stored_ends_T is not None:
            return np.maximum(self.stored_ends_T.astype(np.int64), -1 if dummy_prefix else 0)
        return self.tokenizer.byte_ends(
            self.side.token_ids_T, segment_offsets=self.side.offsets, n_bytes_S=self.n_bytes_S, dummy_prefix=dummy_prefix
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPart:
    """Both models' tokens of a part."""

    source: Reading
    target: Reading
    source_segment_of_S: NDArray[np.int64]  # for each target segment its index in the source's part, or -1

    def span(self) -> NDArray[np.int32]:
        """The position map `span`."""
        return span_positions(self._ends(dummy_prefix=False))

    def cover(self) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
        """The position map `cover`, and how many bytes each target position is ahead of its source position.

        Inside a source token whose text the tokenizer rewrote, bytes of the token do not correspond to bytes of the text, so there is no
        position. There is also none after the last token of a source that read a conversation in another template, which may end sooner.
        """
        position_T, ahead_T = cover_positions(self._ends(dummy_prefix=True))
        if self.source.stored_ends_T is not None:
            inside_T = np.flatnonzero(ahead_T > 0)
            in_text_U = np.diff(self.source.stored_ends_T, prepend=0)
            in_token_U = self.source.tokenizer.token_bytes.lengths_V[self.source.side.token_ids_T]
            is_as_read_U = in_text_U == in_token_U
            is_as_read_U[self.source.side.offsets[:-1]] = False  # the entry after a segment's last token is the next segment's first
            rewritten_T = inside_T[~np.append(is_as_read_U, False)[position_T[inside_T] + 1]]
            position_T[rewritten_T], ahead_T[rewritten_T] = UNALIGNED, 0
        return position_T, ahead_T

    def warp(self, spellings: Spellings) -> Matches:
        """The matches on the path of `dtw`."""
        return warp(self.source.side, target=self.target.side, source_segment_of_S=self.source_segment_of_S, spellings=spellings)

    def _ends(self, *, dummy_prefix: bool) -> Ends:
        return Ends(
            source_ends_T=self.source.byte_ends(dummy_prefix=dummy_prefix),
            source_offsets=self.source.side.offsets,
            target_ends_T=self.target.byte_ends(dummy_prefix=dummy_prefix),
            target_offsets=self.target.side.offsets,
            source_segment_of_S=self.source_segment_of_S,
            n_bytes_S=self.target.n_bytes_S,
        )


class PairStage:
    """A stage over the parts of a source and a target. It pickles as its arguments."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        source: Dataset,
        target: Dataset,
        positions: str,
        source_tokenizer_folder: Path,
        target_tokenizer_folder: Path,
    ) -> None:
        """`positions` is the kind of position map."""
        self.dataset, self.source, self.target, self.positions = dataset, source, target, positions
        self.source_tokenizer_folder, self.target_tokenizer_folder = source_tokenizer_folder, target_tokenizer_folder

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in {"source_tokenizer", "target_tokenizer", "spellings"}}

    @cached_property
    def source_tokenizer(self) -> Tokenizer:
        """The source's tokenizer, from the store."""
        return Tokenizer.load(self.source_tokenizer_folder)

    @cached_property
    def target_tokenizer(self) -> Tokenizer:
        """The target's tokenizer, from the store."""
        return Tokenizer.load(self.target_tokenizer_folder)

    @cached_property
    def spellings(self) -> Spellings:
        """The spellings of both tokenizers' tokens."""
        return Spellings.of_tokenizers(self.source_tokenizer, target=self.target_tokenizer)

    def read(self, part: int) -> PairPart:
        """Both sides of a part."""
        source = reading(self.source, part=part, tokenizer=self.source_tokenizer)
        target = reading(self.target, part=part, tokenizer=self.target_tokenizer)
        return PairPart(
            source=source,
            target=target,
            source_segment_of_S=match_segments(
                source_doc_id_S=source.doc_id_S,
                source_segment_S=source.segment_S,
                target_doc_id_S=target.doc_id_S,
                target_segment_S=target.segment_S,
            ),
        )


def reading(dataset: Dataset, *, part: int, tokenizer: Tokenizer) -> Reading:
    """One model's tokens of a part of its distributions."""
    token_ids_T, offsets, doc_id_S, segment_S, n_bytes_S = dataset.read(part, *_READ)
    bos_id = tokenizer.roles["bos"] if tokenizer.prepends_bos else None
    side = Side(token_ids_T=token_ids_T, offsets=offsets, bos_id=bos_id)
    arrays = dataset.arrays(part)
    return Reading(
        side=side,
        doc_id_S=doc_id_S,
        segment_S=segment_S,
        n_bytes_S=n_bytes_S,
        tokenizer=tokenizer,
        stored_ends_T=arrays.read_if_there("byte_ends_T"),
    )
