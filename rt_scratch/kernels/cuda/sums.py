"""Sums over rows, above all for gradients of parameters: of products, of columns, of the rows that
have one index."""

from __future__ import annotations

from rt_scratch.dispatch import array_module
from rt_scratch.kernels.cuda.arrays import as_int32, contiguous, each
from rt_scratch.kernels.cuda.routing import by_cluster
from rt_scratch.kernels.cuda.sizes import THREADS, n_blocks
from rt_scratch.kernels.gemm import matmul
from rt_scratch.kernels.launch import launch
from rt_scratch.kmeans import MAX_CLUSTERS

STRIPS = 64  # strips of rows that a sum over rows is cut into


# A backward that has parameters is two functions. The one that works takes `out`, an array for each
# gradient of a parameter (float32), writes or with add = 1 adds to it, and does likewise with dx.
# `add_gradients` gives it the buffers of the model; the twin of the plain backward gives it new
# arrays.

def new_gradients(adding, dy, cache, parameters):
    """(dx, gradients) in new arrays, for a plain backward with these parameters."""
    out = tuple(array_module(p).empty(p.shape, "float32") for p in parameters)
    return adding(dy, cache, out, 0), *out


def add_product(x, dy, out, add, scale=1.0):
    """out = scale x^T dy or out += it, for rows x (N, I), dy (N, O); out may be transposed."""
    if out.strides[-1] == out.itemsize:
        matmul(x.swapaxes(-1, -2), dy, out=out, alpha=scale, beta=add)
    else:
        matmul(dy.swapaxes(-1, -2), x, out=out.swapaxes(-1, -2), alpha=scale, beta=add)


def column_sum(x, out, add) -> None:
    """Sum over the rows of x (N, C), in a fixed order, into the one array of out."""
    column_sums("column_sum", (x,), *x.shape, out, add, x.strides[0] // x.itemsize)


def column_sums(name: str, arguments, rows: int, width: int, out, add, *more) -> None:
    """Runs a kernel that sums strips of rows, then adds the strips, into each array (width,)."""
    strip = max(8, -(-rows // STRIPS))
    strips = n_blocks(rows, strip)
    parts = array_module(out[0]).empty((len(out), strips, width), "float32")
    launch(name, (n_blocks(width, 32), strips), (32, 8), *arguments, *each(parts), rows, width,
           strip, *more)
    sum_strips(each(parts), out, add)


def sum_strips(parts, out, add=0) -> None:
    """Sums over the first axis of one or two float32 arrays, in order, into arrays of out."""
    widths = [x.size for x in out]
    pad = [None] * (2 - len(out))
    launch("sum_strips", (n_blocks(max(widths)), len(out)), (THREADS,), *parts, *pad, *out, *pad,
           parts[0].shape[0], widths[0], widths[-1], add)


def sum_all(x, factor=1.0):
    """factor times the sum of a float32 array, a 0-d array."""
    total = array_module(x).empty((), "float32")
    launch("sum_all", (1,), (256,), x, total, x.size, factor)
    return total


def column_threads(width: int) -> int:
    return min(THREADS, n_blocks(width, 32) * 32)


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
    rows, index = contiguous(rows), as_int32(index)
    order = stable_order(index, n)
    ids = index[order]
    starts, sums = xp.empty(n + 1, xp.int32), xp.empty((n, width), xp.float32)
    pieces, threads = n_blocks(size, PIECE), column_threads(width)
    carry = xp.empty((pieces, width), xp.float32)
    columns = n_blocks(width, threads)
    launch("segment_starts", (n_blocks(size + 1),), (THREADS,), ids, starts, size, n)
    launch("segment_pieces", (pieces, columns), (threads,), rows, order, ids, sums, carry, size,
           width, PIECE)
    launch("segment_finish", (n, columns), (threads,), starts, carry, sums, width, PIECE)
    return sums
