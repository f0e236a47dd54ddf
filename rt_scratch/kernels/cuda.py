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

from rt_scratch import kmeans, layers
from rt_scratch.attention import (
    AttendCache,
    LocalCache,
    causal_mask,
    clipped_reach,
    join_blocks,
)
from rt_scratch.dispatch import array_module, qualified_name
from rt_scratch.dropout import first_entry
from rt_scratch.kernels.gemm import address, aligned_rows, matmul, well_placed
from rt_scratch.kernels.launch import WORD, dtype_name, launch
from rt_scratch.kmeans import MAX_CLUSTERS, SMOOTHING, CommitmentCache
from rt_scratch.layers import (
    EPSILON,
    CrossEntropyCache,
    GateCache,
    GatedCache,
    LayerNormCache,
    LinearCache,
    NormalizeCache,
    ReluCache,
    ResidualCache,
)
from rt_scratch.optim import (
    MOMENTUM,
    NEWTON_SCHULZ,
    is_bias,
    orthogonalized,
    update_scale,
)
from rt_scratch.routing import MEAN_FLOOR, Coverage, ScatterMeanCache

THREADS = 256
WARPS = THREADS // 32
ROW = 8  # entries, 16 bytes of half precision


def _blocks(n: int, per_block: int = THREADS) -> int:
    return -(-n // per_block)


def _float32(x):
    """x as contiguous float32; x itself where it is, or where it is None."""
    if x is None or (dtype_name(x.dtype) == "float32" and x.flags.c_contiguous):
        return x
    return array_module(x).ascontiguousarray(x, dtype="float32")


def _int32(x):
    if dtype_name(x.dtype) == "int32" and x.flags.c_contiguous:
        return x
    return array_module(x).ascontiguousarray(x, dtype="int32")


def _contiguous(x):
    return x if x.flags.c_contiguous else array_module(x).ascontiguousarray(x)


def _by_rows(x):
    """x (..., D) whose rows are contiguous and one stride apart, however far: x itself, or a copy.
    """
    step, rows = x.strides[-2] if x.ndim > 1 else x.nbytes, 1
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.strides[:-1]), strict=True):
        if size > 1 and stride != rows * step:
            return _contiguous(x)
        rows *= size
    return x if x.strides[-1] == x.itemsize else _contiguous(x)


def _rows(x):
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def supports(*arguments) -> bool:
    """Whether the twins take these arguments: none of the arrays among them is, say, float64."""
    for x in arguments:
        if isinstance(x, tuple):
            if not supports(*x):
                return False
        elif hasattr(x, "dtype") and not _supported(x.dtype):
            return False
    return True


@functools.cache
def _supported(dtype) -> bool:
    return dtype.kind in "iub" or dtype.name in WORD


# ------------------------------------------------------------------------------- compute copy

def round_matrices(flat, places, size, dtype):
    """Twin of parameters.round_matrices; what lies between two matrices is left as it is."""
    xp = array_module(flat)
    rounded = xp.empty(size, dtype)
    launch("round_matrices", (128, len(places)), (THREADS,), flat, _lines(xp, places), rounded)
    return rounded


@functools.lru_cache(maxsize=4)
def _lines(xp, places):
    """(matrices, 5) int64: struct Place of round_matrices.cu."""
    return xp.asarray(np.array(places, np.int64))


# ------------------------------------------------------------- gradients, added where they belong
#
# A backward of this file that has parameters is two functions. The one that works takes `out`, an
# array for each gradient of a parameter (float32), writes or with add = 1 adds to it, and does
# likewise with dx. `add_gradients` gives it the buffers of the model; the twin of the plain
# backward gives it new arrays.

def add_gradients(backward, dy, cache, buffers, dx=None):
    """Twin of layers.add_gradients."""
    adding = ADDING.get(qualified_name(backward))
    if adding is None:
        return layers.add_gradients.reference(backward, dy, cache, buffers, dx)
    return adding(dy, cache, buffers, 1, dx)


def _new(adding, dy, cache, parameters):
    """(dx, gradients) in new arrays, for a plain backward with these parameters."""
    out = tuple(array_module(p).empty(p.shape, "float32") for p in parameters)
    return adding(dy, cache, out, 0), *out


def _add_product(x, dy, out, add, scale=1.0):
    """out = scale x^T dy or out += it, for rows x (N, I), dy (N, O); out may be transposed."""
    if out.strides[-1] == out.itemsize:
        matmul(x.swapaxes(-1, -2), dy, out=out, alpha=scale, beta=add)
    else:
        matmul(dy.swapaxes(-1, -2), x, out=out.swapaxes(-1, -2), alpha=scale, beta=add)


