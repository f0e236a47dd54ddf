"""Softmax attention inside blocks, with relative positions, and local attention built on it.

`attend` knows nothing of the sequence: it takes queries (..., S, D), keys and values (..., N, D)
and a mask.
Local attention cuts the sequence into blocks for it; routing attention (routing.py) hands it the
members of each cluster.
"""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any, NamedTuple

from rt_scratch.dispatch import accelerated, array_module
from rt_scratch.dropout import dropout_mask

# ------------------------------------------------------------------------- relative positions
#
# Shaw et al. 2018 ("Shaw's tables" below): a learned vector per distance d = key position - query
# position, clipped to [-m, m], is added to the key, another to the value. Gathering a vector for
# every pair would take S x N x D entries. Instead all S x P products "query i, distance d" come
# from one matrix product, and a skew moves row i so that column d lands under key i + d.


def relative_tables(p, family: str):
    """Shaw's tables for keys and values among the parameters of a layer's attention.

    family: 'local' or 'routing'. None twice without relative positions.
    """
    return p.get(f"{family}_rel_k"), p.get(f"{family}_rel_v")


DistanceRowsCache = namedtuple("DistanceRowsCache", "table first last")


def distance_rows(table, first: int, last: int):
    """Rows of the table for the distances first .. last:  table[clip(d, -m, m) + m].

    table (2 m + 1, D) -> (last - first + 1, D). Where nothing is clipped they are a slice of the
    table, and a view of it. docs/derivations.md (32).
    """
    xp = array_module(table)
    before, near, after = _clipped(table, first, last)
    rows = table[near]
    if before or after:
        rows = xp.concatenate([xp.repeat(table[:1], before, axis=0), rows,
                               xp.repeat(table[-1:], after, axis=0)])
    return rows, DistanceRowsCache(table, first, last)


def distance_rows_backward(drows, cache):
    """Adds up the rows that share an entry of the table: its first, or its last.

    docs/derivations.md (32).
    """
    table, first, last = cache
    before, near, after = _clipped(table, first, last)
    end = drows.shape[0] - after
    dtable = array_module(drows).zeros(table.shape, drows.dtype)
    dtable[near] = drows[before:end]
    if before:
        dtable[0] += drows[:before].sum(0)
    if after:
        dtable[-1] += drows[end:].sum(0)
    return dtable


def _clipped(table, first, last):
    """How many of the distances first .. last are clipped to -m, the rows of those that are not
    clipped, as a slice, and how many are clipped to m."""
    m, n = table.shape[0] // 2, last - first + 1
    before, after = max(0, min(n, -m - first)), max(0, min(n, last - m))
    start = first + before + m
    return before, slice(start, start + n - before - after), after


def skew(x, n_keys: int):
    """out[i, j] = x[i, j - i + S - 1]:  x (..., S, P) by distance -> (..., S, N) by key.

    Row i of x is read from column S - 1 - i on. So where the queries are the first S of the N
    positions (P = S + N - 1), column p stands for distance p + 1 - S; where they are the last S,
    key j is at distance j - i - (N - S) and column p stands for distance p + 1 - N. There P = N is
    enough: entries beyond it are meaningless, but belong to keys after the query, which are masked.
    A spare column makes the rows of the flat array one longer, so that cutting it into rows of the
    old length moves each row by one: no index arrays. docs/derivations.md (33), (34).
    """
    xp = array_module(x)
    *lead, s, p = x.shape
    wide = xp.empty((*lead, s, p + 1), x.dtype)
    wide[..., :p] = x
    wide[..., p] = 0
    flat = wide.reshape(*lead, s * (p + 1))[..., s - 1 : s - 1 + s * p]
    return flat.reshape(*lead, s, p)[..., :n_keys]


def unskew(y, n_distances: int):
    """The inverse and transpose of `skew`: x[i, j - i + S - 1] = y[i, j], else 0.

    y (..., S, N) by key -> (..., S, P) by distance. With P = N the entries of y at keys after the
    query must be 0. docs/derivations.md (35).
    """
    xp = array_module(y)
    *lead, s, n = y.shape
    p = n_distances
    flat = xp.zeros((*lead, s * (p + 1)), y.dtype)
    flat[..., s - 1 : s - 1 + s * p].reshape(*lead, s, p)[..., :n] = y
    return flat.reshape(*lead, s, p + 1)[..., :p]


# ---------------------------------------------------------------------------------- attention

AttendCache = namedtuple("AttendCache", "q k v rel_k rel_v mask scale dropped lse")


