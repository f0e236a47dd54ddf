"""The layers that every Transformer has, each a forward and a backward written side by side.

    y, cache = f(x, w, ...)          dx, dw, ... = f_backward(dy, cache)

A backward returns one gradient per differentiable argument, in argument order; `dy` is the gradient
of the loss with respect to y. Caches are read-only NamedTuples of inputs and row statistics; wide
arrays are computed again rather than stored where that is cheap. `@accelerated` marks a function
that may have a faster version in kernels/, its twin (dispatch.py): what stands here defines it, and
`f.reference` calls this body where a twin is in use.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from typing import NamedTuple

from rt_scratch.dispatch import accelerated, array_module
from rt_scratch.dropout import dropout, dropout_backward
from rt_scratch.threads import tiles

EPSILON = 1e-6  # of LayerNorm; the released code's value


@accelerated
def add_gradients(backward, dy, cache, buffers, dx=None):
    """Run backward(dy, cache), add the gradients of the parameters to `buffers`, return the first.

    The first is that of the input, a tuple where there are several inputs. buffers: an array per
    parameter, in the order of the gradients. With `dx` the input's gradient is added to it, in
    place, and dx returned: an input that is used twice has the sum of two gradients.
    On a GPU, matrix products add to what is there, so that the twin writes no gradient twice.
    """
    own, *gradients = backward(dy, cache)
    gradients = [gradient for gradient in gradients if gradient is not None]
    for buffer, gradient in zip(buffers, gradients, strict=True):
        buffer += gradient
    if dx is None:
        return own
    dx += own
    return dx


# ------------------------------------------------------------------------------------- linear

LinearCache = namedtuple("LinearCache", "x w biased scale", defaults=(1.0,))


@accelerated
def linear(x, w, b=None, scale=1.0):
    """y = scale x w + b.  x (..., I), w (I, O), b (O,) or None -> (..., O).

    docs/derivations.md (2).
    """
    y = (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])
    if scale != 1:
        y *= scale
    if b is not None:
        y += b
    return y, LinearCache(x, w, b is not None, scale)


@accelerated
def linear_backward(dy, cache):
    """dx = dy w^T,  dw = x^T dy,  db = sum of dy over rows, None where there was no bias.

    With a scale, dx and dw are those for scale dy. docs/derivations.md (3).
    """
    x, w, biased, scale = cache
    rows = dy.reshape(-1, dy.shape[-1])  # (N, O)
    db = rows.sum(0) if biased else None
    if scale != 1:
        rows = rows * scale
    dx = (rows @ w.T).reshape(x.shape)
    dw = x.reshape(-1, x.shape[-1]).T @ rows
    return dx, dw, db


# ---------------------------------------------------------------------------------- LayerNorm

NormalizeCache = namedtuple("NormalizeCache", "x mean rstd")


LayerNormCache = namedtuple("LayerNormCache", "x gain mean rstd")


@accelerated
def normalize(x):
    """n = (x - mean) / sqrt(variance + 1e-6) over the last axis: LayerNorm without parameters.

    Routing heads apply it to queries and keys (..., D), so that all have the length sqrt(D).
    Cache: x and the row statistics mean and rstd = 1 / sqrt(variance + 1e-6), each (..., 1).
    docs/derivations.md (9).
    """
    xp = array_module(x)
    mean = x.mean(-1, keepdims=True)  # (..., 1)
    centred = x - mean
    rstd = 1 / xp.sqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
    return centred * rstd, NormalizeCache(x, mean, rstd)


@accelerated
def normalize_backward(dn, cache):
    """dx = rstd (dn - mean(dn) - n mean(dn n)). docs/derivations.md (12), (13)."""
    x, mean, rstd = cache
    n = (x - mean) * rstd
    return rstd * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))


@accelerated
def layer_norm(x, gain, bias):
    """y = n gain + bias with n = normalize(x).  x (..., C), gain and bias (C,).

    Ba, Kiros, Hinton 2016. docs/derivations.md (9), (10).
    """
    n, (_, mean, rstd) = normalize.reference(x)
    return n * gain + bias, LayerNormCache(x, gain, mean, rstd)


@accelerated
def layer_norm_backward(dy, cache):
    """dgain = sum dy n,  dbias = sum dy,  dx = normalize_backward(dy gain).

    docs/derivations.md (11), (13).
    """
    x, gain, mean, rstd = cache
    rows = tuple(range(dy.ndim - 1))  # every axis but the last
    n = (x - mean) * rstd
    dx = normalize_backward.reference(dy * gain, NormalizeCache(x, mean, rstd))
    return dx, (dy * n).sum(rows), dy.sum(rows)


# ----------------------------------------------------------------------------------- residual

ResidualCache = namedtuple("ResidualCache", "dropped norm")


@accelerated
def residual(x, f, dropped, gain=None, bias=None):
    """y = x + dropout(f), the end of a sublayer f;  post-norm: y = layer_norm(x + dropout(f)).

    x, f (..., C); with gain and bias (C,) the sum is normalised. docs/derivations.md (53).
    """
    f, dropped = dropout(f, dropped)
    y, norm = x + f, None
    if gain is not None:
        y, norm = layer_norm(y, gain, bias)
    return y, ResidualCache(dropped, norm)


@accelerated
def residual_backward(dy, cache):
    """(dx, df), after a LayerNorm dgain, dbias:  dx = dy or LN^T dy,  df = dx keep / (1 - rate).

    Without a LayerNorm dx is dy, without dropout df is dx. docs/derivations.md (8), (54).
    """
    dx, gradients = dy, ()
    if cache.norm is not None:
        dx, *gradients = layer_norm_backward(dy, cache.norm)
    return (dx, dropout_backward(dx, cache.dropped)), *gradients


# ------------------------------------------------------------------------------- feed-forward

GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715


GateCache = namedtuple("GateCache", "a b")


@accelerated
def geglu(a, b):
    """y = gelu(a) b,  gelu(a) = a (1 + tanh u) / 2,  u = sqrt(2/pi) (a + 0.044715 a^3).

    Shazeer 2020, with the tanh form of GELU as in the released code. docs/derivations.md (15).
    """
    xp = array_module(a)
    t = xp.tanh(GELU_SCALE * a * (1 + GELU_CUBE * a * a))
    return 0.5 * a * (1 + t) * b, GateCache(a, b)


@accelerated
def geglu_backward(dy, cache):
    """da = dy b gelu'(a),  db = dy gelu(a),  gelu' = (1 + t)/2 + a (1 - t^2) u' / 2.

    docs/derivations.md (16), (17).
    """
    a, b = cache
    xp = array_module(a)
    t = xp.tanh(GELU_SCALE * a * (1 + GELU_CUBE * a * a))
    du = GELU_SCALE * (1 + 3 * GELU_CUBE * a * a)
    da = dy * b * (0.5 * (1 + t) + 0.5 * a * (1 - t * t) * du)
    return da, dy * (0.5 * a * (1 + t))


def swiglu(a, b):
    """y = silu(a) b,  silu(a) = a s,  s = 1 / (1 + exp(-a)) = (1 + tanh(a / 2)) / 2.

    Shazeer 2020. The tanh form does not overflow. docs/derivations.md (19).
    """
    s = _sigmoid(a)
    return a * s * b, GateCache(a, b)


def swiglu_backward(dy, cache):
    """da = dy b silu'(a),  db = dy silu(a),  silu' = s (1 + a (1 - s)).

    docs/derivations.md (17), (19).
    """
    a, b = cache
    s = _sigmoid(a)
    return dy * b * s * (1 + a * (1 - s)), dy * (a * s)


def _sigmoid(a):
    """In the dtype of a: CuPy's product of bfloat16 and a Python number is float32."""
    return (0.5 * (1 + array_module(a).tanh(0.5 * a))).astype(a.dtype, copy=False)


