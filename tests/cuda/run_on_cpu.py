"""Executes the CUDA kernels on the CPU: the same source through g++ and cuda_on_cpu.h.

`install(monkeypatch)` puts this in place of CuPy's compiler and of cuBLAS, after which the
launchers of rt_scratch.kernels.cuda work on NumPy arrays.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from rt_scratch.kernels import gemm, launch

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
CTYPE = {"int": ctypes.c_int, "unsigned": ctypes.c_uint, "long long": ctypes.c_longlong,
         "float": ctypes.c_float}
FLAGS = ("-std=c++20", "-O1", "-pthread", "-w", "-include", str(HEADER))
SANITIZE = ("-DREAL_THREADS", "-fsanitize=thread", "-g")


def compiler() -> str | None:
    return shutil.which("g++")


def translation(file: str) -> str:
    """The file's source and, for each kernel instance, a function with C linkage that runs it."""
    return launch.source(file) + "\n".join(
        _entry(kernel, instance)
        for kernel in launch.declarations(file).values() for instance in kernel.instances())


def _entry(kernel: launch.Kernel, instance: str) -> str:
    word = instance.partition("<")[2].rstrip(">")
    declared = [(word + "*" if t == f"{kernel.template}*" else t, n) for t, n in kernel.parameters]
    parameters = "".join(f", {t} {n}" for t, n in declared)
    names = ", ".join(n for _, n in declared)
    return f"""
extern "C" void {symbol(instance)}(const unsigned* shape, bool backwards{parameters}) {{
  dim3 grid = {{shape[0], shape[1], shape[2]}}, block = {{shape[3], shape[4], shape[5]}};
  emulator::launch(grid, block, backwards, [=] {{ {instance}({names}); }});
}}"""


def symbol(instance: str) -> str:
    return "run_" + "".join(c if c.isalnum() else "_" for c in instance)


def build(text: str, target: Path, *flags: str) -> Path:
    """Compile C++ text; RuntimeError with the compiler's words if it does not."""
    code = target.with_suffix(".cpp")
    code.write_text(text)
    done = subprocess.run([compiler(), *FLAGS, *flags, str(code), "-o", str(target)],
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return target


@functools.cache
def library(file: str) -> ctypes.CDLL:
    """The shared library of a .cu file; kept between runs while its text stays the same."""
    text = translation(file)
    key = hashlib.sha256((text + HEADER.read_text() + str(FLAGS)).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"rt_scratch_kernels_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{Path(file).stem}_{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            build(text, Path(scratch) / "kernels.so", "-shared", "-fPIC").rename(target)
    return ctypes.CDLL(str(target))


def started(instance: str, backwards: bool = False):
    """A function (grid, block, arguments) that runs the kernel on NumPy arrays, now."""
    kernel = launch.kernels()[instance.partition("<")[0]]
    function = library(kernel.file)[symbol(instance)]

    def start(grid, block, arguments):
        shape = (ctypes.c_uint * 6)(*_three(grid), *_three(block))
        fenced, values = {}, []
        for (declared, _), value in zip(kernel.parameters, arguments, strict=True):
            if not declared.endswith("*"):
                values.append(CTYPE[declared](value.item()))
            elif value is None or not value.flags.c_contiguous:
                values.append(ctypes.c_void_p(None if value is None else value.ctypes.data))
            else:
                key = value.ctypes.data, value.nbytes  # in-place kernels get an array twice
                fenced.setdefault(key, Fenced(value))
                values.append(ctypes.c_void_p(fenced[key].address))
        function(shape, ctypes.c_bool(backwards), *values)
        for array in fenced.values():
            array.take_back(instance)

    return start


class Fenced:
    """A copy of an array between two fences of bytes that read as NaN, or as a huge integer.

    A kernel that reads beyond its arrays meets NaN; one that writes there is found out.
    """

    WIDTH, BYTE = 256, 0x7F

    def __init__(self, array):
        self.array = array
        self.start = self.WIDTH + array.ctypes.data % 16  # of the same alignment
        self.bytes = np.empty(self.start + array.nbytes + self.WIDTH + 16, np.uint8)
        self.start += -self.bytes.ctypes.data % 16
        self.end = self.start + array.nbytes
        self.bytes[:] = self.BYTE
        self.bytes[self.start : self.end] = array.reshape(-1).view(np.uint8)
        self.address = self.bytes.ctypes.data + self.start

    def take_back(self, instance):
        if not ((self.bytes[: self.start] == self.BYTE).all()
                and (self.bytes[self.end :] == self.BYTE).all()):
            raise RuntimeError(f"{instance} wrote outside an array of shape {self.array.shape}")
        self.array.reshape(-1).view(np.uint8)[:] = self.bytes[self.start : self.end]


def _three(shape):
    return (*shape, 1, 1)[:3]


def cublas(p: gemm.Plan, a, b, c, alpha, beta):
    """cublasGemmStridedBatchedEx in NumPy: column-major operands by address and stride."""
    first = _columns(b, p.operation_b, p.m, p.k, p.ld_b, p.stride_b, p.batch)
    second = _columns(a, p.operation_a, p.k, p.n, p.ld_a, p.stride_a, p.batch)
    result = _columns(c, gemm.AS_IS, p.m, p.n, p.ld_c, p.stride_c, p.batch)
    total = np.float32(alpha) * (first.astype(np.float32) @ second.astype(np.float32))
    if beta:  # as in cuBLAS, a result that does not count may hold NaN
        total += np.float32(beta) * result.astype(np.float32)
    result[...] = total.astype(c.dtype)


def _call(p: gemm.Plan, a, b, c, alpha, beta):
    """Every product of every test is one that cuBLAS reads and writes 16 bytes at a time."""
    assert gemm.aligned(p, a, b, c), f"{p} at {[gemm.address(x) % 16 for x in (a, b, c)]}"
    cublas(p, a, b, c, alpha, beta)


def _columns(x, operation, rows, columns, ld, stride, batch):
    """op(X) for each of the batch: (batch, rows, columns) read from column-major storage."""
    if operation == gemm.TRANSPOSED:
        return _columns(x, gemm.AS_IS, columns, rows, ld, stride, batch).swapaxes(-1, -2)
    if ld < rows:
        raise ValueError(f"leading dimension {ld} is below the number of rows {rows}")
    item = x.itemsize
    view = as_strided(x, (batch, rows, columns), (stride * item, item, ld * item))
    low, high = _span(x)
    start, end = _span(view)
    if view.size and (start < low or end > high):
        raise ValueError("reads outside the operand")
    return view


def _span(x):
    """Addresses of the first byte and past the last byte of an array."""
    start = x.__array_interface__["data"][0]
    ends = [(n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)]
    return start, start + sum(ends) + x.itemsize


def install(monkeypatch, backwards: bool = False) -> None:
    """Let the launchers run on NumPy arrays."""
    monkeypatch.setattr(launch, "compiled", functools.partial(started, backwards=backwards))
    monkeypatch.setattr(gemm, "_call", _call)