@accelerated
def attend(q, k, v, rel_k, rel_v, mask, scale, dropped=None):
    """o_i = sum_j p_ij (v_j + rel_v[j - i]),  p_i = softmax_j scale q_i . (k_j + rel_k[j - i]).

    q (..., S, D), k and v (..., N, D); rel_k, rel_v (P, D) rows by distance as in `skew`, or both
    None; mask, broadcast to (..., S, N), is True where query i may see key j, None where the
    queries are the last S of the N positions and see no later one. A query that may see nothing
    gets 0. `dropped` drops entries of p (dropout.py).
    Paper section 3, Shaw et al. 2018 equations 3 and 4. Cache: the inputs and lse (..., S, 1), the
    log-sum-exp of each row, from which the backward computes p again.
    docs/derivations.md (26), (27), (36).
    """
    xp = array_module(q)
    z = _logits(q, k, rel_k, mask, scale)  # (..., S, N)
    top = z.max(-1, keepdims=True)
    top = xp.maximum(top, xp.finfo(z.dtype).min)  # an empty row has top -inf
    p = xp.exp(z - top)
    total = p.sum(-1, keepdims=True)
    p /= xp.maximum(total, xp.finfo(z.dtype).tiny)
    lse = xp.where(total > 0, top + xp.log(xp.maximum(total, xp.finfo(z.dtype).tiny)), 0)
    if dropped:
        p *= dropout_mask(xp, p.shape, dropped, p.dtype)
    o = p @ v
    if rel_v is not None:
        o += rows_times(unskew(p, rel_v.shape[0]), rel_v)
    return o, AttendCache(q, k, v, rel_k, rel_v, mask, scale, dropped, lse)


@accelerated
def attend_backward(do, cache):
    """With dp_ij = do_i . (v_j + rel_v[j - i]):  dz_ij = p_ij (dp_ij - sum_j p_ij dp_ij).

    Returns dq, dk, dv, drel_k, drel_v (the last two None without relative positions).
    docs/derivations.md (28) to (31), (37), (38).
    """
    q, k, v, rel_k, rel_v, mask, scale, dropped, lse = cache
    xp = array_module(q)
    p = xp.exp(_logits(q, k, rel_k, mask, scale) - lse)  # (..., S, N)
    keep = dropout_mask(xp, p.shape, dropped, p.dtype) if dropped else None
    used = p if keep is None else p * keep

    dv = used.swapaxes(-1, -2) @ do                                  # o = p v
    dp = do @ v.swapaxes(-1, -2)
    drel_k = drel_v = None
    if rel_v is not None:
        n_distances = rel_v.shape[0]
        drel_v = outer(unskew(used, n_distances), do)               # o += unskew(p) rel_v
        dp += skew(rows_times(do, rel_v.T), k.shape[-2])
    if keep is not None:
        dp *= keep

    dz = p * (dp - (p * dp).sum(-1, keepdims=True))                  # p = softmax(z)
    dz *= scale
    dq = dz @ k                                                      # z = scale q k^T
    dk = dz.swapaxes(-1, -2) @ q
    if rel_k is not None:
        by_distance = unskew(dz, n_distances)                        # z += skew(scale q rel_k^T)
        dq += rows_times(by_distance, rel_k)
        drel_k = outer(by_distance, q)
    return dq, dk, dv, drel_k, drel_v


def _logits(q, k, rel_k, mask, scale):
    xp = array_module(q)
    z = q @ k.swapaxes(-1, -2)
    if rel_k is not None:
        z += skew(rows_times(q, rel_k.T), k.shape[-2])
    z *= scale
    if mask is None:
        mask = causal_mask(xp, *z.shape[-2:])
    return xp.where(mask, z, -math.inf)


def causal_mask(xp, n_queries: int, n_keys: int):
    """(S, N), True where key j is not after query i, the queries being the last S of N positions.
    """
    return xp.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool)


