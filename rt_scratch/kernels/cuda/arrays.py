"""Arrays as the kernels take them: type, strides, views and words."""

from __future__ import annotations

import functools
import math

from rt_scratch.dispatch import array_module
from rt_scratch.kernels.gemm import address
from rt_scratch.kernels.launch import dtype_name


def as_float32(x):
    """x as contiguous float32; x itself where it is, or where it is None."""
    if x is None or (dtype_name(x.dtype) == "float32" and x.flags.c_contiguous):
        return x
    return array_module(x).ascontiguousarray(x, dtype="float32")


def as_int32(x):
    if dtype_name(x.dtype) == "int32" and x.flags.c_contiguous:
        return x
    return array_module(x).ascontiguousarray(x, dtype="int32")


def contiguous(x):
    return x if x.flags.c_contiguous else array_module(x).ascontiguousarray(x)


def by_rows(x):
    """x (..., D) whose rows are contiguous and one stride apart, however far: x itself, or a copy.
    """
    step, rows = x.strides[-2] if x.ndim > 1 else x.nbytes, 1
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.strides[:-1]), strict=True):
        if size > 1 and stride != rows * step:
            return contiguous(x)
        rows *= size
    return x if x.strides[-1] == x.itemsize else contiguous(x)


def as_rows(x):
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def each(x):
    """The arrays along the first axis of x."""
    return [x[i] for i in range(x.shape[0])]


def stacked(first, second):
    """Two matrices as one batch (2, ...) without a copy, by the distance of their addresses.

    None where shapes or strides differ.
    """
    gap = address(second) - address(first)
    if (first.shape != second.shape or first.strides != second.strides or gap <= 0
            or gap % first.itemsize):
        return None
    return array_module(first).lib.stride_tricks.as_strided(
        first, (2, *first.shape), (gap, *first.strides))


WORDS = ((16, "uint4"), (8, "uint2"), (4, "unsigned"), (2, "unsigned short"), (1, "unsigned char"))


def widest_word(row_bytes, *arrays):
    """(bytes, type) of the widest word in which rows of these arrays can be moved."""
    parts = row_bytes
    for x in arrays:
        parts = math.gcd(parts, address(x), *x.strides[:-1])
    return next((n, name) for n, name in WORDS if not parts % n)


def number(xp, value, dtype):
    """What changes from step to step as a 0-d array that a kernel reads; an array as it is.

    A CUDA graph repeats every argument that was passed by value.
    """
    return value if hasattr(value, "dtype") else _kept_number(xp, value, dtype)


@functools.lru_cache(maxsize=8)
def _kept_number(xp, value, dtype):
    return xp.full((), value, dtype)
