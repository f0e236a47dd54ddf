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
from rt_scratch.kernels.launch import dtype_name
from rt_scratch.parameters import ROW

# Values of cuBLAS's enumerations: cublasOperation_t, cudaDataType_t, cublasComputeType_t.
AS_IS, TRANSPOSED = 0, 1
DATA_TYPE = {"float32": 0, "float16": 2, "bfloat16": 14}
COMPUTE_FLOAT32, COMPUTE_TF32 = 68, 77
DEFAULT_ALGORITHM = -1

ALIGNMENT = 16  # bytes that products read at a time
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
    return _plan(*_layout(a), *_layout(b), *_layout(c))


def _layout(x):
    """Shape and strides in bytes, and the size of an entry."""
    return x.shape, x.strides, x.itemsize


@functools.lru_cache(maxsize=1 << 14)
def _plan(shape_a, bytes_a, size_a, shape_b, bytes_b, size_b, shape_c, bytes_c, size_c) -> Plan:
    rows, inner = shape_a[-2:]
    if shape_b[-2] != inner or shape_c[-2:] != (rows, shape_b[-1]):
        raise ValueError(f"shapes {shape_a} @ {shape_b} do not give {shape_c}")
    a_by_rows, ld_a = _matrix(shape_a, bytes_a, size_a)
    b_by_rows, ld_b = _matrix(shape_b, bytes_b, size_b)
    c_by_rows, ld_c = _matrix(shape_c, bytes_c, size_c)
    if not c_by_rows:
        raise ValueError(f"the rows of the result must be contiguous, not strides {bytes_c}")
    batch_shape = shape_c[:-2]
    batch = math.prod(batch_shape)
    stride_a = _batch_stride(shape_a, bytes_a, size_a, batch_shape)
    stride_b = _batch_stride(shape_b, bytes_b, size_b, batch_shape)
    stride_c = _batch_stride(shape_c, bytes_c, size_c, batch_shape)
    if batch > 1 and stride_c == 0:
        raise ValueError("the result must not be broadcast")
    if rows == 1 and stride_a >= inner:
        ld_a, ld_c = stride_a, stride_c
    if (batch > 1 and stride_b == 0 and a_by_rows
            and stride_a == rows * ld_a and stride_c == rows * ld_c):
        rows, batch = rows * batch, 1  # one tall product instead of many small ones
    if batch == 1:
        stride_a = stride_b = stride_c = 0
    return Plan(AS_IS if b_by_rows else TRANSPOSED, AS_IS if a_by_rows else TRANSPOSED,
                shape_c[-1], rows, inner, ld_b, stride_b, ld_a, stride_a, ld_c, stride_c, batch)


