"""Compiles the CUDA kernels for real GPUs on a machine without one, and counts registers.

NVRTC needs neither a GPU nor a driver. (CuPy's own RawModule does: it asks the device for its
architecture.) Packages: the extra `gpu-check` of pyproject.toml.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rt_scratch.kernels import launch


class Usage(NamedTuple):
    registers: int
    spilled: int  # bytes stored to and loaded from local memory for want of registers
    shared: int   # bytes of shared memory per block


def missing() -> str | None:
    """Why kernels cannot be compiled here (CuPy, NVRTC or CUDA's headers are missing), or None."""
    try:
        compile_text("#include <cuda_bf16.h>\n__global__ void f() {}", ["f"])
    except Exception as error:  # ImportError, what cuda.pathfinder raises, or NVRTC's complaint
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"CUDA sources cannot be compiled ({reason}); pip install -e '.[gpu-check]'"
    return None


def compile_text(text: str, instances, architecture: str = "sm_90") -> dict[str, Usage]:
    """Compiles CUDA C++ -> {instance: Usage}. RuntimeError with NVRTC's log if it does not."""
    from cupy._core import core
    from cupy_backends.cuda.libs import nvrtc

    options = (*core.assemble_cupy_compiler_options(launch.OPTIONS), "-ftz=true",
               f"-arch={architecture}", "--ptxas-options=-v")
    program = nvrtc.createProgram(text, "kernels.cu", (), ())
    try:
        for instance in instances:
            nvrtc.addNameExpression(program, instance)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            raise RuntimeError(nvrtc.getProgramLog(program)) from None
        used = _read_log(nvrtc.getProgramLog(program))
        return {name: used[nvrtc.getLoweredName(program, name)] for name in instances}
    finally:
        nvrtc.destroyProgram(program)


def compile_file(file: str, architecture: str) -> dict[str, Usage]:
    """Compiles every instance of every kernel of a .cu file."""
    instances = [i for kernel in launch.declarations(file).values() for i in kernel.instances()]
    return compile_text(launch.source(file), instances, architecture)


def _read_log(log: str) -> dict[str, Usage]:
    """ptxas -v: one paragraph per kernel."""
    used = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads",
                                           part).groups())
        shared = re.search(r"(\d+) bytes smem", part)
        used[name] = Usage(int(re.search(r"Used (\d+) registers", part)[1]), stores + loads,
                           int(shared[1]) if shared else 0)
    return used
