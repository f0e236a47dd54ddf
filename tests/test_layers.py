"""layers.py: values against plain loops or formulas, gradients against directional derivatives."""

import math

import numpy as np
import pytest
from helpers.gradcheck import check_gradients
from helpers.strategies import layouts, lengths, normal, seeds, sizes, widths
from hypothesis import assume, given
from hypothesis import strategies as st

from rt_scratch import layers
from rt_scratch.dropout import Dropped

EXACT = dict(rtol=1e-12, atol=1e-12)


@given(seeds, sizes, sizes, sizes, layouts, st.booleans(), st.sampled_from([1.0, 0.3]))
def test_linear(seed, n, i, o, layout, bias, scale):
    rng = np.random.default_rng(seed)
    x, w = normal(rng, (2, n, i), layout), normal(rng, (i, o), layout)
    b = normal(rng, (o,)) if bias else None
    y, _ = layers.linear(x, w, b, scale)
    want = [[[scale * sum(x[p, q, r] * w[r, s] for r in range(i)) + (b[s] if bias else 0)
              for s in range(o)] for q in range(n)] for p in range(2)]
    np.testing.assert_allclose(y, want, **EXACT)
    check_gradients(lambda *a: layers.linear(*a, scale), layers.linear_backward, (x, w, b), rng)


@given(seeds, sizes, widths, st.booleans())
def test_add_gradients(seed, n, c, twice):
    """Gradients are added to the buffers; that of the input is returned, or added as well."""
    rng = np.random.default_rng(seed)
    x, w, b, dy, dx = (normal(rng, s) for s in ((2, n, c), (c, 3), (3,), (2, n, 3), (2, n, c)))
    before, buffers = [normal(rng, (c, 3)), normal(rng, (3,))], []
    buffers += [z.copy() for z in before]
    _, cache = layers.linear(x, w, b)
    want = layers.linear_backward(dy, cache)
    old = dx.copy()
    got = layers.add_gradients(layers.linear_backward, dy, cache, tuple(buffers),
                               dx if twice else None)
    assert (got is dx) == twice
    np.testing.assert_array_equal(got, old + want[0] if twice else want[0])
    for buffer, z, gradient in zip(buffers, before, want[1:], strict=True):
        np.testing.assert_array_equal(buffer, z + gradient)
    with pytest.raises(ValueError):  # a buffer for each gradient
        layers.add_gradients(layers.linear_backward, dy, cache, tuple(buffers[:1]))


@given(seeds, sizes, widths, st.booleans(), st.sampled_from([0.0, 0.4]))
def test_residual(seed, n, c, normed, rate):
    """x + dropout(f), normalised or not, and both inputs' gradients."""
    rng = np.random.default_rng(seed)
    x, f = normal(rng, (2, n, c)), normal(rng, (2, n, c))
    norm = (normal(rng, (c,)), normal(rng, (c,))) if normed else ()
    dropped = Dropped(rate, (3, 4, 5))
    y, _ = layers.residual(x, f, dropped, *norm)
    want = x + layers.dropout(f, dropped)[0]
    assume(want.std(-1).min() > 0.1 or not normed)
    np.testing.assert_array_equal(y, layers.layer_norm(want, *norm)[0] if normed else want)

    def backward(dy, cache):
        (dx, df), *gradients = layers.residual_backward(dy, cache)
        return dx, df, *gradients

    check_gradients(lambda x, f, *norm: layers.residual(x, f, dropped, *norm), backward,
                    (x, f, *norm), rng, step=1e-5)


@given(seeds, sizes, widths, layouts)
def test_normalize(seed, n, c, layout):
    rng = np.random.default_rng(seed)
    x = 3 * normal(rng, (n, c), layout) + 1
    y, _ = layers.normalize(x)
    for row, got in zip(x, y, strict=True):
        mean = sum(row) / c
        variance = sum((e - mean) ** 2 for e in row) / c
        np.testing.assert_allclose(got, [(e - mean) / math.sqrt(variance + 1e-6) for e in row],
                                   rtol=1e-9, atol=1e-9)
    assume(x.std(-1).min() > 0.1)  # near a constant row the function bends within the step
    check_gradients(layers.normalize, layers.normalize_backward, (x,), rng, step=1e-5)


