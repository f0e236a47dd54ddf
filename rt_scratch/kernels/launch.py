"""Starting CUDA kernels: compiled at first use, arguments checked against the declaration.

The kernels are the .cu files beside this one. Everything that has to be known about a kernel is
read from its own declaration.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17",)  # of the compiler
DTYPE = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16", "int": "int32",
         "unsigned": "uint32", "long long": "int64", "bool": "bool"}
SCALAR = {"int": np.int32, "unsigned": np.uint32, "long long": np.int64, "float": np.float32}
NUMBERS = (bool, int, float)
# The types that stand for a template parameter: activations, and words of a row that is only moved.
INSTANCES = {"T": ("float", "__half", "__nv_bfloat16"),
             "W": ("unsigned char", "unsigned short", "unsigned", "uint2", "uint4")}
WORD = {DTYPE[t]: t for t in INSTANCES["T"]}
DECLARATION = re.compile(r"(?:template <typename (\w)>\s*)?__global__ void\s+"
                         r"(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(([^)]*)\)")


class Kernel(NamedTuple):
    """What a kernel's declaration says."""

    file: str
    name: str
    template: str | None                      # letter of its template parameter
    parameters: tuple[tuple[str, str], ...]   # (type, name)

    def instances(self) -> list[str]:
        """Its full names: layer_norm<float>, layer_norm<__half>, ..."""
        if self.template is None:
            return [self.name]
        return [f"{self.name}<{t}>" for t in INSTANCES[self.template]]


@functools.cache
def source(file: str) -> str:
    """Text of a .cu file with common.cuh in place of its #include."""
    common = (FOLDER / "common.cuh").read_text()
    return (FOLDER / file).read_text().replace('#include "common.cuh"', common)


def declarations(file: str) -> dict[str, Kernel]:
    """The kernels of a file, by name."""
    text = re.sub(r"//.*", "", source(file))
    kernels = {}
    for template, name, parameters in DECLARATION.findall(text):
        split = [tuple(p.replace("const ", "").strip().rsplit(maxsplit=1))
                 for p in parameters.split(",")]
        kernels[name] = Kernel(file, name, template or None, tuple(split))
    return kernels


@functools.cache
def kernels() -> dict[str, Kernel]:
    """All kernels, by name."""
    files = sorted(path.name for path in FOLDER.glob("*.cu"))
    return {k.name: k for file in files for k in declarations(file).values()}


@functools.cache
def compiled(instance: str):
    """A function (grid, block, arguments) that starts the kernel."""
    import cupy

    function = _module(kernels()[instance.partition("<")[0]].file).get_function(instance)
    null = cupy.uintp(0)  # CuPy takes addresses from arrays by itself

    def start(grid, block, arguments):
        function(grid, block, tuple([null if a is None else a for a in arguments]))

    return start


@functools.cache
def _module(file: str):
    import cupy

    names = [instance for kernel in declarations(file).values() for instance in kernel.instances()]
    return cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=names)


class Check(NamedTuple):
    """What `launch` asks of an argument."""

    parameter: str
    scalar: type | None    # that numbers are converted to; None: a pointer
    dtype: str | None      # that arrays must have; None: any
    activation: bool       # T*: one of the activation types, the same for all
    strided: bool          # need not be C-contiguous


@functools.cache
def _checks(name: str) -> tuple[Check, ...]:
    return tuple(Check(parameter, None if declared.endswith("*") else SCALAR[declared],
                       DTYPE.get(declared[:-1]), declared == "T*", parameter.endswith("strided"))
                 for declared, parameter in kernels()[name].parameters)


@functools.lru_cache(maxsize=1 << 12)
def _converted(scalar: type, value):
    """scalar(value), which NumPy takes its time for."""
    return scalar(value)


@functools.cache
def dtype_name(dtype) -> str:
    """dtype.name, which NumPy spells out anew each time."""
    return dtype.name


def launch(name: str, grid, block, *arguments, word: str | None = None) -> None:
    """Start kernel `name`, with arguments in the order of its declaration.

    CuPy passes what it is given: an array of another dtype, a strided view or a Python int where
    the kernel expects 32 bits would be read as garbage. So each argument is checked against the
    declared type, and scalars are converted to it. A pointer may be None. Arrays must be
    C-contiguous, unless the parameter's name ends in `strided`. T is taken from the arrays; `word`
    is the type of W.
    """
    checks, activation, converted = _checks(name), None, []
    if len(arguments) != len(checks):
        raise TypeError(f"{name} takes {len(checks)} arguments, not {len(arguments)}")
    for check, value in zip(checks, arguments, strict=True):
        parameter, scalar, expected, activated, strided = check
        if scalar is not None:
            if type(value) not in NUMBERS and hasattr(value, "shape"):
                raise TypeError(f"{name}: {parameter} is an array; a number is expected")
            value = _converted(scalar, value)
        elif value is not None:
            dtype = dtype_name(value.dtype)
            if activated:
                activation = expected = activation or dtype
                if activation not in WORD:
                    raise TypeError(f"{name}: {parameter} is {activation}, not one of {[*WORD]}")
            if expected and dtype != expected:
                raise TypeError(f"{name}: {parameter} is {dtype}, not {expected}")
            if not (strided or value.flags.c_contiguous):
                raise TypeError(f"{name}: {parameter} is not contiguous")
        converted.append(value)
    template = kernels()[name].template
    instance = f"{name}<{WORD[activation] if template == 'T' else word}>" if template else name
    compiled(instance)(grid, block, tuple(converted))
