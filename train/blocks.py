"""Reads blocks of a part's rows and lays pieces of them end to end.

Axes: T tokens, K stored entries of a distribution, P pieces, R rows of a block.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..store.dataset import Dataset
from .order import BUFFER_BLOCKS, SegmentIndex
from .packing import Packs

Arrays = Mapping[str, NDArray[Any]]


class Blocks:
    """The decoded arrays of the most recently used blocks.

    At most BUFFER_BLOCKS are cached, about 2M rows for parts of any size: 92 MB for ten entries with ids of two bytes and float16. Only one
    thread may read.
    """

    def __init__(self, dataset: Dataset, *, index: SegmentIndex, names: tuple[str, ...]) -> None:
        self._dataset, self._index, self._names = dataset, index, names
        self._arrays: OrderedDict[int, Arrays] = OrderedDict()

    def gather(self, packs: Packs) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
        """For each array the rows of packs' pieces, end to end; and for each piece the token after it in its block.

        That token is the segment's next token if the piece does not end its segment, else undefined.
        """
        start_P = np.cumsum(packs.length_P) - packs.length_P
        following_P = np.empty(len(start_P), np.int64)
        gathered: dict[str, NDArray[Any]] = {}
        blocks, first_P = np.unique(packs.block_P, return_index=True)
        for block in blocks[np.argsort(first_P)].tolist():  # the packs of one buffer are together, so its blocks stay in the cache
            pieces = np.flatnonzero(packs.block_P == block)
            begin, length, to = packs.start_P[pieces], packs.length_P[pieces], start_P[pieces]
            arrays = self._read(block)
            for name, rows in arrays.items():
                if name not in gathered:
                    gathered[name] = np.empty((int(packs.length_P.sum()), *rows.shape[1:]), rows.dtype)
                _copy_rows(_bits(rows), begin, length, _bits(gathered[name]), to)
            token_ids_R = arrays["token_ids_T"]
            following_P[pieces] = token_ids_R[np.minimum(begin + length, len(token_ids_R) - 1)]
        return gathered, following_P

    def _read(self, block: int) -> Arrays:
        if block in self._arrays:
            self._arrays.move_to_end(block)
            return self._arrays[block]
        if len(self._arrays) >= BUFFER_BLOCKS:
            self._arrays.popitem(last=False)
        start = int(self._index.row_B[block])
        part = self._dataset.arrays(int(self._index.part_B[block]))
        found = {name: part.read(name, start, start + int(self._index.n_rows_B[block])) for name in self._names}
        self._arrays[block] = found
        return found


def _bits(rows: NDArray[Any]) -> NDArray[Any]:
    """The same memory as unsigned integers: numba has no float16, and one compiled version per size is enough."""
    return rows.view(f"u{rows.itemsize}").reshape(len(rows), -1)


@njit(cache=True, nogil=True)
def _copy_rows(rows: Any, begin_P: Any, length_P: Any, out: Any, to_P: Any) -> None:
    for p in range(len(begin_P)):
        out[to_P[p] : to_P[p] + length_P[p]] = rows[begin_P[p] : begin_P[p] + length_P[p]]
