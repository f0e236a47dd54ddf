"""attention.py against plain loops, and its gradients."""

import numpy as np
from helpers.gradcheck import check_gradients
from helpers.loops import clipped, dropouts, loop_attention, reaches, tables
from helpers.strategies import layouts, lengths, normal, seeds, sizes, widths
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch.attention import (
    attend,
    attend_backward,
    distance_rows,
    distance_rows_backward,
    local_attention,
    local_attention_backward,
    skew,
    unskew,
)

EXACT = dict(rtol=1e-11, atol=1e-12)


@given(seeds, sizes, st.sampled_from([1, 2, 3]), st.booleans())
def test_skew(seed, s, blocks, both_ways):
    """out[i, j] = x[i, j - i + S - 1]; unskew is transpose and, where seen, inverse."""
    rng = np.random.default_rng(seed)
    n = blocks * s if not both_ways else s
    p = n if not both_ways else 2 * s - 1
    x = normal(rng, (2, s, p))
    y = skew(x, n)
    visible = np.zeros((s, n), bool)
    for i in range(s):
        for j in range(n):
            if 0 <= j - i + s - 1 < p:
                visible[i, j] = True
                assert (y[:, i, j] == x[:, i, j - i + s - 1]).all()
    z = normal(rng, (2, s, n)) * visible
    np.testing.assert_allclose((np.where(visible, y, 0) * z).sum(), (x * unskew(z, p)).sum())
    np.testing.assert_array_equal(np.where(visible, skew(unskew(z, p), n), 0), z)


@given(seeds, reaches.filter(bool), sizes)
def test_distance_rows(seed, reach, n):
    rng = np.random.default_rng(seed)
    table = normal(rng, (2 * reach + 1, 3))
    rows, _ = distance_rows(table, 1 - n, n - 1)
    for row, distance in zip(rows, range(1 - n, n), strict=True):
        assert (row == table[max(-reach, min(reach, distance)) + reach]).all()
    check_gradients(lambda t: distance_rows(t, 1 - n, n - 1),
                    lambda d, cache: (distance_rows_backward(d, cache),), (table,), rng)


@given(seeds, sizes, st.sampled_from([1, 2, 3]), widths, layouts, st.booleans(), dropouts)
def test_attend(seed, s, blocks, d, layout, relative, dropped):
    """Any causal mask, with rows that may see nothing (they give 0 and have no gradient)."""
    rng = np.random.default_rng(seed)
    n, scale = blocks * s, 0.7
    args = [normal(rng, (2, s, d), layout), normal(rng, (2, n, d), layout),
            normal(rng, (2, n, d), layout)]
    args += [normal(rng, (n, d)), normal(rng, (n, d))] if relative else [None, None]
    q, k, v, rel_k, rel_v = args
    behind = np.arange(n)[None] - (n - s) <= np.arange(s)[:, None]
    mask = behind & (rng.random((2, s, n)) < 0.7)
    mask[0, 0] = False
    o, _ = attend(q, k, v, rel_k, rel_v, mask, scale)
    rel = (lambda i, j: (rel_k[j - i + s - 1], rel_v[j - i + s - 1])) if relative else None
    for b in range(2):
        want = loop_attention(q[b], k[b], v[b], lambda i, j, b=b: mask[b, i, j], scale, rel)
        np.testing.assert_allclose(o[b], want, **EXACT)
    assert (o[0, 0] == 0).all()
    check_gradients(lambda *a: attend(*a, mask, scale, dropped), attend_backward, args, rng)


@given(seeds, lengths, st.sampled_from([1, 2, 3, 8]), st.sampled_from([0, 1, 2, 5]), widths,
       reaches, layouts, dropouts)
def test_local_attention(seed, t, block, lookback, d, reach, layout, dropped):
    """Lengths that are no multiple of the block, shorter than it, or one token."""
    rng = np.random.default_rng(seed)
    args = [normal(rng, (2, 2, t, d), layout) for _ in "qkv"] + [*tables(rng, reach, d)]
    q, k, v, rel_k, rel_v = args
    o, _ = local_attention(*args, block, lookback, 0.6)

    def visible(i, j):
        return max(0, i // block - lookback) * block <= j <= i

    for b in range(2):
        for h in range(2):
            want = loop_attention(q[b, h], k[b, h], v[b, h], visible, 0.6,
                                  clipped(rel_k, rel_v, reach))
            np.testing.assert_allclose(o[b, h], want, **EXACT)
    check_gradients(
        lambda *a: local_attention(*a, block, lookback, 0.6, dropped=dropped),
        local_attention_backward, args, rng)


@given(seeds, lengths, st.sampled_from([1, 2, 5, 8]), st.sampled_from([1, 2, 3]), reaches)
def test_segments_and_window(seed, t, window, n_segments, reach):
    """What routing attention asks for: own segment, at most `window` tokens back."""
    rng = np.random.default_rng(seed)
    args = [normal(rng, (1, 2, t, 3)) for _ in "qkv"] + [*tables(rng, reach, 3)]
    q, k, v, rel_k, rel_v = args
    segments = np.sort(rng.integers(0, n_segments, (1, 2, t)), axis=-1)
    o, _ = local_attention(*args, window, 1, 1.0, segments, window)
    for h in range(2):
        want = loop_attention(
            q[0, h], k[0, h], v[0, h],
            lambda i, j, h=h: i - window < j <= i and segments[0, h, i] == segments[0, h, j],
            1.0, clipped(rel_k, rel_v, reach))
        np.testing.assert_allclose(o[0, h], want, **EXACT)
    check_gradients(lambda *a: local_attention(*a, window, 1, 1.0, segments, window),
                    local_attention_backward, args, rng)


def test_large_logits():
    """Logits of 1e4 neither overflow nor lose the winner."""
    q = np.full((1, 1, 3, 1), 100.0)
    k = np.array([1.0, 100.0, 2.0]).reshape(1, 1, 3, 1)
    v = np.array([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    o, cache = local_attention(q, k, v, None, None, 3, 0, 1.0)
    np.testing.assert_allclose(o[0, 0, :, 0], [1, 2, 2])
    assert all(np.isfinite(g).all() for g in local_attention_backward(o, cache)[:3])
