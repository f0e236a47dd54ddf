"""Steps as CUDA graphs, without a GPU: nothing in a step that a graph cannot hold, and replays that
are steps. On a GPU test_gpu.py compares whole recorded runs with runs kernel by kernel.
"""

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import strictxp
from helpers.models import SMALL, setup
from test_cuda_kernels import HAVE_COMPILER, run_on_cpu, use_twins
from test_device import MODELS, to_device

from rt_scratch import dispatch
from rt_scratch.config import TrainConfig
from rt_scratch.graph import Recorded, recorded
from rt_scratch.kernels import cuda, gemm, launch
from rt_scratch.optim import OPTIMIZERS
from rt_scratch.parallel import World
from rt_scratch.step import train_step

RECIPE = TrainConfig(lr=0.01, schedule="linear", steps=9, parts=1, weight_decay=0.1, batch=4)


# ------------------------------------------------------------------------ nothing that is refused

@pytest.fixture
def kernels(monkeypatch):
    """Device arrays meet the launchers of the GPU; kernels and products do nothing but count."""
    started = []
    for name, twin in cuda.TWINS.items():
        monkeypatch.setitem(dispatch.twins[name], strictxp.__name__, (twin, cuda.supports))
    monkeypatch.setattr(launch, "compiled", lambda instance: lambda *_: started.append(instance))
    monkeypatch.setattr(gemm, "_call", lambda *_: started.append("product"))
    return started


@pytest.mark.parametrize("name, optimizer, dtype", [
    *((name, "adafactor", "float16") for name in MODELS if name != "own keys"),
    *(("causal", optimizer, None) for optimizer in OPTIMIZERS)])
def test_a_step_holds_nothing_that_a_graph_refuses(kernels, name, optimizer, dtype):
    """The second of two steps, its rate and number in arrays: no wait, no copy from the host, no
    product or sort of CuPy's, and every array of the state stays where it is."""
    m = setup(dataclasses.replace(MODELS[name], timing_signal=MODELS[name].kind == "text"),
              batch=4, dtype="float32")
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, accumulate=2)
    flat = to_device(m.flat)
    state = m.state()._replace(flat=flat, centroids=to_device(m.centroids),
                               step=strictxp.zeros((), "uint32"),
                               optimizer=OPTIMIZERS[optimizer].init(flat, m.table))
    lr, grads = strictxp.zeros((), "float32"), strictxp.zeros(m.flat.shape, "float32")
    parts, before = m.parts(2, 2, xp=strictxp), state.arrays
    for warm_up in (True, False):
        del kernels[:]
        with strictxp.capturing(warm_up):
            after, _ = train_step(state, grads, parts, m.cfg, recipe, dtype, lr=lr)
        assert all(a is b for a, b in zip(after.arrays, before, strict=True))
    assert kernels.count("product") > 20


@pytest.mark.parametrize("plant", [
    lambda x: float(x.sum()), lambda x: x @ x, lambda x: strictxp.argsort(x), lambda x: x.argsort(),
    lambda x: strictxp.asarray(np.ones(3)), lambda x: x[x > 0], lambda x: x.get()])
def test_what_a_graph_refuses_is_found(kernels, monkeypatch, plant):
    """Were it in the update of the centroids, say."""
    known = cuda.TWINS["kmeans.replace_centroids"]
    m = setup(SMALL, batch=2, dtype="float32")
    state = m.state()._replace(flat=to_device(m.flat), centroids=to_device(m.centroids))
    state = state._replace(optimizer=OPTIMIZERS["adamw"].init(state.flat, m.table))
    step = state, state.flat.copy(), m.parts(xp=strictxp), SMALL, TrainConfig(optimizer="adamw")
    with strictxp.capturing(warm_up=True):
        train_step(*step)

    def planted(own, counts, *rest):
        plant(counts.reshape(-1))
        known(own, counts, *rest)

    monkeypatch.setitem(dispatch.twins["kmeans.replace_centroids"], strictxp.__name__,
                        (planted, None))
    with strictxp.capturing(), pytest.raises(AssertionError):
        train_step(*step)


# ---------------------------------------------------------------------------- replays are steps

