"""Layers, dropout, output and loss: faster twins for NumPy arrays."""

from __future__ import annotations

import functools

import numpy as np

from rt_scratch.dropout import dropout_mask, first_entry
from rt_scratch.kernels.cpu import sizes
from rt_scratch.layers import (
    EPSILON,
    GELU_CUBE,
    GELU_SCALE,
    CrossEntropyCache,
    GateCache,
    GatedCache,
    LayerNormCache,
    LinearCache,
    NormalizeCache,
)
from rt_scratch.threads import busy, parallel, tiles

# ------------------------------------------------------------------------------------- linear

def linear(x, w, b=None, scale=1.0):
    rows = x.reshape(-1, x.shape[-1])
    y = np.empty((len(rows), w.shape[1]), x.dtype)

    def piece(r):
        np.matmul(rows[r], w, out=y[r])
        if scale != 1:
            y[r] *= scale
        if b is not None:
            y[r] += b

    _over_rows(piece, len(rows))
    return y.reshape(*x.shape[:-1], w.shape[1]), LinearCache(x, w, b is not None, scale)


def linear_backward(dy, cache):
    x, w, biased, scale = cache
    rows = dy.reshape(-1, dy.shape[-1])
    db = np.ones(len(rows), dy.dtype) @ rows if biased else None
    if scale != 1:
        rows = rows * scale
    dx = np.empty((len(rows), w.shape[0]), dy.dtype)
    _over_rows(lambda r: np.matmul(rows[r], w.T, out=dx[r]), len(rows))
    dw = _product(x.reshape(-1, x.shape[-1]), rows)
    return dx.reshape(x.shape), dw, db


def _over_rows(function, n):
    """function(slice) over n rows: all of them at once where other threads are at work already."""
    parallel(function, [slice(0, n)] if busy() else tiles(n, sizes.ROWS))


def _product(x, y):
    """x^T y, a piece of columns of x at a time: (N, I), (N, O) -> (I, O)."""
    out = np.empty((x.shape[1], y.shape[1]), y.dtype)
    pieces = [slice(0, x.shape[1])] if busy() else tiles(x.shape[1], sizes.COLUMNS)
    parallel(lambda c: np.matmul(x[:, c].T, y, out=out[c]), pieces)
    return out


# ---------------------------------------------------------------------------------- LayerNorm

