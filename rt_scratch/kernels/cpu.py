"""Faster twins for NumPy arrays: the same numbers up to rounding, in pieces that stay in cache.

Three things make the plain functions slow on a CPU: every operation on a wide array is a pass
through memory, NumPy's element-wise functions use one thread, and copies (windows of keys, masks,
gathered rows) are written only to be read once. The twins work on pieces of some hundred kilobytes,
in place, side by side on threads (`threads.parallel`), and build windows and masks piece by piece.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.lib.stride_tricks import as_strided

from rt_scratch.attention import AttendCache, LocalCache, causal_mask, clipped_reach
from rt_scratch.dispatch import first_array
from rt_scratch.dropout import dropout_mask, first_entry
from rt_scratch.kmeans import MAX_CLUSTERS
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
from rt_scratch.optim import (
    MOMENTUM,
    NEWTON_SCHULZ,
    adamw_of_the_rest,
    orthogonalized,
    update_scale,
)
from rt_scratch.threads import busy, parallel, tiles

PIECE = 1 << 18      # entries of an array that element-wise work takes at a time
ROWS = 1024        # rows per matrix product that a thread takes
COLUMNS = 256      # columns of a weight gradient that a thread takes
ATTENTION = 1 << 17   # attention weights that a thread takes at a time
LOGITS = 1 << 21     # logits alive at a time in the output layer


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
    parallel(function, [slice(0, n)] if busy() else tiles(n, ROWS))


def _product(x, y):
    """x^T y, a piece of columns of x at a time: (N, I), (N, O) -> (I, O)."""
    out = np.empty((x.shape[1], y.shape[1]), y.dtype)
    pieces = [slice(0, x.shape[1])] if busy() else tiles(x.shape[1], COLUMNS)
    parallel(lambda c: np.matmul(x[:, c].T, y, out=out[c]), pieces)
    return out


# ---------------------------------------------------------------------------------- LayerNorm

def layer_norm(x, gain, bias):
    if _few(x):
        y, mean, rstd = _normalized_few(x)
        y *= gain
        y += bias
        return y, LayerNormCache(x, gain, mean, rstd)
    y, mean, rstd = _normalized(x)

    def piece(r):
        y[r] *= gain
        y[r] += bias

    parallel(piece, tiles(len(y), PIECE // y.shape[1]))
    return y.reshape(x.shape), LayerNormCache(x, gain, mean, rstd)


def layer_norm_backward(dy, cache):
    x, gain, mean, rstd = cache
    rows, c = dy.reshape(-1, dy.shape[-1]), dy.shape[-1]
    pieces = tiles(len(rows), PIECE // c)
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
    if _few(x):
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

    parallel(piece, tiles(len(flat), PIECE // d))
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

    parallel(piece, tiles(len(rows), PIECE // d))
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
    parallel(lambda r: _geglu(flat_a[r], flat_b[r], flat[r]), tiles(flat.size, PIECE))
    return y, GateCache(a, b)


def geglu_backward(dy, cache):
    a, b = (z.reshape(-1) for z in cache)
    da, db, dy = np.empty_like(a), np.empty_like(b), dy.reshape(-1)
    parallel(lambda r: _geglu_backward(dy[r], a[r], b[r], da[r], db[r]), tiles(a.size, PIECE))
    return da.reshape(cache[0].shape), db.reshape(cache[1].shape)


def geglu_ffn(x, w_gate, w_value, w_out, dropped=None):
    if _few(x) and dropped is None:
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
    drop = _Drop(dropped, (*x.shape[:-1], m))
    a, b = (np.empty((len(rows), m), x.dtype) for _ in range(2))
    y = np.empty((len(rows), w_out.shape[1]), x.dtype)

    def piece(r):
        np.matmul(rows[r], w_gate, out=a[r])
        np.matmul(rows[r], w_value, out=b[r])
        h = np.empty((r.stop - r.start, m), x.dtype)
        for s in tiles(len(h), PIECE // m):
            _geglu(a[r][s], b[r][s], h[s])
        drop(h, r.start * m)
        np.matmul(h, w_out, out=y[r])

    parallel(piece, tiles(len(rows), ROWS))
    wide = (*x.shape[:-1], m)
    return y.reshape(*x.shape[:-1], -1), GatedCache(
        x, w_gate, w_value, w_out, a.reshape(wide), b.reshape(wide), dropped)


def geglu_ffn_backward(dy, cache):
    x, w_gate, w_value, w_out, a, b, dropped = cache
    rows, flat, m = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), a.shape[-1]
    drop = _Drop(dropped, a.shape)
    a, b = a.reshape(-1, m), b.reshape(-1, m)
    h, da, db = (np.empty(a.shape, a.dtype) for _ in range(3))
    dx = np.empty(flat.shape, dy.dtype)

    def piece(r):
        dh = rows[r] @ w_out.T
        drop(dh, r.start * m)
        for s in tiles(len(dh), PIECE // m):
            _geglu_backward(dh[s], a[r][s], b[r][s], da[r][s], db[r][s], h[r][s])
        drop(h[r], r.start * m)
        np.matmul(da[r], w_gate.T, out=dx[r])
        dx[r] += db[r] @ w_value.T

    parallel(piece, tiles(len(rows), ROWS))
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
    y, drop = x.copy(), _Drop(dropped, x.shape)
    flat = y.reshape(-1)
    parallel(lambda r: drop(flat[r], r.start), tiles(flat.size, PIECE))
    return y, dropped


class _Drop:
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

        parallel(piece, tiles(n, PIECE * 4 // (c.stop - c.start)))
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

        parallel(piece, tiles(n, PIECE * 4 // (c.stop - c.start)))
        dw[:, c] = _product(x, dz)
        db[c] = np.ones(n, x.dtype) @ dz
    return dx, dw, db


def _columns(n, n_values):
    """Slices of the vocabulary so that n rows of logits fit the bound."""
    return tiles(n_values, max(256, LOGITS // n))


# ---------------------------------------------------------------------------------- attention

def attend(q, k, v, rel_k, rel_v, mask, scale, dropped=None):
    *lead, s, d = q.shape
    n = k.shape[-2]
    blocks = math.prod(lead)
    flat = [z.reshape(blocks, *z.shape[-2:]) for z in (q, k, v)]
    tables = _padded_tables(rel_k, rel_v)
    o, lse = np.empty((blocks, s, v.shape[-1]), q.dtype), np.empty((blocks, s, 1), q.dtype)
    hidden = _hidden(mask, (*lead, s, n), q.dtype)
    drop = _Drop(dropped, (*lead, s, n))

    def piece(r):
        own_q, own_k, own_v = (z[r] for z in flat)
        _attend(own_q * scale, own_k, own_v, tables, hidden(r), drop, r.start * s * n, o[r], lse[r])

    parallel(piece, tiles(blocks, PIECE // (s * n)))
    return o.reshape(*lead, s, -1), AttendCache(q, k, v, rel_k, rel_v, mask, scale, dropped,
                                                lse.reshape(*lead, s, 1))


def attend_backward(do, cache):
    q, k, v, rel_k, rel_v, mask, scale, dropped, lse = cache
    *lead, s, d = q.shape
    n = k.shape[-2]
    blocks = math.prod(lead)
    flat = [z.reshape(blocks, *z.shape[-2:]) for z in (q, k, v, do, lse)]
    tables = _padded_tables(rel_k, rel_v)
    dq, dk, dv = (np.empty(z.shape, q.dtype) for z in flat[:3])
    hidden = _hidden(mask, (*lead, s, n), q.dtype)
    drop = _Drop(dropped, (*lead, s, n))
    groups = tiles(blocks, -(-blocks // 8))  # each adds up its own gradient of the tables
    drel = None if rel_k is None else np.zeros((2, len(groups), *rel_k.shape), q.dtype)

    def group(i):
        for r in tiles(groups[i].stop - groups[i].start, PIECE // (s * n)):
            r = slice(groups[i].start + r.start, groups[i].start + r.stop)
            own_q, own_k, own_v, own_do, own_lse = (z[r] for z in flat)
            own_q = own_q * scale
            _attend_backward(own_do, own_q, own_k, own_v, tables, hidden(r), drop,
                             r.start * s * n, own_lse, dq[r], dk[r], dv[r],
                             None if drel is None else drel[:, i])
            dq[r] *= scale

    parallel(group, range(len(groups)))
    return (dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape),
            *((None, None) if drel is None else drel.sum(1)))


def _hidden(mask, shape, dtype):
    """Function of a slice of blocks that gives 0 where a query may look, else -inf."""
    mask = np.broadcast_to(causal_mask(np, *shape[-2:]) if mask is None else mask, shape)
    if all(stride == 0 for stride in mask.strides[:-2]):  # one mask for all blocks
        bias = np.where(mask.reshape(-1, *mask.shape[-2:])[:1], 0, -np.inf).astype(dtype)
        return lambda r: bias
    flat = mask.reshape(-1, *mask.shape[-2:])
    return lambda r: np.where(flat[r], dtype.type(0), dtype.type(-np.inf))


def _padded_tables(rel_k, rel_v):
    """Rows by distance with a row of zeros behind: the spare column that the skew needs."""
    if rel_k is None:
        return None
    return tuple(np.concatenate([rel, np.zeros_like(rel[:1])]) for rel in (rel_k, rel_v))


def _skewed(wide, n_keys):
    """View of wide (G, S, P + 1) by distance as (G, S, N) by key; see `attention.skew`."""
    g, s, p1 = wide.shape
    size = wide.itemsize
    start = wide.reshape(g, -1)[:, s - 1 :]
    return as_strided(start, (g, s, n_keys), (wide.strides[0], (p1 - 1) * size, size))


def _by_distance(y, tables):
    """y (G, S, N) by key -> (G, S, P + 1) by distance, else 0; see `attention.unskew`."""
    g, s, n = y.shape
    wide = np.zeros((g, s, len(tables[0])), y.dtype)
    _skewed(wide, n)[...] = y
    return wide


def _logits(q, k, tables, hidden):
    """Logits of scaled queries q (G, S, D) and keys k (G, N, D)."""
    z = q @ k.swapaxes(-1, -2)
    if tables is not None:
        z += _skewed(_rows_times(q, tables[0].T), k.shape[1])
    z += hidden
    return z


def _rows_times(x, w):
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def _attend(q, k, v, tables, hidden, drop, start, o, lse):
    """Into o (G, S, D) and lse (G, S, 1)."""
    tiny, lowest = np.finfo(q.dtype).tiny, np.finfo(q.dtype).min
    p = _logits(q, k, tables, hidden)
    top = np.maximum(p.max(-1, keepdims=True), lowest)
    p -= top
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    drop(p, start)
    np.matmul(p, v, out=o)
    if tables is not None:
        o += _rows_times(_by_distance(p, tables), tables[1])
    o /= np.maximum(total, tiny)
    lse[...] = np.where(total > 0, top + np.log(np.maximum(total, tiny)), 0)


def _attend_backward(do, q, k, v, tables, hidden, drop, start, lse, dq, dk, dv, drel):
    """Into dq (of the scaled queries), dk, dv; adds to drel (2, P, D)."""
    p = _logits(q, k, tables, hidden)
    p -= lse
    np.exp(p, out=p)
    dp = do @ v.swapaxes(-1, -2)
    if tables is not None:
        dp += _skewed(_rows_times(do, tables[1].T), k.shape[1])
    used = p
    if drop.dropped:
        keep = drop.mask(p, start)
        used = p * keep
        dp *= keep
    np.matmul(used.swapaxes(-1, -2), do, out=dv)
    if tables is not None:
        drel[1] += _outer(_by_distance(used, tables), do)[:-1]
    dp -= np.einsum("gij,gij->gi", p, dp)[..., None]
    dp *= p
    np.matmul(dp, k, out=dq)
    np.matmul(dp.swapaxes(-1, -2), q, out=dk)
    if tables is not None:
        by_distance = _by_distance(dp, tables)
        dq += _rows_times(by_distance, tables[0])
        drel[0] += _outer(by_distance, q)[:-1]


def _outer(x, y):
    return x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1])


# ---------------------------------------------------------------------------- local attention
#
# The blocks of all heads that a thread works on stand one behind the other as one long sequence, so
# that few array operations serve many small heads. Keys and values lie transposed where a product
# wants them so. Relative products are computed only for distances that are seen and not clipped;
# they come in a buffer whose other columns always hold HIDDEN, so adding them is also the mask.

HIDDEN = -1e30  # a logit whose weight is 0; finite, so that products with it are no NaN


def local_attention(q, k, v, rel_k, rel_v, block, lookback, scale, segments=None, window=None,
                    dropped=None):
    b, h, t, d = q.shape
    reach = clipped_reach(t, block, lookback, segments, window)
    cut = _Cut(t, reach, rel_k, rel_v, q.dtype)
    drop = _Drop(dropped, (b, h, cut.n, cut.size))
    o = np.empty((b, h, t, v.shape[-1]), q.dtype)
    lse = np.empty((b, h, cut.n, reach.block, 1), q.dtype)
    ones = np.ones((cut.n_keys, 1), q.dtype)

    def heads(share):
        own = _Heads(cut, share, q, k, scale)
        own_v, own_lse = own.keys(v[share]), np.empty((*own.q.shape[:2], 1), q.dtype)
        out = np.empty((*own.q.shape[:2], v.shape[-1]), q.dtype)
        bounded = own.bounded()
        for r in own.pieces:
            p = own.logits(r)                                        # (G, S, N)
            top = 0 if bounded else p.max(-1, keepdims=True)
            if not bounded:
                p -= top
            np.exp(p, out=p)
            total = (p.reshape(-1, cut.n_keys) @ ones).reshape(*p.shape[:2], 1)
            drop(p, (own.first * cut.n + r.start) * cut.size)
            np.matmul(p, own.windows(own_v, r), out=out[r])
            if rel_k is not None:
                out[r] += (own.by_distance(p) @ cut.rel_v).reshape(out[r].shape)
            out[r] /= total
            np.log(total, out=own_lse[r])
            own_lse[r] += top
        o[share] = own.tokens(out)
        lse[share] = own_lse.reshape(lse[share].shape)

    parallel(heads, _shares(b, h))
    return o, LocalCache(q, k, v, rel_k, rel_v, reach, scale, dropped, lse)


def local_attention_backward(do, cache):
    q, k, v, rel_k, rel_v, reach, scale, dropped, lse = cache
    cut = _Cut(q.shape[2], reach, rel_k, rel_v, q.dtype)
    drop = _Drop(dropped, (*q.shape[:2], cut.n, cut.size))
    dq, dk, dv = (np.empty(z.shape, q.dtype) for z in (q, k, v))
    shares = _shares(*q.shape[:2])
    drel = None if rel_k is None else np.zeros((2, len(shares), *cut.rel_k.shape), q.dtype)

    def heads(i):
        share = shares[i]
        own = _Heads(cut, share, q, k, scale)
        own_k, own_vt = own.keys(k[share]), own.transposed(v[share])
        own_do, own_lse = own.blocks(do[share]), lse[share].reshape(*own.q.shape[:2], 1)
        own_dq, own_dk = np.empty_like(own.q), np.zeros_like(own_k)
        own_dv = np.zeros((len(own_k), v.shape[-1]), q.dtype)
        for r in own.pieces:
            p = own.logits(r)
            p -= own_lse[r]
            np.exp(p, out=p)
            dp = own_do[r] @ own.windows_transposed(own_vt, r)
            if rel_k is not None:
                dp += own.by_key(own_do[r], cut.rel_vt)
            used = p
            if dropped:
                used = drop.mask(p, (own.first * cut.n + r.start) * cut.size)
                dp *= used
                used *= p
            own.add_windows(own_dv, used.swapaxes(-1, -2) @ own_do[r], r)
            if rel_k is not None:
                drel[1, i] += own.by_distance(used).T @ _rows(own_do[r])
            dp -= np.einsum("gij,gij->gi", p, dp)[..., None]
            dp *= p
            np.matmul(dp, own.windows(own_k, r), out=own_dq[r])
            own.add_windows(own_dk, dp.swapaxes(-1, -2) @ own.q[r], r)
            if rel_k is not None:
                by_distance = own.by_distance(dp)
                own_dq[r] += (by_distance @ cut.rel_k).reshape(own_dq[r].shape)
                drel[0, i] += by_distance.T @ _rows(own.q[r])
        first = cut.lookback * cut.block
        np.multiply(own.tokens(own_dq), scale, out=dq[share])
        dk[share], dv[share] = own.tokens(own_dk[first:]), own.tokens(own_dv[first:])

    parallel(heads, range(len(shares)))
    if drel is None:
        return dq, dk, dv, None, None
    drel_k, drel_v = np.zeros_like(rel_k), np.zeros_like(rel_v)
    drel_k[cut.rows], drel_v[cut.rows] = drel.sum(1)
    return dq, dk, dv, drel_k, drel_v


def _shares(b, h):
    """The heads that a thread works on at a time: all where other threads are at work already."""
    if busy():
        return [(slice(0, b), slice(0, h))]
    return [(slice(i, i + 1), slice(j, j + 1)) for i in range(b) for j in range(h)]


def _rows(x):
    return x.reshape(-1, x.shape[-1])


class _Cut:
    """How T tokens are cut into n blocks of S, and which of their N keys the queries see.

    By distance, column p of N stands for distance p + 1 - N; columns from `seen` on are seen, those
    from `near` on are not clipped and have the rows `rows` of the tables.
    """

    def __init__(self, t, reach, rel_k, rel_v, dtype):
        self.block, self.lookback, self.segments, window = reach
        self.t, self.n = t, -(-t // self.block)
        self.n_keys = (self.lookback + 1) * self.block
        self.size = self.block * self.n_keys
        window = min(window or self.n_keys, self.n_keys)
        self.seen, self.rel_k = self.n_keys - window, None
        if rel_k is None:
            distance = np.arange(self.n_keys) - self.lookback * self.block \
                - np.arange(self.block)[:, None]
            hidden = (distance > 0) | (distance <= -window)
            self.bias = np.where(hidden, HIDDEN, 0).astype(dtype)    # (S, N)
            return
        m = len(rel_k) // 2
        self.near = self.n_keys - min(window, m + 1)
        self.rows = slice(m + 1 + self.near - self.n_keys, m + 1)
        self.rel_k, self.rel_v = rel_k[self.rows], rel_v[self.rows]  # (N - near, D)
        self.rel_kt, self.rel_vt = (np.ascontiguousarray(x.T) for x in (self.rel_k, self.rel_v))


class _Heads:
    """The blocks of a share of the heads, one head behind the other, worked on in pieces."""

    def __init__(self, cut, share, q, k, scale):
        self.cut, self.heads = cut, q[share].shape[:2]
        self.first = share[0].start * q.shape[1] + share[1].start    # its first head
        self.q = self.blocks(q[share])                               # (heads n, S, D)
        self.q *= scale
        self.kt = self.transposed(k[share])
        self.pieces = tiles(len(self.q), ATTENTION // cut.size)
        rows = self.pieces[0].stop * cut.block
        if cut.rel_k is not None:
            self._wide = np.full((rows, cut.n_keys + cut.block - 1), HIDDEN, q.dtype)
            self._spread = np.zeros_like(self._wide)
        if cut.segments is not None:
            front = cut.lookback * cut.block
            self._segments = np.zeros(front + len(self.q) * cut.block, np.uint16)
            self._segments[front:].reshape(*self.heads, -1)[..., : cut.t] = cut.segments[share]

    def blocks(self, x):
        """(b, h, T, D) -> (b h n, S, D) in a new array, filled up with zeros."""
        cut, out = self.cut, np.empty((*self.heads, self.cut.n * self.cut.block, x.shape[-1]),
                                      x.dtype)
        out[:, :, cut.t :] = 0
        out[:, :, : cut.t] = x
        return out.reshape(-1, cut.block, x.shape[-1])

    def tokens(self, x):
        """The inverse of `blocks`: (..., D) -> (b, h, T, D)."""
        return x.reshape(*self.heads, -1, x.shape[-1])[:, :, : self.cut.t]

    def keys(self, x):
        """(b, h, T, D) -> ((lookback + b h n) S, D), zeros in front and behind each head."""
        return np.concatenate([np.zeros((self.cut.lookback * self.cut.block, x.shape[-1]), x.dtype),
                               _rows(self.blocks(x))])

    def transposed(self, x):
        """(b, h, T, D) -> `keys` transposed, (D, ...)."""
        front, size = self.cut.lookback * self.cut.block, self.cut.n * self.cut.block
        total = front + math.prod(self.heads) * size
        out = np.empty((x.shape[-1], total + 16), x.dtype)  # 16: rows that do not share cache lines
        out[:, :front] = 0
        tokens = out[:, front:total].reshape(-1, *self.heads, size)
        tokens[..., self.cut.t :] = 0
        tokens[..., : self.cut.t] = x.transpose(3, 0, 1, 2)
        return out

    def windows(self, x, r):
        """What blocks r may see of x (from `keys`): (G, N, ...), a view."""
        step = self.cut.block * x.strides[0]
        return np.ndarray((r.stop - r.start, self.cut.n_keys, *x.shape[1:]), x.dtype, x,
                          r.start * step, (step, *x.strides))

    def windows_transposed(self, x, r):
        """The same of what `transposed` returned: (G, D, N), a view."""
        step = self.cut.block * x.itemsize
        return np.ndarray((r.stop - r.start, len(x), self.cut.n_keys), x.dtype, x,
                          r.start * step, (step, *x.strides))

    def add_windows(self, x, grads, r):
        """Adds gradients (G, N, D) of windows to the positions of x that they are views of."""
        s = self.cut.block
        for i in range(self.cut.lookback + 1):
            rows = x[(r.start + i) * s : (r.stop + i) * s]
            rows += grads[:, i * s : (i + 1) * s].reshape(rows.shape)

    def logits(self, r):
        """Of blocks r: (G, S, N), HIDDEN where a query may not look."""
        cut = self.cut
        z = self.q[r] @ self.windows_transposed(self.kt, r)
        z += cut.bias if cut.rel_k is None else self.by_key(self.q[r], cut.rel_kt)
        for i in range(r.start, r.stop) if cut.lookback else ():
            before = cut.lookback - i % cut.n  # blocks of its window that are another head's
            if before > 0:
                z[i - r.start, :, : before * cut.block] = HIDDEN
        if cut.segments is not None:
            own = self._segments[cut.lookback * cut.block :].reshape(-1, cut.block)[r]
            apart = own[:, :, None] != self.windows(self._segments, r)[:, None, :]
            np.copyto(z, HIDDEN, where=apart)
        return z

    def bounded(self):
        """True if |logits| stay below 60 by the lengths of vectors: exp needs no maximum then."""
        def longest(x, axis):
            return math.sqrt(np.einsum(x, [0, 1], x, [0, 1], [axis]).max(initial=0))

        keys = longest(self.kt[:, :-16], 1)
        if self.cut.rel_k is not None:
            keys += longest(self.cut.rel_k, 0)
        return longest(_rows(self.q), 0) * keys < 60  # exp(60) N is far from any overflow

    def by_key(self, x, table):
        """x (G, S, D) times the table's row of every pair's distance: (G, S, N), see `skew`."""
        cut, wide = self.cut, self._wide[: len(x) * self.cut.block]
        np.matmul(_rows(x), table, out=wide[:, cut.near : cut.n_keys])
        wide[:, cut.seen : cut.near] = wide[:, cut.near, None]
        return self._skewed(wide)

    def by_distance(self, y):
        """The transpose of `by_key`'s last step: y (G, S, N) -> (G S, N - near), a view."""
        cut, wide = self.cut, self._spread[: len(y) * self.cut.block]
        self._skewed(wide)[...] = y
        if cut.seen < cut.near:
            wide[:, cut.near] += wide[:, cut.seen : cut.near] @ np.ones(cut.near - cut.seen,
                                                                        y.dtype)
        return wide[:, cut.near : cut.n_keys]

    def _skewed(self, wide):
        s, columns, size = self.cut.block, wide.shape[1], wide.itemsize
        return np.ndarray((len(wide) // s, s, self.cut.n_keys), wide.dtype, wide, (s - 1) * size,
                          (s * columns * size, (columns - 1) * size, size))


# ------------------------------------------------------------------------------------ routing

def top_members(scores, window):
    """The W-th best score by selection instead of a sort; then every position is in or out."""
    t = scores.shape[-1]
    flat = scores.reshape(-1, t)
    out = np.empty((len(flat), window), np.int64)

    def piece(r):
        worst = np.partition(flat[r], t - window, axis=-1)[:, t - window, None]
        above, equal = flat[r] > worst, flat[r] == worst
        room = window - above.sum(-1, keepdims=True)
        member = above | (equal & (np.cumsum(equal, axis=-1, dtype=np.int32) <= room))
        out[r] = np.nonzero(member)[1].reshape(-1, window)

    parallel(piece, tiles(len(flat), PIECE // t))
    return out.reshape(*scores.shape[:-1], window)


def by_cluster(winner, n_clusters=MAX_CLUSTERS):
    """Sixteen bits are enough for a cluster's number, and NumPy sorts them by radix."""
    small = winner.astype(np.uint16)
    return small.argsort(axis=-1, kind="stable")


def inverse(order):
    out = np.empty_like(order)
    np.put_along_axis(out, order, np.arange(order.shape[-1]).reshape(
        (1,) * (order.ndim - 1) + (-1,)), axis=-1)
    return out


def gather(x, index):
    b, h = x.shape[:2]
    out = np.empty((*index.shape, x.shape[-1]), x.dtype)

    def head(i):
        at = divmod(i, h)
        np.take(x[at], index[at], axis=0, out=out[at], mode="clip")

    parallel(head, range(b * h))
    return out


def scatter_sum(rows, index, n_tokens):
    """Round after round: the first row of every token, then the second of those that have two, ...

    No token is in a round twice, so a round is one addition. A position below 2^16 is sorted by
    radix.
    """
    b, h, d = *rows.shape[:2], rows.shape[-1]
    flat = rows.reshape(b * h, -1, d)
    positions = index.reshape(b * h, -1).astype(np.min_scalar_type(n_tokens - 1))
    out = np.zeros((b * h, n_tokens, d), rows.dtype)

    def heads(r):
        head = np.arange(r.stop - r.start)[:, None]
        order = positions[r].argsort(axis=-1, kind="stable")
        order += head * order.shape[1]                               # by token
        order = order.reshape(-1)
        count = np.bincount((positions[r] + head * n_tokens).reshape(-1),
                            minlength=len(head) * n_tokens)
        first = np.cumsum(count) - count                             # of each token in the order
        source, total = flat[r].reshape(-1, d), out[r].reshape(-1, d)
        left = np.flatnonzero(count)
        total[left] = source[order[first[left]]]
        done = 1
        while len(left := left[count[left] > done]):
            total[left] += source[order[first[left] + done]]
            done += 1

    parallel(heads, [slice(0, b * h)] if busy() else tiles(b * h, 1))
    return out.reshape(b, h, n_tokens, d)


# ---------------------------------------------------------------------------------- optimizer

def adamw_update(flat, grads, state, table, lr, step, *, beta1=0.9, beta2=0.99, eps=1e-8,
                 weight_decay=0.0):
    if weight_decay:
        for leaf in table:
            if len(leaf.shape) >= 2:
                flat[leaf.start : leaf.stop] *= 1 - lr * weight_decay
    unbias1, unbias2 = 1 - beta1 ** (step + 1), math.sqrt(1 - beta2 ** (step + 1))

    def piece(r):
        g, m, v = grads[r], state["m"][r], state["v"][r]
        change = g - m
        change *= 1 - beta1
        m += change
        np.multiply(g, g, out=change)
        change -= v
        change *= 1 - beta2
        v += change
        np.sqrt(v, out=change)
        change /= unbias2
        change += eps
        np.divide(m, change, out=change)
        change *= lr / unbias1
        flat[r] -= change

    parallel(piece, tiles(flat.size, PIECE))


def muon_update(flat, grads, state, table, lr, step, *, weight_decay=0.0):
    """Matrices of one shape, or of its transpose, in one stack: few calls, and each is products.

    x @ x^T of one array is a symmetric product in NumPy, half the work; a is symmetric as well.
    """
    adamw_of_the_rest(flat, grads, state, table, lr, step, weight_decay)
    alike = {}
    for leaf in filter(orthogonalized, table):
        alike.setdefault(tuple(sorted(leaf.shape)), []).append(leaf)

    def piece(group):
        shape, leaves = group
        x = np.empty((len(leaves), *shape), flat.dtype)
        for one, leaf in zip(x, leaves, strict=True):
            g, m = grads[leaf.start : leaf.stop], state["m"][leaf.start : leaf.stop]
            m *= MOMENTUM
            m += g
            change = (MOMENTUM * m).reshape(leaf.shape)
            change += g.reshape(leaf.shape)
            one[...] = _wide(change)
            one *= 1 / max(math.sqrt(np.vdot(one, one)), np.finfo(x.dtype).tiny)
        for first, third, fifth in NEWTON_SCHULZ:
            a = x @ x.swapaxes(-1, -2)
            b = a @ a.swapaxes(-1, -2)
            b *= fifth
            a *= third
            b += a
            y = b @ x
            x *= first
            x += y
        for one, leaf in zip(x, leaves, strict=True):
            w = _wide(flat[leaf.start : leaf.stop].reshape(leaf.shape))
            one *= lr * update_scale(leaf)
            w *= 1 - lr * weight_decay
            w -= one

    parallel(piece, [(shape, leaves[r]) for shape, leaves in alike.items()
                     for r in tiles(len(leaves), PIECE // math.prod(shape))])


def _wide(matrix):
    """A view with at least as many columns as rows."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _few(x) -> bool:
    """True for arrays so small that cutting them costs more than it gains: a token per text."""
    return x.size < PIECE // 8


def worthwhile(*args) -> bool:
    """False for arrays so small that the plain functions are quicker."""
    return not _few(first_array(args))


TWINS = {f"{module}.{f.__name__}": f for module, functions in {
    "layers": (linear, linear_backward, layer_norm, layer_norm_backward, normalize,
               normalize_backward, geglu, geglu_backward, geglu_ffn, geglu_ffn_backward,
               linear_cross_entropy, linear_cross_entropy_backward),
    "dropout": (dropout,),
    "attention": (attend, attend_backward, local_attention, local_attention_backward),
    "routing": (top_members, by_cluster, inverse, gather, scatter_sum),
    "optim": (adamw_update, muon_update),
}.items() for f in functions}
ANY_SIZE = ("layers.layer_norm", "layers.normalize", "layers.geglu_ffn")  # have a way for few rows