@given(seeds, sizes, widths, layouts)
def test_layer_norm(seed, n, c, layout):
    rng = np.random.default_rng(seed)
    x, gain, bias = normal(rng, (2, n, c), layout), normal(rng, (c,)), normal(rng, (c,))
    y, _ = layers.layer_norm(x, gain, bias)
    np.testing.assert_allclose(y, layers.normalize(x)[0] * gain + bias, **EXACT)
    assume(x.std(-1).min() > 0.1)
    check_gradients(layers.layer_norm, layers.layer_norm_backward, (x, gain, bias), rng, step=1e-5)


def gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + math.exp(-x))


gates = pytest.mark.parametrize("name, activation", [("geglu", gelu), ("swiglu", silu)])


@gates
@given(seeds, sizes, layouts)
def test_gate(name, activation, seed, n, layout):
    rng = np.random.default_rng(seed)
    gate, backward = getattr(layers, name), getattr(layers, f"{name}_backward")
    a, b = 2 * normal(rng, (n, 3), layout), normal(rng, (n, 3), layout)
    want = [[activation(e) for e in row] for row in a]
    np.testing.assert_allclose(gate(a, b)[0], np.array(want) * b, **EXACT)
    check_gradients(gate, backward, (a, b), rng)


@gates
def test_gate_of_large_numbers(name, activation):
    """No overflow, no NaN: the activation is a or 0, its derivative 1 or 0."""
    gate, backward = getattr(layers, name), getattr(layers, f"{name}_backward")
    a = np.array([-1e4, -50.0, 50.0, 1e4])
    with np.errstate(all="raise", under="ignore"):
        y, cache = gate(a, np.ones(4))
        da, _ = backward(np.ones(4), cache)
    np.testing.assert_allclose(y, [0, 0, 50, 1e4], atol=1e-12)
    np.testing.assert_allclose(da, [0, 0, 1, 1], atol=1e-12)


dropouts = st.sampled_from([None, Dropped(0.3, (1, 2, 3), first=5)])


@gates
@given(seeds, sizes, widths, sizes, layouts, dropouts)
def test_gated_ffn(name, activation, seed, n, c, m, layout, dropped):
    rng = np.random.default_rng(seed)
    forward, backward, parameters = layers.FEED_FORWARDS[name]
    assert list(parameters(c, m)) == ["w_gate", "w_value", "w_out"]
    args = [normal(rng, s, layout) for s in ((2, n, c), *parameters(c, m).values())]
    x, w_gate, w_value, w_out = args
    if dropped is None:
        hidden = np.vectorize(activation)(x @ w_gate) * (x @ w_value)
        np.testing.assert_allclose(forward(*args)[0], hidden @ w_out, rtol=1e-11, atol=1e-12)
    check_gradients(lambda *a: forward(*a, dropped), backward, args, rng, step=2e-5)


@given(seeds, sizes, widths, sizes, layouts, dropouts)
def test_relu_ffn(seed, n, c, m, layout, dropped):
    rng = np.random.default_rng(seed)
    args = [normal(rng, s, layout) for s in ((2, n, c), (c, m), (m,), (m, c), (c,))]
    x, w_in, b_in, w_out, b_out = args
    hidden = x @ w_in + b_in
    assume(np.abs(hidden).min() > 1e-3)  # a step must not cross the kink
    if dropped is None:
        want = np.where(hidden > 0, hidden, 0) @ w_out + b_out
        np.testing.assert_allclose(layers.relu_ffn(*args)[0], want, **EXACT)
    check_gradients(lambda *a: layers.relu_ffn(*a, dropped), layers.relu_ffn_backward, args, rng,
                    step=1e-5)