GatedCache = namedtuple("GatedCache", "x w_gate w_value w_out a b dropped")


@accelerated
def geglu_ffn(x, w_gate, w_value, w_out, dropped=None):
    """y = dropout(gelu(x w_gate) * (x w_value)) w_out: no biases.

    x (..., C), w_gate and w_value (C, M), w_out (M, C). Shazeer 2020. docs/derivations.md (14).
    """
    return _gated(geglu, x, w_gate, w_value, w_out, dropped)


@accelerated
def geglu_ffn_backward(dy, cache):
    """Gradients of x, w_gate, w_value, w_out. docs/derivations.md (18)."""
    return _gated_backward(geglu, geglu_backward, dy, cache)


def swiglu_ffn(x, w_gate, w_value, w_out, dropped=None):
    """y = dropout(silu(x w_gate) * (x w_value)) w_out: no biases.

    x (..., C), w_gate and w_value (C, M), w_out (M, C). Shazeer 2020.
    docs/derivations.md (14), (19).
    """
    return _gated(swiglu, x, w_gate, w_value, w_out, dropped)


def swiglu_ffn_backward(dy, cache):
    """Gradients of x, w_gate, w_value, w_out. docs/derivations.md (18)."""
    return _gated_backward(swiglu, swiglu_backward, dy, cache)


