"""Which tokens go into which packed sequence, and which packed sequences into which batch: a function of the data's offsets and the seed.

Axes: N packs of an epoch, P pieces of an epoch, S segments of a part.

A piece is a run of consecutive tokens of one segment: the whole of it, or a cut of at most `sequence_length` tokens where it is longer. A
pack holds whole pieces, at most `sequence_length` tokens together. The number of ranks plays no part, so any number sees the same batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUFFER_PARTS = 4  # parts whose segments are shuffled together; a rank holds about twice as many in memory
_OPEN_PACKS = 32  # packs that a piece may still join: with segments of mixed length packs are over 99 % full


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one segment: `start` counts from the beginning of the part."""

    part: int
    segment: int
    start: int
    length: int
    ends_segment: bool  # its last token is the segment's last, so that position has no next token


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPacks:
    """The packs of one epoch, in order."""

    part_P: NDArray[np.int32]
    segment_P: NDArray[np.int32]
    start_P: NDArray[np.int64]
    length_P: NDArray[np.int32]
    ends_segment_P: NDArray[np.bool_]
    pack_offsets_N1: NDArray[np.int64]  # N + 1 offsets into the pieces

    def __len__(self) -> int:
        return len(self.pack_offsets_N1) - 1

    def __getitem__(self, pack: int) -> list[Piece]:
        span = slice(self.pack_offsets_N1[pack], self.pack_offsets_N1[pack + 1])
        columns = (self.part_P, self.segment_P, self.start_P, self.length_P, self.ends_segment_P)
        return [Piece(*fields) for fields in zip(*(column[span].tolist() for column in columns), strict=True)]


def pack_epoch(offsets: Mapping[int, NDArray[np.int64]], *, sequence_length: int, seed: int, epoch: int) -> EpochPacks:
    """Order and pack all segments once.

    Parts come in random order, BUFFER_PARTS at a time; the segments of a buffer are shuffled together and go to the fullest open pack that
    has room. When too many packs are open, the fullest is closed.

    Args:
        offsets: `segment_offsets` (S + 1 tokens, ascending) of each part.
        sequence_length: most tokens of a pack.
        seed: of the order.
        epoch: counts from 0; each has its own order.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(np.array(sorted(offsets), dtype=np.int32))
    buffers = [order[i : i + BUFFER_PARTS].tolist() for i in range(0, len(order), BUFFER_PARTS)]
    tables, packs, n_pieces = [], [], 0
    packer = _Packer(sequence_length)
    for buffer in buffers:
        table = np.concatenate([_pieces(part, offsets[part], sequence_length=sequence_length) for part in buffer], axis=1)
        table = table[:, random.permutation(table.shape[1])]
        tables.append(table)
        packs += list(packer.add(table[3].tolist(), first=n_pieces))
        n_pieces += table.shape[1]
    packs += packer.close()
    table = np.concatenate(tables, axis=1)[:, [piece for pack in packs for piece in pack]]
    return EpochPacks(
        part_P=table[0].astype(np.int32),
        segment_P=table[1].astype(np.int32),
        start_P=table[2],
        length_P=table[3].astype(np.int32),
        ends_segment_P=table[4].astype(np.bool_),
        pack_offsets_N1=np.concatenate([[0], np.cumsum([len(pack) for pack in packs], dtype=np.int64)]),
    )


def _pieces(part: int, segment_offsets: NDArray[np.int64], *, sequence_length: int) -> NDArray[np.int64]:
    """Columns part, segment, start, length, ends_segment. A piece of one token that ends its segment predicts nothing and is left out."""
    lengths_S = np.diff(segment_offsets)
    cuts_S = -(-lengths_S // sequence_length)
    segment_P = np.repeat(np.arange(len(lengths_S)), cuts_S)
    within_P = (np.arange(cuts_S.sum()) - np.repeat(np.cumsum(cuts_S) - cuts_S, cuts_S)) * sequence_length
    left_P = lengths_S[segment_P] - within_P
    length_P = np.minimum(left_P, sequence_length)
    start_P = segment_offsets[segment_P] + within_P
    pieces = np.stack([np.full_like(segment_P, part), segment_P, start_P, length_P, left_P <= sequence_length])
    return pieces[:, left_P > 1]


class _Packer:
    """Best fit over a bounded number of open packs."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.open: list[tuple[int, list[int]]] = []  # (room, pieces), least room first

    def add(self, lengths: Sequence[int], *, first: int) -> Iterator[list[int]]:
        """Place pieces numbered from `first`; yields the packs that this closes."""
        for piece, length in enumerate(lengths, start=first):
            place = next((i for i, (room, _) in enumerate(self.open) if room >= length), None)
            room, pieces = (self.sequence_length, []) if place is None else self.open.pop(place)
            pieces.append(piece)
            room -= length
            if room < 2:  # no piece is shorter
                yield pieces
                continue
            self.open.insert(next((i for i, (other, _) in enumerate(self.open) if other >= room), len(self.open)), (room, pieces))
            if len(self.open) > _OPEN_PACKS:
                yield self.open.pop(0)[1]

    def close(self) -> list[list[int]]:
        """The packs that are still open."""
        return [pieces for _, pieces in self.open]
