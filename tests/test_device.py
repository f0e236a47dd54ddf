"""The whole model on device arrays, checked without a device: CuPy's rules, NumPy's numbers.

`strictxp` refuses what CuPy refuses and every wait for the GPU. Results must equal those on NumPy
arrays to the last bit: the same operations run in the same order.
"""

import copy
import dataclasses
import io
from contextlib import redirect_stdout

import numpy as np
import pytest
from helpers import strictxp
from helpers.models import SMALL, setup

import train
from rt_scratch import decode
from rt_scratch.config import TrainConfig
from rt_scratch.data.dataset import byte_dataset
from rt_scratch.dispatch import to_host
from rt_scratch.optim import OPTIMIZERS
from rt_scratch.parameters import views
from rt_scratch.run import checkpoint, log
from rt_scratch.run.folder import describe
from rt_scratch.step import cut, new_state, train_step

DROPOUTS = dict(embed_dropout=0.1, attention_dropout=0.1, ffn_dropout=0.1, residual_dropout=0.1)
MODELS = {
    "causal": dataclasses.replace(SMALL, routing="causal", **DROPOUTS, target_dropout=0.2),
    "topk": dataclasses.replace(SMALL, routing="topk", share_qk=False, ffn="relu", pad_id=0),
    "random": dataclasses.replace(SMALL, routing="random", norm="post", timing_signal=True),
    "own keys": dataclasses.replace(SMALL, share_qk=False, n_probes=2, **DROPOUTS),
    "shifted": dataclasses.replace(SMALL, shift_keys=True, **DROPOUTS),
    "hybrid": dataclasses.replace(SMALL, full_layers=(0,), ffn="swiglu"),
    "full": dataclasses.replace(SMALL, attention="full", tie_embedding=True, embed_width=6),
    "image": dataclasses.replace(SMALL, kind="image", image_size=3, seq_len=27, vocab_size=256,
                                 n_classes=3, **DROPOUTS),
}


def to_device(value):
    if isinstance(value, np.ndarray):
        return strictxp.asarray(value)
    if isinstance(value, dict):
        return {k: to_device(v) for k, v in value.items()}
    return type(value)(*map(to_device, value)) if hasattr(value, "_fields") else value


def assert_same(device, host):
    with strictxp.reading():
        np.testing.assert_array_equal(to_host(device), host)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_steps(name, recompute, optimizer):
    """Two steps of two parts: forward, backward, clipping, optimizer, k-means, without a wait."""
    m = setup(MODELS[name], batch=4, dtype="float32")
    recipe = TrainConfig(optimizer=optimizer, lr=0.01, schedule="constant", warmup=0, parts=2,
                         weight_decay=0.1, accumulate=2, recompute=recompute)
    ends = []
    for put, xp in ((lambda x: x, np), (to_device, strictxp)):
        flat = put(m.flat.copy())
        state = m.state()._replace(flat=flat, centroids=put(copy.deepcopy(m.centroids)),
                                   optimizer=OPTIMIZERS[optimizer].init(flat, m.table))
        grads = put(np.empty_like(m.flat))
        parts = cut(m.ids, m.labels, m.cfg, dataclasses.replace(recipe, parts=1), xp)
        assert len(parts) == 2
        for _ in range(2):
            state, result = train_step(state, grads, parts, m.cfg, recipe)
        ends.append((state, result))
    (host, host_result), (device, device_result) = ends
    assert np.abs(host.flat - m.flat).max() > 1e-3
    assert_same(device.flat, host.flat)
    assert_same(device_result.nats, host_result.nats)
    assert_same(device_result.norm, host_result.norm)
    for i, c in host.centroids.items():
        for x, y in zip(device.centroids[i], c, strict=True):
            assert_same(x, y)
    for key, value in host.optimizer.items():
        assert_same(device.optimizer[key], value)


@pytest.mark.parametrize("name", MODELS)
def test_decoding(name):
    """A prompt in one pass and tokens one by one; only the logits come back to the host."""
    m = setup(MODELS[name], dtype="float32")
    drawn = []
    for put in (lambda x: x, to_device):
        params = views(put(m.flat), m.table)
        labels = None if m.labels is None else put(m.labels)
        logits, memory = decode.prefill(params, put(m.centroids), m.cfg, put(m.ids[:, :5]), 12,
                                        labels)
        for t in range(5, 9):
            logits = decode.step(params, put(m.centroids), m.cfg, memory, put(m.ids[:, t]))
        drawn.append(logits)
    assert_same(drawn[1], drawn[0])


