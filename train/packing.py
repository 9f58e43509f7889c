"""Packs tokens into sequences: a function of the segments' lengths and their order.

Axes: S segments in the order they are packed in, P pieces, N packs.

A piece is a run of consecutive tokens of one segment. There are two ways to pack:

    isolated      Pieces are whole segments; longer segments are cut into pieces of `sequence_length` tokens. A pack holds whole pieces,
                  which do not see each other. The longest pieces are placed first, each into the fullest pack with enough room.
    concatenated  The published way: segments are joined and cut at every `sequence_length` tokens. To the model, a pack is one text.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .labels import LabelRuns

Packing = Literal["isolated", "concatenated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Segments to pack, with the blocks that they are read from."""

    block_S: NDArray[np.int32]
    segment_S: NDArray[np.int64]  # number among all segments
    start_S: NDArray[np.int64]  # row of its first token in its block
    length_S: NDArray[np.int32]

    def __getitem__(self, which: Any) -> Self:
        return type(self)(**{name: getattr(self, name)[which] for name in self.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    """Packed sequences, as lists of pieces."""

    block_P: NDArray[np.int32]
    segment_P: NDArray[np.int64]
    start_P: NDArray[np.int64]  # row of the piece's first token in its block
    length_P: NDArray[np.int64]
    ends_segment_P: NDArray[np.bool_]  # whether its last token is the segment's last, so that there is no next token
    offsets_N1: NDArray[np.int64]  # N + 1 offsets into the pieces

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    def __getitem__(self, which: slice) -> Self:
        """A range of packs."""
        first, stop, _ = which.indices(len(self))
        offsets = self.offsets_N1[first : max(first, stop) + 1]
        columns = {name: getattr(self, name)[offsets[0] : offsets[-1]] for name in _COLUMNS}
        return type(self)(**columns, offsets_N1=offsets - offsets[0])

    @classmethod
    def joined(cls, several: "list[Self]") -> Self:
        """Concatenate packs."""
        columns = {name: np.concatenate([getattr(packs, name) for packs in several]) for name in _COLUMNS}
        sizes = np.concatenate([np.diff(packs.offsets_N1) for packs in several])
        return cls(**columns, offsets_N1=np.concatenate([[0], np.cumsum(sizes)]))


_COLUMNS = ("block_P", "segment_P", "start_P", "length_P", "ends_segment_P")


def pack(
    segments: Segments, *, packing: Packing, sequence_length: int, random: np.random.Generator, labels: LabelRuns | None = None
) -> Packs:
    """Pack segments in random order; the packs are in random order too.

    Tokens without labels are left out. If isolated, these are pieces without a label, including a single last token: it predicts nothing,
    and is the label of the previous piece. If concatenated, these are segments and packs without a label.

    Args:
        segments: to be packed.
        packing: see above.
        sequence_length: tokens of a pack.
        random: decides the order.
        labels: of all segments; None: every position except the last of a segment has one.
    """
    segments = segments[random.permutation(len(segments.length_S))]
    place_P, offset_P, length_P, pack_P = _placed(segments, packing=packing, sequence_length=sequence_length, labels=labels)
    number_N = random.permutation(int(pack_P.max(initial=-1)) + 1)
    order_P = np.argsort(number_N[pack_P], kind="stable")
    place_P, offset_P, length_P = place_P[order_P], offset_P[order_P], length_P[order_P]
    sizes_N = np.bincount(number_N[pack_P], minlength=len(number_N))
    return Packs(
        block_P=segments.block_S[place_P],
        segment_P=segments.segment_S[place_P],
        start_P=segments.start_S[place_P] + offset_P,
        length_P=length_P,
        ends_segment_P=offset_P + length_P == segments.length_S[place_P],
        offsets_N1=np.concatenate([[0], np.cumsum(sizes_N)]),
    )


def count_packs(length_S: NDArray[np.int32], *, packing: Packing, sequence_length: int) -> int:
    """The number of packs that `pack` makes from segments of these lengths, in any order, if every position has a label."""
    if packing == "concatenated":
        return -(-int(length_S.sum(dtype=np.int64)) // sequence_length)
    return int(_best_fit(_pieces(length_S, sequence_length)[2], sequence_length).max(initial=-1)) + 1


def _placed(segments: Segments, *, packing: Packing, sequence_length: int, labels: LabelRuns | None) -> tuple[NDArray[np.int64], ...]:
    """Pieces (index in S, offset in the segment, length) and the pack of each."""
    length_S = segments.length_S
    if packing == "isolated":
        place_P, offset_P, length_P = _pieces(length_S, sequence_length)
        if labels is not None:
            kept_P = labels.has_some(segments.segment_S[place_P], start_P=offset_P, length_P=length_P)
            place_P, offset_P, length_P = place_P[kept_P], offset_P[kept_P], length_P[kept_P]
        return place_P, offset_P, length_P, _best_fit(length_P, sequence_length)
    if labels is None:
        return _concatenated(length_S, sequence_length)
    place_P, offset_P, length_P, pack_P = _concatenated(np.where(labels.has_some_S[segments.segment_S], length_S, 0), sequence_length)
    has_label_P = labels.has_some(segments.segment_S[place_P], start_P=offset_P, length_P=length_P)
    has_label_N = np.bincount(pack_P, weights=has_label_P) > 0
    kept_P, number_N = has_label_N[pack_P], np.cumsum(has_label_N) - 1
    return place_P[kept_P], offset_P[kept_P], length_P[kept_P], number_N[pack_P[kept_P]]


@njit(cache=True, nogil=True)
def _pieces(length_S: Any, sequence_length: int) -> Any:
    """Segments, cut if they are longer than a pack: index in S, offset in the segment, length."""
    n_pieces = 0
    for length in length_S:
        n_pieces += length // sequence_length + (length % sequence_length > 1)
    place_P, offset_P, length_P = np.empty(n_pieces, np.int64), np.empty(n_pieces, np.int64), np.empty(n_pieces, np.int64)
    p = 0
    for s in range(len(length_S)):
        for offset in range(0, length_S[s], sequence_length):
            left = length_S[s] - offset
            if left > 1:
                place_P[p], offset_P[p], length_P[p] = s, offset, min(left, sequence_length)
                p += 1
    return place_P, offset_P, length_P


@njit(cache=True, nogil=True)
def _concatenated(length_S: Any, sequence_length: int) -> Any:
    """Joined segments, cut into pieces: index in S, offset in the segment, length, and the pack of each piece."""
    n_pieces, end = 0, 0
    for length in length_S:
        if length:
            n_pieces += (end + length - 1) // sequence_length - end // sequence_length + 1
            end += length
    place_P, offset_P = np.empty(n_pieces, np.int64), np.empty(n_pieces, np.int64)
    length_P, pack_P = np.empty(n_pieces, np.int64), np.empty(n_pieces, np.int64)
    p, at = 0, 0
    for s in range(len(length_S)):
        offset = 0
        while offset < length_S[s]:
            length = min(length_S[s] - offset, sequence_length - at % sequence_length)
            place_P[p], offset_P[p], length_P[p], pack_P[p] = s, offset, length, at // sequence_length
            p, at, offset = p + 1, at + length, offset + length
    return place_P, offset_P, length_P, pack_P


@njit(cache=True, nogil=True)
def _best_fit(length_P: Any, sequence_length: int) -> Any:
    """The pack of each piece: longest pieces first, each into the open pack with the least sufficient room.

    The open packs with the same room are a linked list. Rooms are in groups with counts of open packs, so that the next room is found in at
    most about 2 · sqrt(sequence_length) steps: 0.1 µs a piece at 2048 (`benchmarks/training_data.py`).
    """
    group_size = int(np.sqrt(sequence_length)) + 1
    first_of_room = np.full(sequence_length + 1, -1, np.int64)
    n_open_of_group = np.zeros(sequence_length // group_size + 1, np.int64)
    next_pack = np.empty(len(length_P), np.int64)
    pack_P = np.empty(len(length_P), np.int64)
    n_packs = 0
    for piece in _longest_first(length_P, sequence_length):
        length = length_P[piece]
        room = _least_room(first_of_room, n_open_of_group, group_size, length)
        if room < 0:
            chosen, room, n_packs = n_packs, sequence_length, n_packs + 1
        else:
            chosen = first_of_room[room]
            first_of_room[room] = next_pack[chosen]
            n_open_of_group[room // group_size] -= 1
        pack_P[piece] = chosen
        room -= length
        if room >= 2:  # the shortest piece
            next_pack[chosen] = first_of_room[room]
            first_of_room[room] = chosen
            n_open_of_group[room // group_size] += 1
    return pack_P


@njit(cache=True, nogil=True)
def _longest_first(length_P: Any, longest: int) -> Any:
    """Pieces by falling length, in stable order."""
    first_of_length = np.zeros(longest + 1, np.int64)
    for length in length_P:
        first_of_length[length - 1] += 1
    for length in range(longest - 1, -1, -1):
        first_of_length[length] += first_of_length[length + 1]
    order_P = np.empty(len(length_P), np.int64)
    for piece in range(len(length_P)):
        length = length_P[piece]
        order_P[first_of_length[length]] = piece
        first_of_length[length] += 1
    return order_P


@njit(cache=True, nogil=True)
def _least_room(first_of_room: Any, n_open_of_group: Any, group_size: int, length: int) -> int:
    """The least room of an open pack that is at least `length`, or -1."""
    group = length // group_size
    for room in range(length, min((group + 1) * group_size, len(first_of_room))):
        if first_of_room[room] >= 0:
            return room
    for other in range(group + 1, len(n_open_of_group)):
        if n_open_of_group[other]:
            for room in range(other * group_size, min((other + 1) * group_size, len(first_of_room))):
                if first_of_room[room] >= 0:
                    return room
    return -1
