"""Matrix products on the GPU without copies: c = alpha a @ b + beta c through cuBLAS.

CuPy's own matmul copies transposed and sliced operands, computes float16 batches in float32 and
fails on bfloat16 batches. cuBLAS can take all of these as they lie in memory; `plan` works out how.
It needs only shapes and strides, so tests check it on NumPy arrays with cuBLAS's meaning of the
arguments written out (tests/cuda).
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

from rt_scratch.dispatch import array_module
from rt_scratch.errors import GPU_PACKAGES, UserError

# Values of cuBLAS's enumerations: cublasOperation_t, cudaDataType_t, cublasComputeType_t.
AS_IS, TRANSPOSED = 0, 1
DATA_TYPE = {"float32": 0, "float16": 2, "bfloat16": 14}
COMPUTE_FLOAT32, COMPUTE_TF32 = 68, 77
DEFAULT_ALGORITHM = -1

WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends on Hopper; a fixed one keeps results the same

STATUS = {1: "not initialised", 3: "out of memory", 7: "invalid value", 8: "wrong architecture",
          13: "execution failed", 14: "internal error", 15: "not supported"}

_precision = {"tf32": False}


class Plan(NamedTuple):
    """Arguments of cublasGemmStridedBatchedEx in cuBLAS's column-major terms.

    A row-major matrix is the transpose of a column-major one, so c = a b is computed as
    c^T = b^T a^T: cuBLAS's first operand is our b, its second our a.
    """

    operation_b: int
    operation_a: int
    m: int  # columns of c
    n: int  # rows of c
    k: int
    ld_b: int
    stride_b: int
    ld_a: int
    stride_a: int
    ld_c: int
    stride_c: int
    batch: int


def plan(a, b, c) -> Plan:
    """How cuBLAS computes c = a @ b:  a (..., M, K), b (..., K, N), c (..., M, N).

    Rows or columns of each matrix must be contiguous (transposed views and column slices are), the
    rows of c always; leading axes of a and b broadcast to those of c, and must have one common
    stride, which may be 0. Works on anything with shape, strides and itemsize. ValueError when a
    copy would be needed or shapes disagree.
    """
    rows, inner = a.shape[-2:]
    if b.shape[-2] != inner or c.shape[-2:] != (rows, b.shape[-1]):
        raise ValueError(f"shapes {a.shape} @ {b.shape} do not give {c.shape}")
    a_by_rows, ld_a = _matrix(a)
    b_by_rows, ld_b = _matrix(b)
    c_by_rows, ld_c = _matrix(c)
    if not c_by_rows:
        raise ValueError(f"the rows of the result must be contiguous, not strides {c.strides}")
    batch_shape = c.shape[:-2]
    batch = math.prod(batch_shape)
    stride_a, stride_b = _batch_stride(a, batch_shape), _batch_stride(b, batch_shape)
    stride_c = _batch_stride(c, batch_shape)
    if batch > 1 and stride_c == 0:
        raise ValueError("the result must not be broadcast")
    if (batch > 1 and stride_b == 0 and a_by_rows
            and stride_a == rows * ld_a and stride_c == rows * ld_c):
        rows, batch = rows * batch, 1  # one tall product instead of many small ones
    if batch == 1:
        stride_a = stride_b = stride_c = 0
    return Plan(AS_IS if b_by_rows else TRANSPOSED, AS_IS if a_by_rows else TRANSPOSED,
                c.shape[-1], rows, inner, ld_b, stride_b, ld_a, stride_a, ld_c, stride_c, batch)


def _matrix(x):
    """(rows contiguous?, leading dimension in entries) of the last two axes."""
    rows, columns = x.shape[-2:]
    step_row, step_column = (s // x.itemsize for s in x.strides[-2:])
    if (step_column == 1 or columns == 1) and (step_row >= columns or rows == 1):
        return True, step_row if rows > 1 else columns
    if (step_row == 1 or rows == 1) and (step_column >= rows or columns == 1):
        return False, step_column if columns > 1 else rows
    raise ValueError(f"matrix of shape {(rows, columns)} with strides {x.strides[-2:]} "
                     "has neither contiguous rows nor contiguous columns")


def _batch_stride(x, batch_shape):
    """The one stride, in entries, of the leading axes after broadcasting to batch_shape."""
    shape = (1,) * (len(batch_shape) - x.ndim + 2) + x.shape[:-2]
    strides = (0,) * (len(batch_shape) - x.ndim + 2) + x.strides[:-2]
    count, stride = 1, None
    for size, full, step in zip(reversed(shape), reversed(batch_shape), reversed(strides),
                                strict=True):
        if size not in (1, full):
            raise ValueError(f"leading axes {x.shape[:-2]} do not broadcast to {batch_shape}")
        if full == 1:
            continue
        step = 0 if size == 1 else step // x.itemsize
        if stride is not None and step != stride * count:
            raise ValueError(f"leading axes of shape {x.shape[:-2]} with strides "
                             f"{x.strides[:-2]} have no common stride")
        stride = step if stride is None else stride
        count *= full
    return stride or 0


def use_tf32(on: bool) -> None:
    """Whether products of float32 arrays may round their operands to TF32 (10-bit mantissa)."""
    _precision["tf32"] = on


def matmul(a, b, out=None, alpha: float = 1.0, beta: float = 0.0, dtype=None):
    """out = alpha a @ b + beta out, summed in float32.  a (..., M, K), b (..., K, N).

    a and b share a dtype: float32, float16 or bfloat16. Without `out` a new array of `dtype`
    (default: that of a) is made; float32 results of half-precision operands are allowed.
    An operand that cuBLAS cannot read as it lies is copied first; `out` never is.
    """
    if out is None:
        batch = _broadcast(a.shape[:-2], b.shape[:-2])
        out = array_module(a).empty((*batch, a.shape[-2], b.shape[-1]), dtype or a.dtype)
    if a.dtype != b.dtype or a.dtype.name not in DATA_TYPE:
        raise TypeError(f"matrix product of {a.dtype} and {b.dtype}")
    if out.dtype != a.dtype and out.dtype.name != "float32":
        raise TypeError(f"matrix product of {a.dtype} into {out.dtype}")
    if out.size and a.shape[-1]:
        a, b = _readable(a, out.shape[:-2]), _readable(b, out.shape[:-2])
        _call(plan(a, b, out), a, b, out, alpha, beta)
    elif out.size and beta:
        out *= beta
    else:
        out[...] = 0  # not times 0: what was never written may be nan
    return out


def _broadcast(first, second):
    """The common leading axes of two operands."""
    n = max(len(first), len(second))
    pairs = zip((1,) * (n - len(first)) + first, (1,) * (n - len(second)) + second, strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)


def _readable(x, batch_shape):
    try:
        _matrix(x)
        _batch_stride(x, batch_shape)
    except ValueError:
        return array_module(x).ascontiguousarray(x)
    return x


def _call(p: Plan, a, b, c, alpha, beta):
    device = a.device.id
    library, handle, workspace = _cublas(device)
    stream = ctypes.c_void_p(array_module(a).cuda.get_current_stream().ptr)
    _check(library.cublasSetStream_v2(handle, stream))  # takes the workspace away ...
    _check(library.cublasSetWorkspace_v2(handle, ctypes.c_void_p(workspace.data.ptr),
                                         ctypes.c_size_t(workspace.nbytes)))  # ... so after it
    tf32 = _precision["tf32"] and a.dtype.name == "float32"
    alpha, beta = ctypes.c_float(alpha), ctypes.c_float(beta)
    _check(library.cublasGemmStridedBatchedEx(
        handle, p.operation_b, p.operation_a, p.m, p.n, p.k, ctypes.byref(alpha),
        b.data.ptr, DATA_TYPE[b.dtype.name], p.ld_b, p.stride_b,
        a.data.ptr, DATA_TYPE[a.dtype.name], p.ld_a, p.stride_a, ctypes.byref(beta),
        c.data.ptr, DATA_TYPE[c.dtype.name], p.ld_c, p.stride_c, p.batch,
        COMPUTE_TF32 if tf32 else COMPUTE_FLOAT32, DEFAULT_ALGORITHM))


@functools.cache
def _cublas(device: int):
    """(library, handle, workspace) of a GPU. CuPy's own handle refuses to work in CUDA graphs."""
    import cupy
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        library = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except (RuntimeError, OSError) as error:
        raise UserError(f"the cuBLAS library was not found; {GPU_PACKAGES}") from error
    integer, pointer, long = ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong
    operand = [pointer, integer, integer, long]  # address, type, leading dimension, stride
    library.cublasGemmStridedBatchedEx.argtypes = [
        pointer, *[integer] * 5, pointer, *operand, *operand, pointer, *operand, *[integer] * 3]
    handle = ctypes.c_void_p()
    with cupy.cuda.Device(device):
        _check(library.cublasCreate_v2(ctypes.byref(handle)))
        return library, handle, cupy.empty(WORKSPACE_BYTES, cupy.uint8)


def _check(status: int):
    if status:
        raise RuntimeError(f"cuBLAS: {STATUS.get(status, 'failed')} (status {status})")
