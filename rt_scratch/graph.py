"""A training step as one CUDA graph: recorded once, then repeated as a whole.

A step is a thousand kernels or more, and Python starts them one by one, which can take longer than
running them. A graph holds them with all their arguments. So whatever differs from step to step
must be read from memory that keeps its place: the windows, the step's number, the learning rate.
The rest of a step is written for it: parameters, optimizer state and centroids change in place,
nothing waits for the GPU, and products go through a cuBLAS handle of our own (kernels/gemm.py).
"""

from __future__ import annotations

import contextlib

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.heads import sortable
from rt_scratch.optim import learning_rate
from rt_scratch.parallel import SINGLE, World


def recorded(train_step, model: ModelConfig, train: TrainConfig, xp, world: World = SINGLE):
    """train_step, to be called as before, with its kernels in a graph from the second call on.

    Where a step cannot be recorded, or is not to be, train_step as it is: without a GPU; with
    fp16, whose loss scale the host chooses by every gradient's norm; with float64, which has no
    kernels of ours; with causal heads that have keys of their own or several probes, which use
    products and sorts of CuPy's own; with several processes, whose sums between GPUs no graph has
    held yet.
    """
    can = (xp.__name__ == "cupy" and train.precision not in ("fp16", "float64")
           and ("causal" not in model.kinds() or sortable(model)) and world.size == 1)
    return Recorded(train_step, xp) if train.cuda_graph and can else train_step


class Recorded:
    """A training step that repeats itself.

    The first call runs the step as it will be recorded, which compiles kernels and fills caches.
    The second records it, and it and all later ones start the graph. With other arrays, those of
    another state or windows of another shape, this begins anew. The arrays of the result are
    the graph's: the next call writes into them.
    """

    def __init__(self, train_step, xp):
        self._train_step, self._xp = train_step, xp
        self._used = self._graph = self._result = self._pool = None

    def __call__(self, state, grads, parts, model, train, dtype=None, world=SINGLE):
        used = [*state.arrays, grads], [[x.shape for x in _arrays(part)] for part in parts], train
        first = self._used is None or not _same(used, self._used)
        if first:
            self.release()
            self._used = used
            self._step, self._lr = self._xp.zeros((), "uint32"), self._xp.zeros((), "float32")
            self._parts = [part._replace(
                ids=part.ids.copy(), weights=part.weights.copy(),
                labels=None if part.labels is None else part.labels.copy()) for part in parts]

        def run():
            return self._train_step(state._replace(step=self._step), grads, self._parts, model,
                                    train, dtype, world, self._lr)[1]

        lr = learning_rate(state.step, train.schedule, train.lr, train.warmup, train.steps)
        self._step.fill(state.step)
        self._lr.fill(lr)
        for own, new in zip(self._parts, parts, strict=True):
            for to, source in zip(_arrays(own), _arrays(new), strict=True):
                to[...] = source
        if first:
            result = run()
        else:
            if self._graph is None:
                self._record(run)
            self._graph.launch()
            result = self._result
        return state._replace(step=state.step + 1), result._replace(lr=lr)

    def _record(self, run):
        """What the step allocates lives in a pool of the graph's own, which nothing else uses."""
        xp = self._xp
        xp.get_default_memory_pool().free_all_blocks()  # of the first call, which had it from there
        self._pool, stream = xp.cuda.MemoryPool(), xp.cuda.get_current_stream()
        with xp.cuda.using_allocator(self._pool.malloc):
            stream.begin_capture()
            try:
                self._result = run()
            except BaseException:
                with contextlib.suppress(Exception):  # what went wrong first is worth telling
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()

    def release(self):
        """Give the graph's memory back, which CuPy does not do for a pool that is dropped. Arrays
        go first: their blocks stay otherwise."""
        self._graph = self._result = None
        if self._pool is not None:
            self._pool.free_all_blocks()

    __del__ = release


def _arrays(part):
    """What of a part differs from step to step."""
    return [x for x in (part.ids, part.labels, part.weights) if x is not None]


def _same(used, before):
    return (len(used[0]) == len(before[0]) and used[1:] == before[1:]
            and all(a is b for a, b in zip(used[0], before[0], strict=True)))