def _gated(gate, x, w_gate, w_value, w_out, dropped):
    """The cache holds x and its two products; the hidden layer is computed again."""
    a, _ = linear(x, w_gate)                                         # (..., M)
    b, _ = linear(x, w_value)
    h, _ = gate(a, b)
    h, _ = dropout(h, dropped)
    y, _ = linear(h, w_out)
    return y, GatedCache(x, w_gate, w_value, w_out, a, b, dropped)


def _gated_backward(gate, gate_backward, dy, cache):
    x, w_gate, w_value, w_out, a, b, dropped = cache
    h, _ = gate(a, b)
    h, _ = dropout(h, dropped)
    dh, dw_out, _ = linear_backward(dy, LinearCache(h, w_out, False))
    dh = dropout_backward(dh, dropped)
    da, db = gate_backward(dh, GateCache(a, b))
    dx_a, dw_gate, _ = linear_backward(da, LinearCache(x, w_gate, False))
    dx_b, dw_value, _ = linear_backward(db, LinearCache(x, w_value, False))
    return dx_a + dx_b, dw_gate, dw_value, dw_out


ReluCache = namedtuple("ReluCache", "hidden dropped out")


@accelerated
def relu_ffn(x, w_in, b_in, w_out, b_out, dropped=None):
    """y = dropout(max(x w_in + b_in, 0)) w_out + b_out.  x (..., C), w_in (C, M), w_out (M, C).

    b_in (M,), b_out (C,). Vaswani et al. 2017. docs/derivations.md (20).
    """
    h, hidden = linear(x, w_in, b_in)
    h, dropped = dropout(array_module(x).maximum(h, 0), dropped)
    y, out = linear(h, w_out, b_out)
    return y, ReluCache(hidden, dropped, out)


@accelerated
def relu_ffn_backward(dy, cache):
    """Gradients of x, w_in, b_in, w_out, b_out. docs/derivations.md (20)."""
    dh, dw_out, db_out = linear_backward(dy, cache.out)
    positive = cache.out.x > 0  # after dropout: where that gave 0, dh is 0 as well
    dh = dropout_backward(dh, cache.dropped) * positive
    dx, dw_in, db_in = linear_backward(dh, cache.hidden)
    return dx, dw_in, db_in, dw_out, db_out


class FeedForward(NamedTuple):
    """A feed-forward layer: forward(x, **parameters, dropped), and the parameters' shapes."""

    forward: Callable
    backward: Callable                              # gradients of x and of the parameters, in order
    parameters: Callable[[int, int], dict[str, tuple]]  # (C, M) -> {name: shape}, in order


def _gated_parameters(c, m):
    return {"w_gate": (c, m), "w_value": (c, m), "w_out": (m, c)}


def _relu_parameters(c, m):
    return {"w_in": (c, m), "b_in": (m,), "w_out": (m, c), "b_out": (c,)}


FEED_FORWARDS = {
    "geglu": FeedForward(geglu_ffn, geglu_ffn_backward, _gated_parameters),
    "swiglu": FeedForward(swiglu_ffn, swiglu_ffn_backward, _gated_parameters),
    "relu": FeedForward(relu_ffn, relu_ffn_backward, _relu_parameters),
}


