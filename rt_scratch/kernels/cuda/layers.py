"""Linear layers, LayerNorm and residuals."""

from __future__ import annotations

from rt_scratch.dispatch import array_module
from rt_scratch.kernels.cuda.arrays import as_float32, as_rows, contiguous, each
from rt_scratch.kernels.cuda.dropout import drop, dropout
from rt_scratch.kernels.cuda.sizes import THREADS, WARPS, n_blocks
from rt_scratch.kernels.cuda.sums import add_product, column_sum, column_sums, new_gradients
from rt_scratch.kernels.gemm import matmul
from rt_scratch.kernels.launch import launch
from rt_scratch.layers import EPSILON, LayerNormCache, LinearCache, NormalizeCache, ResidualCache

# ------------------------------------------------------------------------------------- linear

def linear(x, w, b=None, scale=1.0):
    """Twin of layers.linear."""
    y = matmul(as_rows(x), w, alpha=scale)
    if b is not None:
        add_bias(y, b)
    return y.reshape(*x.shape[:-1], w.shape[1]), LinearCache(x, w, b is not None, scale)


def linear_backward(dy, cache):
    """Twin of layers.linear_backward; gradients of w and b are summed, and left, in float32."""
    bias = (dy[(0,) * (dy.ndim - 1)],) if cache.biased else ()
    dx, dw, *db = new_gradients(add_linear, dy, cache, (cache.w, *bias))
    return dx, dw, (db[0] if db else None)


def add_linear(dy, cache, out, add, dx=None):
    x, w, biased, scale = cache
    rows = contiguous(as_rows(dy))
    add_product(as_rows(x), rows, out[0], add, scale)
    if biased:
        column_sum(rows, out[1:], add)
    if dx is None:
        return matmul(rows, w.T, alpha=scale).reshape(x.shape)
    matmul(rows, w.T, out=as_rows(dx), alpha=scale, beta=1)
    return dx


def add_bias(y, b, relu=False, dropped=None):
    """In place: y + b, or dropout(max(y + b, 0)).  y (N, C)."""
    launch("add_bias", (n_blocks(y.size, 8 * THREADS),), (THREADS,), y, as_float32(b), y.size,
           y.shape[-1], relu, *drop(dropped, y.shape, array_module(y)))


# ---------------------------------------------------------------------------------- LayerNorm

def normalize(x):
    """Twin of layers.normalize; x (B, H, T, D) may be strided except along its last axis."""
    y, x, mean, rstd = _layer_norm(x, None, None)
    return y, NormalizeCache(x, mean, rstd)


def layer_norm(x, gain, bias):
    """Twin of layers.layer_norm."""
    y, x, mean, rstd = _layer_norm(x, as_float32(gain), as_float32(bias))
    return y, LayerNormCache(x, gain, mean, rstd)


def _layer_norm(x, gain, bias):
    xp, (x, where) = array_module(x), _heads(x)
    rows, width = x.size // x.shape[-1], x.shape[-1]
    y = xp.empty(x.shape, x.dtype)
    mean, rstd = each(xp.empty((2, *x.shape[:-1], 1), xp.float32))
    launch("layer_norm", (n_blocks(rows, WARPS),), (THREADS,), x, gain, bias, y, mean, rstd, rows,
           width, EPSILON, *where)
    return y, x, mean, rstd


def _heads(x):
    """x, copied if it must be, and (heads, tokens, strides in entries) of its rows."""
    if x.ndim != 4 or x.strides[-1] != x.itemsize:
        x = contiguous(x)
    if x.flags.c_contiguous:
        return x, (1, max(1, x.size // x.shape[-1]), 0, 0, x.shape[-1])
    return x, (*x.shape[1:3], *(stride // x.itemsize for stride in x.strides[:-1]))


def normalize_backward(dn, cache):
    """Twin of layers.normalize_backward."""
    return _layer_norm_dx(contiguous(dn), cache.x, None, cache.mean, cache.rstd)[0]


def layer_norm_backward(dy, cache):
    """Twin of layers.layer_norm_backward; gradients of gain and bias are left in float32."""
    return new_gradients(add_layer_norm, dy, cache, (cache.gain, cache.gain))


def add_layer_norm(dy, cache, out, add, dx=None):
    return _add_norm(contiguous(dy), cache, out, add, dx)[0]


def _add_norm(dy, cache, out, add, dx=None, dropped=None):
    """dx and df of a LayerNorm; see `_layer_norm_dx`."""
    x, gain, mean, rstd = cache
    width = x.shape[-1]
    column_sums("layer_norm_backward_columns", (dy, x, mean, rstd), x.size // width, width, out,
                add)
    return _layer_norm_dx(dy, x, as_float32(gain), mean, rstd, dx, dropped)


def _layer_norm_dx(dy, x, gain, mean, rstd, dx=None, dropped=None):
    """dx, added to the one given if any, and df, dx after dropout."""
    xp, (x, where), width = array_module(x), _heads(x), x.shape[-1]
    add, dx = dx is not None, xp.empty(x.shape, x.dtype) if dx is None else dx
    df = xp.empty(x.shape, x.dtype) if dropped else None
    rows = x.size // width
    launch("layer_norm_backward", (n_blocks(rows, WARPS),), (THREADS,), dy, x, gain, mean, rstd, dx,
           df, rows, width, add, *where, *drop(dropped, x.shape, xp))
    return dx, (df if dropped else dx)


def residual(x, f, dropped, gain=None, bias=None):
    """Twin of layers.residual: dropout, sum and LayerNorm in one kernel."""
    xp, x, f = array_module(x), contiguous(x), contiguous(f)
    rows, width = x.size // x.shape[-1], x.shape[-1]
    dropped = dropped if dropped and dropped.rate else None
    total, y, mean, rstd = xp.empty(x.shape, x.dtype), None, None, None
    if gain is not None:
        y = xp.empty(x.shape, x.dtype)
        mean, rstd = each(xp.empty((2, *x.shape[:-1], 1), xp.float32))
    launch("residual", (n_blocks(rows, WARPS),), (THREADS,), x, f, as_float32(gain),
           as_float32(bias), total, y, mean, rstd, rows, width, EPSILON,
           *drop(dropped, x.shape, xp))
    if gain is None:
        return total, ResidualCache(dropped, None)
    return y, ResidualCache(dropped, LayerNormCache(total, gain, mean, rstd))


def residual_backward(dy, cache):
    """Twin of layers.residual_backward."""
    return new_gradients(add_residual, dy, cache,
                         () if cache.norm is None else (cache.norm.gain,) * 2)


def add_residual(dy, cache, out, add, dx=None):
    if cache.norm is None:
        return dy, dropout(dy, cache.dropped)[0]
    return _add_norm(contiguous(dy), cache.norm, out, add, None, cache.dropped)
