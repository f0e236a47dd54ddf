"""GPU twins: plain functions of layers, attention, routing and optim as CUDA kernels.

Each twin has the signature, the values and the cache of the function of its name, for float32,
float16 and bfloat16 arrays. Row statistics, parameters of LayerNorm and integers are float32 and
int32 whatever the activations are. Nothing here waits for the GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from rt_scratch.attention import (
    AttendCache,
    LocalCache,
    clipped_reach,
    join_blocks,
    local_gradients,
    local_inputs,
    split_blocks,
)
from rt_scratch.dispatch import array_module
from rt_scratch.dropout import first_entry
from rt_scratch.kernels.gemm import matmul
from rt_scratch.kernels.launch import WORD, launch
from rt_scratch.kmeans import MAX_CLUSTERS
from rt_scratch.layers import (
    EPSILON,
    CrossEntropyCache,
    GateCache,
    LayerNormCache,
    LinearCache,
    NormalizeCache,
)
from rt_scratch.optim import (
    DECAY_POWER,
    MOMENTUM,
    NEWTON_SCHULZ,
    adamw_of_the_rest,
    is_bias,
    orthogonalized,
    update_scale,
)
from rt_scratch.routing import MEAN_FLOOR, ScatterMeanCache

THREADS = 256
WARPS = THREADS // 32


def _blocks(n: int, per_block: int = THREADS) -> int:
    return -(-n // per_block)


def _float32(x):
    """x as contiguous float32; x itself where it is."""
    xp = array_module(x)
    return xp.ascontiguousarray(x, dtype=xp.float32)


def _int32(x):
    xp = array_module(x)
    return xp.ascontiguousarray(x, dtype=xp.int32)


def _contiguous(x):
    return array_module(x).ascontiguousarray(x)


def supports(*arguments) -> bool:
    """Whether the twins take these arguments: none of the arrays among them is, say, float64."""
    for x in arguments:
        if isinstance(x, tuple):
            if not supports(*x):
                return False
        elif hasattr(x, "dtype") and x.dtype.kind not in "iub" and x.dtype.name not in WORD:
            return False
    return True


# -------------------------------------------------------------------------------------- linear

def linear(x, w, b=None):
    """Twin of layers.linear."""
    rows = x.reshape(-1, x.shape[-1])
    y = matmul(rows, w)
    if b is not None:
        y += b
    return y.reshape(*x.shape[:-1], w.shape[1]), LinearCache(x, w, b is not None)


def linear_backward(dy, cache):
    """Twin of layers.linear_backward; gradients of w and b are summed, and left, in float32."""
    x, w, biased = cache
    rows = _contiguous(dy.reshape(-1, dy.shape[-1]))
    dx = matmul(rows, w.T)
    dw = matmul(x.reshape(-1, x.shape[-1]).T, rows, dtype="float32")
    return dx.reshape(x.shape), dw, column_sum(rows) if biased else None


# --------------------------------------------------------------------------- columns, LayerNorm

STRIPS = 64  # strips of rows that a sum over rows is cut into


def _column_sums(name: str, arguments, rows: int, width: int, n_sums: int, xp):
    """Runs a kernel that sums strips of rows, then adds the strips: n_sums arrays (width,)."""
    strip = max(8, -(-rows // STRIPS))
    strips = _blocks(rows, strip)
    parts = [xp.empty((strips, width), xp.float32) for _ in range(n_sums)]
    launch(name, (_blocks(width, 32), strips), (32, 8), *arguments, *parts, rows, width, strip)
    return [_sum_strips(part) for part in parts]


def _sum_strips(parts):
    """Sum over the first axis of a float32 array, in order."""
    xp = array_module(parts)
    total = xp.empty(parts.shape[1:], xp.float32)
    launch("sum_strips", (_blocks(total.size),), (THREADS,), parts, total, parts.shape[0],
           total.size)
    return total


def normalize(x):
    """Twin of layers.normalize."""
    y, x, mean, rstd = _layer_norm(x, None, None)
    return y, NormalizeCache(x, mean, rstd)


def layer_norm(x, gain, bias):
    """Twin of layers.layer_norm."""
    y, x, mean, rstd = _layer_norm(x, _float32(gain), _float32(bias))
    return y, LayerNormCache(x, gain, mean, rstd)


def _layer_norm(x, gain, bias):
    xp = array_module(x)
    x = _contiguous(x)
    width = x.shape[-1]
    rows = x.size // width
    y = xp.empty_like(x)
    mean, rstd = (xp.empty((*x.shape[:-1], 1), xp.float32) for _ in range(2))
    launch("layer_norm", (_blocks(rows, WARPS),), (THREADS,), x, gain, bias, y, mean, rstd, rows,
           width, EPSILON)
    return y, x, mean, rstd


def normalize_backward(dn, cache):
    """Twin of layers.normalize_backward."""
    x, mean, rstd = cache
    return _layer_norm_dx(_contiguous(dn), x, None, mean, rstd)


def layer_norm_backward(dy, cache):
    """Twin of layers.layer_norm_backward."""
    x, gain, mean, rstd = cache
    dy = _contiguous(dy)
    dx = _layer_norm_dx(dy, x, _float32(gain), mean, rstd)
    width = x.shape[-1]
    dgain, dbias = _column_sums("layer_norm_backward_columns", (dy, x, mean, rstd),
                                x.size // width, width, 2, array_module(x))
    return dx, dgain.astype(gain.dtype, copy=False), dbias.astype(gain.dtype, copy=False)


def _layer_norm_dx(dy, x, gain, mean, rstd):
    dx = array_module(x).empty_like(x)
    width = x.shape[-1]
    rows = x.size // width
    launch("layer_norm_backward", (_blocks(rows, WARPS),), (THREADS,), dy, x, gain, mean, rstd, dx,
           rows, width)
    return dx


# ------------------------------------------------------------------------------ GEGLU, dropout

def geglu(a, b):
    """Twin of layers.geglu."""
    a, b = _contiguous(a), _contiguous(b)
    y = array_module(a).empty_like(a)
    launch("geglu", (_blocks(a.size, 8 * THREADS),), (THREADS,), a, b, y, a.size)
    return y, GateCache(a, b)


def geglu_backward(dy, cache):
    """Twin of layers.geglu_backward."""
    a, b = cache
    da, db = array_module(a).empty_like(a), array_module(a).empty_like(a)
    launch("geglu_backward", (_blocks(a.size, 8 * THREADS),), (THREADS,), _contiguous(dy), a, b,
           da, db, a.size)
    return da, db


def dropout(x, dropped):
    """Twin of dropout.dropout; also its backward."""
    if dropped is None or not dropped.rate:
        return x, None
    x = _contiguous(x)
    y = array_module(x).empty_like(x)
    launch("dropout", (_blocks(x.size, 8 * THREADS),), (THREADS,), x, y, x.size,
           *_drop(dropped, x.shape))
    return y, dropped


def _drop(dropped, shape):
    """The kernels' form of a Dropped, for an array of this shape; None draws nothing."""
    if not dropped:
        return (0,) * 6
    seed, stream, step = dropped.key
    low = 0xFFFFFFFF
    return (round(dropped.rate * 65536), seed & low, (seed >> 32) & low, stream & low, step & low,
            first_entry(dropped, shape))


