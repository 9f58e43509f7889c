"""Reads the arrays of a committed part, whole or by rows, checks them against the manifest, and counts what was read."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from .arrays import decoded, require_decodable
from .errors import DamagedPart, reason_of
from .inside import require_inside
from .json_files import Facts, decode_json, read_bytes
from .manifest import Manifest
from .shard import Shard
from .shown import shown

_COUNTED = {"T": "tokens", "TK": "tokens", "S": "segments", "SN": "segments"}  # axes in arrays' names -> what the manifest counts


class Reads:
    """How much was read of arrays, by all threads."""

    def __init__(self) -> None:
        self.chunks = self.stored_bytes = 0  # bytes on the disk
        self._lock = Lock()

    def add(self, *, chunks: int = 0, stored_bytes: int = 0) -> None:
        """Add what was read."""
        with self._lock:
            self.chunks += chunks
            self.stored_bytes += stored_bytes


class PartArrays:
    """The arrays of one part, opened once. Parts are immutable, so this stays valid while the part exists."""

    def __init__(self, folder: Path, *, manifest: Manifest, remedy: str, reads: Reads | None = None) -> None:
        """`folder` is the payload that `manifest` names; `remedy` is what to do about damage; `reads` counts what is read.

        Raises:
            DamagedPart: the folder is missing, is not a Zarr group, or its metadata have changed since the commit.
        """
        self.folder, self._manifest, self._remedy, self._reads = folder, manifest, remedy, reads or Reads()
        self._shards: dict[str, Shard] = {}
        path = folder / "zarr.json"  # the metadata of all arrays, which Zarr has no checksum for
        try:
            require_inside(path, folder=folder)
            data = read_bytes(path)
            if (len(data), zlib.crc32(data)) != manifest.files["zarr.json"]:
                raise DamagedPart(f"{path} has changed since the commit: its checksum differs from the manifest's.", remedy=remedy)
            group = decode_json(data)
            facts, self._metadata = group["attributes"], group["consolidated_metadata"]["metadata"]
            for name, entry in {"attributes": facts, "metadata": self._metadata, **self._metadata}.items():
                if not isinstance(entry, dict):
                    raise ValueError(f"its {shown(name)} must be an object")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DamagedPart):
                raise
            raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy=remedy) from error
        # The small values that are stored beside the arrays.
        self.attributes: Mapping[str, Any] = Facts(facts, path=path, what="attributes", remedy=remedy)

    @property
    def names(self) -> list[str]:
        """Names of the arrays, sorted."""
        return sorted(self._metadata)

    def read_if_there(self, name: str) -> NDArray[Any] | None:
        """A whole array that only some datasets of the kind have; None if this one does not have it."""
        return self.read(name) if name in self.names else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start` to `stop` of an array (by default all), decoded; only their chunks are read and checked.

        Log-probabilities are float16, or float32 if they are stored in eight bits (`arrays.encode_q8`); never codes.

        Raises:
            DamagedPart: the array is missing, cut short, or does not match its checksum.
        """
        try:
            shard = self._shards.get(name) or self._open(name)
            stop = shard.shape[0] if stop is None else stop
            rows, n_bytes = shard.read(start, stop)
        except (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
            if isinstance(error, DamagedPart):
                raise
            raise DamagedPart(f"{self.folder}: the array {name} cannot be read ({reason_of(error)}).", remedy=self._remedy) from error
        if stop > start:
            self._reads.add(chunks=(stop - 1) // shard.chunk_rows - start // shard.chunk_rows + 1, stored_bytes=n_bytes)
        return decoded(rows, attributes=self._metadata[name]["attributes"])

    def _open(self, name: str) -> Shard:
        files = {self.folder / path: size for path, (size, _) in self._manifest.files.items() if path.startswith(f"{name}/c/")}
        for path, size in files.items():
            if not _has_size(path, size):
                raise DamagedPart(f"{path} of the array {name} is missing or cut short.", remedy=self._remedy)
            require_inside(path, folder=self.folder)
        metadata = self._metadata[name]
        shard = Shard(next(iter(files), None), metadata)
        counted = self._manifest.counts.get(_COUNTED.get(name.rpartition("_")[2], ""))
        if counted is not None and shard.shape[0] != counted:
            raise ValueError(f"it has {shard.shape[0]:,} rows, but the manifest says {counted:,}")
        require_decodable(shard.dtype, attributes=metadata["attributes"])
        self._shards[name] = shard
        return shard


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