def layer_norm(x, gain, bias):
    if sizes.few(x):
        y, mean, rstd = _normalized_few(x)
        y *= gain
        y += bias
        return y, LayerNormCache(x, gain, mean, rstd)
    y, mean, rstd = _normalized(x)

    def piece(r):
        y[r] *= gain
        y[r] += bias

    parallel(piece, tiles(len(y), sizes.PIECE // y.shape[1]))
    return y.reshape(x.shape), LayerNormCache(x, gain, mean, rstd)


def layer_norm_backward(dy, cache):
    x, gain, mean, rstd = cache
    rows, c = dy.reshape(-1, dy.shape[-1]), dy.shape[-1]
    pieces = tiles(len(rows), sizes.PIECE // c)
    dx, sums = np.empty_like(rows), np.empty((len(pieces), 2, c), dy.dtype)
    x, mean, rstd = x.reshape(-1, c), mean.reshape(-1, 1), rstd.reshape(-1, 1)

    def piece(i):
        r = pieces[i]
        n = _n(x[r], mean[r], rstd[r])
        ones = np.ones(len(n), dy.dtype)
        sums[i, 0] = np.einsum("ij,ij->j", rows[r], n)
        sums[i, 1] = ones @ rows[r]
        _normalize_backward(rows[r] * gain, n, rstd[r], dx[r])

    parallel(piece, range(len(pieces)))
    dgain, dbias = sums.sum(0)
    return dx.reshape(dy.shape), dgain, dbias


def normalize(x):
    if sizes.few(x):
        y, mean, rstd = _normalized_few(x)
        return y, NormalizeCache(x, mean, rstd)
    y, mean, rstd = _normalized(x)
    return y.reshape(x.shape), NormalizeCache(x, mean, rstd)


def normalize_backward(dn, cache):
    x, mean, rstd = cache
    d = x.shape[-1]
    dx = np.empty(x.shape, dn.dtype)
    flat, many = dx.reshape(-1, d), x.reshape(-1, d)
    mean, rstd, rows = mean.reshape(-1, 1), rstd.reshape(-1, 1), dn.reshape(-1, d)

    def piece(r):
        _normalize_backward(rows[r].copy(), _n(many[r], mean[r], rstd[r]), rstd[r], flat[r])

    parallel(piece, tiles(len(flat), sizes.PIECE // d))
    return dx


def _normalized_few(x):
    """n, mean, rstd in as few operations as can be."""
    average, epsilon, _ = _few_constants(x.shape[-1], x.dtype)
    mean = x.dot(average)                                            # (..., 1)
    n = x - mean
    rstd = (n * n).dot(average)
    rstd += epsilon
    np.sqrt(rstd, out=rstd)
    np.reciprocal(rstd, out=rstd)
    n *= rstd
    return n, mean, rstd


@functools.cache
def _few_constants(d, dtype):
    """Arrays, since a number costs NumPy as much as an operation on a row."""
    average = np.full((d, 1), 1 / d, dtype)
    gelu = [np.array(z, dtype) for z in (GELU_SCALE * GELU_CUBE, GELU_SCALE, 1, 0.5)]
    return average, np.array(EPSILON, dtype), gelu


def _normalized(x):
    """n (N, D) in a new array, mean and rstd (..., 1)."""
    d = x.shape[-1]
    rows = x.reshape(-1, d)
    n = np.empty(rows.shape, x.dtype)
    mean, rstd = (np.empty((len(rows), 1), x.dtype) for _ in range(2))
    column = np.full((d, 1), 1 / d, x.dtype)

    def piece(r):
        np.matmul(rows[r], column, out=mean[r])
        np.subtract(rows[r], mean[r], out=n[r])
        variance = np.einsum("ij,ij->i", n[r], n[r])[:, None] / d
        np.divide(1, np.sqrt(variance + EPSILON), out=rstd[r])
        n[r] *= rstd[r]

    parallel(piece, tiles(len(rows), sizes.PIECE // d))
    return n, mean.reshape(*x.shape[:-1], 1), rstd.reshape(*x.shape[:-1], 1)


def _n(x, mean, rstd):
    n = x - mean
    n *= rstd
    return n


def _normalize_backward(dn, n, rstd, out):
    """Into out; dn and n are used up."""
    d = n.shape[1]
    along = np.einsum("ij,ij->i", dn, n)[:, None] / d
    dn -= dn @ np.full((d, 1), 1 / d, dn.dtype)
    n *= along
    dn -= n
    np.multiply(dn, rstd, out=out)


# ------------------------------------------------------------------------------- feed-forward

def geglu(a, b):
    y = np.empty(a.shape, a.dtype)
    flat_a, flat_b, flat = a.reshape(-1), b.reshape(-1), y.reshape(-1)
    parallel(lambda r: _geglu(flat_a[r], flat_b[r], flat[r]), tiles(flat.size, sizes.PIECE))
    return y, GateCache(a, b)


def geglu_backward(dy, cache):
    a, b = (z.reshape(-1) for z in cache)
    da, db, dy = np.empty_like(a), np.empty_like(b), dy.reshape(-1)
    parallel(lambda r: _geglu_backward(dy[r], a[r], b[r], da[r], db[r]), tiles(a.size, sizes.PIECE))
    return da.reshape(cache[0].shape), db.reshape(cache[1].shape)


def geglu_ffn(x, w_gate, w_value, w_out, dropped=None):
    if sizes.few(x) and dropped is None:
        a, b = _few_times(x, w_gate), _few_times(x, w_value)
        cube, scale, one, half = _few_constants(1, x.dtype)[2]
        h = a * a
        h *= cube
        h += scale
        h *= a
        np.tanh(h, out=h)
        h += one
        h *= a
        h *= b
        h *= half
        return _few_times(h, w_out), GatedCache(x, w_gate, w_value, w_out, a, b, dropped)
    rows, m = x.reshape(-1, x.shape[-1]), w_gate.shape[1]
    drop = Drop(dropped, (*x.shape[:-1], m))
    a, b = (np.empty((len(rows), m), x.dtype) for _ in range(2))
    y = np.empty((len(rows), w_out.shape[1]), x.dtype)

    def piece(r):
        np.matmul(rows[r], w_gate, out=a[r])
        np.matmul(rows[r], w_value, out=b[r])
        h = np.empty((r.stop - r.start, m), x.dtype)
        for s in tiles(len(h), sizes.PIECE // m):
            _geglu(a[r][s], b[r][s], h[s])
        drop(h, r.start * m)
        np.matmul(h, w_out, out=y[r])

    parallel(piece, tiles(len(rows), sizes.ROWS))
    wide = (*x.shape[:-1], m)
    return y.reshape(*x.shape[:-1], -1), GatedCache(
        x, w_gate, w_value, w_out, a.reshape(wide), b.reshape(wide), dropped)


def geglu_ffn_backward(dy, cache):
    x, w_gate, w_value, w_out, a, b, dropped = cache
    rows, flat, m = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), a.shape[-1]
    drop = Drop(dropped, a.shape)
    a, b = a.reshape(-1, m), b.reshape(-1, m)
    h, da, db = (np.empty(a.shape, a.dtype) for _ in range(3))
    dx = np.empty(flat.shape, dy.dtype)

    def piece(r):
        dh = rows[r] @ w_out.T
        drop(dh, r.start * m)
        for s in tiles(len(dh), sizes.PIECE // m):
            _geglu_backward(dh[s], a[r][s], b[r][s], da[r][s], db[r][s], h[r][s])
        drop(h[r], r.start * m)
        np.matmul(da[r], w_gate.T, out=dx[r])
        dx[r] += db[r] @ w_value.T

    parallel(piece, tiles(len(rows), sizes.ROWS))
    return dx.reshape(x.shape), _product(flat, da), _product(flat, db), _product(h, rows)


def _few_times(x, w):
    """x w, up to three rows one after the other: for a product of matrices BLAS first copies w."""
    return (x[..., None, :] @ w)[..., 0, :] if x.shape[-1] < x.size < 4 * x.shape[-1] else x.dot(w)


def _geglu(a, b, out):
    """out = gelu(a) b, with (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))."""
    u = _exp_minus_two_u(a)
    u += 1
    np.divide(a, u, out=out)
    out *= b


def _geglu_backward(dy, a, b, da, db, h=None):
    """With s = 1 / (1 + exp(-2 u)): gelu = a s and gelu' = s + 2 a s (1 - s) u'."""
    s = _exp_minus_two_u(a)
    s += 1
    np.divide(1, s, out=s)
    np.multiply(a, s, out=db)      # gelu
    if h is not None:
        np.multiply(db, b, out=h)
    np.multiply(a, a, out=da)
    da *= 6 * GELU_SCALE * GELU_CUBE
    da += 2 * GELU_SCALE           # 2 u'
    da *= db
    db *= dy
    t = 1 - s
    da *= t
    da += s                        # gelu'
    da *= b
    da *= dy


def _exp_minus_two_u(a):
    """exp(-2 sqrt(2/pi) (a + 0.044715 a^3)); inf for a far below 0, whose gelu is then 0."""
    u = a * a
    u *= -2 * GELU_SCALE * GELU_CUBE
    u -= 2 * GELU_SCALE
    u *= a
    with np.errstate(over="ignore"):
        return np.exp(u, out=u)


def dropout(x, dropped):
    if dropped is None or not dropped.rate:
        return x, None
    y, drop = x.copy(), Drop(dropped, x.shape)
    flat = y.reshape(-1)
    parallel(lambda r: drop(flat[r], r.start), tiles(flat.size, sizes.PIECE))
    return y, dropped


class Drop:
    """The mask of an array (B, ...) of this shape, for pieces of it."""

    def __init__(self, dropped, shape):
        self.dropped, self.first = dropped, first_entry(dropped, shape) if dropped else 0

    def __call__(self, x, start):
        """Drop out, in place, x: entries start, start + 1, ... of the array."""
        if self.dropped:
            x *= self.mask(x, start)

    def mask(self, x, start):
        return dropout_mask(np, x.shape, self.dropped, x.dtype, self.first + start)


# ---------------------------------------------------------------------------- output and loss

def linear_cross_entropy(x, w, b, targets, weights):
    n = len(x)
    top, total, hit = np.full(n, -np.inf, x.dtype), np.zeros(n, x.dtype), np.empty(n, x.dtype)
    for c in _columns(n, w.shape[1]):
        def piece(r, c=c):
            z = x[r] @ w[:, c]
            z += b[c]
            here = targets[r] - c.start
            own = np.flatnonzero((here >= 0) & (here < z.shape[1]))
            hit[r][own] = z[own, here[own]]
            new = np.maximum(top[r], z.max(1))
            z -= new[:, None]
            np.exp(z, out=z)
            total[r] *= np.exp(top[r] - new)
            total[r] += z @ np.ones(z.shape[1], z.dtype)
            top[r] = new

        parallel(piece, tiles(n, sizes.PIECE * 4 // (c.stop - c.start)))
    lse = top + np.log(total)
    return np.asarray(weights @ (lse - hit)), CrossEntropyCache(x, w, b, targets, weights, lse)


def linear_cross_entropy_backward(dloss, cache):
    x, w, b, targets, weights, lse = cache
    n = len(x)
    dx, dw, db = np.zeros_like(x), np.empty(w.shape, w.dtype), np.empty_like(b)
    factor = np.asarray(dloss, x.dtype) * weights
    for c in _columns(n, w.shape[1]):
        dz = np.empty((n, c.stop - c.start), x.dtype)

        def piece(r, c=c, dz=dz):
            z = np.matmul(x[r], w[:, c], out=dz[r])
            z += b[c]
            z -= lse[r, None]
            np.exp(z, out=z)
            here = targets[r] - c.start
            own = np.flatnonzero((here >= 0) & (here < z.shape[1]))
            z[own, here[own]] -= 1
            z *= factor[r, None]
            dx[r] += z @ w[:, c].T

        parallel(piece, tiles(n, sizes.PIECE * 4 // (c.stop - c.start)))
        dw[:, c] = _product(x, dz)
        db[c] = np.ones(n, x.dtype) @ dz
    return dx, dw, db


def _columns(n, n_values):
    """Slices of the vocabulary so that n rows of logits fit the bound."""
    return tiles(n_values, max(256, sizes.LOGITS // n))