@given(seeds, sizes, lengths)
def test_shift_right(seed, b, t):
    ids = np.random.default_rng(seed).integers(0, 9, (b, t))
    shifted = layers.shift_right(ids)
    assert (shifted[:, 0] == 0).all() and (shifted[:, 1:] == ids[:, :-1]).all()
    x, dx = np.random.default_rng(seed).normal(size=(2, b, t, 2))
    np.testing.assert_allclose((layers.shift_right(x) * dx).sum(),
                               (x * layers.shift_right_backward(dx)).sum())


@given(seeds, sizes, lengths, sizes)
def test_recent(seed, b, t, n):
    ids = np.random.default_rng(seed).integers(1, 9, (b, t))
    seen = layers.recent(ids, n)
    for j in range(n):
        assert (seen[:, :j, j] == 0).all() and (seen[:, j:, j] == ids[:, : max(t - j, 0)]).all()
    cut = t // 2
    padded = np.concatenate([np.zeros((b, n - 1), int), ids], axis=1)
    later = layers.recent(ids[:, cut:], n, padded[:, cut : cut + n - 1])
    np.testing.assert_array_equal(later, seen[:, cut:])


@given(seeds, sizes, st.sampled_from([1, 7, 101]))
def test_ngram(seed, n, rows):
    """The number that Python's own integers make of the digits, long or short."""
    base = 250
    ids = np.random.default_rng(seed).integers(0, base, (2, 5, n))
    found = layers.ngram(ids, base, rows)
    for b, t in np.ndindex(2, 5):
        digits = ids[b, t].tolist()
        assert found[b, t] == sum(d * base**j for j, d in enumerate(digits)) % rows


@given(seeds, sizes, lengths, sizes, sizes)
def test_embedding(seed, b, t, v, e):
    rng = np.random.default_rng(seed)
    ids, table = rng.integers(0, v, (b, t)), normal(rng, (v, e))
    y, _ = layers.embedding(ids, table)
    assert all((y[i, j] == table[ids[i, j]]).all() for i in range(b) for j in range(t))
    check_gradients(lambda table: layers.embedding(ids, table),
                    lambda dy, cache: (layers.embedding_backward(dy, cache),), (table,), rng)


@given(seeds, sizes, sizes, sizes)
def test_segment_sum(seed, n, m, d):
    rng = np.random.default_rng(seed)
    rows, index = normal(rng, (n, d)), rng.integers(0, m, n)
    want = np.zeros((m + 2, d))
    for row, i in zip(rows, index, strict=True):
        want[i] += row
    np.testing.assert_allclose(layers.segment_sum(rows, index, m + 2), want, **EXACT)


