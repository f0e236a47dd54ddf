"""Devices: choose one, register its faster twins, choose the precision of its arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rt_scratch.console import say
from rt_scratch.dispatch import register_twins
from rt_scratch.errors import GPU_PACKAGES, UserError
from rt_scratch.heap import keep_freed_memory, use_huge_pages
from rt_scratch.kernels import cpu
from rt_scratch.parallel import SINGLE, World
from rt_scratch.threads import n_threads, set_blas_threads


def select_device(name: str = "auto", world: World = SINGLE):
    """(module, one-line description) of 'cpu', 'cuda' or 'auto'; the fast path is on afterwards.

    'auto' takes the GPU if a small computation on it works and says why if not; 'cuda' never falls
    back: it raises UserError. On a CPU the work is cut into pieces above BLAS, which therefore gets
    one thread per piece. Of several processes each takes a GPU of its own.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {name!r}: choose auto, cpu or cuda")
    if name != "cpu":
        try:
            return _select_cuda(world)
        except Exception as error:  # whatever a broken driver, wheel or library raises
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            if name == "cuda":
                raise UserError(f"--device cuda: no usable GPU ({reason}); use --device cpu, or "
                                f"install a driver and {GPU_PACKAGES}") from error
            why = f" (no GPU: {reason})"
    else:
        why = ""
    register_twins("numpy", cpu.TWINS, cpu.worthwhile)
    register_twins("numpy", {name: cpu.TWINS[name] for name in cpu.ANY_SIZE})
    keep_freed_memory()
    use_huge_pages()
    threads = f"{n_threads()} thread{'s' * (n_threads() > 1)}"
    blas = f"{threads}, 1 BLAS thread each" if set_blas_threads(1) \
        else "BLAS threads as NumPy chooses"
    return np, f"cpu: NumPy, {blas}{why}"


def _select_cuda(world):
    import cupy

    if not cupy.is_available():
        raise RuntimeError("CuPy finds no CUDA device")
    if world.size > 1:
        n = cupy.cuda.runtime.getDeviceCount()
        if n < world.local_size:
            raise RuntimeError(f"{world.local_size} processes on a machine with {n}; each needs "
                               "its own")
        cupy.cuda.Device(world.local_rank).use()
    a = cupy.ones((2, 2), cupy.float32)
    if float((a @ a + 1).sum()) != 12:  # loads cuBLAS and NVRTC
        raise RuntimeError("a small product on the GPU came out wrong")
    from rt_scratch.kernels import cuda

    register_twins("cupy", cuda.TWINS, cuda.supports)
    cupy.cuda.Stream(non_blocking=True).use()  # a CUDA graph records any but the default one
    name = cupy.cuda.runtime.getDeviceProperties(world.local_rank)["name"].decode()
    return cupy, f"cuda: {name}, CuPy {cupy.__version__}, one stream"


class Precision(NamedTuple):
    """Arithmetic of the network."""

    name: str = "float32"
    dtype: Any = None      # of activations; None: that of the parameters


def select_precision(name: str, xp) -> Precision:
    """The Precision of that name. 'auto' is bf16 on GPUs that have it (compute capability 8 and
    more), float32 elsewhere; where packages for bf16 are missing, it is tf32, and a line says why.

    UserError where the device cannot do what was asked for.
    """
    on_gpu = xp.__name__ == "cupy"
    has_bf16 = on_gpu and int(xp.cuda.Device().compute_capability) >= 80
    bfloat16, problem = _bfloat16() if has_bf16 else (None, "")
    if name == "auto":
        name = "bf16" if bfloat16 else "tf32" if has_bf16 else "float32"
        if problem:
            say(f"note: --precision auto is tf32 here: {problem}")
    if name in ("tf32", "bf16", "fp16") and not on_gpu:
        raise UserError(f"--precision {name}: for GPUs; a CPU takes float32 or float64")
    if name in ("tf32", "bf16") and not has_bf16:
        raise UserError(f"--precision {name}: this GPU does not have it; take fp16 or float32")
    if on_gpu:
        from rt_scratch.kernels import gemm

        gemm.use_tf32(name == "tf32")
    if name == "bf16" and problem:
        raise UserError(f"--precision bf16: {problem}")
    return Precision(name, {"bf16": bfloat16, "fp16": "float16"}.get(name))


def _bfloat16():
    """(NumPy's type, "") or (None, what is missing)."""
    if np.lib.NumpyVersion(np.__version__) < "2.1.2":  # CuPy registers the type from there on
        return None, f"bf16 needs NumPy 2.1.2 or later, not {np.__version__}: {GPU_PACKAGES}"
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return None, f"bf16 needs ml_dtypes: {GPU_PACKAGES}"
    return bfloat16, ""
