"""Multi-probe routing: faster twins for NumPy arrays.

Rows, sorted by the slot where their run ends (multiprobe.py), are cut into tiles of S. The keys of
a tile are the slots from the lowest to the highest that one of its rows sees, so tiles differ in
width, and tiles of about the same width are worked on together. What lies between the ends of the
runs of one tile is in no other tile, so that the widths add up to at most R T W / S + T per head.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rt_scratch import multiprobe
from rt_scratch.attention import distance_rows, distance_rows_backward
from rt_scratch.kernels.cpu import sizes
from rt_scratch.kernels.cpu.attention import HIDDEN, bounded, shares
from rt_scratch.multiprobe import MultiprobeCache, runs
from rt_scratch.routing import Coverage
from rt_scratch.threads import parallel, tiles


def multiprobe_attention(q, k, v, rel_k, rel_v, route, rule, dropped=None):
    if dropped:  # drawn by the tiles of the plain function
        return multiprobe.multiprobe_attention.reference(q, k, v, rel_k, rel_v, route, rule,
                                                         dropped)
    b, h, t, _ = q.shape
    reach = 1 - min(rule.window, t)
    (rows_k, cache_k), (rows_v, cache_v) = (
        (None, None) if rel is None else distance_rows(rel, reach, 0) for rel in (rel_k, rel_v))
    o, lse = np.empty((b, h, t, v.shape[-1]), q.dtype), np.empty((b, h, t, 1), q.dtype)
    tiny, lowest = np.finfo(q.dtype).tiny, np.finfo(q.dtype).min

    def heads(share):
        own = _Heads(share, q, k, route, rule, rows_k)
        own_v, calm = own.slots(v[share]), bounded(own.q, own.kt, [rows_k])
        y = np.empty((own.n, own.size, v.shape[-1]), q.dtype)
        top, total = (np.zeros((own.n, own.size, 1), q.dtype) for _ in range(2))
        for piece in own.pieces():
            p = own.logits(piece)                                    # (G, S, N)
            if not calm:
                top[piece.tiles] = np.maximum(p.max(-1, keepdims=True), HIDDEN / 2)
                p -= top[piece.tiles]
            np.exp(p, out=p)
            total[piece.tiles] = p @ np.ones((p.shape[-1], 1), q.dtype)
            out = p @ own.windows(own_v, piece)
            if rows_v is not None:
                out += (own.by_distance(p, piece) @ rows_v).reshape(out.shape)
            y[piece.tiles] = out
        y, top, total = (own.of_queries(x) for x in (y, top, total))
        highest = top.max(1, keepdims=True)                          # (b h T, 1, 1)
        weight = np.exp(top - highest)
        total = (weight * total).sum(1)
        o[share] = ((weight * y).sum(1) / np.maximum(total, tiny)).reshape(o[share].shape)
        found = np.where(total > 0, highest[:, 0] + np.log(np.maximum(total, tiny)), lowest)
        lse[share] = found.reshape(lse[share].shape)

    parallel(heads, shares(b, h))
    return (o, MultiprobeCache(q, k, v, rows_k, rows_v, (cache_k, cache_v), route, rule, dropped,
                               lse, o),
            Coverage((lse == lowest).mean(dtype=lse.dtype), np.zeros((), lse.dtype)))


def multiprobe_attention_backward(do, cache):
    q, k, v, rows_k, rows_v, tables, route, rule, dropped, lse, o = cache
    if dropped:
        return multiprobe.multiprobe_attention_backward.reference(do, cache)
    b, h, _, d = q.shape
    wide = v.shape[-1]
    dq, dk, dv = (np.empty(x.shape, q.dtype) for x in (q, q, v))
    parts = shares(b, h)
    drel = None if rows_k is None else np.zeros((2, len(parts), *rows_k.shape), q.dtype)

    def heads(i):
        share = parts[i]
        own = _Heads(share, q, k, route, rule, rows_k)
        own_k, own_vt = own.slots((q if k is None else k)[share]), own.slots(v[share]).T.copy()
        own_do = do[share].reshape(-1, wide)
        own_lse = np.maximum(lse[share].reshape(-1, 1), HIDDEN / 2)  # of what sees nothing: -inf
        own_delta = np.einsum("bhtd,bhtd->bht", do[share], o[share]).reshape(-1, 1)
        own_dq = np.empty((own.n, own.size, d), q.dtype)
        sums = np.zeros((len(own_k), d + wide), q.dtype)             # of keys and values
        for piece in own.pieces():
            rows = own.query[piece.tiles]                            # (G, S)
            p = own.logits(piece)
            p -= own_lse[rows]
            np.exp(p, out=p)
            do_rows, q_rows = own_do[rows], own.q[rows]
            dp = do_rows @ own.windows_transposed(own_vt, piece)
            grads = np.empty((*p.shape[::2], d + wide), q.dtype)     # (G, N, D + D)
            np.matmul(p.swapaxes(-1, -2), do_rows, out=grads[..., d:])
            if rows_v is not None:
                dp += own.by_key(do_rows, rows_v, piece)
                drel[1, i] += own.by_distance(p, piece).T @ do_rows.reshape(-1, wide)
            dp -= own_delta[rows]
            dp *= p
            np.matmul(dp.swapaxes(-1, -2), q_rows, out=grads[..., :d])
            out = dp @ own.windows(own_k, piece)
            if rows_k is not None:
                by_distance = own.by_distance(dp, piece)
                out += (by_distance @ rows_k).reshape(out.shape)
                drel[0, i] += by_distance.T @ q_rows.reshape(-1, d)
            own_dq[piece.tiles] = out
            for first, one in zip(piece.first.tolist(), grads, strict=True):
                sums[first : first + len(one)] += one
        np.multiply(own.of_queries(own_dq).sum(1).reshape(dq[share].shape), rule.scale,
                    out=dq[share])
        for grad, part in ((dk, sums[:, :d]), (dv, sums[:, d:])):
            tokens = np.empty((len(own.order), part.shape[1]), q.dtype)
            tokens[own.order] = part[: len(tokens)]
            grad[share] = tokens.reshape(grad[share].shape)

    parallel(heads, range(len(parts)))
    drel_k = drel_v = None
    if drel is not None:
        drel_k, drel_v = map(distance_rows_backward, drel.sum(1), tables)
    return *((dq + dk, None) if k is q else (dq, dk)), dv, drel_k, drel_v


class _Piece(NamedTuple):
    """Tiles that are worked on together, with N keys each."""

    tiles: np.ndarray    # (G,)
    first: np.ndarray    # (G,) slot of the first key
    n_keys: int          # N
    column: np.ndarray   # (G, S, 1) of the latest key that the row sees
    low: np.ndarray      # (G, S, 1) of the first; N where it sees nothing


class _Heads:
    """Rows, tiles and slots of a share of the heads, one head behind the other."""

    def __init__(self, share, q, k, route, rule, rows_k):
        t, r = route.probes.shape[2:]
        window = min(rule.window, t)
        self.size, self.r, self.rows_k = -(-window // 2), r, rows_k          # S
        order, low, end = (x.reshape(-1, x.shape[-1]) for x in runs(
            route.probes[share], route.key_winner[share], rule.window))
        head = np.arange(len(order))[:, None]
        last = np.maximum(end - 1, 0).astype(np.min_scalar_type(t - 1))      # 16 bits: radix sort
        by_last = (last.argsort(axis=-1, kind="stable") + r * t * head).reshape(-1)
        self.order = (order + t * head).reshape(-1)
        self.n = -(-len(by_last) // self.size)                               # tiles

        def cut(x, spare):
            out = np.full(self.n * self.size, spare)
            out[: len(by_last)] = x
            return out.reshape(self.n, self.size)

        low, end = (cut((x + t * head).reshape(-1)[by_last], len(self.order)) for x in (low, end))
        self.query, self.low, self.end = cut(by_last // r, 0), low, end
        self.at = np.empty_like(by_last)                                     # of each row
        self.at[by_last] = np.arange(len(by_last))
        self.first = low.min(1)
        self.n_keys = -(-np.maximum(end.max(1) - self.first, 1) // sizes.WIDTH) * sizes.WIDTH
        self.q = (q[share] * rule.scale).reshape(-1, q.shape[-1])
        self.kt = self.slots((q if k is None else k)[share]).T.copy()

    def slots(self, x):
        """(b, h, T, D) -> sorted (b h T, D), and zeros behind, as many as a tile may read there."""
        flat = x.reshape(-1, x.shape[-1])
        out = np.zeros((len(flat) + self.n_keys.max(), flat.shape[1]), x.dtype)
        np.take(flat, self.order, axis=0, out=out[: len(flat)], mode="clip")
        return out

    def of_queries(self, x):
        """Rows (n, S, D) of tiles -> those of each query (b h T, R, D)."""
        return x.reshape(-1, x.shape[-1])[self.at].reshape(-1, self.r, x.shape[-1])

    def pieces(self):
        """Yields pieces; each tile is in one."""
        for n_keys in np.unique(self.n_keys).tolist():
            own = np.flatnonzero(self.n_keys == n_keys)
            for part in tiles(len(own), sizes.ATTENTION // (self.size * n_keys)):
                some = own[part]
                first, low, end = self.first[some], self.low[some], self.end[some]
                column = np.clip(end - 1 - first[:, None], 0, None)[..., None]
                low = np.where(end > low, low - first[:, None], n_keys)[..., None]
                yield _Piece(some, first, n_keys, column, low)

    def windows(self, x, piece):
        """Slots (..., D) that the tiles may see: (G, N, D)."""
        shape = len(x) - piece.n_keys + 1, piece.n_keys, x.shape[1]
        return np.ndarray(shape, x.dtype, x, 0, (x.strides[0], *x.strides))[piece.first]

    def windows_transposed(self, x, piece):
        """The same of (D, ...): (G, D, N)."""
        shape = x.shape[1] - piece.n_keys + 1, len(x), piece.n_keys
        return np.ndarray(shape, x.dtype, x, 0, (x.itemsize, *x.strides))[piece.first]

    def logits(self, piece):
        """(G, S, N), HIDDEN where a row does not see the key."""
        q, key = self.q[self.query[piece.tiles]], np.arange(piece.n_keys)
        z = q @ self.windows_transposed(self.kt, piece)
        if self.rows_k is None:
            np.copyto(z, HIDDEN, where=key > piece.column)
        else:
            z += self.by_key(q, self.rows_k, piece)
        np.copyto(z, HIDDEN, where=key < piece.low)
        return z

    def by_key(self, x, rows, piece):
        """x (G, S, D) times the row of every pair's distance: (G, S, N), HIDDEN beyond them."""
        n, p = piece.n_keys, len(rows)
        wide = np.full((x.size // x.shape[-1], 2 * n + p - 1), HIDDEN, x.dtype)
        np.matmul(x.reshape(-1, x.shape[-1]), rows.T, out=wide[:, n : n + p])
        return _from(wide, n + p - 1 - piece.column, n)

    def by_distance(self, y, piece):
        """The transpose of `by_key`'s last step: y (G, S, N) -> (G S, P)."""
        p = len(self.rows_k)
        wide = np.zeros((y.shape[0] * y.shape[1], p + piece.n_keys), y.dtype)
        wide[:, p:].reshape(y.shape)[...] = y
        return _from(wide, piece.column + 1, p).reshape(-1, p)


def _from(wide, start, n):
    """Of each row of wide (G S, L), n numbers from `start` (G, S, 1) on: (G, S, n)."""
    length, size = wide.shape[1], wide.itemsize
    start = start[..., 0] + length * np.arange(len(wide)).reshape(start.shape[:2])
    return np.ndarray((wide.size - n + 1, n), wide.dtype, wide, 0, (size, size))[start]
