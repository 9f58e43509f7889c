"""How arrays are laid out and encoded in a part's Zarr v3 group.

Axes: T tokens (or positions) of a part, S its segments, K entries of a distribution, D documents. An array's name ends in its axes; ragged
axes come with offsets, never with padding.

Every array is one shard file of chunks of 16,384 rows, each with a CRC-32C: without a checksum 51 to 55 of 60 flipped bits pass silently.
Encodings were measured on real distributions (`benchmarks/store.py`): bitshuffle helps float16 and hurts uint16 ids; byte shuffle helps
uint32.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.errors import ZarrUserWarning

CHUNK_ROWS = 16_384
Arrays = Mapping[str, NDArray[Any]]


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integer type that holds every id of a vocabulary: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65_536 else np.uint32)


def write_group(folder: Path, *, arrays: Arrays, attributes: Mapping[str, Any]) -> None:
    """Write arrays and attributes as one Zarr group with consolidated metadata (3.8 ms to open instead of one read per array)."""
    group = zarr.create_group(folder, attributes=dict(attributes), overwrite=True)
    for name, array in arrays.items():
        rows = min(CHUNK_ROWS, max(1, len(array)))
        shard_rows = -(-max(1, len(array)) // rows) * rows
        rest = tuple(max(1, size) for size in array.shape[1:])
        target = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(rows, *rest),
            shards=(shard_rows, *rest),
            compressors=_compressors(array.dtype),
        )
        if array.size:
            target[...] = array
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # not yet in the Zarr 3 specification; zarr-python reads and writes it
        zarr.consolidate_metadata(folder)


def _compressors(dtype: np.dtype[Any]) -> list[Any]:
    if dtype.kind == "f":
        shuffle: Literal["bitshuffle", "shuffle"] = "bitshuffle" if dtype.itemsize == 2 else "shuffle"
        return [BloscCodec(typesize=dtype.itemsize, cname="zstd", clevel=5, shuffle=shuffle), Crc32cCodec()]
    if dtype.itemsize > 2:
        return [BloscCodec(typesize=dtype.itemsize, cname="zstd", clevel=5, shuffle="shuffle"), Crc32cCodec()]
    return [ZstdCodec(level=5), Crc32cCodec()]
