"""The order of a run's segments: a function of their lengths, the seed and the number of the pack.

Axes: S segments of all parts, B blocks of all parts.

A block is the unit of reading: the segments of a part that begin in the same `BLOCK_ROWS` of its rows. In each epoch all blocks come in
random order, and the segments of `BUFFER_BLOCKS` blocks are shuffled and packed together. So the segments of a batch come from up to
`BUFFER_BLOCKS` random places in all parts, over which the corpus has already placed documents at random. A chunk is decoded about once
per epoch (9/8 times, because a block may begin and end inside chunks). The packs of a buffer do not depend on other buffers, so any pack
can be found without the previous ones. The numbers of ranks and of packs in a micro-batch have no effect.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..store.arrays import CHUNK_ROWS
from .labels import LabelRuns
from .packing import Packing, Packs, Segments, count_packs, pack

BLOCK_ROWS = 8 * CHUNK_ROWS
BUFFER_BLOCKS = 16  # about 2M tokens: 1,024 packs of 2,048


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentIndex:
    """All segments of a run, 4 bytes each, and their blocks."""

    length_S: NDArray[np.int32]
    part_B: NDArray[np.int64]
    row_B: NDArray[np.int64]  # of the block's first token in its part
    n_rows_B: NDArray[np.int64]
    number_B: NDArray[np.int64]  # of the block's first segment in its part
    first_B1: NDArray[np.int64]  # the block's first segment in S; B + 1 entries

    @classmethod
    def of(cls, offsets: Mapping[int, NDArray[np.int64]]) -> "SegmentIndex":
        """From the `segment_offsets` of parts (tokens, ascending from 0), in the order of their numbers."""
        columns: dict[str, list[NDArray[np.int64]]] = {name: [] for name in ("part_B", "row_B", "n_rows_B", "number_B")}
        for part, starts in sorted(offsets.items()):
            number_B = np.flatnonzero(np.diff(starts[:-1] // BLOCK_ROWS, prepend=-1))
            row_B = starts[number_B]
            n_rows_B = np.diff(row_B, append=starts[-1])
            for name, column in zip(columns, (np.full_like(number_B, part), row_B, n_rows_B, number_B), strict=True):
                columns[name].append(column)
        lengths = [np.diff(offsets[part]).astype(np.int32) for part in sorted(offsets)]
        before = np.cumsum([0, *map(len, lengths)])
        first = [number_B + n for number_B, n in zip(columns["number_B"], before, strict=False)]
        return cls(
            length_S=np.concatenate(lengths),
            first_B1=np.concatenate([*first, before[-1:]]),
            **{name: np.concatenate(found) for name, found in columns.items()},
        )

    def segments(self, blocks: NDArray[np.int64]) -> Segments:
        """The segments of some blocks, block by block."""
        n_B = self.first_B1[blocks + 1] - self.first_B1[blocks]
        before_S = np.repeat(np.cumsum(n_B) - n_B, n_B)
        segment_S = np.repeat(self.first_B1[blocks], n_B) + np.arange(len(before_S)) - before_S
        length_S = self.length_S[segment_S]
        end_S = np.cumsum(length_S, dtype=np.int64)
        rows_before_B = np.cumsum(self.n_rows_B[blocks]) - self.n_rows_B[blocks]
        return Segments(
            block_S=np.repeat(blocks, n_B).astype(np.int32),
            segment_S=segment_S,
            start_S=end_S - length_S - np.repeat(rows_before_B, n_B),
            length_S=length_S,
        )


class PackOrder:
    """The endless sequence of the packs of all epochs."""

    def __init__(self, index: SegmentIndex, *, packing: Packing, sequence_length: int, seed: int, labels: LabelRuns | None = None) -> None:
        """Packs nothing yet; the first request for an epoch counts its packs, at about 10M segments a second."""
        self.index, self._packing, self._sequence_length, self._seed, self._labels = index, packing, sequence_length, seed, labels
        self._first_of_buffer: dict[int, NDArray[np.int64]] = {}  # per epoch: the first pack of each buffer, and the number of packs
        self._last_packed: tuple[tuple[int, int], Packs] | None = None

    def n_packs(self, epoch: int) -> int:
        """Number of packs of an epoch, counted from 0."""
        return int(self._counted(epoch)[-1])

    def tokens_left_out(self) -> int:
        """Tokens of the first epoch that are in no pack, because they have no label."""
        if self._labels is None:
            return 0
        buffers = range(len(self._blocks(0)))
        tokens = [sum(int(self._packed(0, buffer, labels=labels).length_P.sum()) for buffer in buffers) for labels in (None, self._labels)]
        return tokens[0] - tokens[1]

    def packs(self, first: int, stop: int) -> Packs:
        """The packs `first` to `stop` of the run."""
        found: list[Packs] = []
        epoch = before = 0
        while before + self.n_packs(epoch) <= first:
            before, epoch = before + self.n_packs(epoch), epoch + 1
        while first < stop:
            counted = self._counted(epoch) + before
            buffer = int(np.searchsorted(counted, first, side="right")) - 1
            found.append(self._buffer(epoch, buffer)[first - counted[buffer] : stop - counted[buffer]])
            first = int(counted[buffer + 1])
            if first == counted[-1]:
                before, epoch = first, epoch + 1
        return Packs.joined(found)

    def _blocks(self, epoch: int) -> list[NDArray[np.int64]]:
        """The blocks of each buffer."""
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self.index.part_B))
        return [order[i : i + BUFFER_BLOCKS] for i in range(0, len(order), BUFFER_BLOCKS)]

    def _counted(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._first_of_buffer:
            counts = [self._count(epoch, buffer, blocks) for buffer, blocks in enumerate(self._blocks(epoch))]
            self._first_of_buffer[epoch] = np.cumsum([0, *counts])
        return self._first_of_buffer[epoch]

    def _count(self, epoch: int, buffer: int, blocks: NDArray[np.int64]) -> int:
        if self._labels is not None:  # which packs have no label depends on the order
            return len(self._packed(epoch, buffer, labels=self._labels))
        return count_packs(self.index.segments(blocks).length_S, packing=self._packing, sequence_length=self._sequence_length)

    def _buffer(self, epoch: int, buffer: int) -> Packs:
        last = self._last_packed  # read once: another thread may use it for an error report
        if last is None or last[0] != (epoch, buffer):
            last = self._last_packed = (epoch, buffer), self._packed(epoch, buffer, labels=self._labels)
        return last[1]

    def _packed(self, epoch: int, buffer: int, *, labels: LabelRuns | None) -> Packs:
        return pack(
            self.index.segments(self._blocks(epoch)[buffer]),
            packing=self._packing,
            sequence_length=self._sequence_length,
            random=np.random.default_rng((self._seed, epoch, buffer)),
            labels=labels,
        )