# -------------------------------------------------------------------- output layer and loss

CHUNK_ENTRIES = 1 << 25  # of wide intermediates (logits) alive at a time: 128 MB in float32


def linear_cross_entropy(x, w, b, targets, weights):
    """Twin of layers.linear_cross_entropy."""
    xp = array_module(x)
    lse, loss = xp.empty(x.shape[0], xp.float32), xp.empty(x.shape[0], xp.float32)
    bias, target, weight = _float32(b), _int32(targets), _float32(weights)
    vocabulary = w.shape[1]
    for rows in _chunks(x.shape[0], vocabulary):
        z = matmul(x[rows], w, dtype=xp.float32)
        launch("cross_entropy", (z.shape[0],), (_row_threads(vocabulary),), z, bias, target[rows],
               weight[rows], lse[rows], loss[rows], vocabulary)
    return loss.sum(), CrossEntropyCache(x, w, b, targets, weights, lse)


def linear_cross_entropy_backward(dloss, cache):
    """Twin of layers.linear_cross_entropy_backward; dw and db are summed in float32."""
    x, w, b, targets, weights, lse = cache
    xp = array_module(x)
    bias, target, weight = _float32(b), _int32(targets), _float32(weights * dloss)
    vocabulary = w.shape[1]
    dx = xp.empty(x.shape, x.dtype)
    dw, db = xp.zeros(w.shape, xp.float32), xp.zeros(b.shape, xp.float32)
    for rows in _chunks(x.shape[0], vocabulary):
        z = matmul(x[rows], w, dtype=xp.float32)
        dz = z if x.dtype == xp.float32 else xp.empty(z.shape, x.dtype)
        launch("cross_entropy_backward", (z.shape[0],), (_row_threads(vocabulary),), z, bias,
               target[rows], weight[rows], lse[rows], dz, vocabulary)
        matmul(dz, w.T, out=dx[rows])
        matmul(x[rows].T, dz, out=dw, beta=1)
        db += column_sum(dz)
    return dx, dw, db


