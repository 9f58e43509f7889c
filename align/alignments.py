"""The stage that makes `alignments/<source>--<target>`: the position map of each part.

Arrays of a part (T positions and S segments of the target's part):

    source_position_T                 index of the source position in the source's part, -1 where there is none
    ahead_T                           of `cover`: bytes that the target position has read beyond the source position
    doc_id_S, segment_S               which segments these are
    n_positions_S, n_aligned_S        positions of the segment, and those with a source position that has read the same: its coverage
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..store.dataset import Dataset, PartContent
from ..store.tokenizer import Tokenizer
from .positions import UNALIGNED, cover_positions, match_segments, span_positions


def alignment_identity(source: Dataset, *, target: Dataset, rule: str) -> dict[str, Any]:
    """What determines the position maps between two models' distributions."""
    return {"stage": "alignments/1", "source": source.fingerprint, "target": target.fingerprint, "positions": rule}


class AlignmentsStage:
    """Aligns one source's positions to the target's. Pickles as its arguments."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        source: Dataset,
        target: Dataset,
        rule: str,
        source_tokenizer_folder: Path,
        target_tokenizer_folder: Path,
    ) -> None:
        self.dataset, self.source, self.target, self.rule = dataset, source, target, rule
        self.source_tokenizer_folder, self.target_tokenizer_folder = source_tokenizer_folder, target_tokenizer_folder

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.endswith("_tokenizer")}

    @cached_property
    def source_tokenizer(self) -> Tokenizer:
        """The source's tokenizer, from the store."""
        return Tokenizer.load(self.source_tokenizer_folder)

    @cached_property
    def target_tokenizer(self) -> Tokenizer:
        """The target's tokenizer, from the store."""
        return Tokenizer.load(self.target_tokenizer_folder)

    def compute(self, part: int) -> PartContent:
        """Match the positions of one part."""
        source_offsets, source_doc_id_S, source_segment_S = self.source.read(part, "segment_offsets", "doc_id_S", "segment_S")
        target_offsets, target_doc_id_S, target_segment_S, target_bytes_S = self.target.read(
            part, "segment_offsets", "doc_id_S", "segment_S", "n_bytes_S"
        )
        covers = self.rule == "cover"
        sides: dict[str, Any] = {
            "source_ends_T": _byte_ends(self.source, part, tokenizer=self.source_tokenizer, dummy_prefix=covers),
            "source_offsets": source_offsets,
            "target_ends_T": _byte_ends(self.target, part, tokenizer=self.target_tokenizer, dummy_prefix=covers),
            "target_offsets": target_offsets,
            "source_segment_of_S": match_segments(
                source_doc_id_S=source_doc_id_S,
                source_segment_S=source_segment_S,
                target_doc_id_S=target_doc_id_S,
                target_segment_S=target_segment_S,
            ),
            "n_bytes_S": target_bytes_S,
        }
        arrays = {"doc_id_S": target_doc_id_S, "segment_S": target_segment_S, "n_positions_S": np.diff(target_offsets).astype(np.uint32)}
        if covers:
            position_T, ahead_T = cover_positions(**sides)
            aligned_T = (position_T != UNALIGNED) & (ahead_T == 0)
            arrays["ahead_T"] = ahead_T
        else:
            position_T = span_positions(**sides)
            aligned_T = position_T != UNALIGNED
        aligned_before = np.concatenate([[0], np.cumsum(aligned_T)])
        arrays |= {"source_position_T": position_T, "n_aligned_S": np.diff(aligned_before[target_offsets]).astype(np.uint32)}
        return PartContent(
            data=arrays, counts={"segments": len(target_doc_id_S), "tokens": len(position_T), "aligned": int(aligned_before[-1])}
        )


def _byte_ends(dataset: Dataset, part: int, *, tokenizer: Tokenizer, dummy_prefix: bool) -> NDArray[np.int64]:
    """Byte of its segment at which each token ends: as stored where the tokenizer rewrote text, else by the tokens' lengths."""
    arrays = dataset.arrays(part)
    if "byte_ends_T" in arrays.names:
        return np.maximum(arrays.read("byte_ends_T").astype(np.int64), -1 if dummy_prefix else 0)
    return tokenizer.byte_ends(
        arrays.read("token_ids_T"),
        segment_offsets=arrays.read("segment_offsets"),
        n_bytes_S=arrays.read("n_bytes_S"),
        dummy_prefix=dummy_prefix,
    )
