"""Attention, local and in clusters: products, softmax and windows that are views."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from rt_scratch.attention import AttendCache, LocalCache, causal_mask, clipped_reach, join_blocks
from rt_scratch.dispatch import array_module
from rt_scratch.kernels.cuda.arrays import as_int32, as_rows, by_rows, contiguous, each, widest_word
from rt_scratch.kernels.cuda.dropout import drop
from rt_scratch.kernels.cuda.sizes import THREADS, WARPS, chunks, n_blocks
from rt_scratch.kernels.gemm import aligned_rows, matmul
from rt_scratch.kernels.launch import launch
from rt_scratch.parameters import ROW


class Band(NamedTuple):
    """A mask for `attend` by rule instead of by array: the causal mask of blocks.

    The batch is sequences x blocks. Query i of a block sees key j (which stands at position
    block S + j - offset) of its own sequence and, with `segment` (sequences, T), of its own
    segment, at a distance from 0 to window - 1.
    """

    blocks: int
    tokens: int
    offset: int
    window: int
    segment: Any = None


class Pairs(NamedTuple):
    """What the products of attention have in common: (b, S, N) pairs of a query and a key."""

    queries: Any        # (b, S, D)
    keys: Any           # (b, N, D); keys and values may be overlapping windows of a sequence
    values: Any         # (b, N, D)
    by_key: Any         # (P, D) rows of the tables by distance, or None
    by_value: Any
    clipped: int        # distances before the first row that share it
    rule: tuple         # who sees whom, see `_rule`
    scale: float
    drop: tuple         # see `dropout.drop`


def attend(q, k, v, rel_k, rel_v, mask, scale, dropped=None):
    """Twin of attention.attend; the mask may also be a Band."""
    pairs = _pairs(q, k, v, rel_k, rel_v, mask, scale, dropped)
    lse = array_module(q).empty((*q.shape[:-1], 1), "float32")
    o = _attend(pairs, lse)
    return o.reshape(*q.shape[:-1], v.shape[-1]), AttendCache(
        q, k, v, rel_k, rel_v, mask, scale, dropped, lse)


def attend_backward(do, cache):
    """Twin of attention.attend_backward; gradients of the tables are summed in float32."""
    q, k, v, rel_k, rel_v, *_, lse = cache
    xp, pairs = array_module(q), _pairs(*cache[:-1])
    drel = [None if x is None else xp.empty(x.shape, "float32") for x in (rel_k, rel_v)]
    dq, dk, dv = _attend_backward(_flat(do), pairs, lse, drel, None)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), *drel


def _pairs(q, k, v, rel_k, rel_v, mask, scale, dropped):
    shape, xp = (*q.shape[:-1], k.shape[-2]), array_module(q)
    return Pairs(_flat(q), _flat(k), _flat(v), *_tables(rel_k, rel_v, q.dtype), 0,
                 _rule(mask, shape, xp), scale, drop(dropped, shape, xp))


def _attend(pairs: Pairs, lse):
    """o (b, S, D), and lse of all rows."""
    queries, keys, values, by_key, by_value, *_ = pairs
    o = aligned_rows((*queries.shape[:2], values.shape[-1]), queries)
    for part in chunks(queries.shape[0], queries.shape[1] * keys.shape[1]):
        s, r = _products(queries[part], keys[part], by_key)
        p, u = _like(s, queries.dtype), _like(r, queries.dtype)
        _softmax("attention_softmax", part, s, r, pairs, (p, u, lse))
        matmul(p, values[part], out=o[part])
        if by_value is not None:
            matmul(as_rows(u), by_value, out=as_rows(o[part]), beta=1)
    return o


def _attend_backward(do, pairs: Pairs, lse, drel, lookback):
    """dq (b, S, D), dk, dv (b, N, D); writes the tables' gradients into drel.

    With a lookback keys and values are windows, each a block and the `lookback` blocks before it:
    dk and dv are those of the blocks, (b, S, D).
    """
    queries, keys, values, by_key, by_value, *_ = pairs
    dtype, n_keys = queries.dtype, keys.shape[1] if lookback is None else queries.shape[1]
    dq = aligned_rows(queries.shape, queries)
    dk, dv = (aligned_rows((keys.shape[0], n_keys, x.shape[-1]), queries) for x in (keys, values))
    for part in chunks(queries.shape[0], queries.shape[1] * keys.shape[1]):
        s, r = _products(queries[part], keys[part], by_key)
        dp, dr = _products(do[part], values[part], by_value)
        p, u, dz, du = (_like(x, dtype) for x in (s, r, dp, dr))
        _softmax("attention_softmax_backward", part, s, r, pairs, (lse, dp, dr, p, u, dz, du))
        matmul(dz, keys[part], out=dq[part])
        _to_keys(p, do[part], dv, part, lookback)
        _to_keys(dz, queries[part], dk, part, lookback)
        if by_key is not None:
            later = part.start > 0
            matmul(as_rows(du), by_key, out=as_rows(dq[part]), beta=1)
            for weights, rows, out in ((u, do[part], drel[1]), (du, queries[part], drel[0])):
                matmul(as_rows(weights)[:, : len(out)].T, as_rows(rows), out=out, beta=later)
    return dq, dk, dv


def _to_keys(weights, rows, out, part, lookback):
    """weights^T rows of each pair of blocks: into out, or added up by the blocks of its window."""
    if lookback is None:
        matmul(weights.swapaxes(-1, -2), rows, out=out[part])
        return
    size = rows.shape[1]
    for back in range(lookback + 1):  # a block's own keys first: every block is written then
        skip = max(0, back - part.start)  # no block stands before the first
        own = weights[skip:, :, (lookback - back) * size : (lookback - back + 1) * size]
        if own.shape[0]:
            target = out[part.start + skip - back : part.stop - back]
            matmul(own.swapaxes(-1, -2), rows[skip:], out=target, beta=back > 0)


def _flat(x):
    """(..., N, D) -> (b, N, D), rows at one distance."""
    return by_rows(x).reshape(-1, *x.shape[-2:])


def _tables(rel_k, rel_v, dtype):
    """The tables, padded with rows of zeros to a multiple of eight: then the rows of products by
    distance begin at multiples of 16 bytes."""
    if rel_k is None:
        return None, None
    n, width = rel_k.shape
    if n % ROW == 0:
        return tuple(table.astype(dtype, copy=False) for table in (rel_k, rel_v))
    tables = each(array_module(rel_k).zeros((2, n + -n % ROW, width), dtype))
    for table, rel in zip(tables, (rel_k, rel_v), strict=True):
        table[:n] = rel
    return tables


def _products(rows, columns, table):
    """Products of each row with the block's columns and with the table, in float32."""
    by_column = matmul(rows, columns.swapaxes(-1, -2), dtype="float32")       # (b, S, N)
    if table is None:
        return by_column, None
    by_distance = matmul(as_rows(rows), table.T, dtype="float32")             # (b S, P)
    return by_column, by_distance.reshape(*rows.shape[:2], -1)