@given(seeds, sizes, st.sampled_from([1, 2, 3]), widths, st.booleans())
def test_image_embedding(seed, b, side, c, from_middle):
    rng = np.random.default_rng(seed)
    start = side if from_middle else 0
    ids = rng.integers(0, 256, (b, 3 * side * side - start))
    args = normal(rng, (768, c)), normal(rng, (side, 1, 3 * c)), normal(rng, (1, side, 3 * c))
    table, rows, columns = args
    y, _ = layers.image_embedding(ids, start, *args)
    for i in range(b):
        for j in range(ids.shape[1]):
            pixel, channel = divmod(start + j, 3)
            part = slice(channel * c, (channel + 1) * c)
            want = math.sqrt(c) * table[256 * channel + ids[i, j]] + math.sqrt(3 * c) * (
                rows[pixel // side, 0, part] + columns[0, pixel % side, part])
            np.testing.assert_allclose(y[i, j], want, **EXACT)
    check_gradients(lambda *a: layers.image_embedding(ids, start, *a),
                    layers.image_embedding_backward, args, rng)


@given(st.sampled_from([1, 2, 5, 8, 31]), st.sampled_from([1, 2, 3, 7, 40]))
def test_timing_signal(t, c):
    signal = layers.timing_signal(np, t, c, np.float64, 5)
    n = c // 2
    for p in range(t):
        for i in range(n):
            angle = (5 + p) / 10_000 ** (i / max(n - 1, 1))
            np.testing.assert_allclose(signal[p, i], math.sin(angle), atol=1e-9)
            np.testing.assert_allclose(signal[p, n + i], math.cos(angle), atol=1e-9)
    assert (signal[:, 2 * n:] == 0).all()


# -------------------------------------------------------------------------- output and its loss

@given(seeds, sizes, sizes, st.sampled_from([2, 3, 7, 40]), layouts, st.booleans())
def test_linear_cross_entropy(seed, n, c, v, layout, weighted):
    rng = np.random.default_rng(seed)
    x, w, b = normal(rng, (n, c), layout), normal(rng, (c, v), layout), normal(rng, (v,))
    targets = rng.integers(0, v, n)
    weights = rng.integers(0, 3, n) / 3 if weighted else np.full(n, 1 / n)
    loss, _ = layers.linear_cross_entropy(x, w, b, targets, weights)
    want = 0.0
    for i in range(n):
        z = [sum(x[i, j] * w[j, k] for j in range(c)) + b[k] for k in range(v)]
        want += weights[i] * (math.log(sum(math.exp(e) for e in z)) - z[targets[i]])
    np.testing.assert_allclose(loss, want, **EXACT)
    check_gradients(lambda *a: layers.linear_cross_entropy(*a, targets, weights),
                    layers.linear_cross_entropy_backward, (x, w, b), rng)


def test_cross_entropy_in_chunks(monkeypatch):
    """Cutting the rows differently changes rounding only."""
    rng = np.random.default_rng(0)
    args = (normal(rng, (13, 5)), normal(rng, (5, 7)), normal(rng, (7,)), rng.integers(0, 7, 13),
            normal(rng, (13,)))
    function, backward = (f.reference for f in (layers.linear_cross_entropy,
                                                layers.linear_cross_entropy_backward))
    whole, cache = function(*args)
    gradients = backward(1.0, cache)
    monkeypatch.setattr(layers, "CHUNK_ENTRIES", 21)  # three rows at a time
    tiles, cuts = layers.tiles, []
    monkeypatch.setattr(layers, "tiles", lambda *cut: cuts.append(tiles(*cut)) or cuts[-1])
    parts, cache = function(*args)
    np.testing.assert_allclose(parts, whole, rtol=1e-13)
    for a, b in zip(backward(1.0, cache), gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    assert [len(cut) for cut in cuts] == [5, 5]  # forward, backward


def test_cross_entropy_of_large_logits():
    """No overflow: logits of 1e4."""
    x, w = np.full((1, 1), 1e4), np.array([[1.0, 2.0, -3.0]])
    loss, cache = layers.linear_cross_entropy(x, w, np.zeros(3), np.array([0]), np.ones(1))
    np.testing.assert_allclose(loss, 1e4)
    assert all(np.isfinite(g).all() for g in layers.linear_cross_entropy_backward(1.0, cache))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_follows_the_input(dtype):
    x = np.ones((3, 4), dtype)
    w, b = np.ones((4, 4), dtype), np.ones(4, dtype)
    dropped = Dropped(0.5, (0, 0, 0))
    for y in (layers.linear(x, w, b)[0], layers.layer_norm(x, b, b)[0], layers.geglu(x, x)[0],
              layers.swiglu(x, x)[0], layers.geglu_ffn(x, w, w, w, dropped)[0],
              layers.swiglu_ffn(x, w, w, w, dropped)[0],
              layers.relu_ffn(x, w, b, w, b, dropped)[0],
              layers.linear_cross_entropy(x, w, b, np.zeros(3, int), np.ones(3, dtype))[0]):
        assert y.dtype == dtype
