"""Feed-forward layers and gates."""

from __future__ import annotations

from rt_scratch.dispatch import array_module
from rt_scratch.kernels.cuda.arrays import as_rows, contiguous, each, stacked
from rt_scratch.kernels.cuda.dropout import drop
from rt_scratch.kernels.cuda.layers import add_bias, add_linear, linear
from rt_scratch.kernels.cuda.sizes import THREADS, n_blocks
from rt_scratch.kernels.cuda.sums import add_product, new_gradients
from rt_scratch.kernels.gemm import matmul
from rt_scratch.kernels.launch import launch
from rt_scratch.layers import GateCache, GatedCache, LinearCache, ReluCache


def relu_ffn(x, w_in, b_in, w_out, b_out, dropped=None):
    """Twin of layers.relu_ffn: bias, ReLU and dropout in one kernel."""
    h = matmul(as_rows(x), w_in).reshape(*x.shape[:-1], -1)
    add_bias(h, b_in, True, dropped)
    y, out = linear(h, w_out, b_out)
    dropped = dropped if dropped and dropped.rate else None
    return y, ReluCache(LinearCache(x, w_in, True), dropped, out)


def relu_ffn_backward(dy, cache):
    """Twin of layers.relu_ffn_backward."""
    w_in, w_out = cache.hidden.w, cache.out.w
    return new_gradients(add_relu_ffn, dy, cache, (w_in, w_in[0], w_out, w_out[0]))


def add_relu_ffn(dy, cache, out, add, dx=None):
    dh = add_linear(dy, cache.out, out[2:], add)
    threshold = drop(cache.dropped, dh.shape, array_module(dh))[0]
    launch("relu_backward", (n_blocks(dh.size, 8 * THREADS),), (THREADS,), dh, cache.out.x, dh.size,
           65536 / (65536 - threshold))
    return add_linear(dh, cache.hidden, out[:2], add, dx)


def geglu(a, b):
    """Twin of layers.geglu."""
    a, b = contiguous(a), contiguous(b)
    return _geglu(a, b, None), GateCache(a, b)


def _geglu(a, b, dropped):
    y = array_module(a).empty(a.shape, a.dtype)
    launch("geglu", (n_blocks(a.size, 8 * THREADS),), (THREADS,), a, b, y, a.size,
           *drop(dropped, a.shape, array_module(a)))
    return y


def geglu_backward(dy, cache):
    """Twin of layers.geglu_backward."""
    a, b = cache
    return tuple(each(_geglu_backward(contiguous(dy), a, b, None, None)))


def _geglu_backward(dy, a, b, y, dropped):
    """da and db as one array (2, ...); writes y, unless it is None, again."""
    d = array_module(a).empty((2, *a.shape), a.dtype)
    launch("geglu_backward", (n_blocks(a.size, 8 * THREADS),), (THREADS,), dy, a, b, d[0], d[1], y,
           a.size, *drop(dropped, a.shape, array_module(a)))
    return d


def geglu_ffn(x, w_gate, w_value, w_out, dropped=None):
    """Twin of layers.geglu_ffn: both first products are one, gate and dropout one kernel."""
    rows, weights = as_rows(x), stacked(w_gate, w_value)
    ab = array_module(x).empty((2, *x.shape[:-1], w_gate.shape[1]), x.dtype)
    flat = ab.reshape(2, rows.shape[0], -1)
    if weights is None:
        matmul(rows, w_gate, out=flat[0])
        matmul(rows, w_value, out=flat[1])
    else:
        matmul(rows, weights, out=flat)
    a, b = each(ab)
    y = matmul(as_rows(_geglu(a, b, dropped)), w_out)
    return y.reshape(*x.shape[:-1], -1), GatedCache(x, w_gate, w_value, w_out, a, b, dropped)


def geglu_ffn_backward(dy, cache):
    """Twin of layers.geglu_ffn_backward."""
    return new_gradients(add_geglu_ffn, dy, cache, (cache.w_gate, cache.w_value, cache.w_out))


def add_geglu_ffn(dy, cache, out, add, dx=None):
    x, w_gate, w_value, w_out, a, b, dropped = cache
    rows, dy = as_rows(x), contiguous(as_rows(dy))
    h = array_module(a).empty(a.shape, a.dtype)
    d = _geglu_backward(matmul(dy, w_out.T), a, b, h, dropped).reshape(2, rows.shape[0], -1)
    add_product(as_rows(h), dy, out[2], add)
    both = stacked(*out[:2])
    if both is None:
        add_product(rows, d[0], out[0], add)
        add_product(rows, d[1], out[1], add)
    else:
        add_product(rows, d, both, add)
    if dx is None:
        dx = array_module(x).empty(x.shape, x.dtype)
        matmul(d[0], w_gate.T, out=as_rows(dx))
    else:
        matmul(d[0], w_gate.T, out=as_rows(dx), beta=1)
    matmul(d[1], w_value.T, out=as_rows(dx), beta=1)
    return dx
