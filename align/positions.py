"""Position maps: for each target position, the source position at the same place in the text.

`span`: a source position j and a target position i condition on the same text exactly when their prefixes end at the same byte, e_j = f_i.
Two sorted integer arrays are matched, in linear time and exactly, for any tokenizers.

`cover`: the same; for a target position inside a source token, the source position before that token, whose prediction is then
conditioned on the bytes that the target has read since.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNALIGNED = -1


def match_segments(
    *, source_doc_id_S: NDArray[Any], source_segment_S: NDArray[Any], target_doc_id_S: NDArray[Any], target_segment_S: NDArray[Any]
) -> NDArray[np.int64]:
    """For each target segment the index of the same segment in the source's part, or -1 if the source left it out.

    Both parts hold segments of the same corpus part, ordered by document and segment.
    """
    most = int(max(source_segment_S.max(initial=0), target_segment_S.max(initial=0))) + 1
    source_key_S = source_doc_id_S.astype(np.int64) * most + source_segment_S
    target_key_S = target_doc_id_S.astype(np.int64) * most + target_segment_S
    place_S = np.searchsorted(source_key_S, target_key_S)
    found_S = np.append(source_key_S, -1)[place_S] == target_key_S
    return np.where(found_S, place_S, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The ends of the tokens of a part, on both sides."""

    source_ends_T: NDArray[np.int64]  # byte offset in its segment at which each source token ends, ascending within a segment
    source_offsets: NDArray[np.int64]  # where the source's segments start, and the end of the last
    target_ends_T: NDArray[np.int64]  # the same of the target's tokens
    target_offsets: NDArray[np.int64]  # the same of the target's segments
    source_segment_of_S: NDArray[np.int64]  # for each target segment its index in the source's part, or -1 (`match_segments`)
    n_bytes_S: NDArray[Any]  # length of each target segment's text in bytes


def span_positions(ends: Ends) -> NDArray[np.int32]:
    """Match the positions of a whole part by the byte at which their prefixes end.

    Returns:
        For each target position the index of its source position in the source's part, int32; -1 if there is none. If several positions
        end at the same byte (bos, or tokens without text), the last one counts: it has read the most.
    """
    position_T, ahead_T = _last_positions(ends)
    return np.where(ahead_T == 0, position_T, UNALIGNED).astype(np.int32)


def cover_positions(ends: Ends) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """For each target position the source position that has read the most of the same text, but no more text than the target.

    Args:
        ends: with -1 for a bos before a dummy prefix, on both sides.

    Returns:
        The index of the source position in the source's part, int32, -1 if there is none; and how many bytes the target has read beyond
        it, uint16: the beginning of the next source token, 0 if both have read the same.
    """
    # A dummy prefix is not text: only a source with one has a position before it.
    first_ends_S = np.append(ends.source_ends_T, 0)[ends.source_offsets[:-1]]
    has_dummy_S = np.append(first_ends_S, 0)[ends.source_segment_of_S] == -1
    least_T = -np.repeat(has_dummy_S, np.diff(ends.target_offsets)).astype(np.int64)
    position_T, ahead_T = _last_positions(replace(ends, target_ends_T=np.maximum(ends.target_ends_T, least_T)))
    return position_T, np.where(position_T == UNALIGNED, 0, ahead_T).astype(np.uint16)


def _last_positions(ends: Ends) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The last source position of the same segment that ends at or before each target position, -1 if there is none; and the distance.

    Only the last of several target positions that end at the same byte has one.
    """
    base_S = np.concatenate([[1], 1 + np.cumsum(ends.n_bytes_S.astype(np.int64) + 2)])[:-1]  # separates the segments' byte ranges
    base_T = np.repeat(base_S, np.diff(ends.target_offsets))
    target_key_T = ends.target_ends_T + base_T
    shared_S = ends.source_segment_of_S >= 0
    base_of_source_S = np.full(len(ends.source_offsets) - 1, -1, np.int64)
    base_of_source_S[ends.source_segment_of_S[shared_S]] = base_S[shared_S]
    source_base_T = np.repeat(base_of_source_S, np.diff(ends.source_offsets))
    shared_T = np.flatnonzero(source_base_T >= 0)
    source_key_T = ends.source_ends_T[shared_T] + source_base_T[shared_T]
    if not len(source_key_T):
        return np.full(len(target_key_T), UNALIGNED, np.int32), np.ones(len(target_key_T), np.int64)
    place_T = np.searchsorted(source_key_T, target_key_T, side="right") - 1
    is_last_T = np.append(target_key_T[1:] != target_key_T[:-1], True)
    found_T = (place_T >= 0) & (source_key_T[place_T] >= base_T - 1) & is_last_T
    return np.where(found_T, shared_T[place_T], UNALIGNED).astype(np.int32), target_key_T - source_key_T[place_T]