def _stacked(first, second):
    """Two matrices as one batch (2, ...) without a copy, by the distance of their addresses.

    None where shapes or strides differ.
    """
    gap = address(second) - address(first)
    if (first.shape != second.shape or first.strides != second.strides or gap <= 0
            or gap % first.itemsize):
        return None
    return array_module(first).lib.stride_tricks.as_strided(
        first, (2, *first.shape), (gap, *first.strides))


# -------------------------------------------------------------------------------------- linear

def linear(x, w, b=None, scale=1.0):
    """Twin of layers.linear."""
    y = matmul(_rows(x), w, alpha=scale)
    if b is not None:
        _add_bias(y, b)
    return y.reshape(*x.shape[:-1], w.shape[1]), LinearCache(x, w, b is not None, scale)


def linear_backward(dy, cache):
    """Twin of layers.linear_backward; gradients of w and b are summed, and left, in float32."""
    bias = (dy[(0,) * (dy.ndim - 1)],) if cache.biased else ()
    dx, dw, *db = _new(_add_linear, dy, cache, (cache.w, *bias))
    return dx, dw, (db[0] if db else None)


def _add_linear(dy, cache, out, add, dx=None):
    x, w, biased, scale = cache
    rows = _contiguous(_rows(dy))
    _add_product(_rows(x), rows, out[0], add, scale)
    if biased:
        _column_sum(rows, out[1:], add)
    if dx is None:
        return matmul(rows, w.T, alpha=scale).reshape(x.shape)
    matmul(rows, w.T, out=_rows(dx), alpha=scale, beta=1)
    return dx


def _add_bias(y, b, relu=False, dropped=None):
    """In place: y + b, or dropout(max(y + b, 0)).  y (N, C)."""
    launch("add_bias", (_blocks(y.size, 8 * THREADS),), (THREADS,), y, _float32(b), y.size,
           y.shape[-1], relu, *_drop(dropped, y.shape, array_module(y)))


def relu_ffn(x, w_in, b_in, w_out, b_out, dropped=None):
    """Twin of layers.relu_ffn: bias, ReLU and dropout in one kernel."""
    h = matmul(_rows(x), w_in).reshape(*x.shape[:-1], -1)
    _add_bias(h, b_in, True, dropped)
    y, out = linear(h, w_out, b_out)
    dropped = dropped if dropped and dropped.rate else None
    return y, ReluCache(LinearCache(x, w_in, True), dropped, out)


def relu_ffn_backward(dy, cache):
    """Twin of layers.relu_ffn_backward."""
    w_in, w_out = cache.hidden.w, cache.out.w
    return _new(_add_relu_ffn, dy, cache, (w_in, w_in[0], w_out, w_out[0]))


def _add_relu_ffn(dy, cache, out, add, dx=None):
    dh = _add_linear(dy, cache.out, out[2:], add)
    threshold = _drop(cache.dropped, dh.shape, array_module(dh))[0]
    launch("relu_backward", (_blocks(dh.size, 8 * THREADS),), (THREADS,), dh, cache.out.x, dh.size,
           65536 / (65536 - threshold))
    return _add_linear(dh, cache.hidden, out[:2], add, dx)


# --------------------------------------------------------------------------- columns, LayerNorm

STRIPS = 64  # strips of rows that a sum over rows is cut into


