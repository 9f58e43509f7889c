"""Reading the arrays of a committed part: whole or by rows, checked against the manifest, with what was read counted."""

import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from .arrays import decoded
from .errors import DamagedPart
from .shard import Shard


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
            DamagedPart: the folder is missing or holds no Zarr group.
        """
        self.folder, self._reads = folder, reads or Reads()
        self._sizes, self._remedy = sizes, remedy
        self._shards: dict[str, Shard] = {}
        try:
            group = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
            self.attributes: Mapping[str, Any] = group["attributes"]  # the small facts that are stored beside the arrays
            self._metadata: Mapping[str, Any] = group["consolidated_metadata"]["metadata"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedPart(f"{folder} is named by its manifest but cannot be opened ({error}).", remedy=remedy) from error

    @property
    def names(self) -> list[str]:
        """Names of the arrays, sorted."""
        return sorted(self._metadata)

    def read_if_there(self, name: str) -> NDArray[Any] | None:
        """All of an array that not every dataset of the kind has; None where this one has not."""
        return self.read(name) if name in self.names else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start` to `stop` of an array (by default all), decoded; only the chunks that hold them are read, and checked.

        Log-probabilities come as float16 or, where they are stored in eight bits (`arrays.encode_q8`), as float32: never as codes.

        Raises:
            DamagedPart: the array is missing, cut short, or does not match its checksum.
        """
        try:
            shard = self._shards.get(name) or self._open(name)
            stop = shard.shape[0] if stop is None else stop
            rows, n_bytes = shard.read(start, stop)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            if isinstance(error, DamagedPart):
                raise
            raise DamagedPart(f"{self.folder}: the array {name} cannot be read ({error}).", remedy=self._remedy) from error
        if stop > start:
            self._reads.add(chunks=(stop - 1) // shard.chunk_rows - start // shard.chunk_rows + 1, stored_bytes=n_bytes)
        return decoded(rows, attributes=self._metadata[name]["attributes"])

    def _open(self, name: str) -> Shard:
        files = {self.folder / path: size for path, size in self._sizes.items() if path.startswith(f"{name}/c/")}
        for path, size in files.items():
            if not _has_size(path, size):
                raise DamagedPart(f"{path} of the array {name} is missing or cut short.", remedy=self._remedy)
        shard = self._shards[name] = Shard(next(iter(files), None), self._metadata[name])
        return shard


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
