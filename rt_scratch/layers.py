"""The layers that every Transformer has, each a forward and a backward written side by side.

    y, cache = f(x, w, ...)          dx, dw, ... = f_backward(dy, cache)

A backward returns one gradient per differentiable argument, in argument order. `dy` is the gradient
of the loss with respect to y. Caches are read-only: inputs and row statistics; wide arrays are
computed again rather than stored where that is cheap.
"""

from __future__ import annotations

import math

from rt_scratch.backend import accelerated, array_module, segment_sum

EPSILON = 1e-6  # of LayerNorm; the released code's value


# ------------------------------------------------------------------------------------- linear

@accelerated
def linear(x, w, b=None):
    """y = x w + b.  x (..., I), w (I, O), b (O,) or None -> (..., O)."""
    y = (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])
    if b is not None:
        y += b
    return y, (x, w, b is not None)


@accelerated
def linear_backward(dy, cache):
    """dx = dy w^T,  dw = x^T dy,  db = sum of dy over rows, None where there was no bias."""
    x, w, biased = cache
    rows = dy.reshape(-1, dy.shape[-1])  # (N, O)
    dx = (rows @ w.T).reshape(x.shape)
    dw = x.reshape(-1, x.shape[-1]).T @ rows
    return dx, dw, rows.sum(0) if biased else None


# ---------------------------------------------------------------------------------- LayerNorm

@accelerated
def normalize(x):
    """n = (x - mean) / sqrt(variance + 1e-6) over the last axis: LayerNorm without parameters.

    Routing heads apply it to queries and keys, so that q . mu compares directions.
    Cache: x and the row statistics.
    """
    xp = array_module(x)
    mean = x.mean(-1, keepdims=True)  # (..., 1)
    centred = x - mean
    rstd = 1 / xp.sqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
    return centred * rstd, (x, mean, rstd)


@accelerated
def normalize_backward(dn, cache):
    """dx = rstd (dn - mean(dn) - n mean(dn n))."""
    x, mean, rstd = cache
    n = (x - mean) * rstd
    return rstd * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))


@accelerated
def layer_norm(x, gain, bias):
    """y = n gain + bias with n = normalize(x).  x (..., C), gain and bias (C,).

    Ba, Kiros, Hinton 2016. Cache: x, gain and the row statistics.
    """
    n, (_, mean, rstd) = normalize.reference(x)
    return n * gain + bias, (x, gain, mean, rstd)


@accelerated
def layer_norm_backward(dy, cache):
    """dgain = sum dy n,  dbias = sum dy,  dx = normalize_backward(dy gain)."""
    x, gain, mean, rstd = cache
    rows = tuple(range(dy.ndim - 1))  # every axis but the last
    n = (x - mean) * rstd
    dx = normalize_backward.reference(dy * gain, (x, mean, rstd))
    return dx, (dy * n).sum(rows), dy.sum(rows)


# ------------------------------------------------------------------------------- feed-forward

GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715


@accelerated
def geglu(a, b):
    """y = gelu(a) b,  gelu(a) = a (1 + tanh u) / 2,  u = sqrt(2/pi) (a + 0.044715 a^3).

    Shazeer 2020, with the tanh form of GELU as in the released code. Cache: a and b.
    """
    xp = array_module(a)
    t = xp.tanh(GELU_SCALE * a * (1 + GELU_CUBE * a * a))
    return 0.5 * a * (1 + t) * b, (a, b)


@accelerated
def geglu_backward(dy, cache):
    """da = dy b gelu'(a),  db = dy gelu(a),  gelu' = (1 + t)/2 + a (1 - t^2) u' / 2."""
    a, b = cache
    xp = array_module(a)
    t = xp.tanh(GELU_SCALE * a * (1 + GELU_CUBE * a * a))
    du = GELU_SCALE * (1 + 3 * GELU_CUBE * a * a)
    da = dy * b * (0.5 * (1 + t) + 0.5 * a * (1 - t * t) * du)
    return da, dy * (0.5 * a * (1 + t))


