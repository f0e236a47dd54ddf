"""Optimizers against their formulas leaf by leaf (Adafactor's golden arrays: test_golden.py)."""

import math

import numpy as np
import pytest
from helpers.strategies import seeds
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch import optim
from rt_scratch.optim import clip_by_global_norm, global_norm, learning_rate
from rt_scratch.parameters import Leaf

TABLE = [Leaf("a.w", (3, 4), 0, 12, ""), Leaf("a.bias", (5,), 12, 17, ""),
         Leaf("a.gain", (2,), 17, 19, "")]


@given(seeds, st.sampled_from([0.0, 0.1]))
def test_adamw(seed, decay):
    rng = np.random.default_rng(seed)
    flat = rng.normal(size=19)
    want, state = flat.copy(), optim.adamw_init(flat, TABLE)
    m, v = np.zeros(19), np.zeros(19)
    for step in range(4):
        g = rng.normal(size=19)
        kept = g.copy()
        optim.adamw_update(flat, g, state, TABLE, 0.01, step, weight_decay=decay)
        np.testing.assert_array_equal(g, kept)
        want[:12] -= 0.01 * decay * want[:12]  # matrices decay, vectors do not
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.99 ** (step + 1))
        want -= 0.01 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        np.testing.assert_allclose(flat, want, rtol=1e-12)


def test_adafactor_decay_skips_biases():
    """The released L2 loss adds decay x w to the gradient of all but biases."""
    flat = np.ones(19)
    g = np.linspace(-1, 1, 19)
    with_decay, by_hand = flat.copy(), flat.copy()
    optim.adafactor_update(with_decay, g, optim.adafactor_init(flat, TABLE), TABLE, 0.1, 0,
                           weight_decay=0.5)
    decayed = g + 0.5 * np.r_[np.ones(12), np.zeros(5), np.ones(2)]
    optim.adafactor_update(by_hand, decayed, optim.adafactor_init(flat, TABLE), TABLE, 0.1, 0)
    np.testing.assert_allclose(with_decay, by_hand, rtol=1e-14)


@given(seeds, st.sampled_from([0.5, 3.0, 1e9]))
def test_clipping(seed, limit):
    g = np.random.default_rng(seed).normal(size=30)
    size = math.sqrt(sum(x * x for x in g))
    clipped = g.copy()
    np.testing.assert_allclose(clip_by_global_norm(clipped, limit), size)
    np.testing.assert_allclose(clipped, g * min(1, limit / size), rtol=1e-12)


def test_norm_of_bad_gradients_is_not_finite():
    """A NaN anywhere must reach the norm, which the training loop looks at."""
    for bad in (np.nan, np.inf):
        g = np.zeros(5)
        g[3] = bad
        assert not np.isfinite(global_norm(g))
    zero = np.zeros(5)
    assert clip_by_global_norm(zero, 1.0) == 0 and (zero == 0).all()


def test_schedules():
    rate = lambda step, kind: learning_rate(step, kind, 2.0, 10, 110)  # noqa: E731
    for kind in ("cosine", "constant"):
        np.testing.assert_allclose([rate(s, kind) for s in (0, 4, 9)], [0.2, 1.0, 2.0])
    np.testing.assert_allclose([rate(s, "cosine") for s in (10, 60, 110, 200)], [2, 1.1, 0.2, 0.2])
    assert rate(500, "constant") == 2
    np.testing.assert_allclose([rate(s, "rsqrt") for s in (0, 10, 40)], [2, 2, 1])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizers_go_downhill(name):
    """A quadratic bowl, from the same start: the loss falls by far."""
    init, update = optim.OPTIMIZERS[name]
    goal = np.linspace(-1, 1, 19)
    flat = np.zeros(19)
    flat[:] = goal + 0.5
    state = init(flat, TABLE)
    for step in range(200):
        update(flat, flat - goal, state, TABLE, 0.02, step)
    assert ((flat - goal) ** 2).sum() < 0.05


def test_loss_scale():
    """Halved by an overflow, doubled after 2,000 steps without; powers of two throughout."""
    scale = optim.FIRST_SCALE
    assert scale.after(False) == (2.0**15, 0)
    for _ in range(1999):
        scale = scale.after(True)
    assert scale == (2.0**16, 1999)
    assert scale.after(True) == (2.0**17, 0)
