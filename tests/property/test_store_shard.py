"""Our reader of shards gives what zarr-python gives, and nothing that was not written."""

import numpy as np
import pytest
import zarr
from fuseline.store import arrays
from fuseline.store.shard import Shard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = ["uint8", "bool", "uint16", "uint32", "int32", "int64", "float16", "float32", "float64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_ROWS", 8)
        yield tmp_path_factory.mktemp("shards") / "group"


@st.composite
def stored_arrays(draw) -> np.ndarray:
    dtype = draw(st.sampled_from(DTYPES))
    shape = (draw(st.integers(0, 40)), *draw(st.sampled_from([(), (1,), (3,)])))
    array = draw(hnp.arrays(dtype, shape))
    for chunk in draw(st.sets(st.integers(0, 4))):  # chunks of zeros are not stored
        array[chunk * 8 : chunk * 8 + 8] = 0
    return array


def shard_of(folder, array: np.ndarray) -> Shard:
    arrays.write_group(folder, arrays={"x": array}, attributes={})
    files = [path for path in (folder / "x" / "c").rglob("*") if path.is_file()]
    assert len(files) <= 1
    return Shard(next(iter(files), None), zarr.open_group(folder, mode="r")["x"].metadata.to_dict())


@given(array=stored_arrays(), bounds=st.tuples(st.integers(0, 40), st.integers(0, 40)))
@settings(max_examples=150, deadline=None)
def test_any_rows_are_those_that_were_written(folder, array, bounds):
    shard = shard_of(folder, array)
    start, stop = sorted(min(bound, len(array)) for bound in bounds)
    rows, n_bytes = shard.read(start, stop)
    assert rows.dtype == array.dtype
    assert rows.shape == array[start:stop].shape
    assert rows.tobytes() == array[start:stop].tobytes() == np.asarray(zarr.open_group(folder, mode="r")["x"][start:stop]).tobytes()
    assert n_bytes <= (0 if shard.path is None else shard.path.stat().st_size)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_file_that_was_changed_in_any_place_is_never_read_as_something_else(folder, data):
    array = np.arange(40, dtype=data.draw(st.sampled_from(["uint16", "float32"])))
    shard = shard_of(folder, array)
    assert shard.path is not None
    stored = bytearray(shard.path.read_bytes())
    if data.draw(st.booleans()):
        stored = stored[: data.draw(st.integers(0, len(stored) - 1))]
    else:
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    shard.path.write_bytes(stored)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        shard.read(0, len(array))
