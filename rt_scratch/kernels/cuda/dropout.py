"""Dropout, and its arguments of the kernels that drop on the way."""

from __future__ import annotations

from rt_scratch.dispatch import array_module
from rt_scratch.dropout import first_entry
from rt_scratch.kernels.cuda.arrays import contiguous, number
from rt_scratch.kernels.cuda.sizes import THREADS, n_blocks
from rt_scratch.kernels.launch import launch


def dropout(x, dropped):
    """Twin of dropout.dropout; also its backward."""
    if dropped is None or not dropped.rate:
        return x, None
    x = contiguous(x)
    y = array_module(x).empty_like(x)
    launch("dropout", (n_blocks(x.size, 8 * THREADS),), (THREADS,), x, y, x.size,
           *drop(dropped, x.shape, array_module(x)))
    return y, dropped


def drop(dropped, shape, xp):
    """The kernels' form of a Dropped, for an array of this shape; None draws nothing."""
    if not dropped:
        return 0, 0, 0, 0, None, 0
    seed, stream, step = dropped.key
    low = 0xFFFFFFFF
    return (round(dropped.rate * 65536), seed & low, (seed >> 32) & low, stream & low,
            number(xp, step, "uint32"), first_entry(dropped, shape))