def column_sum(x):
    """Sum over the rows of x (N, C) in a fixed order -> (C,) float32."""
    rows, width = x.shape
    return _column_sums("column_sum", (x,), rows, width, 1, array_module(x))[0]


def _row_threads(width: int) -> int:
    """Threads of a block that handles one row."""
    return min(1024, max(32, _blocks(width, 128) * 32))


def _chunks(n_rows: int, row_size: int):
    step = max(1, CHUNK_ENTRIES // row_size)
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]


# ----------------------------------------------------------------------------------- attention

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


def attend(q, k, v, rel_k, rel_v, mask, scale, dropped=None):
    """Twin of attention.attend; the mask may also be a Band."""
    xp = array_module(q)
    lead, n_queries, n_keys = q.shape[:-2], q.shape[-2], k.shape[-2]
    queries, keys, values = (_flat(x) for x in (q, k, v))            # (b, S, D), (b, N, D)
    by_key, by_value = _tables(rel_k, rel_v, q.dtype)                # (P, D)
    o = xp.empty((*queries.shape[:2], v.shape[-1]), q.dtype)
    lse = xp.empty((*q.shape[:-1], 1), xp.float32)
    rule = _rule(mask, lead, n_queries, n_keys, xp)
    drop = _drop(dropped, (*lead, n_queries, n_keys))
    for part in _chunks(queries.shape[0], n_queries * n_keys):
        s, r = _products(queries[part], keys[part], by_key)
        p, u = _like(s, q.dtype), _like(r, q.dtype)
        _softmax("attention_softmax", part, s, r, rule, (p, u, lse), by_key, scale, drop)
        matmul(p, values[part], out=o[part])
        if by_value is not None:
            matmul(_rows(u), by_value, out=_rows(o[part]), beta=1)
    return o.reshape(*lead, n_queries, v.shape[-1]), AttendCache(
        q, k, v, rel_k, rel_v, mask, scale, dropped, lse)


def attend_backward(do, cache):
    """Twin of attention.attend_backward; gradients of the tables are summed in float32."""
    q, k, v, rel_k, rel_v, mask, scale, dropped, lse = cache
    xp = array_module(q)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    do, queries, keys, values = (_flat(x) for x in (do, q, k, v))
    by_key, by_value = _tables(rel_k, rel_v, q.dtype)
    dq, dk, dv = (xp.empty(x.shape, x.dtype) for x in (queries, keys, values))
    drel_k = drel_v = None
    if by_key is not None:
        drel_k, drel_v = xp.zeros(by_key.shape, xp.float32), xp.zeros(by_value.shape, xp.float32)
    rule = _rule(mask, q.shape[:-2], n_queries, n_keys, xp)
    drop = _drop(dropped, (*q.shape[:-2], n_queries, n_keys))
    for part in _chunks(queries.shape[0], n_queries * n_keys):
        s, r = _products(queries[part], keys[part], by_key)
        dp, dr = _products(do[part], values[part], by_value)
        p, u, dz, du = (_like(x, q.dtype) for x in (s, r, dp, dr))
        _softmax("attention_softmax_backward", part, s, r, rule, (lse, dp, dr, p, u, dz, du),
                 by_key, scale, drop)
        matmul(p.swapaxes(-1, -2), do[part], out=dv[part])
        matmul(dz, keys[part], out=dq[part])
        matmul(dz.swapaxes(-1, -2), queries[part], out=dk[part])
        if by_key is not None:
            matmul(_rows(du), by_key, out=_rows(dq[part]), beta=1)
            matmul(_rows(u).T, _rows(do[part]), out=drel_v, beta=1)
            matmul(_rows(du).T, _rows(queries[part]), out=drel_k, beta=1)
    if by_key is not None:
        drel_k = drel_k.astype(rel_k.dtype, copy=False)
        drel_v = drel_v.astype(rel_v.dtype, copy=False)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), drel_k, drel_v