def _column_sum(x, out, add) -> None:
    """Sum over the rows of x (N, C), in a fixed order, into the one array of out."""
    _column_sums("column_sum", (x,), *x.shape, out, add, x.strides[0] // x.itemsize)


def _column_sums(name: str, arguments, rows: int, width: int, out, add, *more) -> None:
    """Runs a kernel that sums strips of rows, then adds the strips, into each array (width,)."""
    strip = max(8, -(-rows // STRIPS))
    strips = _blocks(rows, strip)
    parts = array_module(out[0]).empty((len(out), strips, width), "float32")
    launch(name, (_blocks(width, 32), strips), (32, 8), *arguments, *_each(parts), rows, width,
           strip, *more)
    _sum_strips(_each(parts), out, add)


def _each(x):
    """The arrays along the first axis of x."""
    return [x[i] for i in range(x.shape[0])]


def _sum_strips(parts, out, add=0) -> None:
    """Sums over the first axis of one or two float32 arrays, in order, into arrays of out."""
    widths = [x.size for x in out]
    pad = [None] * (2 - len(out))
    launch("sum_strips", (_blocks(max(widths)), len(out)), (THREADS,), *parts, *pad, *out, *pad,
           parts[0].shape[0], widths[0], widths[-1], add)


def _sum_all(x, factor=1.0):
    """factor times the sum of a float32 array, a 0-d array."""
    total = array_module(x).empty((), "float32")
    launch("sum_all", (1,), (256,), x, total, x.size, factor)
    return total


def normalize(x):
    """Twin of layers.normalize; x (B, H, T, D) may be strided except along its last axis."""
    y, x, mean, rstd = _layer_norm(x, None, None)
    return y, NormalizeCache(x, mean, rstd)


def layer_norm(x, gain, bias):
    """Twin of layers.layer_norm."""
    y, x, mean, rstd = _layer_norm(x, _float32(gain), _float32(bias))
    return y, LayerNormCache(x, gain, mean, rstd)


def _layer_norm(x, gain, bias):
    xp, (x, where) = array_module(x), _heads(x)
    rows, width = x.size // x.shape[-1], x.shape[-1]
    y = xp.empty(x.shape, x.dtype)
    mean, rstd = _each(xp.empty((2, *x.shape[:-1], 1), xp.float32))
    launch("layer_norm", (_blocks(rows, WARPS),), (THREADS,), x, gain, bias, y, mean, rstd, rows,
           width, EPSILON, *where)
    return y, x, mean, rstd


def _heads(x):
    """x, copied if it must be, and (heads, tokens, strides in entries) of its rows."""
    if x.ndim != 4 or x.strides[-1] != x.itemsize:
        x = _contiguous(x)
    if x.flags.c_contiguous:
        return x, (1, max(1, x.size // x.shape[-1]), 0, 0, x.shape[-1])
    return x, (*x.shape[1:3], *(stride // x.itemsize for stride in x.strides[:-1]))


def normalize_backward(dn, cache):
    """Twin of layers.normalize_backward."""
    return _layer_norm_dx(_contiguous(dn), cache.x, None, cache.mean, cache.rstd)[0]


def layer_norm_backward(dy, cache):
    """Twin of layers.layer_norm_backward; gradients of gain and bias are left in float32."""
    return _new(_add_layer_norm, dy, cache, (cache.gain, cache.gain))


def _add_layer_norm(dy, cache, out, add, dx=None):
    return _add_norm(_contiguous(dy), cache, out, add, dx)[0]


def _add_norm(dy, cache, out, add, dx=None, dropped=None):
    """dx and df of a LayerNorm; see `_layer_norm_dx`."""
    x, gain, mean, rstd = cache
    width = x.shape[-1]
    _column_sums("layer_norm_backward_columns", (dy, x, mean, rstd), x.size // width, width, out,
                 add)
    return _layer_norm_dx(dy, x, _float32(gain), mean, rstd, dx, dropped)


def _layer_norm_dx(dy, x, gain, mean, rstd, dx=None, dropped=None):
    """dx, added to the one given if any, and df, dx after dropout."""
    xp, (x, where), width = array_module(x), _heads(x), x.shape[-1]
    add, dx = dx is not None, xp.empty(x.shape, x.dtype) if dx is None else dx
    df = xp.empty(x.shape, x.dtype) if dropped else None
    rows = x.size // width
    launch("layer_norm_backward", (_blocks(rows, WARPS),), (THREADS,), dy, x, gain, mean, rstd, dx,
           df, rows, width, add, *where, *_drop(dropped, x.shape, xp))
    return dx, (df if dropped else dx)


def residual(x, f, dropped, gain=None, bias=None):
    """Twin of layers.residual: dropout, sum and LayerNorm in one kernel."""
    xp, x, f = array_module(x), _contiguous(x), _contiguous(f)
    rows, width = x.size // x.shape[-1], x.shape[-1]
    dropped = dropped if dropped and dropped.rate else None
    total, y, mean, rstd = xp.empty(x.shape, x.dtype), None, None, None
    if gain is not None:
        y = xp.empty(x.shape, x.dtype)
        mean, rstd = _each(xp.empty((2, *x.shape[:-1], 1), xp.float32))
    launch("residual", (_blocks(rows, WARPS),), (THREADS,), x, f, _float32(gain), _float32(bias),
           total, y, mean, rstd, rows, width, EPSILON, *_drop(dropped, x.shape, xp))
    if gain is None:
        return total, ResidualCache(dropped, None)
    return y, ResidualCache(dropped, LayerNormCache(total, gain, mean, rstd))


def residual_backward(dy, cache):
    """Twin of layers.residual_backward."""
    return _new(_add_residual, dy, cache, () if cache.norm is None else (cache.norm.gain,) * 2)


def _add_residual(dy, cache, out, add, dx=None):
    if cache.norm is None:
        return dy, dropout(dy, cache.dropped)[0]
    return _add_norm(_contiguous(dy), cache.norm, out, add, None, cache.dropped)


# ------------------------------------------------------------------------------ GEGLU, dropout

def geglu(a, b):
    """Twin of layers.geglu."""
    a, b = _contiguous(a), _contiguous(b)
    return _geglu(a, b, None), GateCache(a, b)


def _geglu(a, b, dropped):
    y = array_module(a).empty(a.shape, a.dtype)
    launch("geglu", (_blocks(a.size, 8 * THREADS),), (THREADS,), a, b, y, a.size,
           *_drop(dropped, a.shape, array_module(a)))
    return y


def geglu_backward(dy, cache):
    """Twin of layers.geglu_backward."""
    a, b = cache
    return tuple(_each(_geglu_backward(_contiguous(dy), a, b, None, None)))


def _geglu_backward(dy, a, b, y, dropped):
    """da and db as one array (2, ...); writes y, unless it is None, again."""
    d = array_module(a).empty((2, *a.shape), a.dtype)
    launch("geglu_backward", (_blocks(a.size, 8 * THREADS),), (THREADS,), dy, a, b, d[0], d[1], y,
           a.size, *_drop(dropped, a.shape, array_module(a)))
    return d


def geglu_ffn(x, w_gate, w_value, w_out, dropped=None):
    """Twin of layers.geglu_ffn: both first products are one, gate and dropout one kernel."""
    rows, weights = _rows(x), _stacked(w_gate, w_value)
    ab = array_module(x).empty((2, *x.shape[:-1], w_gate.shape[1]), x.dtype)
    flat = ab.reshape(2, rows.shape[0], -1)
    if weights is None:
        matmul(rows, w_gate, out=flat[0])
        matmul(rows, w_value, out=flat[1])
    else:
        matmul(rows, weights, out=flat)
    a, b = _each(ab)
    y = matmul(_rows(_geglu(a, b, dropped)), w_out)
    return y.reshape(*x.shape[:-1], -1), GatedCache(x, w_gate, w_value, w_out, a, b, dropped)


def geglu_ffn_backward(dy, cache):
    """Twin of layers.geglu_ffn_backward."""
    return _new(_add_geglu_ffn, dy, cache, (cache.w_gate, cache.w_value, cache.w_out))


def _add_geglu_ffn(dy, cache, out, add, dx=None):
    x, w_gate, w_value, w_out, a, b, dropped = cache
    rows, dy = _rows(x), _contiguous(_rows(dy))
    h = array_module(a).empty(a.shape, a.dtype)
    d = _geglu_backward(matmul(dy, w_out.T), a, b, h, dropped).reshape(2, rows.shape[0], -1)
    _add_product(_rows(h), dy, out[2], add)
    both = _stacked(*out[:2])
    if both is None:
        _add_product(rows, d[0], out[0], add)
        _add_product(rows, d[1], out[1], add)
    else:
        _add_product(rows, d, both, add)
    if dx is None:
        dx = array_module(x).empty(x.shape, x.dtype)
        matmul(d[0], w_gate.T, out=_rows(dx))
    else:
        matmul(d[0], w_gate.T, out=_rows(dx), beta=1)
    matmul(d[1], w_value.T, out=_rows(dx), beta=1)
    return dx


ADDING = {f"layers.{name}": f for name, f in (
    ("linear_backward", _add_linear), ("relu_ffn_backward", _add_relu_ffn),
    ("geglu_ffn_backward", _add_geglu_ffn), ("layer_norm_backward", _add_layer_norm),
    ("residual_backward", _add_residual))}


def dropout(x, dropped):
    """Twin of dropout.dropout; also its backward."""
    if dropped is None or not dropped.rate:
        return x, None
    x = _contiguous(x)
    y = array_module(x).empty_like(x)
    launch("dropout", (_blocks(x.size, 8 * THREADS),), (THREADS,), x, y, x.size,
           *_drop(dropped, x.shape, array_module(x)))
    return y, dropped


def _drop(dropped, shape, xp):
    """The kernels' form of a Dropped, for an array of this shape; None draws nothing."""
    if not dropped:
        return 0, 0, 0, 0, None, 0
    seed, stream, step = dropped.key
    low = 0xFFFFFFFF
    return (round(dropped.rate * 65536), seed & low, (seed >> 32) & low, stream & low,
            _number(xp, step, "uint32"), first_entry(dropped, shape))


def _number(xp, value, dtype):
    """What changes from step to step as a 0-d array that a kernel reads; an array as it is.

    A CUDA graph repeats every argument that was passed by value.
    """
    return value if hasattr(value, "dtype") else _kept_number(xp, value, dtype)


@functools.lru_cache(maxsize=8)
def _kept_number(xp, value, dtype):
    return xp.full((), value, dtype)


# -------------------------------------------------------------------- output layer and loss

CHUNK_ENTRIES = 5 << 24  # of wide intermediates (logits) alive at a time: 320 MB in float32


def linear_cross_entropy(x, w, b, targets, weights):
    """Twin of layers.linear_cross_entropy."""
    xp = array_module(x)
    lse, loss = _each(xp.empty((2, x.shape[0]), xp.float32))
    bias, target, weight = _float32(b), _int32(targets), _float32(weights)
    vocabulary = w.shape[1]
    for rows in _chunks(x.shape[0], vocabulary):
        z = _logits(x[rows], w)
        launch("cross_entropy", (z.shape[0],), (_row_threads(vocabulary),), z, bias, target[rows],
               weight[rows], lse[rows], loss[rows], vocabulary, z.strides[0] // 4)
    return _sum_all(loss), CrossEntropyCache(x, w, b, targets, weights, lse)


def linear_cross_entropy_backward(dloss, cache):
    """Twin of layers.linear_cross_entropy_backward; dw and db are summed in float32."""
    return _new(_add_cross_entropy, dloss, cache, (cache.w, cache.b))


def _add_cross_entropy(dloss, cache, out, add, dx=None):
    x, w, b, targets, weights, lse = cache
    xp = array_module(x)
    bias, target, weight = _float32(b), _int32(targets), _float32(weights * dloss)
    vocabulary = w.shape[1]
    dx, dw = xp.empty(x.shape, x.dtype), out[0]
    if not well_placed(dw):  # one addition at the end, not one per chunk
        dw = aligned_rows(w.shape, x, "float32")
    for rows in _chunks(x.shape[0], vocabulary):
        z = _logits(x[rows], w)
        dz = z if x.dtype == z.dtype else aligned_rows(z.shape, x)
        launch("cross_entropy_backward", (z.shape[0],), (_row_threads(vocabulary),), z, bias,
               target[rows], weight[rows], lse[rows], dz, vocabulary, z.strides[0] // 4)
        matmul(dz, w.T, out=dx[rows])
        _add_product(x[rows], dz, dw, rows.start > 0 or add and dw is out[0])
        _column_sum(dz, out[1:], add or rows.start > 0)
    if dw is not out[0]:
        out[0][...] = dw + out[0] if add else dw
    return dx


def _logits(x, w):
    """x w in float32."""
    return matmul(x, w, out=aligned_rows((x.shape[0], w.shape[1]), x, "float32"))


ADDING["layers.linear_cross_entropy_backward"] = _add_cross_entropy


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
    drop: tuple         # see `_drop`


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
                 _rule(mask, shape, xp), scale, _drop(dropped, shape, xp))


def _attend(pairs: Pairs, lse):
    """o (b, S, D), and lse of all rows."""
    queries, keys, values, by_key, by_value, *_ = pairs
    o = aligned_rows((*queries.shape[:2], values.shape[-1]), queries)
    for part in _chunks(queries.shape[0], queries.shape[1] * keys.shape[1]):
        s, r = _products(queries[part], keys[part], by_key)
        p, u = _like(s, queries.dtype), _like(r, queries.dtype)
        _softmax("attention_softmax", part, s, r, pairs, (p, u, lse))
        matmul(p, values[part], out=o[part])
        if by_value is not None:
            matmul(_rows(u), by_value, out=_rows(o[part]), beta=1)
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
    for part in _chunks(queries.shape[0], queries.shape[1] * keys.shape[1]):
        s, r = _products(queries[part], keys[part], by_key)
        dp, dr = _products(do[part], values[part], by_value)
        p, u, dz, du = (_like(x, dtype) for x in (s, r, dp, dr))
        _softmax("attention_softmax_backward", part, s, r, pairs, (lse, dp, dr, p, u, dz, du))
        matmul(dz, keys[part], out=dq[part])
        _to_keys(p, do[part], dv, part, lookback)
        _to_keys(dz, queries[part], dk, part, lookback)
        if by_key is not None:
            later = part.start > 0
            matmul(_rows(du), by_key, out=_rows(dq[part]), beta=1)
            matmul(_rows(u).T, _rows(do[part]), out=drel[1], beta=later)
            matmul(_rows(du).T, _rows(queries[part]), out=drel[0], beta=later)
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
    return _by_rows(x).reshape(-1, *x.shape[-2:])


def _tables(rel_k, rel_v, dtype):
    if rel_k is None:
        return None, None
    return tuple(table.astype(dtype, copy=False) for table in (rel_k, rel_v))


def _products(rows, columns, table):
    """Products of each row with the block's columns and with the table, in float32."""
    by_column = matmul(rows, columns.swapaxes(-1, -2), dtype="float32")       # (b, S, N)
    if table is None:
        return by_column, None
    by_distance = matmul(_rows(rows), table.T, dtype="float32")               # (b S, P)
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
        segment = None if mask.segment is None else _int32(mask.segment)
        return None, 1, segment, mask.blocks, mask.tokens, mask.offset, mask.window
    if mask is None:
        mask = causal_mask(xp, n_queries, n_keys)
    lead, shape = tuple(lead), mask.shape[:-2]
    while shape and shape[0] == 1:
        shape = shape[1:]
    if mask.shape[-2:] != (n_queries, n_keys) or shape != lead[len(lead) - len(shape):]:
        mask, shape = xp.broadcast_to(mask, (*lead, n_queries, n_keys)), lead
    return _contiguous(mask), math.prod(shape), None, 1, 0, 0, 0


def _softmax(name, part, s, r, pairs: Pairs, arrays):
    mask, mask_blocks, segment, blocks, tokens, offset, window = pairs.rule
    b, n_queries, n_keys = s.shape
    rows = b * n_queries
    distances = 0 if pairs.by_key is None else pairs.by_key.shape[0]
    launch(name, (_blocks(rows, WARPS),), (THREADS,), s, r, mask, segment, *arrays,
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
        drel = _each(xp.zeros((2, *rel_k.shape), xp.float32))
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
                  clipped, _rule(band, shape, xp), scale, _drop(dropped, shape, xp))
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
    arrays = [x if x.strides[-1] == x.itemsize else _contiguous(x) for x in arrays]
    n_rows = front + b * h * length
    out = aligned_rows((len(arrays), n_rows, d), arrays[0])
    size, word = _word(d * out.itemsize, out, *arrays)
    words = d * out.itemsize // size
    strides = [stride // size for x in arrays for stride in x.strides[:-1]]
    missing = 4 - len(arrays)
    launch("split_heads", (_blocks(n_rows * words), len(arrays)), (THREADS,), *arrays,
           *[None] * missing, out, h, t, front, length, n_rows, words, out.strides[1] // size,
           *strides, *[0] * (3 * missing), word=word)
    return _each(out)


WORDS = ((16, "uint4"), (8, "uint2"), (4, "unsigned"), (2, "unsigned short"), (1, "unsigned char"))


def _word(row_bytes, *arrays):
    """(bytes, type) of the widest word in which rows of these arrays can be moved."""
    parts = row_bytes
    for x in arrays:
        parts = math.gcd(parts, address(x), *x.strides[:-1])
    return next((n, name) for n, name in WORDS if not parts % n)


# ------------------------------------------------------------------------------------- routing

def top_members(scores, window: int):
    """Twin of routing.top_members: int32 positions."""
    xp = array_module(scores)
    scores = _float32(scores)
    index = xp.empty((*scores.shape[:-1], window), xp.int32)
    launch("top_members", (math.prod(scores.shape[:-1]),), (256,), scores, index,
           scores.shape[-1], window)
    return index


def by_cluster(winner, n_clusters: int = MAX_CLUSTERS):
    """Twin of routing.by_cluster: int32 positions."""
    xp = array_module(winner)
    winner = _int32(winner)
    tokens = winner.shape[-1]
    rows = winner.size // tokens
    chunk = max(512, _blocks(tokens, 64 * 32) * 32)  # at most 64 chunks, a multiple of the warp
    chunks = _blocks(tokens, chunk)
    starts = xp.empty((rows, n_clusters, chunks), xp.int32)
    order = xp.empty_like(winner)
    grid = (chunks, rows)
    launch("cluster_counts", grid, (32,), winner, starts, tokens, n_clusters, chunk)
    launch("cluster_starts", (rows,), (256,), starts, n_clusters * chunks)
    launch("cluster_positions", grid, (32,), winner, starts, order, tokens, n_clusters, chunk)
    return order


def inverse(order):
    """Twin of routing.inverse: int32."""
    order = _int32(order)
    tokens = order.shape[-1]
    rank = array_module(order).empty_like(order)
    launch("invert", (_blocks(tokens), order.size // tokens), (THREADS,), order, rank, tokens)
    return rank


def gather(x, index):
    """Twin of routing.gather, for any dtype; x may be strided except along its last axis."""
    if x.strides[-1] != x.itemsize:
        x = _contiguous(x)
    index = _int32(index)
    shape = (*index.shape, x.shape[-1])  # integers enter no product
    out = array_module(x).empty(shape, x.dtype) if x.dtype.kind in "iub" else aligned_rows(shape, x)
    heads, rows = x.shape[1], math.prod(index.shape[2:])
    size, word = _word(x.shape[-1] * x.itemsize, x, out)
    words = x.shape[-1] * x.itemsize // size
    launch("gather_rows", (_blocks(rows * words), x.shape[0] * heads), (THREADS,), x, index, out,
           heads, rows, words, out.strides[-2] // size,
           *(stride // size for stride in x.strides[:-1]), word=word)
    return out


TILE = 4096        # floats of sums that a block holds, as in kmeans.cu


def scatter_sum(rows, index, n_tokens: int):
    """Twin of routing.scatter_sum for lists that ascend along the last axis of index."""
    return _scatter(rows, index, n_tokens, -1.0)[0]


def scatter_mean(rows, index, n_tokens: int):
    """Twin of routing.scatter_mean for lists that ascend along the last axis of index."""
    out, times = _scatter(rows, index, n_tokens, MEAN_FLOOR)
    return out, ScatterMeanCache(index, times)


def _scatter(rows, index, n_tokens, floor):
    xp = array_module(rows)
    rows, index = _by_rows(rows), _int32(index)
    b, h = index.shape[:2]
    window, width = index.shape[-1], rows.shape[-1]
    out = xp.empty((b, h, n_tokens, width), rows.dtype)
    times = None if floor < 0 else xp.empty((b, h, n_tokens, 1), rows.dtype)
    launch("scatter_rows", (_blocks(n_tokens, WARPS), b * h), (THREADS,), rows, index, out, times,
           math.prod(index.shape[2:-1]), window, n_tokens, width,
           rows.strides[-2] // rows.itemsize, floor)
    return out, times


def scatter_mean_backward(dout, cache):
    """Twin of routing.scatter_mean_backward: division and gather in one kernel."""
    index, times = cache
    if dout.strides[-1] != dout.itemsize:
        dout = _contiguous(dout)
    index, (_, h, t, d) = _int32(index), dout.shape
    out, rows = aligned_rows((*index.shape, d), dout), math.prod(index.shape[2:])
    strides = [stride // dout.itemsize for stride in dout.strides[:3]]
    launch("gather_mean", (_blocks(rows * d), dout.shape[0] * h), (THREADS,), dout, times, index,
           out, h, rows, t, d, out.strides[-2] // out.itemsize, MEAN_FLOOR, *strides)
    return out


def coverage(times):
    """Twin of routing.coverage."""
    shares = array_module(times).empty(2, "float32")
    launch("coverage", (1,), (256,), _contiguous(times), shares, times.size)
    return Coverage(*_each(shares))


def _column_threads(width: int) -> int:
    return min(THREADS, _blocks(width, 32) * 32)


PIECE = 64  # rows that a block of segment_pieces adds


def stable_order(index, n: int):
    """int32 positions that sort index (N,), numbers below n: by ten bits at a time, lowest first.

    CuPy's own sort waits for the GPU, which no CUDA graph can.
    """
    order, bits = None, 0
    while order is None or (n - 1) >> bits:
        digit, values = index >> bits & (MAX_CLUSTERS - 1), (n - 1 >> bits) + 1
        own = by_cluster((digit if order is None else digit[order])[None],
                         min(values, MAX_CLUSTERS))[0]
        order = own if order is None else order[own]
        bits += MAX_CLUSTERS.bit_length() - 1
    return order


def segment_sum(rows, index, n: int):
    """Twin of layers.segment_sum: sorts the index, sums runs in a fixed order; float32."""
    xp = array_module(rows)
    size, width = rows.shape
    rows, index = _contiguous(rows), _int32(index)
    order = stable_order(index, n)
    ids = index[order]
    starts, sums = xp.empty(n + 1, xp.int32), xp.empty((n, width), xp.float32)
    pieces, threads = _blocks(size, PIECE), _column_threads(width)
    carry = xp.empty((pieces, width), xp.float32)
    columns = _blocks(width, threads)
    launch("segment_starts", (_blocks(size + 1),), (THREADS,), ids, starts, size, n)
    launch("segment_pieces", (pieces, columns), (threads,), rows, order, ids, sums, carry, size,
           width, PIECE)
    launch("segment_finish", (n, columns), (threads,), starts, carry, sums, width, PIECE)
    return sums


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
    out = xp.empty((h, n_clusters), xp.float32), xp.empty((h, n_clusters, width), xp.float32)
    _sum_strips((counts, sums), out)
    return out


def compare(x, mu, equal_length=False):
    """Twin of kmeans.compare: int32 winners and float32 products from one kernel."""
    xp, x, mu = array_module(x), _contiguous(x), _float32(mu)
    b, h, tokens, width = x.shape
    winner = xp.empty((b, h, tokens), xp.int32)
    products = xp.empty((b, h, mu.shape[1], tokens), xp.float32)
    launch("compare", (_blocks(tokens, 32), b * h), (256,), x, mu, winner, products, h, tokens,
           width, mu.shape[1], bool(equal_length))
    return winner, products


def commitment(x, mu, winner):
    """Twin of kmeans.commitment."""
    xp, x, mu, winner = array_module(x), _contiguous(x), _float32(mu), _int32(winner)
    _, h, tokens, width = x.shape
    rows, apart = x.size // width, xp.empty(x.shape, xp.float32)
    chunk = max(64, _blocks(rows, 1024))
    squares = xp.empty(_blocks(rows, chunk), xp.float32)
    launch("commitment", (squares.size,), (256,), x, mu, winner, apart, squares, rows, h, tokens,
           width, mu.shape[1], chunk)
    return _sum_all(squares, 1 / x.size), CommitmentCache(apart)


def add_commitment_gradient(dx, dloss, cache):
    """Twin of kmeans.add_commitment_gradient."""
    if not dx.flags.c_contiguous:  # heads of a width that is no multiple of 8
        kmeans.add_commitment_gradient.reference(dx, dloss, cache)
        return
    launch("add_scaled", (_blocks(dx.size, 8 * THREADS),), (THREADS,), dx, cache.apart, dx.size,
           2 * dloss / dx.size)


def replace_centroids(state, counts, sums, decay) -> None:
    """Twin of kmeans.replace_centroids, one launch per layer."""
    heads, clusters, width = state.mu.shape
    launch("replace_centroids", (heads,), (THREADS,), *state, counts, sums, clusters, width,
           1 - decay, SMOOTHING)


# ----------------------------------------------------------------------------------- optimizers

def global_norm(grads):
    """Twin of optim.global_norm: CuPy's dot product uses a handle that no CUDA graph takes."""
    xp = array_module(grads)
    parts = xp.empty(min(1024, _blocks(grads.size, 4 * THREADS)), xp.float32)
    launch("sum_squares", parts.shape, (THREADS,), grads, parts, grads.size)
    return xp.sqrt(parts.sum())


def adamw_update(flat, grads, state, table, lr, step, *, beta1=0.9, beta2=0.99, eps=1e-8,
                 weight_decay=0.0) -> None:
    """Twin of optim.adamw_update, for float32 buffers."""
    xp = array_module(flat)
    lines = _leaves(xp, tuple(table), len(state["v"]) == len(flat))
    launch("adamw", (128, lines.shape[0]), (THREADS,), flat, grads, state["m"], state["v"], lines,
           _number(xp, lr, "float32"), _number(xp, step, "uint32"), 1 - beta1, 1 - beta2, eps,
           weight_decay)


@functools.lru_cache(maxsize=64)
def _leaves(xp, table, full=True):
    """(leaves, 4) int64: struct Leaf of optim.cu; leaves of two or more axes decay.

    Second moments stand where the parameters stand, or, unless `full`, one leaf's after another's.
    """
    lines, second = [], 0
    for leaf in table:
        size = leaf.stop - leaf.start
        lines.append((leaf.start, size, len(leaf.shape) >= 2, leaf.start if full else second))
        second += size
    return xp.asarray(np.array(lines, np.int64))


def muon_update(flat, grads, state, table, lr, step, *, weight_decay=0.0) -> None:
    """Twin of optim.muon_update: matrices of one shape as one batch of products."""
    xp = array_module(flat)
    alike, rest = {}, []
    for leaf in table:
        (alike.setdefault(leaf.shape, []) if orthogonalized(leaf) else rest).append(leaf)
    if rest:
        adamw_update(flat, grads, state, rest, lr, step, weight_decay=weight_decay)
    for shape, leaves in alike.items():
        lines, size = _leaves(xp, tuple(leaves)), math.prod(shape)
        grid = min(128, _blocks(size, 4 * THREADS)), len(leaves)
        x = xp.empty((len(leaves), *shape), flat.dtype)
        launch("muon_momentum", grid, (THREADS,), grads, state["m"], lines, x, size, MOMENTUM)
        x = _contiguous(_newton_schulz(x))
        launch("muon_update", grid, (THREADS,), flat, lines, x, _number(xp, lr, "float32"), size,
               update_scale(leaves[0]), weight_decay)


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
    lr, step = _number(xp, lr, "float32"), _number(xp, step, "uint32")
    grid = (ADAFACTOR_BLOCKS, lines.shape[0])
    parts = xp.empty((ADAFACTOR_STRIPS, column.size), xp.float32)
    means = xp.zeros(lines.shape[0], xp.float32)
    squares = xp.empty((lines.shape[0], 2, ADAFACTOR_BLOCKS), xp.float32)
    launch("adafactor_rows", grid, (THREADS,), flat, grads, lines, row, full, step, weight_decay)
    launch("adafactor_columns", (32, lines.shape[0], ADAFACTOR_STRIPS), (32, 8), flat, grads,
           lines, parts, column.size, weight_decay)
    launch("adafactor_columns_finish", grid, (THREADS,), parts, lines, row, column, means,
           ADAFACTOR_STRIPS, column.size, step)
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
    "layers": (add_gradients, linear, linear_backward, normalize, normalize_backward, layer_norm,
               layer_norm_backward, residual, residual_backward, geglu, geglu_backward, geglu_ffn,
               geglu_ffn_backward, relu_ffn, relu_ffn_backward, segment_sum, linear_cross_entropy,
               linear_cross_entropy_backward),
    "dropout": (dropout,),
    "parameters": (round_matrices,),
    "attention": (attend, attend_backward, local_attention, local_attention_backward),
    "kmeans": (compare, cluster_statistics, commitment, add_commitment_gradient,
               replace_centroids),
    "routing": (top_members, by_cluster, inverse, gather, scatter_sum, scatter_mean,
                scatter_mean_backward, coverage),
    "optim": (global_norm, adamw_update, muon_update, adafactor_update),
}.items() for f in functions}
