"""The array decides which module computes with it, and which twin of a function is called.

`xp = array_module(x)` is NumPy for NumPy arrays and CuPy for CuPy arrays; the maths is written once
in terms of `xp`. `@accelerated` marks a plain function that may have a faster twin for the arrays
of a module. This file knows no kernel: `device.py` registers those of `kernels/`.
"""

from __future__ import annotations

import functools
import sys

import numpy as np

twins: dict[str, dict[str, tuple]] = {}  # 'layers.linear' -> {'numpy': (twin, takes), ...}


def array_module(x):
    """The module (numpy, cupy) whose functions work on x."""
    return _module_of(type(x))


@functools.cache
def _module_of(kind: type):
    if issubclass(kind, np.ndarray | np.generic):
        return np
    return sys.modules[kind.__module__.partition(".")[0]]


def to_host(x) -> np.ndarray:
    """A NumPy copy (GPU array) or x itself (NumPy array). Waits for the GPU."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def qualified_name(function) -> str:
    """The key of a function in `twins`: its module below rt_scratch and its name."""
    return f"{function.__module__.removeprefix('rt_scratch.')}.{function.__name__}"


def accelerated(function):
    """Call the twin registered for the arguments' module if it takes them, else the plain body.

    The first array among the arguments, or in their caches, decides the module. A twin has the
    signature, the values and the cache of the plain body, which stays callable as `.reference`.
    """
    table = twins.setdefault(qualified_name(function), {})

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


def register_twins(module: str, functions: dict, takes=None) -> None:
    """Use these twins of accelerated functions for arrays of `module` ('numpy', 'cupy').

    functions: twin by qualified name, such as 'layers.linear'; KeyError for a name that no
    accelerated function has. takes(*args) says whether the twins can compute a call (say, its
    dtype); None: always.
    """
    for name, function in functions.items():
        twins[name][module] = function, takes