@accelerated
def geglu_ffn(x, w_gate, w_value, w_out, dropped=None):
    """y = dropout(gelu(x w_gate) * (x w_value)) w_out: no biases.  x (..., C), (C, M), (M, C).

    The cache holds x and its two products; the hidden layer is computed again.
    """
    a, _ = linear(x, w_gate)  # (..., M)
    b, _ = linear(x, w_value)
    h, _ = geglu(a, b)
    h, _ = dropout(h, dropped)
    y, _ = linear(h, w_out)
    return y, (x, w_gate, w_value, w_out, a, b, dropped)


@accelerated
def geglu_ffn_backward(dy, cache):
    """Gradients of x, w_gate, w_value, w_out."""
    x, w_gate, w_value, w_out, a, b, dropped = cache
    h, _ = geglu(a, b)
    h, _ = dropout(h, dropped)
    dh, dw_out, _ = linear_backward(dy, (h, w_out, False))
    dh = dropout_backward(dh, dropped)
    da, db = geglu_backward(dh, (a, b))
    dx_a, dw_gate, _ = linear_backward(da, (x, w_gate, False))
    dx_b, dw_value, _ = linear_backward(db, (x, w_value, False))
    return dx_a + dx_b, dw_gate, dw_value, dw_out


def relu_ffn(x, w_in, b_in, w_out, b_out, dropped=None):
    """y = dropout(max(x w_in + b_in, 0)) w_out + b_out.  x (..., C), w_in (C, M), w_out (M, C)."""
    h, cache_h = linear(x, w_in, b_in)
    xp = array_module(x)
    h = xp.maximum(h, 0)
    d, cache_d = dropout(h, dropped)
    y, cache_y = linear(d, w_out, b_out)
    return y, (cache_h, h > 0, cache_d, cache_y)


def relu_ffn_backward(dy, cache):
    """Gradients of x, w_in, b_in, w_out, b_out."""
    cache_h, positive, cache_d, cache_y = cache
    dh, dw_out, db_out = linear_backward(dy, cache_y)
    dh = dropout_backward(dh, cache_d) * positive
    dx, dw_in, db_in = linear_backward(dh, cache_h)
    return dx, dw_in, db_in, dw_out, db_out


# --------------------------------------------------------------------------------- embeddings

def shift_right(ids):
    """Position t sees id t - 1; position 0 sees id 0, an ordinary row of the table.

    ids (B, T). Released code: right_shift_blockwise_nd, which shifts the whole sequence by one.
    """
    xp = array_module(ids)
    return xp.concatenate([xp.zeros_like(ids[:, :1]), ids[:, :-1]], axis=1)


def embedding(ids, table):
    """y = table[ids].  ids (...) integers, table (V, E) -> (..., E)."""
    return table[ids], (ids, table)


def embedding_backward(dy, cache):
    """dtable[v] = sum of dy over the places where ids == v."""
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


def image_embedding(ids, start, table, rows, columns):
    """y_t = sqrt(C) table[256 c + ids_t] + sqrt(3 C) (rows[r] + columns[s])_c.

    Place t of the row-major list of R, G, B values belongs to row r, column s and channel c. The
    channel is that of the place, not of the value, which was shifted in from the place before.
    ids (B, T) for places start .. start + T - 1, table (3 x 256, C), rows (P, 1, 3 C), columns
    (1, P, 3 C), P the pixels per side. Released code: get_channel_embeddings,
    add_positional_embedding_nd.
    """
    xp = array_module(table)
    width, side = table.shape[1], rows.shape[0]
    place = start + xp.arange(ids.shape[1])
    pixel, channel = place // 3, place % 3
    index = ids + 256 * channel  # (B, T)
    row, column = pixel // side * 3 + channel, pixel % side * 3 + channel  # (T,)
    position = rows.reshape(-1, width)[row] + columns.reshape(-1, width)[column]  # (T, C)
    y = math.sqrt(width) * table[index] + math.sqrt(3 * width) * position
    return y.astype(table.dtype, copy=False), (index, row, column, table, rows, columns)


