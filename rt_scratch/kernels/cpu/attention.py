"""Attention, local and in clusters: faster twins for NumPy arrays."""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import as_strided

from rt_scratch.attention import (
    AttendCache,
    LocalCache,
    causal_mask,
    clipped_reach,
    outer,
    rows_times,
)
from rt_scratch.kernels.cpu import sizes
from rt_scratch.kernels.cpu.layers import Drop
from rt_scratch.threads import busy, parallel, tiles


def attend(q, k, v, rel_k, rel_v, mask, scale, dropped=None):
    *lead, s, d = q.shape
    n = k.shape[-2]
    blocks = math.prod(lead)
    flat = [z.reshape(blocks, *z.shape[-2:]) for z in (q, k, v)]
    tables = _padded_tables(rel_k, rel_v)
    o, lse = np.empty((blocks, s, v.shape[-1]), q.dtype), np.empty((blocks, s, 1), q.dtype)
    hidden = _hidden(mask, (*lead, s, n), q.dtype)
    drop = Drop(dropped, (*lead, s, n))

    def piece(r):
        own_q, own_k, own_v = (z[r] for z in flat)
        _attend(own_q * scale, own_k, own_v, tables, hidden(r), drop, r.start * s * n, o[r], lse[r])

    parallel(piece, tiles(blocks, sizes.PIECE // (s * n)))
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
    drop = Drop(dropped, (*lead, s, n))
    groups = tiles(blocks, -(-blocks // 8))  # each adds up its own gradient of the tables
    drel = None if rel_k is None else np.zeros((2, len(groups), *rel_k.shape), q.dtype)

    def group(i):
        for r in tiles(groups[i].stop - groups[i].start, sizes.PIECE // (s * n)):
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
        z += _skewed(rows_times(q, tables[0].T), k.shape[1])
    z += hidden
    return z


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
        o += rows_times(_by_distance(p, tables), tables[1])
    o /= np.maximum(total, tiny)
    lse[...] = np.where(total > 0, top + np.log(np.maximum(total, tiny)), 0)


def _attend_backward(do, q, k, v, tables, hidden, drop, start, lse, dq, dk, dv, drel):
    """Into dq (of the scaled queries), dk, dv; adds to drel (2, P, D)."""
    p = _logits(q, k, tables, hidden)
    p -= lse
    np.exp(p, out=p)
    dp = do @ v.swapaxes(-1, -2)
    if tables is not None:
        dp += _skewed(rows_times(do, tables[1].T), k.shape[1])
    used = p
    if drop.dropped:
        keep = drop.mask(p, start)
        used = p * keep
        dp *= keep
    np.matmul(used.swapaxes(-1, -2), do, out=dv)
    if tables is not None:
        drel[1] += outer(_by_distance(used, tables), do)[:-1]
    dp -= np.einsum("gij,gij->gi", p, dp)[..., None]
    dp *= p
    np.matmul(dp, k, out=dq)
    np.matmul(dp.swapaxes(-1, -2), q, out=dk)
    if tables is not None:
        by_distance = _by_distance(dp, tables)
        dq += rows_times(by_distance, tables[0])
        drel[0] += outer(by_distance, q)[:-1]


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
    cut = Cut(t, reach, rel_k, rel_v, q.dtype, dropped)
    drop = Drop(dropped, (b, h, cut.n, cut.bands[0].size))
    o = np.empty((b, h, t, v.shape[-1]), q.dtype)
    lse = np.empty((b, h, -(-t // reach.block), reach.block, 1), q.dtype)

    def heads(share):
        own = _Heads(cut, share, q, k, scale)
        own_v, own_lse = own.keys(v[share]), np.empty((*own.q.shape[:2], 1), q.dtype)
        out = np.empty((*own.q.shape[:2], v.shape[-1]), q.dtype)
        calm = bounded(own.q, own.kt[:, :-16], [band.rel_k for band in cut.bands])
        for band, r in own.pieces():
            p = own.logits(band, r)                                  # (G, S, N)
            top = 0 if calm else p.max(-1, keepdims=True)
            if not calm:
                p -= top
            np.exp(p, out=p)
            total = (p.reshape(-1, band.n_keys) @ band.ones).reshape(*p.shape[:2], 1)
            drop(p, (own.first * cut.n + r.start) * band.size)
            y = p @ own.windows(own_v, band, r)
            if rel_k is not None:
                y += (own.by_distance(p, band) @ band.rel_v).reshape(y.shape)
            np.divide(y, total, out=out[r])
            np.log(total, out=total)
            np.add(total, top, out=own_lse[r])
        o[share] = own.tokens(out)
        own_lse = own_lse.reshape(*own.heads, -1, 1)[:, :, : math.prod(lse.shape[2:])]
        lse[share] = own_lse.reshape(lse[share].shape)

    parallel(heads, shares(b, h))
    return o, LocalCache(q, k, v, rel_k, rel_v, reach, scale, dropped, lse)


def local_attention_backward(do, cache):
    q, k, v, rel_k, rel_v, reach, scale, dropped, lse = cache
    b, h, t, _ = q.shape
    cut = Cut(t, reach, rel_k, rel_v, q.dtype, dropped)
    drop = Drop(dropped, (b, h, cut.n, cut.bands[0].size))
    dq, dk, dv = (np.empty(z.shape, q.dtype) for z in (q, k, v))
    parts = shares(b, h)
    drel = None if rel_k is None else np.zeros((2, len(parts), *rel_k.shape), q.dtype)

    def heads(i):
        share = parts[i]
        own = _Heads(cut, share, q, k, scale)
        own_k, own_vt = own.keys(k[share]), own.transposed(v[share])
        own_do = own.blocks(do[share])
        own_lse = own.blocks(lse[share].reshape(*own.heads, -1, 1)[:, :, :t])
        own_dq, own_dk = np.empty_like(own.q), np.zeros_like(own_k)
        own_dv = np.zeros((len(own_k), v.shape[-1]), q.dtype)
        for band, r in own.pieces():
            p = own.logits(band, r)
            p -= own_lse[r]
            np.exp(p, out=p)
            dp = own_do[r] @ own.windows_transposed(own_vt, band, r)
            if rel_k is not None:
                own.add_by_key(dp, own_do[r], band, band.rel_vt)
            used = p
            if dropped:
                used = drop.mask(p, (own.first * cut.n + r.start) * band.size)
                dp *= used
                used *= p
            own.add_windows(own_dv, used.swapaxes(-1, -2) @ own_do[r], band, r)
            if rel_k is not None:
                drel[1, i, band.rows] += own.by_distance(used, band).T @ _rows(own_do[r])
            dp -= np.einsum("gij,gij->gi", p, dp)[..., None]
            dp *= p
            y = dp @ own.windows(own_k, band, r)
            own.add_windows(own_dk, dp.swapaxes(-1, -2) @ own.q[r], band, r)
            if rel_k is not None:
                by_distance = own.by_distance(dp, band)
                y += (by_distance @ band.rel_k).reshape(y.shape)
                drel[0, i, band.rows] += by_distance.T @ _rows(own.q[r])
            own_dq[r] = y
        np.multiply(own.tokens(own_dq), scale, out=dq[share])
        dk[share], dv[share] = own.tokens(own_dk[cut.front :]), own.tokens(own_dv[cut.front :])

    parallel(heads, range(len(parts)))
    return dq, dk, dv, *((None, None) if drel is None else drel.sum(1))


def bounded(q, kt, tables):
    """True if |logits| stay below 60 by the lengths of vectors: exp needs no maximum then.

    q (..., D), kt (D, n), tables (P, D) or None each.
    """
    def longest(x, axis):
        return math.sqrt(np.einsum(x, [0, 1], x, [0, 1], [axis]).max(initial=0))

    relative = max((longest(table, 0) for table in tables if table is not None), default=0)
    return longest(_rows(q), 0) * (longest(kt, 1) + relative) < 60  # exp(60) N: far from overflow


def shares(b, h):
    """The heads that a thread takes at a time: all of them where other threads are at work."""
    if busy():
        return [(slice(0, b), slice(0, h))]
    return [(slice(i, i + 1), slice(j, j + 1)) for i in range(b) for j in range(h)]


def _rows(x):
    return x.reshape(-1, x.shape[-1])


class Cut:
    """How T tokens are cut into n blocks of S, and what each block sees.

    Usually every block sees as many keys: one band for all. Where each query sees every earlier
    token, blocks are short and the i-th sees i + 1 of them: n bands, and nearly half of the work
    is saved. Dropout is drawn by the blocks of `reach`, so that it keeps to those.
    """

    def __init__(self, t, reach, rel_k, rel_v, dtype, dropped):
        self.block, lookback, self.segments, window = reach
        self.t, self.n = t, -(-t // self.block)
        self.to_all = (lookback + 1 == self.n and self.n * self.block == t
                       and (window or t) >= t and t > sizes.TRIANGLE and not dropped)
        if self.to_all:
            self.block = sizes.TRIANGLE
            self.n = -(-t // self.block)
        self.front = 0 if self.to_all else lookback * self.block     # keys before those of a head
        self.bands = [Band(self.block, i, window, rel_k, rel_v, dtype)
                      for i in (range(self.n) if self.to_all else [lookback])]


class Band:
    """Blocks of S queries that see their own block, causally, and `lookback` blocks before.

    The first `far` of the N keys are so far from all queries that their distance is clipped. By
    distance, column p of the other M stands for distance p + 1 - M; columns from `seen` on are
    seen, those from `near` on are not clipped and have the rows `rows` of the tables.
    """

    def __init__(self, block, lookback, window, rel_k, rel_v, dtype):
        self.lookback, self.n_keys = lookback, (lookback + 1) * block
        self.size = block * self.n_keys
        self.ones = np.ones((self.n_keys, 1), dtype)
        window = min(window or self.n_keys, self.n_keys)
        self.rel_k = None
        if rel_k is None:
            distance = np.arange(self.n_keys) - lookback * block - np.arange(block)[:, None]
            hidden = (distance > 0) | (distance <= -window)
            self.bias = np.where(hidden, HIDDEN, 0).astype(dtype)    # (S, N)
            return
        m = len(rel_k) // 2
        self.far = max(0, self.n_keys - block - m) if window == self.n_keys else 0
        self.width = self.n_keys - self.far                          # M
        self.seen, self.near = max(0, self.width - window), self.width - min(window, m + 1)
        self.rows = slice(m + 1 + self.near - self.width, m + 1)
        self.rel_k, self.rel_v = rel_k[self.rows], rel_v[self.rows]  # (M - near, D)
        self.rel_kt, self.rel_vt = (np.ascontiguousarray(x.T) for x in (self.rel_k, self.rel_v))


class _Heads:
    """The blocks of a share of the heads, one head behind the other, worked on in pieces."""

    def __init__(self, cut, share, q, k, scale):
        self.cut, self.heads = cut, q[share].shape[:2]
        self.first = share[0].start * q.shape[1] + share[1].start    # its first head
        self.q = self.blocks(q[share])                               # (heads n, S, D)
        self.q *= scale
        self.kt = self.transposed(k[share])
        self.relative = cut.bands[0].rel_k is not None
        if cut.segments is not None:
            self._segments = np.zeros(cut.front + len(self.q) * cut.block, np.uint16)
            self._segments[cut.front :].reshape(*self.heads, -1)[..., : cut.t] = cut.segments[share]

    def pieces(self):
        """Yields bands and the slices of blocks that are worked on together."""
        n, count = self.cut.n, len(self.q)
        for i, band in enumerate(self.cut.bands):
            # Where there are several bands, the i-th block of each head is in the i-th.
            step = n if self.cut.to_all else 1
            slices = [slice(i + step * r.start, i + step * r.stop, step)
                      for r in tiles(count // step, sizes.ATTENTION // band.size)]
            if self.relative:
                rows = len(range(count)[slices[0]]) * self.cut.block
                self._wide = np.full((rows, band.width + self.cut.block - 1), HIDDEN, self.q.dtype)
                self._spread = np.zeros_like(self._wide)
            for r in slices:
                yield band, r

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
        """(b, h, T, D) -> (front + b h n S, D), zeros in front and behind each head."""
        return np.concatenate([np.zeros((self.cut.front, x.shape[-1]), x.dtype),
                               _rows(self.blocks(x))])

    def transposed(self, x):
        """(b, h, T, D) -> `keys` transposed, (D, ...)."""
        front, size = self.cut.front, self.cut.n * self.cut.block
        total = front + math.prod(self.heads) * size
        out = np.empty((x.shape[-1], total + 16), x.dtype)  # 16: rows that do not share cache lines
        out[:, :front] = 0
        tokens = out[:, front:total].reshape(-1, *self.heads, size)
        tokens[..., self.cut.t :] = 0
        tokens[..., : self.cut.t] = x.transpose(3, 0, 1, 2)
        return out

    def _first_key(self, band, r):
        """Where the window of the first of blocks r begins, among `keys`."""
        return self.cut.front + (r.start - band.lookback) * self.cut.block

    def windows(self, x, band, r):
        """What blocks r may see of x (from `keys`): (G, N, ...), a view."""
        step = self.cut.block * x.strides[0]
        return np.ndarray((len(range(len(self.q))[r]), band.n_keys, *x.shape[1:]), x.dtype, x,
                          self._first_key(band, r) * x.strides[0],
                          ((r.step or 1) * step, *x.strides))

    def windows_transposed(self, x, band, r):
        """The same of what `transposed` returned: (G, D, N), a view."""
        step = self.cut.block * x.itemsize
        return np.ndarray((len(range(len(self.q))[r]), len(x), band.n_keys), x.dtype, x,
                          self._first_key(band, r) * x.itemsize,
                          ((r.step or 1) * step, *x.strides))

    def add_windows(self, x, grads, band, r):
        """Adds gradients (G, N, D) of windows to the positions of x that they are views of."""
        if self.cut.to_all:  # each window is of another head
            windows = self.windows(x, band, r)
            windows += grads
            return
        s, first = self.cut.block, self._first_key(band, r)
        for i in range(band.lookback + 1):
            rows = x[first + i * s :][: len(grads) * s]
            rows += grads[:, i * s : (i + 1) * s].reshape(rows.shape)

    def logits(self, band, r):
        """Of blocks r: (G, S, N), HIDDEN where a query may not look."""
        cut = self.cut
        z = self.q[r] @ self.windows_transposed(self.kt, band, r)
        if self.relative:
            self.add_by_key(z, self.q[r], band, band.rel_kt)
        else:
            z += band.bias
        for i in range(r.start, r.stop) if cut.front else ():
            before = band.lookback - i % cut.n  # blocks of its window that are another head's
            if before > 0:
                z[i - r.start, :, : before * cut.block] = HIDDEN
        if cut.segments is not None:
            own = self._segments[cut.front :].reshape(-1, cut.block)[r]
            apart = own[:, :, None] != self.windows(self._segments, band, r)[:, None, :]
            np.copyto(z, HIDDEN, where=apart)
        return z

    def add_by_key(self, z, x, band, table):
        """Adds to z (G, S, N) x (G, S, D) times the table's row of every pair's distance: `skew`.

        What lies behind the query gets HIDDEN.
        """
        wide = self._wide[: len(x) * self.cut.block]
        np.matmul(_rows(x), table, out=wide[:, band.near : band.width])
        wide[:, band.seen : band.near] = wide[:, band.near, None]
        z[..., band.far :] += self._skewed(wide, band)
        z[..., : band.far] += wide[:, band.near].reshape(*z.shape[:2], 1)

    def by_distance(self, y, band):
        """The transpose: y (G, S, N) -> (G S, M - near), a view of a buffer."""
        wide = self._spread[: len(y) * self.cut.block]
        self._skewed(wide, band)[...] = y[..., band.far :]
        if band.seen < band.near:
            wide[:, band.near] += (wide[:, band.seen : band.near]
                                   @ band.ones[band.seen : band.near, 0])
        if band.far:
            wide[:, band.near] += (y[..., : band.far] @ band.ones[: band.far]).reshape(-1)
        return wide[:, band.near : band.width]

    def _skewed(self, wide, band):
        s, columns, size = self.cut.block, wide.shape[1], wide.itemsize
        return np.ndarray((len(wide) // s, s, band.width), wide.dtype, wide, (s - 1) * size,
                          (s * columns * size, (columns - 1) * size, size))
