"""Position maps: which source position speaks about the same place in the text as each target position.

`span`: a source position j and a target position i condition on the same text exactly when their prefixes end at the same byte, e_j = f_i.
Two sorted integer arrays are matched, in linear time and exactly, whatever the tokenizers.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

UNALIGNED = -1


def match_segments(
    *, source_doc_id_S: NDArray[Any], source_segment_S: NDArray[Any], target_doc_id_S: NDArray[Any], target_segment_S: NDArray[Any]
) -> NDArray[np.int64]:
    """For each target segment the index of the same segment in the source's part, or -1 where the source left it out.

    Both parts hold segments of the same corpus part, ordered by document and segment.
    """
    most = int(max(source_segment_S.max(initial=0), target_segment_S.max(initial=0))) + 1
    source_key_S = source_doc_id_S.astype(np.int64) * most + source_segment_S
    target_key_S = target_doc_id_S.astype(np.int64) * most + target_segment_S
    place_S = np.searchsorted(source_key_S, target_key_S)
    found_S = np.append(source_key_S, -1)[place_S] == target_key_S
    return np.where(found_S, place_S, -1)


def span_positions(
    *,
    source_ends_T: NDArray[np.int64],
    source_offsets: NDArray[np.int64],
    target_ends_T: NDArray[np.int64],
    target_offsets: NDArray[np.int64],
    source_segment_of_S: NDArray[np.int64],
    n_bytes_S: NDArray[Any],
) -> NDArray[np.int32]:
    """Match the positions of a whole part by the byte at which their prefixes end.

    Args:
        source_ends_T: byte offset in its segment at which each source token ends, ascending within a segment.
        source_offsets: where the source's segments start, and the end of the last.
        target_ends_T: the same of the target's tokens.
        target_offsets: the same of the target's segments.
        source_segment_of_S: for each target segment its index in the source's part, or -1 (`match_segments`); ascending where not -1.
        n_bytes_S: length of each target segment's text in bytes.

    Returns:
        For each target position the index of its source position in the source's part, int32; -1 where there is none. Where several
        positions end at the same byte (bos, or tokens without text), the last one counts: it has read the most.
    """
    base_S = np.concatenate([[0], np.cumsum(n_bytes_S.astype(np.int64) + 1)])[:-1]  # sets the segments' byte ranges apart
    target_key_T = target_ends_T + np.repeat(base_S, np.diff(target_offsets))
    shared_S = source_segment_of_S >= 0
    base_of_source_S = np.full(len(source_offsets) - 1, -1, np.int64)
    base_of_source_S[source_segment_of_S[shared_S]] = base_S[shared_S]
    base_T = np.repeat(base_of_source_S, np.diff(source_offsets))
    shared_T = np.flatnonzero(base_T >= 0)
    source_key_T = source_ends_T[shared_T] + base_T[shared_T]
    if not len(source_key_T):
        return np.full(len(target_key_T), UNALIGNED, np.int32)
    place_T = np.maximum(np.searchsorted(source_key_T, target_key_T, side="right") - 1, 0)
    is_last_T = np.append(target_key_T[1:] != target_key_T[:-1], True)
    found_T = (source_key_T[place_T] == target_key_T) & is_last_T
    return np.where(found_T, shared_T[place_T], UNALIGNED).astype(np.int32)
