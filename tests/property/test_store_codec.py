"""The eight-bit encoding of log-probabilities: how far off it is, what it keeps, and that its ends are exact."""

import numpy as np
import pytest
from fuseline.store.arrays import decode_q8, encode_q8
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

quick = settings(max_examples=300, deadline=None)
LEAST = -((254 / 60) ** 2)
dtypes = st.sampled_from([np.float16, np.float32, np.float64])
shapes = array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=40)


def logprobs(low: float):
    return dtypes.flatmap(lambda dtype: arrays(dtype, shapes, elements=st.floats(low, 0, width=np.dtype(dtype).itemsize * 8)))


@quick
@given(logprobs(-17.5))
def test_the_error_is_at_most_half_a_step(values):
    found = decode_q8(encode_q8(values))
    assert (found.dtype, found.shape) == (np.float32, values.shape)
    exact = values.astype(np.float64)
    assert (np.abs(found - exact) <= np.sqrt(-exact) / 60 + 1 / 14400 + 2e-6).all()


@quick
@given(logprobs(-1000.0))
def test_encoding_again_changes_nothing(values):
    once = decode_q8(encode_q8(values))
    assert decode_q8(encode_q8(once)).tobytes() == once.tobytes()
    assert np.isfinite(once).all()
    assert (once >= LEAST - 1e-5).all()


@quick
@given(logprobs(-1000.0))
def test_the_order_is_kept(values):
    ordered = np.array(sorted(values.ravel().tolist()))  # np.sort of float16 puts -0.0 anywhere
    assert (np.diff(decode_q8(encode_q8(ordered))) >= 0).all()


def test_every_code_means_a_number_of_its_own_and_comes_back():
    codes = np.arange(256, dtype=np.uint8)
    values = decode_q8(codes)
    assert encode_q8(values).tolist() == codes.tolist()
    assert (np.diff(values) < 0).all()
    assert (values[0], values[255]) == (0, -np.inf)
    assert np.isfinite(values[:255]).all()


def test_certainty_impossibility_and_what_rounding_put_above_zero():
    values = np.array([0.0, -0.0, 1e-7, -np.inf, -1e30], np.float32)
    assert decode_q8(encode_q8(values)).tolist() == pytest.approx([0, 0, 0, -np.inf, LEAST])
