"""Optimizers, and the copy of the parameters that the network computes with."""

from __future__ import annotations

import functools
import math

import numpy as np

from rt_scratch.dispatch import array_module
from rt_scratch.kernels.cuda.arrays import contiguous, number
from rt_scratch.kernels.cuda.sizes import THREADS, n_blocks
from rt_scratch.kernels.gemm import matmul
from rt_scratch.kernels.launch import launch
from rt_scratch.optim import MOMENTUM, NEWTON_SCHULZ, is_bias, orthogonalized, update_scale


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


def global_norm(grads):
    """Twin of optim.global_norm: CuPy's dot product uses a handle that no CUDA graph takes."""
    xp = array_module(grads)
    parts = xp.empty(min(1024, n_blocks(grads.size, 4 * THREADS)), xp.float32)
    launch("sum_squares", parts.shape, (THREADS,), grads, parts, grads.size)
    return xp.sqrt(parts.sum())


def adamw_update(flat, grads, state, table, lr, step, *, beta1=0.9, beta2=0.99, eps=1e-8,
                 weight_decay=0.0) -> None:
    """Twin of optim.adamw_update, for float32 buffers."""
    xp = array_module(flat)
    lines = _leaves(xp, tuple(table), len(state["v"]) == len(flat))
    launch("adamw", (128, lines.shape[0]), (THREADS,), flat, grads, state["m"], state["v"], lines,
           number(xp, lr, "float32"), number(xp, step, "uint32"), 1 - beta1, 1 - beta2, eps,
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
        grid = min(128, n_blocks(size, 4 * THREADS)), len(leaves)
        x = xp.empty((len(leaves), *shape), flat.dtype)
        launch("muon_momentum", grid, (THREADS,), grads, state["m"], lines, x, size, MOMENTUM)
        x = contiguous(_newton_schulz(x))
        launch("muon_update", grid, (THREADS,), flat, lines, x, number(xp, lr, "float32"), size,
               update_scale(leaves[0]), weight_decay)


def _newton_schulz(x):
    """Twin of optim.newton_schulz, its sums inside the products."""
    xp = array_module(x)
    if x.shape[-2] > x.shape[-1]:
        return _newton_schulz(contiguous(x.swapaxes(-1, -2))).swapaxes(-1, -2)
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
    lr, step = number(xp, lr, "float32"), number(xp, step, "uint32")
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
