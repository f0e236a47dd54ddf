"""On a GPU: whole runs. `pytest -m gpu`; without a device these are skipped.

The same checks without one are in test_device.py (CuPy's rules) and test_cuda_kernels.py (the
kernels' numbers); there too, the tests of single twins run on the GPU under this mark.
"""

import dataclasses

import numpy as np
import pytest
from helpers.models import SMALL, setup

import sample
import train
from rt_scratch import decode, step
from rt_scratch.config import TrainConfig
from rt_scratch.device import select_device, select_precision
from rt_scratch.dispatch import to_host
from rt_scratch.errors import UserError
from rt_scratch.parameters import views
from rt_scratch.run import checkpoint

pytestmark = pytest.mark.gpu

SMALL_RUN = ["--seq-len", "64", "--window", "16", "--block", "16", "--n-layers", "2", "--width",
             "32", "--ffn-width", "32", "--steps", "12", "--eval-every", "6", "--eval-windows",
             "2", "--batch", "4"]
HEADS = [{}, {"routing": "topk"}, {"routing": "random"}, {"shift_keys": True},
         {"n_probes": 2, "share_qk": False}, {"attention": "full"}]


@pytest.fixture
def cupy():
    try:
        return select_device("cuda")[0]
    except UserError as error:
        pytest.skip(str(error))


def on_gpu(cupy, value):
    if isinstance(value, np.ndarray):
        return cupy.asarray(value)
    if isinstance(value, dict):
        return {k: on_gpu(cupy, v) for k, v in value.items()}
    return type(value)(*(on_gpu(cupy, v) for v in value)) if hasattr(value, "_fields") else value


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_gradients(cupy, heads, precision):
    """One step: the same loss and gradient as on the CPU, within the precision; twice the same."""
    cfg = dataclasses.replace(SMALL, width=24, timing_signal=True, **heads)
    m = setup(cfg, dtype="float32")
    host = np.empty_like(m.flat)
    recipe = TrainConfig()
    nats = step.gradients(m.state(), host, step.cut(m.ids, None, cfg, recipe, np), cfg,
                          recipe).nats
    _, dtype = select_precision(precision, cupy)
    ends = []
    for _ in range(2):
        grads = cupy.empty(m.flat.size, "float32")
        state = m.state()._replace(flat=cupy.asarray(m.flat), centroids=on_gpu(cupy, m.centroids))
        result = step.gradients(state, grads, step.cut(m.ids, None, cfg, recipe, cupy), cfg,
                                recipe, dtype)
        ends.append((float(result.nats), grads.get()))
    tolerance = {"float32": 1e-4, "tf32": 2e-2}.get(precision, 0.15)
    assert abs(ends[0][0] - float(nats)) < tolerance * float(nats)
    assert np.linalg.norm(ends[0][1] - host) < tolerance * np.linalg.norm(host)
    assert ends[0][0] == ends[1][0]
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decoding(cupy, heads):
    m = setup(dataclasses.replace(SMALL, timing_signal=True, **heads), dtype="float32")
    logits = []
    for put in (lambda x: x, lambda x: on_gpu(cupy, x)):
        params, centroids = views(put(m.flat), m.table), put(m.centroids)
        z, memory = decode.prefill(params, centroids, m.cfg, put(m.ids[:, :5]), 12)
        for t in range(5, 9):
            z = decode.step(params, centroids, m.cfg, memory, put(m.ids[:, t]))
        logits.append(to_host(z))
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("routing, keys", [
    ("causal", "--no-shift-keys"), ("causal", "--shift-keys"), ("topk", "--shift-keys"),
    ("random", "--shift-keys")])
@pytest.mark.parametrize("flags", [[], ["--optimizer", "adafactor", "--accumulate", "2"]], ids=str)
def test_cuda_graph(cupy, tmp_path, routing, keys, flags):
    """A recorded step gives the bits of a step kernel by kernel, dropout and all."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 117)) * 200)
    for name in ("--cuda-graph", "--no-cuda-graph"):
        train.main([str(text), *SMALL_RUN, "--device", "cuda", "--routing", routing, keys, name,
                    *flags, "--residual-dropout", "0.1", "--attention-dropout", "0.1",
                    "--target-dropout", "0.1", "--out", str(tmp_path / name)])
    a, b = (np.load(tmp_path / x / "last.npz") for x in ("--cuda-graph", "--no-cuda-graph"))
    for key in a.files:
        if key != "__meta__":
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("precision", ["auto", "float32", "fp16"])
def test_runs_resume_and_travel(cupy, tmp_path, precision):
    """A GPU run stopped and resumed ends with the same bits; the CPU goes on from it and back."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 117)) * 200)
    gpu = ["--device", "cuda", "--precision", precision]
    train.main([str(text), *SMALL_RUN, *gpu, "--out", str(tmp_path / "a")])
    train.main([str(text), *SMALL_RUN, *gpu, "--out", str(tmp_path / "b"), "--stop-after", "5"])
    train.main(["--resume", *gpu, "--out", str(tmp_path / "b")])
    a, b = (np.load(tmp_path / x / "last.npz")["params"] for x in "ab")
    np.testing.assert_array_equal(a, b)
    if precision == "float32":
        for device in ("cpu", "cuda"):
            train.main(["--resume", "--device", device, "--precision", "float32", "--steps",
                        "14" if device == "cpu" else "16", "--out", str(tmp_path / "b")])
        assert checkpoint.load(tmp_path / "b" / "last.npz")[1]["step"] == 16
    sample.main([str(tmp_path / "b"), "--tokens", "5", "--device", "cuda"])


def test_out_of_memory(cupy, tmp_path):
    """One clear line instead of a traceback."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 117)) * 200_000)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=64 << 20)
    try:
        with pytest.raises(UserError, match="out of memory.*--recompute"):
            train.main([str(text), *SMALL_RUN, "--seq-len", "65536", "--device", "cuda", "--out",
                        str(tmp_path / "c")])
    finally:
        pool.set_limit(size=0)
