"""Layout and encoding of the arrays in a part's Zarr v3 group.

Axes: T tokens (or positions) of a part, S its segments, K entries of a distribution, D documents. An array's name ends in its axes; ragged
axes come with offsets, never with padding.

Every array is one shard file of chunks of 16,384 rows, each with a CRC-32C: without a checksum, 51 to 55 of 60 flipped bits go unnoticed.
Compressors were chosen by measurement on real distributions (`benchmarks/store.py`). Rows are stored unchanged, not rank by rank, because
the entries of one position are correlated. Ids compress best as whole ids (zstd); floats and growing positions with shuffled bytes.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.errors import ZarrUserWarning

CHUNK_ROWS = 16_384
Arrays = Mapping[str, NDArray[Any]]
Encoding = Literal["f16", "q8"]  # of log-probabilities: float16, or eight bits that are coarser for less likely tokens

_Q8_SCALE = 60.0
_Q8_ZERO = 255  # the code of probability 0
_Q8_TABLE = np.append(0 - np.square(np.arange(_Q8_ZERO) / _Q8_SCALE), -np.inf).astype(np.float32)


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integer type that holds every id of a vocabulary: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65_536 else np.uint32)


def encode_q8(logprobs: NDArray[Any]) -> NDArray[np.uint8]:
    """Log-probabilities (nats, any float type and shape) as `round(60 · sqrt(-logprob))`, from 0 to 254; -inf as 255.

    The error is at most sqrt(-logprob) / 60 + 1 / 14400 nats, down to a log-probability of -17.9; lower values are stored as that.
    """
    assert not np.isnan(logprobs).any(), "a log-probability must be a number"
    magnitudes = np.maximum(-np.asarray(logprobs, np.float32), 0)
    codes = np.minimum(np.rint(_Q8_SCALE * np.sqrt(magnitudes)), _Q8_ZERO - 1)
    return np.where(np.isinf(magnitudes), _Q8_ZERO, codes).astype(np.uint8)


def decode_q8(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The log-probabilities (nats) that `encode_q8` encoded, in the same shape."""
    return _Q8_TABLE[codes]


_ENCODERS: Mapping[Encoding, Callable[[NDArray[Any]], NDArray[Any]]] = {"f16": lambda array: array.astype(np.float16), "q8": encode_q8}


def write_group(folder: Path, *, arrays: Arrays, attributes: Mapping[str, Any], encodings: Mapping[str, Encoding] | None = None) -> None:
    """Write arrays and attributes as one Zarr group with consolidated metadata (3.8 ms to open instead of one read per array).

    `encodings` gives the encoding of some arrays of log-probabilities; an array in `q8` has the attribute `encoding`.
    """
    with zarr.config.set({"json_indent": None}):  # 18 kB of metadata a part instead of 38
        group = zarr.create_group(folder, attributes=dict(attributes), overwrite=True)
        for name, array in arrays.items():
            encoding = (encodings or {}).get(name)
            stored = array if encoding is None else _ENCODERS[encoding](array)
            _write_array(group, name, stored, attributes={"encoding": encoding} if encoding == "q8" else {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZarrUserWarning)  # not yet in the Zarr 3 specification; zarr-python reads and writes it
            zarr.consolidate_metadata(folder)


def decoded(array: NDArray[Any], *, attributes: Mapping[str, Any]) -> NDArray[Any]:
    """An array read from a group, decoded: floats instead of codes."""
    return decode_q8(array) if attributes.get("encoding") == "q8" else array


def require_decodable(dtype: np.dtype[Any], *, attributes: Mapping[str, Any]) -> None:
    """Raise ValueError if `decoded` cannot decode an array of this type."""
    if attributes.get("encoding") == "q8" and dtype != np.uint8:
        raise ValueError(f"its encoding is q8, which needs uint8, but its type is {dtype}")


def _write_array(group: zarr.Group, name: str, array: NDArray[Any], *, attributes: Mapping[str, Any]) -> None:
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
        attributes=dict(attributes),
    )
    if array.size:
        target[...] = array


def _compressors(dtype: np.dtype[Any]) -> list[Any]:
    # Higher levels write more slowly and read as fast. At these, all arrays together are written at 65,000 to 190,000 tokens a CPU-second
    # (k = 10), beside forward passes that make at most 50,000 a second.
    if dtype.kind in "ub":
        return [ZstdCodec(level=17), Crc32cCodec()]
    return [BloscCodec(typesize=dtype.itemsize, cname="zstd", clevel=9, shuffle="shuffle"), Crc32cCodec()]