def _like(x, dtype):
    """Room for the result that replaces x: x itself if the dtype agrees."""
    if x is None or x.dtype == dtype:
        return x
    return array_module(x).empty(x.shape, dtype)


def _rule(mask, shape, xp):
    """(mask array, its blocks, segment, blocks, tokens, offset, window) for the kernels."""
    *lead, n_queries, n_keys = shape
    if mask is None and n_queries == n_keys:
        mask = Band(1, n_keys, 0, n_keys)
    if isinstance(mask, Band):
        segment = None if mask.segment is None else as_int32(mask.segment)
        return None, 1, segment, mask.blocks, mask.tokens, mask.offset, mask.window
    if mask is None:
        mask = causal_mask(xp, n_queries, n_keys)
    lead, shape = tuple(lead), mask.shape[:-2]
    while shape and shape[0] == 1:
        shape = shape[1:]
    if mask.shape[-2:] != (n_queries, n_keys) or shape != lead[len(lead) - len(shape):]:
        mask, shape = xp.broadcast_to(mask, (*lead, n_queries, n_keys)), lead
    return contiguous(mask), math.prod(shape), None, 1, 0, 0, 0


def _softmax(name, part, s, r, pairs: Pairs, arrays):
    mask, mask_blocks, segment, blocks, tokens, offset, window = pairs.rule
    b, n_queries, n_keys = s.shape
    rows = b * n_queries
    distances = 0 if pairs.by_key is None else pairs.by_key.shape[0]
    launch(name, (n_blocks(rows, WARPS),), (THREADS,), s, r, mask, segment, *arrays,
           part.start * n_queries, rows, n_queries, n_keys, distances, pairs.clipped, mask_blocks,
           blocks, tokens, offset, window, pairs.scale, *pairs.drop)


