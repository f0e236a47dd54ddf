"""Dropout: masks from a counter, drawn again by the backward; the published generator."""

import numpy as np
import pytest
from helpers.gradcheck import check_gradients
from helpers.strategies import layouts, normal, seeds, sizes
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch.dropout import Dropped, dropout, dropout_backward, dropout_mask, philox
from rt_scratch.kernels import cpu


@given(seeds, sizes, layouts, st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout(seed, n, layout, rate):
    rng = np.random.default_rng(seed)
    x, dropped = normal(rng, (n, 3), layout), Dropped(rate, (seed, 4, 5), first=3)
    check_gradients(lambda x: dropout(x, dropped),
                    lambda dy, cache: (dropout_backward(dy, cache),), (x,), rng)


def test_dropout_rate_and_mean():
    mask = dropout_mask(np, (100_000,), Dropped(0.3, (1, 2, 3)), "float64")
    assert abs((mask == 0).mean() - 0.3) < 0.006  # four standard deviations
    assert abs(mask.mean() - 1) < 0.01
    y, cache = dropout(mask, None)
    assert y is mask and cache is None


def test_dropout_masks_differ():
    masks = [dropout_mask(np, (64,), Dropped(0.5, key), "float64")
             for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))]
    for i, a in enumerate(masks):
        for b in masks[i + 1:]:
            assert (a != b).any()


def test_the_step_may_be_an_array():
    """As a CUDA graph has it: whoever writes a later step into it gets that step's mask."""
    step = np.full((), 3, "uint32")
    for later in (3, 4, 2**32 - 2):
        step[...] = later
        for function in (dropout.reference, cpu.layers.dropout):
            got, want = (function(np.ones((5, 9)), Dropped(0.5, (1, 2, number)))[0]
                         for number in (step, later))
            np.testing.assert_array_equal(got, want)


@given(st.integers(0, 40), st.integers(0, 40))
def test_dropout_mask_by_parts(start, n):
    """Entry i depends on the key and i alone."""
    dropped = Dropped(0.4, (9, 8, 7))
    whole = dropout_mask(np, (80,), dropped, "float32")
    part = dropout_mask(np, (n,), dropped, "float32", start)
    np.testing.assert_array_equal(part, whole[start : start + n])


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 3, 7), (6, 2, 4, 2)])
@pytest.mark.parametrize("function", [dropout.reference, cpu.layers.dropout])
def test_a_window_draws_its_mask_in_any_part(function, shape):
    """The rows of an array are windows: wherever the batch is cut, the same entries are kept."""
    x = np.ones(shape)
    whole, _ = function(x, Dropped(0.4, (9, 8, 7)))
    assert (whole == 0).any() and (whole > 0).any()
    for first in range(6):
        part, _ = function(x[first:], Dropped(0.4, (9, 8, 7), first))
        np.testing.assert_array_equal(part, whole[first:])


def test_beyond_the_first_32_bits_of_the_counter():
    """Octet 2^32 + 1 is not octet 1."""
    dropped, far = Dropped(0.5, (1, 2, 3)), 8 * 2**32
    near = dropout_mask(np, (256,), dropped, "float32")
    assert (dropout_mask(np, (256,), dropped, "float32", far) != near).any()
    across = dropout_mask(np, (16,), dropped, "float32", far - 8)
    np.testing.assert_array_equal(across[8:], dropout_mask(np, (8,), dropped, "float32", far))


def test_philox_known_answers():
    """The test vectors published with the generator (Random123, kat_vectors, philox4x32 10)."""
    zero = philox(np, 0, np.zeros(1, np.uint64), 0, 0)
    words = zero[0].astype(np.uint64)
    words = words[0::2] + (words[1::2] << np.uint64(16))
    assert [hex(int(w)) for w in words] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", [dropout.reference, cpu.layers.dropout])
def test_dtype_follows_the_input(function, dtype):
    """A mask in float64 would make a wide float64 array of every activation behind it."""
    x = np.ones((5, 7), dtype)
    y, cache = function(x, Dropped(0.5, (1, 2, 3)))
    assert y.dtype == function(x, cache)[0].dtype == dtype
    assert dropout_mask(np, (9,), Dropped(0.5, (1, 2, 3)), dtype).dtype == dtype
