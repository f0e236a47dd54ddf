"""Processes that compute the parts of a batch, each on a core of its own, in memory they share.

Threads of one process hand the interpreter's lock to each other some thousand times a step, and
wait for it. Forked processes have a lock each. They see parameters and centroids where this process
changes them, are sent their windows, and leave their gradients in buffers that this process adds
up: the same numbers, to the last bit, as on threads. Optimizer, scores and files stay with this
process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import multiprocessing
import os
import signal
import sys
import warnings

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.console import SIGNALS, warn
from rt_scratch.kmeans import Centroids
from rt_scratch.parallel import World
from rt_scratch.step import State, Threads, part_gradient
from rt_scratch.threads import alone, limit, n_threads

SET_SIGNAL_AT_PARENTS_END = 1  # PR_SET_PDEATHSIG of prctl
MOST = 1 << 24  # parameters: beyond, nearly all time is products, and a fork keeps the old state


@contextlib.contextmanager
def start_workers(step_once, state: State, model: ModelConfig, train: TrainConfig, xp,
                  world: World):
    """(state, step_once), to be used inside `with`: with workers where they help.

    They do on Linux, where a fork is safe, in one process that trains a small model on a CPU with
    several cores and parts. The state moves into shared memory. Where the system has no process or
    memory left for it, threads do the work.
    """
    n = min(train.parts, train.batch * train.accumulate, n_threads())
    crew = None
    if (xp is np and world.size == 1 and n > 1 and state.flat.size <= MOST
            and sys.platform == "linux"):
        with contextlib.suppress(OSError):
            crew = Workers(state, model, train, n)
    if crew is None:
        yield state, step_once
        return
    with contextlib.closing(crew):
        yield crew.state, functools.partial(step_once, crew=crew)


class Workers(Threads):
    """n processes, of which this one is the first."""

    def __init__(self, state: State, model: ModelConfig, train: TrainConfig, n: int):
        self.state = state._replace(
            flat=_shared(state.flat),
            centroids={i: Centroids(*map(_shared, c)) for i, c in state.centroids.items()})
        most = min(train.parts, train.batch * train.accumulate)
        self._buffers = [_shared(state.flat) for _ in range(most)]
        self._pipes, self.pids = [], []
        try:
            for _ in range(1, n):
                ours, theirs = multiprocessing.Pipe()
                self._pipes.append(ours)
                self.pids.append(self._fork(theirs, model, train))
                theirs.close()
        except OSError:
            self.close()
            raise

    def _fork(self, pipe, model, train):
        parent = os.getpid()
        with warnings.catch_warnings():  # Python 3.12 on: about threads, which hold no lock here
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                for number in SIGNALS:  # a terminal's Ctrl-C is for the first process to answer
                    signal.signal(number, signal.SIG_IGN)
                ctypes.CDLL(None).prctl(SET_SIGNAL_AT_PARENTS_END, signal.SIGKILL)
                for ours in self._pipes:
                    ours.close()
                if os.getppid() == parent:
                    _serve(pipe, self.state, self._buffers, model, train)
            finally:
                os._exit(0)
        return pid

    def spare(self, grads, n):
        return self._buffers[:n]

    def run(self, params, state, parts, buffers, model, train):
        if not self._pipes:
            return super().run(params, state, parts, buffers, model, train)
        size = len(self._pipes) + 1
        slots = {id(buffer): slot for slot, buffer in enumerate(self._buffers)}
        found = []
        try:
            # One part each at a time: with more, both ends of a pipe could wait, their sides full.
            for first in range(0, len(parts), size):
                others = list(zip(self._pipes, range(first + 1, len(parts)), strict=False))
                for pipe, i in others:
                    pipe.send((slots[id(buffers[i])], state.step, state.scale, parts[i]))
                with alone():
                    found.append(part_gradient(
                        params, state, parts[first], buffers[first], model, train))
                found += [pipe.recv() for pipe, _ in others]
        except (EOFError, OSError):  # somebody killed one, perhaps the system for want of memory
            warn("note: a process with a part of the batch was killed; threads go on in its place")
            self.close()
            return self.run(params, state, parts, buffers, model, train)
        for outcome in found:
            if isinstance(outcome, Exception):
                raise outcome
        return found

    def close(self):
        """End the other processes, whatever they are doing."""
        for pipe in self._pipes:
            pipe.close()
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pipes, self.pids = [], []


def _shared(array):
    """A copy in memory that forked processes share."""
    memory = mmap.mmap(-1, max(1, array.nbytes))
    copy = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
    copy[...] = array
    return copy


def _serve(pipe, state, buffers, model, train):
    """A worker's life: parts come, and what `part_gradient` says of each, but for its routes, goes
    back.
    """
    limit(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            slot, step, scale, part = pipe.recv()
            state = state._replace(step=step, scale=scale)
            try:
                nats, commitment, report = part_gradient(
                    state.params, state, part, buffers[slot], model, train)
                outcome = nats, commitment, report._replace(routes={})  # large, and not for a step
            except Exception as error:
                outcome = error
            pipe.send(outcome)