# ---------------------------------------------------------------------------- local attention
#
# The blocks of all heads stand one behind the other as one long sequence, behind `lookback` blocks
# of zeros, so that the window of a block is a view: the rows that begin `lookback` blocks before
# it. Of a head's first blocks it shows the end of the head before, which no query sees.

def local_attention(q, k, v, rel_k, rel_v, block, lookback, scale, segments=None, window=None,
                    dropped=None):
    """Twin of attention.local_attention: neither mask nor windows exist as arrays."""
    t = q.shape[2]
    reach = clipped_reach(t, block, lookback, segments, window)
    pairs, blocks, _ = _local_pairs(q, k, v, rel_k, rel_v, reach, scale, dropped)
    lse = array_module(q).empty((*blocks, reach.block, 1), "float32")
    o = _attend(pairs, lse).reshape(*blocks, reach.block, -1)
    return join_blocks(o, t), LocalCache(q, k, v, rel_k, rel_v, reach, scale, dropped, lse)


def local_attention_backward(do, cache):
    """Twin of attention.local_attention_backward; gradients of the tables are float32."""
    q, k, v, rel_k, rel_v, reach, scale, dropped, lse = cache
    xp, t = array_module(q), q.shape[2]
    pairs, blocks, (rows, do) = _local_pairs(q, k, v, rel_k, rel_v, reach, scale, dropped, do)
    drel, own = (None, None), (None, None)
    if rel_k is not None:
        drel = each(xp.zeros((2, *rel_k.shape), xp.float32))
        own = [table[rows] for table in drel]
    dq, dk, dv = (join_blocks(x.reshape(*blocks, reach.block, -1), t)
                  for x in _attend_backward(do, pairs, lse, own, reach.lookback))
    return dq, dk, dv, *drel


def _local_pairs(q, k, v, rel_k, rel_v, reach, scale, dropped, do=None):
    """(Pairs, (B, H, n), (rows of the tables, do in blocks)).

    Of the tables only the rows of distances that are seen and not clipped take part.
    """
    xp, (b, h, t, _) = array_module(q), q.shape
    size, lookback, segments, window = reach
    n, n_keys = -(-t // size), (lookback + 1) * size
    blocks, front = b * h * n, lookback * size
    arrays = [k, v] + ([] if k is q else [q]) + ([] if do is None else [do])
    long = _split_heads(arrays, front, n * size)
    queries = long[0] if k is q else long[2]
    by_key, by_value, rows, clipped = None, None, None, 0
    if rel_k is not None:
        m = rel_k.shape[0] // 2
        seen = min(n_keys, m + 1, window or t)
        rows, clipped = slice(m + 1 - seen, m + 1), n_keys - seen
        by_key, by_value = _tables(rel_k[rows], rel_v[rows], q.dtype)
    shape = b, h, n, size, n_keys
    band = Band(n, t, front, window or t, None if segments is None else segments.reshape(-1, t))
    pairs = Pairs(_windows(queries[front:], blocks, size, size),
                  *(_windows(x, blocks, size, n_keys) for x in long[:2]), by_key, by_value,
                  clipped, _rule(band, shape, xp), scale, drop(dropped, shape, xp))
    return pairs, shape[:3], (rows, None if do is None else _windows(
        long[-1][front:], blocks, size, size))


def _windows(rows, blocks, step, size):
    """Rows (R, D) as (blocks, size, D), each beginning `step` rows after the one before: a view."""
    row = rows.strides[0]
    return array_module(rows).lib.stride_tricks.as_strided(
        rows, (blocks, size, rows.shape[1]), (step * row, row, rows.strides[1]))


def _split_heads(arrays, front, length):
    """Arrays (B, H, T, D) as (front + B H length, D), zeros in front and behind each head."""
    b, h, t, d = arrays[0].shape
    arrays = [x if x.strides[-1] == x.itemsize else contiguous(x) for x in arrays]
    n_rows = front + b * h * length
    out = aligned_rows((len(arrays), n_rows, d), arrays[0])
    size, word = widest_word(d * out.itemsize, out, *arrays)
    words = d * out.itemsize // size
    strides = [stride // size for x in arrays for stride in x.strides[:-1]]
    missing = 4 - len(arrays)
    launch("split_heads", (n_blocks(n_rows * words), len(arrays)), (THREADS,), *arrays,
           *[None] * missing, out, h, t, front, length, n_rows, words, out.strides[1] // size,
           *strides, *[0] * (3 * missing), word=word)
    return each(out)
