"""The stage that makes `alignments/<source>--<target>`: the position map of each part.

Arrays of a part (T positions and S segments of the target's part):

    source_position_T                 index of the source position in the source's part, -1 if there is none
    ahead_T                           for `cover`: bytes that the target position has read beyond the source position
    doc_id_S, segment_S               document and number of each segment
    n_positions_S, n_aligned_S        positions of the segment, and those with a source position that has read the same text: its coverage
    cost_S                            for `dtw`: cost of the segment's path, in characters
"""

from typing import Any

import numpy as np

from ..store.dataset import Dataset, PartContent
from .dtw import Match, agreeing_positions
from .pair import PairStage
from .positions import UNALIGNED
from .vocabulary import target_ids


def alignment_identity(
    source: Dataset, *, target: Dataset, positions: str, match: Match | None = None, vocabulary_map: Dataset | None = None
) -> dict[str, Any]:
    """What determines the position maps between two models' distributions; for `dtw` also the agreement rule and its vocabulary map."""
    identity = {"stage": "alignments/1", "source": source.fingerprint, "target": target.fingerprint, "positions": positions}
    if match is not None:
        identity["match"] = match
    if vocabulary_map is not None:
        identity["vocabulary"] = vocabulary_map.fingerprint
    return identity


class AlignmentsStage(PairStage):
    """Aligns a source's positions to the target's."""

    def __init__(self, dataset: Dataset, *, match: Match | None = None, vocabulary_map: Dataset | None = None, **sides: Any) -> None:
        """`sides` are the arguments of every `PairStage`.

        For `dtw`, `match` says which matched tokens agree, and `vocabulary_map` is the map for it, if `match` needs one.
        """
        super().__init__(dataset, **sides)
        self.match, self.vocabulary_map = match, vocabulary_map

    def compute(self, part: int) -> PartContent:
        """Match the positions of one part."""
        pair = self.read(part)
        offsets = pair.target.side.offsets
        arrays: dict[str, Any] = {
            "doc_id_S": pair.target.doc_id_S,
            "segment_S": pair.target.segment_S,
            "n_positions_S": np.diff(offsets).astype(np.uint32),
        }
        match self.positions:
            case "cover":
                position_T, ahead_T = pair.cover()
                arrays["ahead_T"] = ahead_T
                aligned_T = (position_T != UNALIGNED) & (ahead_T == 0)
            case "span":
                position_T = pair.span()
                aligned_T = position_T != UNALIGNED
            case "dtw":
                assert self.match is not None
                matches = pair.warp(self.spellings)
                position_T = agreeing_positions(
                    matches,
                    source=pair.source.side,
                    target=pair.target.side,
                    spellings=self.spellings,
                    match=self.match,
                    target_ids_V=target_ids(self.vocabulary_map.table(0)) if self.vocabulary_map else None,
                )
                arrays["cost_S"] = matches.cost_S
                aligned_T = position_T != UNALIGNED
        aligned_before = np.concatenate([[0], np.cumsum(aligned_T)])
        arrays |= {"source_position_T": position_T, "n_aligned_S": np.diff(aligned_before[offsets]).astype(np.uint32)}
        counts = {"segments": len(offsets) - 1, "tokens": len(position_T), "aligned": int(aligned_before[-1])}
        return PartContent(data=arrays, counts=counts)