class Gpu:
    """What `Recorded` asks of CuPy, on NumPy arrays: a graph runs the recorded step again."""

    zeros = staticmethod(np.zeros)

    def __init__(self):
        self.cuda, self.captures, self.freed, self._captures = self, 0, 0, False

    def MemoryPool(self):
        def free():
            self.freed += 1

        return SimpleNamespace(malloc=None, free_all_blocks=free)

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=lambda: None)

    def using_allocator(self, malloc):
        return contextlib.nullcontext()

    def get_current_stream(self):
        return self

    def begin_capture(self):
        self._captures, self.captures = True, self.captures + 1

    def end_capture(self):
        self._captures = False
        return self

    def train_step(self, *arguments):
        """Of a step that is captured nothing happens, and the result is where it will be."""
        if not self._captures:
            return train_step(*arguments)
        _, told = train_step(*copy.deepcopy(arguments))
        self._result = told._replace(nats=np.array(0 * told.nats), norm=np.array(0 * told.norm))
        self._run = lambda: train_step(*arguments)[1]
        return None, self._result

    def launch(self):
        told = self._run()
        self._result.nats[...], self._result.norm[...] = told.nats, told.norm


@HAVE_COMPILER
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replays_are_steps(monkeypatch, optimizer):
    """The same bits as steps one by one, whatever changes: windows, dropout, learning rate.

    A state in other arrays is recorded anew, and each graph's memory is given back.
    """
    run_on_cpu.install(monkeypatch)
    use_twins(monkeypatch)
    cfg = dataclasses.replace(MODELS["causal"], width=24, n_layers=1)
    recipe, gpu, ends = dataclasses.replace(RECIPE, optimizer=optimizer), Gpu(), []
    for step_once in (train_step, Recorded(gpu.train_step, gpu)):
        m = setup(cfg, batch=2, dtype="float32")
        state = m.state(step=2)._replace(optimizer=OPTIMIZERS[optimizer].init(m.flat, m.table))
        grads, end = np.empty_like(m.flat), []
        for i in range(5):
            if i == 3:
                state = state._replace(flat=state.flat.copy())
            parts = m._replace(ids=(m.ids + i) % cfg.vocab_size).parts()
            state, told = step_once(state, grads, parts, cfg, recipe)
            end += [float(told.nats), float(told.norm), told.lr, state.step, state.flat.copy(),
                    state.centroids[0].mu.copy()]
        ends.append(end)
    assert gpu.captures == 2 and gpu.freed == 1
    del step_once
    assert gpu.freed == 2
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


def test_arrays_go_before_their_memory():
    """A pool keeps the blocks of arrays that are still there."""
    once, held = Recorded(None, None), []
    once._result = "arrays of the graph"
    once._pool = SimpleNamespace(free_all_blocks=lambda: held.append(once._result))
    once.release()
    assert held == [None]


def test_an_error_while_recording_is_told(monkeypatch):
    """Not that of a capture that cannot end then; and the next call tries again."""
    gpu, calls = Gpu(), []

    def step(*arguments):
        calls.append(gpu._captures)
        if gpu._captures and len(calls) == 2:
            raise MemoryError("all of it")
        return gpu.train_step(*arguments)

    m, once = setup(SMALL, batch=2, dtype="float32"), Recorded(step, gpu)
    state = m.state()._replace(optimizer=OPTIMIZERS["adamw"].init(m.flat, m.table))
    arguments = state, np.empty_like(m.flat), m.parts(), SMALL, TrainConfig(optimizer="adamw")
    once(*arguments)
    monkeypatch.setattr(gpu, "end_capture", lambda: 1 / 0)
    with pytest.raises(MemoryError, match="all of it"):
        once(*arguments)
    monkeypatch.undo()
    gpu._captures = False
    once(*arguments)
    assert calls == [False, True, True] and gpu.captures == 2


@pytest.mark.parametrize("name, settings, size", [
    ("causal", {"precision": "fp16"}, 1), ("causal", {"precision": "float64"}, 1),
    ("own keys", {}, 1), ("causal", {}, 2), ("causal", {"cuda_graph": False}, 1)], ids=str)
def test_what_cannot_be_recorded(name, settings, size):
    world = World()
    world.size = size
    gpu = SimpleNamespace(__name__="cupy")
    recipe = TrainConfig(**settings)
    assert recorded(train_step, MODELS[name], recipe, gpu, world) is train_step
    assert recorded(train_step, SMALL, TrainConfig(), np) is train_step
    assert isinstance(recorded(train_step, SMALL, TrainConfig(), gpu), Recorded)
