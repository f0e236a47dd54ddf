"""Devices: choose one, register its faster twins, choose the precision of its arithmetic."""

from __future__ import annotations

import numpy as np

from rt_scratch.dispatch import register_twins
from rt_scratch.errors import UserError
from rt_scratch.kernels import cpu
from rt_scratch.parallel import SINGLE, World
from rt_scratch.threads import keep_freed_memory, n_threads, set_blas_threads


def select_device(name: str = "auto", world: World = SINGLE):
    """(module, one-line description) of 'cpu', 'cuda' or 'auto'; the fast path is on afterwards.

    'auto' takes the GPU if a small computation on it works and says why if not; 'cuda' never falls
    back: it raises UserError. On a CPU the work is cut into pieces above BLAS, which therefore gets
    one thread per piece. Of several processes each takes a GPU of its own.
    """
    if name != "cpu":
        try:
            return _select_cuda(world)
        except Exception as error:  # whatever a broken driver, wheel or library raises
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            if name == "cuda":
                raise UserError(f"--device cuda: no usable GPU ({reason}); use --device cpu, or "
                                "install a driver and pip install -e '.[cuda13]'") from error
            why = f" (no GPU: {reason})"
    else:
        why = ""
    register_twins("numpy", cpu.TWINS, cpu.worthwhile)
    register_twins("numpy", {name: cpu.TWINS[name] for name in cpu.ANY_SIZE})
    keep_freed_memory()
    blas = f"{n_threads()} threads, 1 BLAS thread each" if set_blas_threads(1) \
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
    name = cupy.cuda.runtime.getDeviceProperties(world.local_rank)["name"].decode()
    return cupy, f"cuda: {name}, CuPy {cupy.__version__}, one stream"


def select_precision(name: str, xp):
    """(name, dtype of activations or None for that of the parameters): what 'auto' means here.

    bf16 on GPUs that have it (compute capability 8 and more), float32 elsewhere. UserError where
    the device cannot do what was asked for.
    """
    on_gpu = xp.__name__ == "cupy"
    has_bf16 = on_gpu and int(xp.cuda.Device().compute_capability) >= 80
    if name == "auto":
        name = "bf16" if has_bf16 else "float32"
    if name in ("tf32", "bf16", "fp16") and not on_gpu:
        raise UserError(f"--precision {name}: for GPUs; a CPU takes float32 or float64")
    if name in ("tf32", "bf16") and not has_bf16:
        raise UserError(f"--precision {name}: this GPU does not have it; take fp16 or float32")
    if on_gpu:
        from rt_scratch.kernels import gemm

        gemm.use_tf32(name == "tf32")
    if name == "bf16":
        try:
            import ml_dtypes
        except ImportError:
            raise UserError("--precision bf16 needs ml_dtypes: pip install "
                            "-e '.[cuda13]'") from None
        return name, ml_dtypes.bfloat16
    return name, "float16" if name == "fp16" else None