@pytest.mark.parametrize("name", ["causal", "image"])
def test_checkpoints_travel(tmp_path, name):
    """Saved from a device, restored on the host, and back: every array the same."""
    model, settings = MODELS[name], TrainConfig()
    config = describe("x", None, byte_dataset("x", {}, ""), model, settings)
    state = new_state(model, settings, np)
    fresh = new_state(model, settings, strictxp)
    assert_same(fresh.flat, state.flat)  # the same seed, the same start, wherever
    progress = checkpoint.Progress(2.5, 7.0)
    with strictxp.reading():
        checkpoint.save_state(tmp_path / "a.npz", fresh._replace(step=3), progress, config)

    def restored(name, xp):
        return checkpoint.restore(checkpoint.read_state(tmp_path / name), xp, for_training=True)

    home, kept = restored("a.npz", np)
    assert home.step == 3 and kept == progress
    np.testing.assert_array_equal(home.flat, state.flat)
    checkpoint.save_state(tmp_path / "b.npz", home, progress, config)
    back, _ = restored("b.npz", strictxp)
    assert_same(back.flat, state.flat)
    assert_same(back.optimizer["m"], state.optimizer["m"])
    assert_same(back.centroids[1].mu, state.centroids[1].mu)


@pytest.mark.parametrize("interval, reads", [(1, 6), (3, 3)])
def test_training_script_waits_once_per_log_line(tmp_path, monkeypatch, interval, reads):
    """train.py on device arrays ends with the same model as on the host, and between log lines
    the host never waits."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 117)) * 100)
    flags = [str(text), "--seq-len", "32", "--window", "8", "--block", "8", "--n-layers", "1",
             "--width", "16", "--ffn-width", "16", "--steps", "6", "--log-every", str(interval),
             "--eval-every", "0", "--eval-windows", "2", "--parts", "1"]
    monkeypatch.setattr(train, "select_device", lambda *_: (np, "plain"))
    with redirect_stdout(io.StringIO()):
        train.main([*flags, "--out", str(tmp_path / "host")])
    waits = []

    def counted(function):
        def call(*args, **kwargs):
            waits.append(function.__name__)
            with strictxp.reading():
                return function(*args, **kwargs)
        return call

    monkeypatch.setattr(train, "select_device", lambda *_: (strictxp, "strict"))
    for where, name in ((checkpoint, "check_finite"), (log, "step_row"), (log, "record"),
                        (train, "evaluate"),
                        (train, "show_sample"), (checkpoint, "save_state")):
        monkeypatch.setattr(where, name, counted(getattr(where, name)))
    with redirect_stdout(io.StringIO()):
        train.main([*flags, "--out", str(tmp_path / "device")])
    assert waits.count("check_finite") == reads
    a, b = (np.load(tmp_path / x / "last.npz")["params"] for x in ("host", "device"))
    np.testing.assert_array_equal(a, b)


def test_the_stand_in_is_strict():
    x = strictxp.asarray(np.arange(6.0).reshape(2, 3))
    for wait in (lambda: float(x.sum()), lambda: bool(x[0, 0] > 0), lambda: x[x > 1],
                 lambda: x.get(), lambda: list(x), lambda: x.sum().item()):
        with pytest.raises(strictxp.Waits):
            wait()
    for mix in (lambda: x + np.ones(3), lambda: np.ones(3) + x, lambda: np.exp(x),
                lambda: x @ np.eye(3), lambda: strictxp.exp(np.ones(3)), lambda: x[: x.sum()],
                lambda: np.asarray(x)):
        with pytest.raises(TypeError):
            mix()
    with pytest.raises(AttributeError):
        strictxp.maximum.reduceat  # noqa: B018
    assert isinstance(x.sum(), strictxp.ndarray) and x.sum().shape == ()
    with strictxp.reading():
        assert float(x.sum()) == 15
