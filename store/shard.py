"""Reads rows of a shard, which is how `arrays.write_group` stores an array: a file of chunks of rows, one after another, and their index.

Any Zarr reader reads these files; but zarr-python takes 1.1 ms to read a thousand rows of a float16 array, and 2.3 ms to open a part, where
this takes 0.06 ms and 0.2 ms, and a question about one document reads six arrays (`benchmarks/sql.py`).
"""

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numcodecs.zstd
import numpy as np
from numpy.typing import NDArray

_CRC_BYTES = 4
_ABSENT = np.iinfo(np.uint64).max  # in the index, of a chunk that is not stored because all of it is the fill value
_DECOMPRESS: Mapping[str, Callable[..., Any]] = {"zstd": numcodecs.zstd.decompress, "blosc": numcodecs.blosc.decompress}


class Shard:
    """One array of a part."""

    def __init__(self, path: Path | None, metadata: Mapping[str, Any]) -> None:
        """`path` is the file, None where nothing is stored because all is the fill value; `metadata` is the array's in Zarr v3.

        Raises:
            KeyError, IndexError, TypeError, ValueError: this is not the metadata of an array that `write_group` wrote.
        """
        self.path = path
        self.shape: tuple[int, ...] = tuple(metadata["shape"])
        self.dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
        self._fill = metadata["fill_value"]
        (sharding,) = (codec["configuration"] for codec in metadata["codecs"])
        self.chunk_rows: int = sharding["chunk_shape"][0]
        names = [codec["name"] for codec in sharding["codecs"]]
        index_names = [codec["name"] for codec in sharding["index_codecs"]]
        if (names[0], *names[2:], *index_names) != ("bytes", "crc32c", "bytes", "crc32c") or sharding["index_location"] != "end":
            raise ValueError(f"its codecs are {names}, with {index_names} at the {sharding['index_location']} of the file")
        self._decompress = _DECOMPRESS[names[1]]

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], int]:
        """Rows `start` to `stop`, which must be rows of the array, and the number of bytes that were read for them.

        Raises:
            OSError: the file cannot be read.
            ValueError, RuntimeError: it is not what was written.
        """
        rows = np.full((stop - start, *self.shape[1:]), self._fill, self.dtype)
        if self.path is None or not rows.size:
            return rows, 0
        n_bytes = 0
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for chunk in range(start // self.chunk_rows, (stop - 1) // self.chunk_rows + 1):
                offset, size = self._index[chunk]
                if offset != _ABSENT:
                    first = chunk * self.chunk_rows
                    self._decode(os.pread(descriptor, int(size), int(offset)), into=rows, first=first - start)
                    n_bytes += int(size)
        finally:
            os.close(descriptor)
        return rows, n_bytes

    def _decode(self, stored: bytes, *, into: NDArray[Any], first: int) -> None:
        """Decode a chunk to its place: its row 0 is row `first` of the result, which may not have all of its rows."""
        data, last = _checked(stored), first + self.chunk_rows
        if first >= 0 and last <= len(into):
            self._decompress(data, into[first:last])
            return
        chunk = np.empty((self.chunk_rows, *self.shape[1:]), self.dtype)
        self._decompress(data, chunk)
        begin, end = max(first, 0), min(last, len(into))
        into[begin:end] = chunk[begin - first : end - first]

    @cached_property
    def _index(self) -> NDArray[np.uint64]:
        """Where each chunk begins in the file, and its bytes."""
        assert self.path is not None
        n_chunks = -(-self.shape[0] // self.chunk_rows)
        size = n_chunks * 16 + _CRC_BYTES
        with self.path.open("rb") as file:
            file.seek(-size, os.SEEK_END)
            return np.frombuffer(_checked(file.read(size)), "<u8").reshape(n_chunks, 2)


def _checked(stored: bytes) -> bytes:
    """What was stored before its CRC-32C.

    Raises:
        ValueError: it is another.
    """
    data, expected = stored[:-_CRC_BYTES], int.from_bytes(stored[-_CRC_BYTES:], "little")
    found = google_crc32c.value(data)
    if found != expected:
        raise ValueError(f"the checksum of a chunk is {found:08x}, and was {expected:08x} when it was written")
    return data
