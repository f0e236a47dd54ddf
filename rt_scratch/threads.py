"""Work on several CPU cores: NumPy releases the interpreter's lock while it computes.

Work is cut into pieces whose number and sizes depend on the arrays alone, so results do not depend
on the number of threads. BLAS runs with one thread inside each piece.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy

_here = threading.local()
_most = 1 << 16  # see `limit`


def parallel(function, items) -> list:
    """[function(item) for item in items], side by side, or one after another inside such a call.

    After Ctrl-C, items that are running end at their next call of `parallel`: a process that exits
    waits for its threads.
    """
    items = list(items)
    if len(items) < 2 or busy():
        return [function(item) for item in items if _wanted()]
    given_up = threading.Event()

    def call(item):
        _here.given_up = given_up
        try:
            return function(item)
        finally:
            _here.given_up = None

    try:
        return list(_pool().map(call, items))
    except BaseException:
        given_up.set()
        raise


@contextlib.contextmanager
def alone():
    """Inside `with`, this thread does its work itself: other cores have work of their own."""
    _here.given_up = threading.Event()
    try:
        yield
    finally:
        _here.given_up = None


def busy() -> bool:
    """True inside `parallel`, and where `limit` leaves one thread: all cores are at work then."""
    return _most == 1 or getattr(_here, "given_up", None) is not None


def _wanted():
    """True; CancelledError where nobody waits for what this thread does."""
    if (given_up := getattr(_here, "given_up", None)) and given_up.is_set():
        raise CancelledError
    return True


def tiles(n: int, size: int) -> list[slice]:
    """0 .. n cut into slices of `size`."""
    size = max(1, size)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads())


def cores() -> set[int]:
    """Numbers of the cores that the system lets this process use."""
    return set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity")
               else range(os.cpu_count()))


def n_threads() -> int:
    """Threads of this process: one per core, or as many as `limit` says."""
    return min(len(cores()), _most)


def limit(n: int) -> None:
    """Use at most n threads, at least one: the other cores belong to other processes."""
    global _most
    _most = max(1, n)


def set_blas_threads(n: int) -> bool:
    """Ask NumPy's bundled OpenBLAS for n threads; False where NumPy has another BLAS."""
    folders = (Path(numpy.__file__).parent.parent / "numpy.libs",
               Path(numpy.__file__).parent / ".dylibs")
    for path in (p for folder in folders for p in folder.glob("*openblas*")):
        library = ctypes.CDLL(str(path))
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads"):
            if hasattr(library, name):
                getattr(library, name)(n)
                return True
    return False
