"""Output layer and loss, whose logits exist a chunk at a time."""

from __future__ import annotations

from rt_scratch.dispatch import array_module
from rt_scratch.kernels.cuda.arrays import as_float32, as_int32, each
from rt_scratch.kernels.cuda.sizes import chunks, n_blocks
from rt_scratch.kernels.cuda.sums import add_product, column_sum, new_gradients, sum_all
from rt_scratch.kernels.gemm import aligned_rows, matmul, well_placed
from rt_scratch.kernels.launch import launch
from rt_scratch.layers import CrossEntropyCache


def linear_cross_entropy(x, w, b, targets, weights):
    """Twin of layers.linear_cross_entropy."""
    xp = array_module(x)
    lse, loss = each(xp.empty((2, x.shape[0]), xp.float32))
    bias, target, weight = as_float32(b), as_int32(targets), as_float32(weights)
    vocabulary = w.shape[1]
    for rows in chunks(x.shape[0], vocabulary):
        z = _logits(x[rows], w)
        launch("cross_entropy", (z.shape[0],), (_row_threads(vocabulary),), z, bias, target[rows],
               weight[rows], lse[rows], loss[rows], vocabulary, z.strides[0] // 4)
    return sum_all(loss), CrossEntropyCache(x, w, b, targets, weights, lse)


def linear_cross_entropy_backward(dloss, cache):
    """Twin of layers.linear_cross_entropy_backward; dw and db are summed in float32."""
    return new_gradients(add_cross_entropy, dloss, cache, (cache.w, cache.b))


def add_cross_entropy(dloss, cache, out, add, dx=None):
    x, w, b, targets, weights, lse = cache
    xp = array_module(x)
    bias, target, weight = as_float32(b), as_int32(targets), as_float32(weights * dloss)
    vocabulary = w.shape[1]
    dx, dw = xp.empty(x.shape, x.dtype), out[0]
    if not well_placed(dw):  # one addition at the end, not one per chunk
        dw = aligned_rows(w.shape, x, "float32")
    for rows in chunks(x.shape[0], vocabulary):
        z = _logits(x[rows], w)
        dz = z if x.dtype == z.dtype else aligned_rows(z.shape, x)
        launch("cross_entropy_backward", (z.shape[0],), (_row_threads(vocabulary),), z, bias,
               target[rows], weight[rows], lse[rows], dz, vocabulary, z.strides[0] // 4)
        matmul(dz, w.T, out=dx[rows])
        add_product(x[rows], dz, dw, rows.start > 0 or add and dw is out[0])
        column_sum(dz, out[1:], add or rows.start > 0)
    if dw is not out[0]:
        out[0][...] = dw + out[0] if add else dw
    return dx


def _logits(x, w):
    """x w in float32."""
    return matmul(x, w, out=aligned_rows((x.shape[0], w.shape[1]), x, "float32"))


def _row_threads(width: int) -> int:
    """Threads of a block that handles one row."""
    return min(1024, max(32, n_blocks(width, 128) * 32))
