"""Several processes that train one model: MPI between CPUs, NCCL between GPUs, nothing for one.

    mpiexec -n 4 python train.py enwik8

A `World` has the few operations a step needs. Every process holds the whole state and computes the
gradient of its share of the windows; sums go over the flat buffers, after which all processes take
the same step. Without mpiexec, or with -n 1, the world is SINGLE and nothing is imported. Two hosts
on one machine: CONTRIBUTING.md.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rt_scratch import threads
from rt_scratch.dispatch import array_module
from rt_scratch.errors import UserError

# (rank, number of processes) as launchers put them into the environment: MPICH, Intel MPI and
# Slurm with PMI; Open MPI; Slurm without either.
LAUNCHERS = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
             ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
CODE = (".py", ".cu", ".cuh")
SLOWEST = 4.0  # seconds that the last process waits before it speaks of an error


class World:
    """The processes that run together, seen by number `rank` of `size`.

    Used as a context, it turns an error of one process into the end of all, reported in one line:
    process 0 reports at once and ends the others; another process waits its turn, because most
    errors occur in all of them.
    """

    rank = local_rank = 0
    size = local_size = 1

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind, *_) -> None:
        pass

    def on(self, xp) -> World:
        """The same world for arrays of xp; on GPUs this connects them."""
        return self

    def sum(self, array) -> None:
        """Replace an array by its sum over all processes."""

    def totals(self, arrays: list, dtype) -> list:
        """Sums over all processes of small arrays and numbers, in one message of this dtype."""
        return arrays

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return flag

    def barrier(self) -> None:
        """Wait until all processes are here."""

    def in_turn(self, function):
        """function(), by process 0 first, then one per machine, then the others.

        For work whose result one process leaves on disk for the others, whether or not the machines
        share a disk.
        """
        return function()

    def check_same(self, facts: Callable[[], dict]) -> None:
        """UserError that names a process and the first of facts() in which it differs from most."""


SINGLE = World()  # one process


def start() -> World:
    """The world that mpiexec or srun made; SINGLE without one.

    From here on only process 0 writes to standard output, and a process uses as many threads as
    its machine has cores per process. UserError where mpiexec has no mpi4py to talk to.
    """
    rank, size = launched()
    if size < 2:
        return SINGLE
    try:
        os.environ.setdefault("MPIR_CVAR_SUPPRESS_ABORT_MESSAGE", "1")
        from mpi4py import MPI
        found = MPI.COMM_WORLD.size
        problem = f"mpi4py uses another MPI than mpiexec: it sees {found} of {size} processes"
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        found, problem = 0, f"{size} processes need mpi4py ({str(error).splitlines()[0]})"
    if found != size:
        if rank:
            sys.exit(2)
        raise UserError(f"{problem}; pip install -e '.[mpi]' and use its mpiexec")
    return MpiWorld(MPI)


def launched() -> tuple[int, int]:
    """(rank, number of processes) according to the launcher; (0, 1) without one."""
    for rank, size in LAUNCHERS:
        values = os.environ.get(rank, ""), os.environ.get(size, "")
        if all(value.isdecimal() for value in values):
            return int(values[0]), int(values[1])
    return 0, 1


class MpiWorld(World):
    """Processes connected by MPI, and on GPUs by NCCL as well."""

    def __init__(self, mpi):
        self._mpi, self._world, self._nccl = mpi, mpi.COMM_WORLD, None
        self.rank, self.size = self._world.rank, self._world.size
        local = self._world.Split_type(mpi.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.rank, local.size
        cores = set().union(*local.allgather(threads.cores()))
        threads.limit(len(cores) // local.size)
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    def __exit__(self, kind, *_):
        if kind in (None, SystemExit):  # --help
            return
        time.sleep(SLOWEST * self.rank / self.size + (0.5 if self.rank else 0))
        atexit.register(self._abort, 130 if kind is KeyboardInterrupt else 2)

    def _abort(self, code):
        sys.stderr.flush()
        time.sleep(0.3)  # mpiexec drops what it has not read when it hears of the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI libraries would add lines to ours
        self._world.Abort(code)

    def on(self, xp):
        if xp is not np:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # many lines, where one is below
                from cupy.cuda import nccl
            if not getattr(nccl, "available", False):
                raise UserError("several GPUs need NCCL: pip install nvidia-nccl-cu12, or cu13 as "
                                "CuPy is")
            own = nccl.get_unique_id() if self.rank == 0 else None
            self._nccl = nccl, nccl.NcclCommunicator(self.size, self._world.bcast(own), self.rank)
        return self

    def sum(self, array):
        if is_host(array):
            self._world.Allreduce(self._mpi.IN_PLACE, array)
            return
        nccl, communicator = self._nccl
        kind = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}[array.dtype.name]
        stream = array_module(array).cuda.get_current_stream()
        communicator.allReduce(array.data.ptr, array.data.ptr, array.size, kind, nccl.NCCL_SUM,
                               stream.ptr)

    def totals(self, arrays, dtype):
        xp = array_module(arrays[0])
        arrays = [xp.asarray(a, dtype) for a in arrays]
        packed = xp.concatenate([a.reshape(-1) for a in arrays])
        self.sum(packed)
        ends = np.cumsum([a.size for a in arrays]).tolist()
        return [packed[end - a.size : end].reshape(a.shape)
                for a, end in zip(arrays, ends, strict=True)]

    def any(self, flag):
        return self._world.allreduce(bool(flag), self._mpi.LOR)

    def barrier(self):
        """Asleep rather than spinning: what the others do may take hours and need the cores."""
        request = self._world.Ibarrier()
        while not request.Test():
            time.sleep(0.01)

    def in_turn(self, function):
        own = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            if turn == own:
                result = function()
            self.barrier()
        return result

    def check_same(self, facts):
        own = {name: str(value) for name, value in facts().items()}
        everyone = self._world.allgather((socket.gethostname(), own))
        for name in own:
            seen = [there[name] for _, there in everyone]
            usual = Counter(seen).most_common(1)[0][0]
            for rank, (value, (host, _)) in enumerate(zip(seen, everyone, strict=True)):
                if value != usual:
                    raise UserError(f"process {rank} on {host} differs from the others in its "
                                    f"{name}: {value:.60}, elsewhere {usual:.60}")


def is_host(array) -> bool:
    """Whether an array is NumPy's."""
    return array_module(array) is np


def checksum(arrays) -> int:
    """Sum of the arrays' bits as 32-bit integers, modulo 2^64; equal for bit-identical replicas."""
    return sum(int(a.reshape(-1).view("uint32").sum(dtype="uint64")) for a in arrays) % 2**64


def software(xp) -> dict:
    """What must be the same in every process so that the same step gives the same bits."""
    sources = sorted(Path(__file__).parent.rglob("*.*"))
    code = zlib.crc32(b"".join(p.read_bytes() for p in sources if p.suffix in CODE))
    found = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found")
    return {"source of rt_scratch": f"{code:08x}", "Python": sys.version.split()[0],
            xp.__name__: xp.__version__, "processor": found}