# --------------------------------------------------------------------------------- embeddings

@accelerated
def segment_sum(rows, index, n: int):
    """out[i] = sum of rows[j] over index[j] == i.  rows (N, D), index (N,) -> (n, D).

    Sorts the index and sums runs, so that the order of addition, and with it every bit of the
    result, is the same on every run (a scatter with atomic additions is not).
    docs/derivations.md (5).
    """
    xp = array_module(rows)
    order = xp.argsort(index, kind="stable")
    index = index[order]
    starts = xp.append(0, xp.flatnonzero(index[1:] != index[:-1]) + 1)  # of runs of one number
    out = xp.zeros((n, rows.shape[1]), rows.dtype)
    out[index[starts]] = xp.add.reduceat(rows[order], starts, axis=0)
    return out


def shift_right(x):
    """Position t gets what x (B, T, ...) has at t - 1, position 0 gets 0.

    Of ids, 0 is an ordinary row of the table. Released code: right_shift_blockwise_nd, which shifts
    the whole sequence by one.
    """
    xp = array_module(x)
    return xp.concatenate([xp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def shift_right_backward(dx):
    """Position t gets what dx has at t + 1, the last gets 0.  docs/derivations.md (72)."""
    xp = array_module(dx)
    return xp.concatenate([dx[:, 1:], xp.zeros_like(dx[:, :1])], axis=1)


def recent(ids, n: int, before=None):
    """ids (B, T) -> (B, T, n): entry j of position t is id t - j, for a convolution over n tokens.

    before (B, n - 1): the ids before the first; without them id 0, as in `shift_right`.
    """
    xp, t = array_module(ids), ids.shape[1]
    if before is None:
        before = xp.zeros((len(ids), n - 1), ids.dtype)
    both = xp.concatenate([before, ids], axis=1)                     # (B, n - 1 + T)
    return xp.stack([both[:, n - 1 - j : n - 1 - j + t] for j in range(n)], axis=-1)


def ngram(ids, base: int, rows: int):
    """(..., n) -> (...): a row of a table of `rows` for every n-gram, sum_j ids_j base^j mod rows.

    If `rows` is a prime number, n-grams that share a row do so by accident: `base` and its powers
    should have no divisor in common with it.
    """
    digits = ids.astype("int64")
    return sum(digits[..., j] * pow(base, j, rows) for j in range(ids.shape[-1])) % rows


EmbeddingCache = namedtuple("EmbeddingCache", "ids table")


def embedding(ids, table):
    """y = table[ids].  ids (...) integers, table (V, E) -> (..., E). docs/derivations.md (4)."""
    return table[ids], EmbeddingCache(ids, table)


def embedding_backward(dy, cache):
    """dtable[v] = sum of dy over the positions where ids == v. docs/derivations.md (5)."""
    ids, table = cache
    return segment_sum(dy.reshape(-1, dy.shape[-1]), ids.reshape(-1), table.shape[0])


def timing_signal(xp, n_positions: int, width: int, dtype, start: int = 0):
    """Sinusoids (n_positions, width): sin and cos of position / 10000^(i / (n - 1)), n = width//2.

    All sines, then all cosines (tensor2tensor), unlike the interleaved form of Vaswani et al.; an
    odd last column is 0.
    """
    n = width // 2
    step = math.log(10000) / max(n - 1, 1)
    wide = xp.promote_types(dtype, "float32")  # half precision cannot count to 8192
    rates = xp.exp(-step * xp.arange(n, dtype=wide))
    angles = xp.arange(start, start + n_positions, dtype=wide)[:, None] * rates  # (T, n)
    parts = [xp.sin(angles), xp.cos(angles), xp.zeros((n_positions, width - 2 * n), wide)]
    return xp.concatenate(parts, axis=1).astype(dtype, copy=False)


ImageEmbeddingCache = namedtuple("ImageEmbeddingCache", "index row column table rows columns")


def image_embedding(ids, start, table, rows, columns):
    """y_t = sqrt(C) table[256 c + ids_t] + sqrt(3 C) (rows[r] + columns[s])_c.

    Position t of the row-major list of R, G, B values belongs to row r, column s and channel c. The
    channel is that of position t, not of the value, which comes from the position before.
    ids (B, T) for positions start .. start + T - 1, table (3 x 256, C), rows (P, 1, 3 C), columns
    (1, P, 3 C), P the pixels per side. Released code: get_channel_embeddings,
    add_positional_embedding_nd. docs/derivations.md (6).
    """
    xp = array_module(table)
    width, side = table.shape[1], rows.shape[0]
    t = start + xp.arange(ids.shape[1])
    pixel, channel = t // 3, t % 3
    index = ids + 256 * channel  # (B, T)
    row, column = pixel // side * 3 + channel, pixel % side * 3 + channel  # (T,)
    position = rows.reshape(-1, width)[row] + columns.reshape(-1, width)[column]  # (T, C)
    y = math.sqrt(width) * table[index] + math.sqrt(3 * width) * position
    return (y.astype(table.dtype, copy=False),
            ImageEmbeddingCache(index, row, column, table, rows, columns))


def image_embedding_backward(dy, cache):
    """Gradients of table, rows, columns. docs/derivations.md (7)."""
    index, row, column, table, rows, columns = cache
    width = table.shape[1]
    dtable = segment_sum(dy.reshape(-1, width), index.reshape(-1), table.shape[0])
    dposition = math.sqrt(3 * width) * dy.sum(0)  # (T, C)
    drows = segment_sum(dposition, row, rows.size // width)
    dcolumns = segment_sum(dposition, column, columns.size // width)
    return math.sqrt(width) * dtable, drows.reshape(rows.shape), dcolumns.reshape(columns.shape)


# -------------------------------------------------------------------- output layer and loss

CHUNK_ENTRIES = 1 << 22  # logits alive at a time: rows are taken so that rows x V stays below


CrossEntropyCache = namedtuple("CrossEntropyCache", "x w b targets weights lse")


@accelerated
def linear_cross_entropy(x, w, b, targets, weights):
    """loss = sum_i weights_i (logsumexp(z_i) - z_i[targets_i]),  z = x w + b.

    x (N, C), w (C, V), b (V,), targets (N,) integers, weights (N,) -> loss, a 0-d array in nats.
    Mean cross-entropy has weights 1 / N; a weight of 0 leaves a row out. The (N, V) logits exist
    only a chunk of rows at a time; the cache holds the inputs and lse (N,), the log-sum-exp of each
    row, from which the backward computes the softmax again. docs/derivations.md (23).
    """
    xp = array_module(x)
    loss = xp.zeros((), x.dtype)
    lse = xp.empty(x.shape[0], x.dtype)
    for rows in tiles(x.shape[0], CHUNK_ENTRIES // w.shape[1]):
        z = x[rows] @ w
        z += b
        top = z.max(-1)
        lse[rows] = top + xp.log(xp.exp(z - top[:, None]).sum(-1))
        hit = z[xp.arange(z.shape[0]), targets[rows]]
        loss = loss + (weights[rows] * (lse[rows] - hit)).sum()
    return loss, CrossEntropyCache(x, w, b, targets, weights, lse)


@accelerated
def linear_cross_entropy_backward(dloss, cache):
    """dz = dloss weights (softmax(z) - onehot(targets)); then dx, dw, db as in `linear`.

    docs/derivations.md (24), (25).
    """
    x, w, b, targets, weights, lse = cache
    xp = array_module(x)
    dx, dw, db = xp.empty_like(x), xp.zeros(w.shape, w.dtype), xp.zeros_like(b)
    for rows in tiles(x.shape[0], CHUNK_ENTRIES // w.shape[1]):
        z = x[rows] @ w
        z += b
        z -= lse[rows, None]
        dz = xp.exp(z, out=z)  # softmax
        dz[xp.arange(dz.shape[0]), targets[rows]] -= 1
        dz *= (dloss * weights[rows])[:, None]
        dx[rows] = dz @ w.T
        dw += x[rows].T @ dz
        db += dz.sum(0)
    return dx, dw, db