def rows_times(x, w):
    """x w as one matrix product over all leading axes."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def outer(x, y):
    """Sum over all rows of x_row^T y_row: (..., S, P), (..., S, D) -> (P, D)."""
    return x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1])


# ---------------------------------------------------------------------------- local attention

class Reach(NamedTuple):
    """What a query of local attention sees."""

    block: int        # S
    lookback: int     # blocks before its own
    segments: Any     # (B, H, T), None: one segment
    window: Any       # how many latest positions it sees, its own included; None: no bound


LocalCache = namedtuple("LocalCache", "q k v rel_k rel_v reach scale dropped lse")


@accelerated
def local_attention(q, k, v, rel_k, rel_v, block, lookback, scale, segments=None, window=None,
                    dropped=None):
    """Causal attention in blocks: query t sees keys from the start of block t // S - lookback to t.

    q, k, v (B, H, T, D), tables rel_k, rel_v (2 m + 1, D) or None -> (B, H, T, D). T need not be a
    multiple of S = block. With `segments` (B, H, T) a query sees only keys of its own segment, and
    with `window` only the `window` latest, its own included (routing attention in `causal` mode is
    this, on the sequence sorted by cluster). Released code: attention_nd in one dimension, masked.
    Cache: the inputs, the Reach, and lse (B, H, n, S, 1); blocks and windows are cut again.
    docs/derivations.md (39).
    """
    t = q.shape[2]
    reach = clipped_reach(t, block, lookback, segments, window)
    inputs, _ = local_inputs(q, k, v, rel_k, rel_v, reach)
    o, cache = attend(*inputs, _local_mask(q, t, *reach), scale, dropped)
    return join_blocks(o, t), LocalCache(q, k, v, rel_k, rel_v, reach, scale, dropped, cache.lse)


@accelerated
def local_attention_backward(do, cache):
    """Gradients of q, k, v, rel_k, rel_v. docs/derivations.md (40)."""
    q, k, v, rel_k, rel_v, reach, scale, dropped, lse = cache
    t = q.shape[2]
    inputs, caches = local_inputs(q, k, v, rel_k, rel_v, reach)
    gradients = attend_backward(split_blocks(do, reach.block), AttendCache(
        *inputs, _local_mask(q, t, *reach), scale, dropped, lse))
    return local_gradients(gradients, caches, t, reach)


def clipped_reach(t: int, block: int, lookback: int, segments, window) -> Reach:
    """The reach within T tokens: no block longer than the text, no lookback before its start."""
    block = min(block, t)
    return Reach(block, min(lookback, -(-t // block) - 1), segments, window)


def local_gradients(gradients, caches, t: int, reach: Reach):
    """Gradients of blocks, windows and rows -> gradients of q, k, v, rel_k, rel_v."""
    dq, dk, dv, drel_k, drel_v = gradients
    if drel_k is not None:
        drel_k = distance_rows_backward(drel_k, caches[0])
        drel_v = distance_rows_backward(drel_v, caches[1])
    dk = _windows_backward(dk, t, reach.block, reach.lookback)
    dv = _windows_backward(dv, t, reach.block, reach.lookback)
    return join_blocks(dq, t), dk, dv, drel_k, drel_v


def local_inputs(q, k, v, rel_k, rel_v, reach: Reach):
    """What `attend` takes: blocks of queries, windows of keys and values, rows by distance.

    Returns the caches of the rows too, (None, None) without relative positions.
    """
    block, lookback = reach.block, reach.lookback
    rows_k = rows_v = cache_k = cache_v = None
    if rel_k is not None:
        first = 1 - (lookback + 1) * block                          # the farthest key
        rows_k, cache_k = distance_rows(rel_k, first, 0)
        rows_v, cache_v = distance_rows(rel_v, first, 0)
    return (split_blocks(q, block), _windows(k, block, lookback), _windows(v, block, lookback),
            rows_k, rows_v), (cache_k, cache_v)


def split_blocks(x, block: int):
    """(B, H, T, ...) -> (B, H, n, S, ...), the last block filled up with zeros."""
    xp = array_module(x)
    b, h, t = x.shape[:3]
    n = -(-t // block)
    if n * block > t:
        x = xp.concatenate([x, xp.zeros((b, h, n * block - t, *x.shape[3:]), x.dtype)], axis=2)
    return x.reshape(b, h, n, block, *x.shape[3:])


def join_blocks(x, t: int):
    """The inverse of `split_blocks`: (B, H, n, S, ...) -> (B, H, T, ...)."""
    b, h, n, s = x.shape[:4]
    return x.reshape(b, h, n * s, *x.shape[4:])[:, :, :t]


def _windows(x, block, lookback):
    """(B, H, T, ...) -> (B, H, n, (lookback + 1) S, ...): each block behind those before it."""
    xp = array_module(x)
    blocks = split_blocks(x, block)
    n = blocks.shape[2]
    if not lookback:
        return blocks
    front = xp.zeros((*blocks.shape[:2], lookback, *blocks.shape[3:]), x.dtype)
    padded = xp.concatenate([front, blocks], axis=2)
    return xp.concatenate([padded[:, :, i : i + n] for i in range(lookback + 1)], axis=3)


def _windows_backward(dx, t, block, lookback):
    """Adds each key's gradients from the lookback + 1 windows it was copied to."""
    xp = array_module(dx)
    b, h, n, _, d = dx.shape
    padded = xp.zeros((b, h, n + lookback, block, d), dx.dtype)
    for i in range(lookback + 1):
        padded[:, :, i : i + n] += dx[:, :, :, i * block : (i + 1) * block]
    return join_blocks(padded[:, :, lookback:], t)


def _local_mask(q, t, block, lookback, segments, window):
    """True where query i of block b may see key j of its window: (n, S, N) or (B, H, n, S, N)."""
    xp = array_module(q)
    n = -(-t // block)
    i = xp.arange(block)[:, None]                                   # (S, 1)
    j = xp.arange((lookback + 1) * block)[None, :]                  # (1, N)
    distance = j - lookback * block - i
    position = (xp.arange(n)[:, None, None] - lookback) * block + j  # (n, 1, N) of the key
    mask = (distance <= 0) & (position >= 0)                        # (n, S, N)
    if window is not None:
        mask &= distance > -window
    if segments is not None:
        own, seen = split_blocks(segments, block), _windows(segments, block, lookback)
        mask = mask & (own[..., :, None] == seen[..., None, :])     # (B, H, n, S, N)
    return mask
