"""Reading the arrays of a committed part: whole or by rows, checked against the manifest, with what was read counted."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from .arrays import decoded
from .errors import DamagedPart


class Reads:
    """How much was read of parts' arrays, by any thread."""

    def __init__(self) -> None:
        self.chunks = self.stored_bytes = 0  # bytes as they lie on the disk
        self._lock = Lock()

    def add(self, *, chunks: int = 0, stored_bytes: int = 0) -> None:
        """Count what was read."""
        with self._lock:
            self.chunks += chunks
            self.stored_bytes += stored_bytes


class PartArrays:
    """The arrays of one part, opened once. Parts are immutable, so it stays valid as long as the part is there."""

    def __init__(self, folder: Path, *, sizes: Mapping[str, int], remedy: str, reads: Reads | None = None) -> None:
        """`sizes` are bytes of each file in the folder, by path, as the manifest says; `remedy` is what to do about damage; `reads` counts.

        Raises:
            DamagedPart: the folder is missing or not a Zarr group.
        """
        self.folder, self._reads = folder, reads or Reads()
        self._sizes, self._remedy = sizes, remedy
        self._arrays: dict[str, zarr.Array[Any]] = {}
        try:
            self._group = zarr.open_consolidated(_CountingStore(folder, reads=self._reads), mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise DamagedPart(f"{folder} is named by its manifest but cannot be opened ({error}). {remedy}") from error

    @cached_property
    def names(self) -> list[str]:
        """Names of the arrays, sorted."""
        return sorted(self._group.array_keys())

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The small facts that are stored beside the arrays."""
        return self._group.attrs.asdict()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start` to `stop` of an array (by default all), decoded; only the chunks that hold them are read, and checked.

        Log-probabilities come as float16 or, where they are stored in eight bits (`arrays.encode_q8`), as float32: never as codes.

        Raises:
            DamagedPart: the array is missing, cut short, or does not match its checksum.
        """
        try:
            array = self._arrays[name] if name in self._arrays else self._open(name)
            stop = array.shape[0] if stop is None else stop
            if stop > start:
                self._reads.add(chunks=(stop - 1) // array.chunks[0] - start // array.chunks[0] + 1)
            return decoded(np.asarray(array[start:stop]), attributes=array.attrs)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            if isinstance(error, DamagedPart):
                raise
            raise DamagedPart(f"{self.folder}: the array {name} cannot be read ({error}). {self._remedy}") from error

    def _open(self, name: str) -> "zarr.Array[Any]":
        # Zarr would read a missing or empty shard as zeros; what one of the right size holds it checks itself.
        for path, size in self._sizes.items():
            if path.startswith(f"{name}/") and not _has_size(self.folder / path, size):
                raise DamagedPart(f"{self.folder / path} of the array {name} is missing or cut short. {self._remedy}")
        self._arrays[name] = cast("zarr.Array[Any]", self._group[name])
        return self._arrays[name]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


class _CountingStore(LocalStore):
    """A read-only folder that counts the bytes which are read of it."""

    def __init__(self, root: Path, *, reads: Reads) -> None:
        super().__init__(root, read_only=True)
        self._reads = reads

    async def get(self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        if found is not None and not key.endswith("zarr.json"):
            self._reads.add(stored_bytes=len(found))
        return found
