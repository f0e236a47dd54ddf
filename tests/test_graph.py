"""Steps as CUDA graphs, without a GPU: nothing in a step that a graph cannot hold, and replays that
are steps. Captured on real CuPy it has been over a stand-in for the driver alone.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import strictxp
from helpers.models import SMALL, setup
from test_cuda_kernels import on_cpu, use_twins  # noqa: F401
from test_device import MODELS, to_device

from rt_scratch import dispatch
from rt_scratch.config import TrainConfig
from rt_scratch.errors import UserError
from rt_scratch.graph import Recorded, recorded
from rt_scratch.kernels import cuda, gemm, launch
from rt_scratch.optim import OPTIMIZERS
from rt_scratch.parallel import World
from rt_scratch.step import train_step

RECIPE = TrainConfig(lr=0.01, schedule="constant", warmup=0, parts=1, weight_decay=0.1, batch=4)


# ------------------------------------------------------------------------ nothing that is refused

@pytest.fixture
def kernels(monkeypatch):
    """Device arrays meet the launchers of the GPU; kernels and products do nothing but count."""
    started = []
    for name, twin in cuda.TWINS.items():
        monkeypatch.setitem(dispatch.twins[name], strictxp.__name__, (twin, cuda.supports))
    monkeypatch.setattr(launch, "_compiled", lambda instance: lambda *_: started.append(instance))
    monkeypatch.setattr(gemm, "_call", lambda *_: started.append("product"))
    return started


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [None, "float16"])
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