def _matrix(shape, strides, size):
    """(rows contiguous?, leading dimension in entries) of the last two axes."""
    rows, columns = shape[-2:]
    step_row, step_column = (s // size for s in strides[-2:])
    if (step_column == 1 or columns == 1) and (step_row >= columns or rows == 1):
        return True, step_row if rows > 1 else columns + -columns % ALIGNMENT  # any will do
    if (step_row == 1 or rows == 1) and (step_column >= rows or columns == 1):
        return False, step_column if columns > 1 else rows + -rows % ALIGNMENT
    raise ValueError(f"matrix of shape {(rows, columns)} with strides {strides[-2:]} "
                     "has neither contiguous rows nor contiguous columns")


def _batch_stride(shape, strides, size, batch_shape):
    """The one stride, in entries, of the leading axes after broadcasting to batch_shape."""
    missing = len(batch_shape) - len(shape) + 2
    count, stride = 1, None
    for own, full, step in zip(reversed((1,) * missing + shape[:-2]), reversed(batch_shape),
                               reversed((0,) * missing + strides[:-2]), strict=True):
        if own not in (1, full):
            raise ValueError(f"leading axes {shape[:-2]} do not broadcast to {batch_shape}")
        if full == 1:
            continue
        step = 0 if own == 1 else step // size
        if stride is not None and step != stride * count:
            raise ValueError(f"leading axes of shape {shape[:-2]} with strides {strides[:-2]} "
                             "have no common stride")
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
    An operand that cuBLAS cannot read as it lies is copied first. So is any array whose rows do
    not all begin at multiples of 16 bytes, which cuBLAS reads, and writes, at a fraction of its
    speed.
    """
    if out is None:
        batch = _broadcast(a.shape[:-2], b.shape[:-2])
        out = array_module(a).empty((*batch, a.shape[-2], b.shape[-1]), dtype or a.dtype)
    operands, result = dtype_name(a.dtype), dtype_name(out.dtype)
    if a.dtype != b.dtype or operands not in DATA_TYPE:
        raise TypeError(f"matrix product of {a.dtype} and {b.dtype}")
    if result not in (operands, "float32"):
        raise TypeError(f"matrix product of {a.dtype} into {out.dtype}")
    if out.size and a.shape[-1]:
        try:
            product = plan(a, b, out)
        except ValueError:
            a, b = _readable(a, out.shape[:-2]), _readable(b, out.shape[:-2])
            product = plan(a, b, out)
        if aligned(product, a, b, out):
            _call(product, a, b, out, alpha, beta)
        else:
            _call_aligned(product, a, b, out, alpha, beta)
    elif out.size and beta:
        out *= beta
    else:
        out[...] = 0  # not times 0: what was never written may be nan
    return out


def _broadcast(first, second):
    """The common leading axes of two operands."""
    if first == second or not second:
        return first
    n = max(len(first), len(second))
    pairs = zip((1,) * (n - len(first)) + first, (1,) * (n - len(second)) + second, strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)


def _readable(x, batch_shape):
    try:
        _matrix(*_layout(x))
        _batch_stride(*_layout(x), batch_shape)
    except ValueError:
        return array_module(x).ascontiguousarray(x)
    return x


def aligned(p: Plan, a, b, c) -> bool:
    """Whether every row (or column, as it lies) of a product begins where reading is fast."""
    return not (_misplaced(a, p.ld_a, p.stride_a) or _misplaced(b, p.ld_b, p.stride_b)
                or _misplaced(c, p.ld_c, p.stride_c))


def _misplaced(x, ld, stride):
    return (address(x) | (ld | stride) * x.itemsize) % ALIGNMENT


def address(x) -> int:
    """Of the first entry."""
    return x.ctypes.data if hasattr(x, "ctypes") else x.data.ptr


def well_placed(x) -> bool:
    """Whether an array and all its rows (or columns, as it lies) begin at multiples of 16 bytes."""
    return not (address(x) % ALIGNMENT or any(
        stride % ALIGNMENT for n, stride in zip(x.shape, x.strides, strict=True)
        if n > 1 and stride != x.itemsize))


def aligned_rows(shape, like, dtype=None):
    """A new array whose rows begin where products read fastest: a view of a wider one, if need be.
    """
    width = shape[-1]
    wide = array_module(like).empty((*shape[:-1], width + -width % ROW), dtype or like.dtype)
    return wide[..., :width] if width % ROW else wide


def _call_aligned(p: Plan, a, b, c, alpha, beta):
    """`_call` by way of copies that lie well."""
    if _misplaced(a, p.ld_a, p.stride_a):
        a = _aligned_copy(a)
    if _misplaced(b, p.ld_b, p.stride_b):
        b = _aligned_copy(b)
    if not _misplaced(c, p.ld_c, p.stride_c):
        _call(plan(a, b, c), a, b, c, alpha, beta)
        return
    result = aligned_rows(c.shape, c, "float32" if beta else None)
    _call(plan(a, b, result), a, b, result, alpha, 0.0)
    if beta and beta != 1:
        c *= beta
    if beta:
        c += result
    else:
        c[...] = result


def _aligned_copy(x):
    copy = aligned_rows(x.shape, x)
    copy[...] = x
    return copy


def _call(p: Plan, a, b, c, alpha, beta):
    cublas = _cublas(a.device.id)
    cublas.use_stream(array_module(a).cuda.get_current_stream().ptr)
    operands = DATA_TYPE[dtype_name(a.dtype)]
    tf32 = _precision["tf32"] and operands == DATA_TYPE["float32"]
    _check(cublas.product(
        cublas.handle, p.operation_b, p.operation_a, p.m, p.n, p.k, _scalar(alpha),
        b.data.ptr, operands, p.ld_b, p.stride_b, a.data.ptr, operands, p.ld_a, p.stride_a,
        _scalar(beta), c.data.ptr, DATA_TYPE[dtype_name(c.dtype)], p.ld_c, p.stride_c, p.batch,
        COMPUTE_TF32 if tf32 else COMPUTE_FLOAT32, DEFAULT_ALGORITHM))


@functools.lru_cache(maxsize=64)
def _scalar(x: float):
    """The address of a float on the host, which cuBLAS reads before it returns."""
    return ctypes.byref(ctypes.c_float(x))


class _Cublas:
    """cuBLAS on one GPU. CuPy's own handle refuses to work in CUDA graphs."""

    def __init__(self, device: int):
        import cupy
        from cuda.pathfinder import load_nvidia_dynamic_lib

        try:
            self._library = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
        except (RuntimeError, OSError) as error:
            raise UserError(f"the cuBLAS library was not found; {GPU_PACKAGES}") from error
        integer, pointer, long = ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong
        operand = [pointer, integer, integer, long]  # address, type, leading dimension, stride
        self.product = self._library.cublasGemmStridedBatchedEx
        self.product.argtypes = [pointer, *[integer] * 5, pointer, *operand, *operand, pointer,
                                 *operand, *[integer] * 3]
        self.handle, self._stream = ctypes.c_void_p(), None
        with cupy.cuda.Device(device):
            _check(self._library.cublasCreate_v2(ctypes.byref(self.handle)))
            self._workspace = cupy.empty(WORKSPACE_BYTES, cupy.uint8)

    def use_stream(self, stream: int) -> None:
        """Let the products run there, with the workspace, which a change of stream takes away."""
        if stream == self._stream:
            return
        self._stream = stream
        _check(self._library.cublasSetStream_v2(self.handle, ctypes.c_void_p(stream)))
        _check(self._library.cublasSetWorkspace_v2(
            self.handle, ctypes.c_void_p(self._workspace.data.ptr),
            ctypes.c_size_t(self._workspace.nbytes)))


_cublas = functools.cache(_Cublas)


def _check(status: int):
    if status:
        raise RuntimeError(f"cuBLAS: {STATUS.get(status, 'failed')} (status {status})")