def _flat(x):
    """(..., N, D) -> (b, N, D), contiguous."""
    return _contiguous(x.reshape(-1, *x.shape[-2:]))


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _tables(rel_k, rel_v, dtype):
    if rel_k is None:
        return None, None
    return tuple(_contiguous(table.astype(dtype, copy=False)) for table in (rel_k, rel_v))


def _products(rows, columns, table):
    """Products of each row with the block's columns and with the table, in float32."""
    xp = array_module(rows)
    by_column = matmul(rows, columns.swapaxes(-1, -2), dtype=xp.float32)      # (b, S, N)
    if table is None:
        return by_column, None
    by_distance = matmul(_rows(rows), table.T, dtype=xp.float32)              # (b S, P)
    return by_column, by_distance.reshape(*rows.shape[:2], -1)


def _like(x, dtype):
    """Room for the result that replaces x: x itself if the dtype agrees."""
    if x is None or x.dtype == dtype:
        return x
    return array_module(x).empty(x.shape, dtype)


def _rule(mask, lead, n_queries, n_keys, xp):
    """(mask array, its blocks, segment, blocks, tokens, offset, window) for the kernels."""
    if isinstance(mask, Band):
        segment = None if mask.segment is None else _int32(mask.segment)
        return None, 1, segment, mask.blocks, mask.tokens, mask.offset, mask.window
    shape = mask.shape[:-2]
    while shape and shape[0] == 1:
        shape = shape[1:]
    if mask.shape[-2:] != (n_queries, n_keys) or shape != lead[len(lead) - len(shape):]:
        mask, shape = xp.broadcast_to(mask, (*lead, n_queries, n_keys)), lead
    return _contiguous(mask), math.prod(shape), None, 1, 0, 0, 0


def _softmax(name, part, s, r, rule, arrays, table, scale, drop):
    mask, mask_blocks, segment, blocks, tokens, offset, window = rule
    b, n_queries, n_keys = s.shape
    rows = b * n_queries
    distances = 0 if table is None else table.shape[0]
    launch(name, (_blocks(rows, WARPS),), (THREADS,), s, r, mask, segment, *arrays,
           part.start * n_queries, rows, n_queries, n_keys, distances, mask_blocks, blocks, tokens,
           offset, window, scale, *drop)


def local_attention(q, k, v, rel_k, rel_v, block, lookback, scale, segments=None, window=None,
                    dropped=None):
    """Twin of attention.local_attention: no mask exists, the kernel knows its rule."""
    t = q.shape[2]
    reach = clipped_reach(t, block, lookback, segments, window)
    inputs, _ = local_inputs(q, k, v, rel_k, rel_v, reach)
    o, cache = attend(*inputs, _band(t, *reach), scale, dropped)
    return join_blocks(o, t), LocalCache(q, k, v, rel_k, rel_v, reach, scale, dropped, cache.lse)


def local_attention_backward(do, cache):
    """Twin of attention.local_attention_backward."""
    q, k, v, rel_k, rel_v, reach, scale, dropped, lse = cache
    t = q.shape[2]
    inputs, caches = local_inputs(q, k, v, rel_k, rel_v, reach)
    gradients = attend_backward(split_blocks(do, reach.block), AttendCache(
        *inputs, _band(t, *reach), scale, dropped, lse))
    return local_gradients(gradients, caches, t, reach)


