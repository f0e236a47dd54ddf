"""Devices: which module an array belongs to, moving arrays, faster twins of plain functions.

The array decides: `xp = array_module(x)` is NumPy for NumPy arrays and CuPy for CuPy arrays, and
the maths is written once in terms of `xp`.
"""

from __future__ import annotations

import functools
import sys

import numpy as np

from rt_scratch.errors import UserError


def array_module(x):
    """The module (numpy, cupy) whose functions work on x."""
    if isinstance(x, np.ndarray | np.generic):
        return np
    return sys.modules[type(x).__module__.partition(".")[0]]


def to_host(x) -> np.ndarray:
    """A NumPy copy (GPU array) or x itself (NumPy array). Waits for the GPU."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def select_device(name: str):
    """(module, one-line description) of 'cpu', 'cuda' or 'auto'.

    'auto' takes the GPU if a small computation on it works and says why if not; 'cuda' never falls
    back: it raises UserError. Registers the faster twins of the device.
    """
    from rt_scratch.kernels import cpu

    register_twins("numpy", cpu.TWINS, cpu.worthwhile)
    if name == "cpu":
        return np, "cpu: NumPy"
    try:
        module, text = _probe_cuda()
        from rt_scratch.kernels import cuda

        register_twins("cupy", cuda.TWINS, cuda.supports)
    except Exception as error:  # whatever a broken driver, wheel or library raises
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" \
            if str(error).strip() else type(error).__name__
        if name == "cuda":
            raise UserError(f"--device cuda: no usable GPU ({reason}); use --device cpu, or "
                            "install a driver and pip install -e '.[cuda13]'") from error
        return np, f"cpu: NumPy (no GPU: {reason})"
    return module, text


def _probe_cuda():
    import cupy

    if not cupy.is_available():
        raise RuntimeError("CuPy finds no CUDA device")
    a = cupy.ones((2, 2), cupy.float32)
    if float((a @ a + 1).sum()) != 12:  # loads cuBLAS and NVRTC
        raise RuntimeError("a small product on the GPU came out wrong")
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return cupy, f"cuda: {name}, CuPy {cupy.__version__}"


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


# Faster twins. `@accelerated` marks a plain function that `rt_scratch.kernels` may replace for some
# arrays; `twins[name][module]` is (the replacement, which arguments it takes). A twin has the same
# signature and the same cache as the plain body.
twins: dict[str, dict[str, tuple]] = {}


def accelerated(function):
    """Call the twin registered for the arguments' module if it takes them, else the plain body.

    The first array among the arguments, or in their caches, decides the module. The plain body
    stays callable as `.reference`.
    """
    table = twins.setdefault(function.__name__, {})

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not table:
            return function(*args, **kwargs)
        twin, takes = table.get(array_module(first_array(args)).__name__, (function, None))
        return (twin if takes is None or takes(*args) else function)(*args, **kwargs)

    call.reference = function
    return call


def first_array(values):
    """The first array in a tree of tuples, None if there is none."""
    for value in values:
        if isinstance(value, tuple):
            value = first_array(value)
        if hasattr(value, "dtype"):
            return value
    return None


def register_twins(module: str, functions: dict, takes=None):
    """Replace plain functions, by name, for arrays of `module` ('numpy', 'cupy').

    takes(*args) says whether the twins can compute the call (say, its dtype); None: always.
    """
    for name, function in functions.items():
        twins.setdefault(name, {})[module] = function, takes


@accelerated
def segment_sum(rows, index, n: int):
    """out[i] = sum of rows[j] over index[j] == i.  rows (N, D), index (N,) -> (n, D).

    Sorts the index and sums runs, so that the order of addition, and with it every bit of the
    result, is the same on every run (a scatter with atomic additions is not).
    """
    xp = array_module(rows)
    order = xp.argsort(index, kind="stable")
    sorted_rows = xp.concatenate([rows[order], xp.zeros_like(rows[:1])])  # (N + 1, D)
    bounds = xp.searchsorted(index[order], xp.arange(n + 1))
    sums = xp.add.reduceat(sorted_rows, bounds[:-1], axis=0)  # an empty run gives a stray row
    return sums * (bounds[1:] > bounds[:-1])[:, None]