def image_embedding_backward(dy, cache):
    """Gradients of table, rows, columns."""
    index, row, column, table, rows, columns = cache
    width = table.shape[1]
    dtable = segment_sum(dy.reshape(-1, width), index.reshape(-1), table.shape[0])
    dposition = math.sqrt(3 * width) * dy.sum(0)  # (T, C)
    drows = segment_sum(dposition, row, rows.size // width)
    dcolumns = segment_sum(dposition, column, columns.size // width)
    return math.sqrt(width) * dtable, drows.reshape(rows.shape), dcolumns.reshape(columns.shape)


# ------------------------------------------------------------------------------------ dropout

@accelerated
def dropout(x, dropped):
    """y = x keep / (1 - rate), keep drawn by `dropout_mask`.

    `dropped` is (rate, key) or None for no dropout. The cache is `dropped` itself: the backward
    draws the same mask again, so no mask is stored.
    """
    if dropped is None or not dropped[0]:
        return x, None
    return x * dropout_mask(array_module(x), x.shape, *dropped, x.dtype), dropped


def dropout_backward(dy, cache):
    """dx = dy keep / (1 - rate)."""
    return dropout(dy, cache)[0]


def dropout_mask(xp, shape, rate: float, key: tuple[int, int, int], dtype, start: int = 0):
    """Array of 0 and 1 / (1 - rate): entry i depends only on (key, start + i).

    key = (seed, stream, step). Philox4x32-10 (Salmon et al. 2011) with key (seed, 0) and counter
    (i // 8, 0, stream, step) gives eight numbers of 16 bits; entry i is kept when number i % 8 is
    at least rate x 65536. The rate is rounded to a multiple of 1 / 65536.
    """
    n = math.prod(shape)
    first, last = start // 8, (start + n + 7) // 8
    halves = philox(xp, key[0], xp.arange(first, last, dtype=xp.uint32), key[1], key[2])
    threshold = round(rate * 65536)
    keep = halves.reshape(-1)[start - 8 * first : start - 8 * first + n] >= threshold
    return keep.astype(dtype).reshape(shape) * (65536 / (65536 - threshold))


def philox(xp, seed: int, index, stream: int, step: int):
    """Philox4x32-10: (n,) uint32 counters -> (n, 8) uint16 random numbers."""
    mask = 0xFFFFFFFF
    c0, c1 = index.astype(xp.uint64), xp.zeros_like(index, dtype=xp.uint64)
    c2, c3 = xp.full_like(c0, stream & mask), xp.full_like(c0, step & mask)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 32 x 32 -> 64 bits
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    words = xp.stack([c0, c1, c2, c3], axis=1).astype(xp.uint32)  # (n, 4)
    return xp.stack([words & 0xFFFF, words >> 16], axis=2).reshape(-1, 8)


# -------------------------------------------------------------------- output layer and loss

CHUNK_ENTRIES = 1 << 22  # logits alive at a time: rows are taken so that rows x V stays below


@accelerated
def linear_cross_entropy(x, w, b, targets, weights):
    """loss = sum_i weights_i (logsumexp(z_i) - z_i[targets_i]),  z = x w + b.

    x (N, C), w (C, V), b (V,), targets (N,) integers, weights (N,) -> loss, a 0-d array in nats.
    Mean cross-entropy has weights 1 / N; a weight of 0 leaves a row out. The (N, V) logits exist
    only a chunk of rows at a time; the cache holds the inputs and the row statistic, and the
    backward computes the logits again.
    """
    xp = array_module(x)
    loss = xp.zeros((), x.dtype)
    lse = xp.empty(x.shape[0], x.dtype)
    for rows in _chunks(x.shape[0], w.shape[1]):
        z = x[rows] @ w
        z += b
        top = z.max(-1)
        lse[rows] = top + xp.log(xp.exp(z - top[:, None]).sum(-1))
        hit = z[xp.arange(z.shape[0]), targets[rows]]
        loss = loss + (weights[rows] * (lse[rows] - hit)).sum()
    return loss, (x, w, b, targets, weights, lse)


@accelerated
def linear_cross_entropy_backward(dloss, cache):
    """dz = dloss weights (softmax(z) - onehot(targets)); then dx, dw, db as in `linear`."""
    x, w, b, targets, weights, lse = cache
    xp = array_module(x)
    dx, dw, db = xp.empty_like(x), xp.zeros(w.shape, w.dtype), xp.zeros_like(b)
    for rows in _chunks(x.shape[0], w.shape[1]):
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


def _chunks(n_rows: int, row_size: int):
    step = max(1, CHUNK_ENTRIES // row_size)
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]