def _band(t, block, lookback, segments, window):
    segments = None if segments is None else segments.reshape(-1, t)
    return Band(-(-t // block), t, lookback * block, window or t, segments)


# ------------------------------------------------------------------------------------- routing

def top_members(scores, window: int):
    """Twin of routing.top_members: int32 positions."""
    xp = array_module(scores)
    scores = _float32(scores)
    index = xp.empty((*scores.shape[:-1], window), xp.int32)
    launch("top_members", (math.prod(scores.shape[:-1]),), (256,), scores, index,
           scores.shape[-1], window)
    return index


def by_cluster(winner):
    """Twin of routing.by_cluster: int32 positions; winners below 1024."""
    xp = array_module(winner)
    winner = _int32(winner)
    tokens = winner.shape[-1]
    rows = winner.size // tokens
    chunk = max(512, _blocks(tokens, 64 * 32) * 32)  # at most 64 chunks, a multiple of the warp
    chunks = _blocks(tokens, chunk)
    starts = xp.empty((rows, MAX_CLUSTERS, chunks), xp.int32)
    order = xp.empty_like(winner)
    grid = (chunks, rows)
    launch("cluster_counts", grid, (32,), winner, starts, tokens, MAX_CLUSTERS, chunk)
    launch("cluster_starts", (rows,), (256,), starts, MAX_CLUSTERS * chunks)
    launch("cluster_positions", grid, (32,), winner, starts, order, tokens, MAX_CLUSTERS, chunk)
    return order


def inverse(order):
    """Twin of routing.inverse: int32."""
    order = _int32(order)
    tokens = order.shape[-1]
    rank = array_module(order).empty_like(order)
    launch("invert", (_blocks(tokens), order.size // tokens), (THREADS,), order, rank, tokens)
    return rank


WORDS = ((16, "uint4"), (8, "uint2"), (4, "unsigned"), (2, "unsigned short"), (1, "unsigned char"))


def gather(x, index):
    """Twin of routing.gather, for any dtype; x may be strided except along its last axis."""
    xp = array_module(x)
    if x.strides[-1] != x.itemsize:
        x = _contiguous(x)
    index = _int32(index)
    out = xp.empty((*index.shape, x.shape[-1]), x.dtype)
    heads, rows = x.shape[1], math.prod(index.shape[2:])
    row_bytes = x.shape[-1] * x.itemsize
    parts = (row_bytes, *x.strides[:-1], _address(x), _address(out))
    size, word = next((n, name) for n, name in WORDS if not any(p % n for p in parts))
    words = row_bytes // size
    launch("gather_rows", (_blocks(rows * words), x.shape[0] * heads), (THREADS,), x, index, out,
           heads, rows, words, *(stride // size for stride in x.strides[:-1]), word=word)
    return out


def _address(x) -> int:
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


TILE = 4096        # floats of sums that a block holds, as in rows.cu and kmeans.cu


def scatter_sum(rows, index, n_tokens: int):
    """Twin of routing.scatter_sum for lists that ascend along the last axis of index."""
    return _scatter(rows, index, n_tokens, -1.0)[0]


def scatter_mean(rows, index, n_tokens: int):
    """Twin of routing.scatter_mean for lists that ascend along the last axis of index."""
    out, times = _scatter(rows, index, n_tokens, MEAN_FLOOR)
    return out, ScatterMeanCache(index, times)


def _scatter(rows, index, n_tokens, floor):
    xp = array_module(rows)
    rows, index = _contiguous(rows), _int32(index)
    b, h = index.shape[:2]
    window, width = index.shape[-1], rows.shape[-1]
    lists = math.prod(index.shape[2:-1])
    if lists > MAX_CLUSTERS or width > TILE:
        raise ValueError(f"at most {MAX_CLUSTERS} lists and {TILE} columns, "
                         f"not {lists} and {width}")
    out = xp.empty((b, h, n_tokens, width), rows.dtype)
    times = xp.empty((b, h, n_tokens, 1), rows.dtype)
    tile = min(256, TILE // width)
    launch("scatter_rows", (_blocks(n_tokens, tile), b * h), (_column_threads(width),), rows, index,
           out, times, lists, window, n_tokens, width, tile, floor)
    return out, times


def _column_threads(width: int) -> int:
    return min(THREADS, _blocks(width, 32) * 32)


PIECE = 64  # rows that a block of segment_pieces adds


def segment_sum(rows, index, n: int):
    """Twin of layers.segment_sum: sorts the index, sums runs in a fixed order, in float32."""
    xp = array_module(rows)
    size, width = rows.shape
    rows, index = _contiguous(rows), _int32(index)
    order = _int32(xp.argsort(index, kind="stable"))
    ids = index[order]
    starts, sums = xp.empty(n + 1, xp.int32), xp.empty((n, width), xp.float32)
    pieces, threads = _blocks(size, PIECE), _column_threads(width)
    carry = xp.empty((pieces, width), xp.float32)
    columns = _blocks(width, threads)
    launch("segment_starts", (_blocks(size + 1),), (THREADS,), ids, starts, size, n)
    launch("segment_pieces", (pieces, columns), (threads,), rows, order, ids, sums, carry, size,
           width, PIECE)
    launch("segment_finish", (n, columns), (threads,), starts, carry, sums, width, PIECE)
    return sums.astype(rows.dtype, copy=False)


def cluster_statistics(x, winner, n_clusters: int):
    """Twin of kmeans.cluster_statistics; float32 results."""
    xp = array_module(x)
    x, winner = _contiguous(x), _int32(winner)
    b, h, tokens, width = x.shape
    chunk = max(64, _blocks(tokens, 256))  # many short walks: a block reads its tokens in turn
    chunks, tile = _blocks(tokens, chunk), min(n_clusters, MAX_CLUSTERS, TILE // width)
    sums = xp.empty((chunks * b, h, n_clusters, width), xp.float32)
    counts = xp.empty((chunks * b, h, n_clusters), xp.float32)
    launch("cluster_sums", (chunks, b * h, _blocks(n_clusters, tile)), (_column_threads(width),),
           x, winner, sums, counts, tokens, width, n_clusters, chunk, tile)
    return _sum_strips(counts), _sum_strips(sums)


# ----------------------------------------------------------------------------------- optimizers

def adamw_update(flat, grads, state, table, lr, step, *, beta1=0.9, beta2=0.99, eps=1e-8,
                 weight_decay=0.0) -> None:
    """Twin of optim.adamw_update, for float32 buffers."""
    lines = _leaves(array_module(flat), tuple(table))
    unbias1, unbias2 = 1 - beta1 ** (step + 1), math.sqrt(1 - beta2 ** (step + 1))
    launch("adamw", (128, lines.shape[0]), (THREADS,), flat, grads, state["m"], state["v"], lines,
           lr / unbias1, 1 - beta1, 1 - beta2, unbias2, eps, lr * weight_decay)


@functools.lru_cache(maxsize=4)
def _leaves(xp, table):
    """(leaves, 3) int64: struct Leaf of optim.cu; leaves of two or more axes decay."""
    lines = [(leaf.start, leaf.stop - leaf.start, len(leaf.shape) >= 2) for leaf in table]
    return xp.asarray(np.array(lines, np.int64))


def muon_update(flat, grads, state, table, lr, step, *, weight_decay=0.0) -> None:
    """Twin of optim.muon_update: matrices of one shape as one batch of products."""
    xp = array_module(flat)
    adamw_of_the_rest(flat, grads, state, table, lr, step, weight_decay)
    alike = {}
    for leaf in filter(orthogonalized, table):
        alike.setdefault(leaf.shape, []).append(leaf)
    for shape, leaves in alike.items():
        x = xp.empty((len(leaves), *shape), flat.dtype)
        for i, leaf in enumerate(leaves):
            g, m = (z[leaf.start : leaf.stop].reshape(shape) for z in (grads, state["m"]))
            m *= MOMENTUM
            m += g
            xp.multiply(m, MOMENTUM, out=x[i])
            x[i] += g
        x = _newton_schulz(x)
        for i, leaf in enumerate(leaves):
            w = flat[leaf.start : leaf.stop].reshape(shape)
            w *= 1 - lr * weight_decay
            w -= lr * update_scale(leaf) * x[i]


def _newton_schulz(x):
    """Twin of optim.newton_schulz, its sums inside the products."""
    xp = array_module(x)
    if x.shape[-2] > x.shape[-1]:
        return _newton_schulz(_contiguous(x.swapaxes(-1, -2))).swapaxes(-1, -2)
    norm = xp.sqrt((x * x).sum((-2, -1), keepdims=True))
    x /= xp.maximum(norm, xp.finfo(x.dtype).tiny)
    for first, third, fifth in NEWTON_SCHULZ:
        a = matmul(x, x.swapaxes(-1, -2))
        b = a.copy()
        matmul(a, a, out=b, alpha=fifth, beta=third)
        x = matmul(b, x, out=x.copy(), beta=first)
    return x


ADAFACTOR_BLOCKS = 128  # BLOCKS in optim.cu
ADAFACTOR_STRIPS = 16   # strips of rows that the sums over columns are cut into


def adafactor_update(flat, grads, state, table, lr, step, *, weight_decay=0.0) -> None:
    """Twin of optim.adafactor_update, for float32 buffers."""
    xp = array_module(flat)
    lines = _matrices(xp, tuple(table))
    row, column, full = state["row"], state["column"], state["full"]
    move = (step + 1) ** -DECAY_POWER
    grid = (ADAFACTOR_BLOCKS, lines.shape[0])
    parts = xp.empty((ADAFACTOR_STRIPS, column.size), xp.float32)
    means = xp.zeros(lines.shape[0], xp.float32)
    squares = xp.empty((lines.shape[0], 2, ADAFACTOR_BLOCKS), xp.float32)
    launch("adafactor_rows", grid, (THREADS,), flat, grads, lines, row, full, move, weight_decay)
    launch("adafactor_columns", (32, lines.shape[0], ADAFACTOR_STRIPS), (32, 8), flat, grads,
           lines, parts, column.size, weight_decay)
    launch("adafactor_columns_finish", grid, (THREADS,), parts, lines, row, column, means,
           ADAFACTOR_STRIPS, column.size, move)
    launch("adafactor_squares", grid, (THREADS,), flat, grads, lines, row, column, full, means,
           squares, weight_decay)
    launch("adafactor_update", grid, (THREADS,), flat, grads, lines, row, column, full, means,
           squares, lr, weight_decay)


@functools.lru_cache(maxsize=4)
def _matrices(xp, table):
    """(matrices, 8) int64: struct Matrix of optim.cu for every matrix of every leaf."""
    lines, row_state, column_state, full_state = [], 0, 0, 0
    for leaf in table:
        first, decays = len(lines), not is_bias(leaf)
        if len(leaf.shape) < 2:
            size = leaf.stop - leaf.start
            lines.append((leaf.start, 1, size, full_state, -1, first, 1, decays))
            full_state += size
            continue
        rows, columns = leaf.shape[-2:]
        matrices = math.prod(leaf.shape[:-2])
        for i in range(matrices):
            lines.append((leaf.start + i * rows * columns, rows, columns, row_state, column_state,
                          first, matrices, decays))
            row_state += rows
            column_state += columns
    return xp.asarray(np.array(lines, np.int64))


# What may be registered as the twin of the function of the same name, when `supports` agrees.
TWINS = {f"{module}.{f.__name__}": f for module, functions in {
    "layers": (linear, linear_backward, normalize, normalize_backward, layer_norm,
               layer_norm_backward, geglu, geglu_backward, segment_sum, linear_cross_entropy,
               linear_cross_entropy_backward),
    "dropout": (dropout,),
    "attention": (attend, attend_backward, local_attention, local_attention_backward),
    "kmeans": (cluster_statistics,),
    "routing": (top_members, by_cluster, inverse, gather, scatter_sum, scatter_mean),
    "optim": (adamw_update, muon_update, adafactor_update),
}.items() for f in functions}
