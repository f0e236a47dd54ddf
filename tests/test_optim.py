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
BLOCKS = [  # rows, columns: as many, fewer, more; what Muon leaves to AdamW is between and around
    Leaf("embed.table", (3, 4), 0, 12, ""), Leaf("layers.0.norm.gain", (4,), 12, 16, ""),
    Leaf("layers.0.attention.w_q", (4, 4), 16, 32, ""),
    Leaf("layers.0.attention.local_rel_k", (3, 2), 32, 38, ""),
    Leaf("layers.0.ffn.w_in", (4, 9), 38, 74, ""), Leaf("layers.0.ffn.b_in", (9,), 74, 83, ""),
    Leaf("layers.0.ffn.w_out", (9, 4), 83, 119, ""), Leaf("output.w", (4, 3), 119, 131, "")]
MATRICES = [BLOCKS[i] for i in (2, 4, 6)]


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


@given(seeds, st.sampled_from([0.0, 0.1]))
def test_muon(seed, decay):
    """Matrices against a literal loop, number by number; the rest = AdamW on the whole buffer."""
    rng = np.random.default_rng(seed)
    flat = rng.normal(size=131)
    state, kept = optim.muon_init(flat, BLOCKS), flat.copy()
    by_adamw, adamw_state = flat.copy(), optim.adamw_init(flat, BLOCKS)
    want = {z.name: flat[z.start : z.stop].reshape(z.shape).copy() for z in MATRICES}
    momentum = {z.name: np.zeros(z.shape) for z in MATRICES}
    for step in range(3):
        grads = rng.normal(size=131)
        kept = grads.copy()
        optim.muon_update(flat, grads, state, BLOCKS, 0.01, step, weight_decay=decay)
        np.testing.assert_array_equal(grads, kept)
        optim.adamw_update(by_adamw, grads, adamw_state, BLOCKS, 0.01, step, weight_decay=decay)
        for z in MATRICES:
            g, w = grads[z.start : z.stop].reshape(z.shape), want[z.name]
            momentum[z.name] = 0.95 * momentum[z.name] + g
            x = g + 0.95 * momentum[z.name]
            x = x / math.sqrt(sum(e * e for e in x.flat))
            for first, third, fifth in (  # from the left, whatever the shape: the same polynomial
                    (7.9424, -22.2873, 15.8239), (3.6465, -2.7291, 0.5374),
                    (2.6758, -1.989, 0.4539)):
                a = np.array([[sum(p * q for p, q in zip(i, j, strict=True)) for j in x]
                              for i in x])
                x = first * x + third * np.dot(a, x) + fifth * np.dot(a, np.dot(a, x))
            want[z.name] = w - 0.01 * (decay * w + 0.2 * math.sqrt(max(z.shape)) * x)
    for z in BLOCKS:
        own = flat[z.start : z.stop]
        if z in MATRICES:
            np.testing.assert_allclose(own, want[z.name].reshape(-1), rtol=1e-9, atol=1e-12)
        else:
            np.testing.assert_array_equal(own, by_adamw[z.start : z.stop])


@given(seeds, st.sampled_from([(6, 6), (4, 9), (9, 4), (1, 7)]), st.sampled_from([1e-12, 1, 1e9]))
def test_muon_moves_orthogonally(seed, shape, size):
    """The first update has the gradient's singular vectors and singular values near one number,
    lr 0.2 sqrt(max(rows, columns)), whatever the size of the gradient."""
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = rng.uniform(0.1, 1, len(right))
    grads = size * ((left * values) @ right).reshape(-1)
    table = [Leaf("layers.0.w", shape, 0, grads.size, "")]
    flat = np.zeros(grads.size)
    optim.muon_update(flat, grads, optim.muon_init(flat, table), table, 0.5, 0)
    change = left.T @ -flat.reshape(shape) @ right.T / (0.5 * 0.2 * math.sqrt(max(shape)))
    np.testing.assert_allclose(change, np.diag(change.diagonal()), atol=1e-9)
    assert (0.7 < change.diagonal()).all() and (change.diagonal() < 1.3).all()


def test_muon_without_gradient():
    """A matrix whose gradient is zero stays where it is."""
    flat = np.ones(131)
    optim.muon_update(flat, np.zeros(131), optim.muon_init(flat, BLOCKS), BLOCKS, 0.1, 0)
    np.testing.assert_array_equal(flat, 1)


def test_muon_resumes_exactly():
    """Its state is its arrays: a copy of them continues with the same bits."""
    rng = np.random.default_rng(0)
    flat, state = rng.normal(size=131), optim.muon_init(np.zeros(131), BLOCKS)
    steps = rng.normal(size=(6, 131))
    for step in range(3):
        optim.muon_update(flat, steps[step], state, BLOCKS, 0.01, step)
    other, copied = flat.copy(), {name: array.copy() for name, array in state.items()}
    for step in range(3, 6):
        optim.muon_update(flat, steps[step], state, BLOCKS, 0.01, step)
    for step in range(3, 6):
        optim.muon_update(other, steps[step], copied, BLOCKS, 0.01, step)
    np.testing.assert_array_equal(flat, other)


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
    for kind in ("linear", "cosine", "constant"):
        np.testing.assert_allclose([rate(s, kind) for s in (0, 4, 9)], [0.2, 1.0, 2.0])
    np.testing.assert_allclose([rate(s, "cosine") for s in (10, 60, 110, 200)], [2, 1.1, 0.2, 0.2])
    np.testing.assert_allclose([rate(s, "linear") for s in (10, 60, 110, 200)], [2, 1, 0, 0])
    assert rate(500, "constant") == 2
    np.testing.assert_allclose([rate(s, "rsqrt") for s in (0, 10, 40)], [2, 2, 1])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizers_go_downhill(name):
    """A quadratic bowl, from the same start: the loss falls by far."""
    init, update, _ = optim.OPTIMIZERS[name]
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
