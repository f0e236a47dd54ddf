"""The whole model on device arrays, checked without a device: CuPy's rules, NumPy's numbers.

`strictxp` refuses what CuPy refuses and every wait for the GPU. Results must equal those on NumPy
arrays to the last bit: the same operations run in the same order.
"""

import dataclasses
import io
from contextlib import redirect_stdout

import numpy as np
import pytest
from helpers import strictxp
from helpers.models import SMALL, setup

import train
from rt_scratch import decode, run
from rt_scratch.backend import to_host
from rt_scratch.config import TrainConfig
from rt_scratch.data.dataset import byte_dataset
from rt_scratch.model import views
from rt_scratch.optim import OPTIMIZERS, clip_by_global_norm
from rt_scratch.step import gradients, move_centroids

DROPOUTS = dict(embed_dropout=0.1, attention_dropout=0.1, ffn_dropout=0.1, residual_dropout=0.1)
MODELS = {
    "causal": dataclasses.replace(SMALL, routing="causal", **DROPOUTS, target_dropout=0.2),
    "topk": dataclasses.replace(SMALL, routing="topk", share_qk=False, ffn="relu", pad_id=0),
    "random": dataclasses.replace(SMALL, routing="random", norm="post", timing_signal=True),
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
    ends = []
    for put in (lambda x: x, to_device):
        flat, centroids = put(m.flat.copy()), put(m.centroids)
        grads = put(np.empty_like(m.flat))
        labels = [None if m.labels is None else put(m.labels[i : i + 2]) for i in (0, 2)]
        parts = [(put(m.ids[i : i + 2]), labels[i // 2]) for i in (0, 2)]
        start, update = OPTIMIZERS[optimizer]
        state = start(flat, m.table)
        for i in range(2):
            result = gradients(flat, grads, m.table, centroids, m.cfg, parts, 0, i, recompute)
            clip_by_global_norm(grads, 1.0)
            update(flat, grads, state, m.table, 0.01, i, weight_decay=0.1)
            centroids = move_centroids(centroids, result.memberships, m.cfg)
        ends.append((flat, result.nats, centroids, state))
    (flat, nats, centroids, state), device = ends
    assert np.abs(flat - m.flat).max() > 1e-3
    assert_same(device[0], flat)
    assert_same(device[1], nats)
    for i, c in centroids.items():
        for x, y in zip(device[2][i], c, strict=True):
            assert_same(x, y)
    for key, value in state.items():
        assert_same(device[3][key], value)


@pytest.mark.parametrize("name", MODELS)
def test_decoding(name):
    """A prompt in one pass and tokens one by one; only the scores come back to the host."""
    m = setup(MODELS[name], dtype="float32")
    drawn = []
    for put in (lambda x: x, to_device):
        params = views(put(m.flat), m.table)
        labels = None if m.labels is None else put(m.labels)
        scores, cache = decode.prefill(params, put(m.centroids), m.cfg, put(m.ids[:, :5]), 12,
                                       labels)
        for t in range(5, 9):
            scores = decode.step(params, put(m.centroids), m.cfg, cache, put(m.ids[:, t]))
        drawn.append(scores)
    assert_same(drawn[1], drawn[0])


@pytest.mark.parametrize("name", ["causal", "image"])
def test_checkpoints_travel(tmp_path, name):
    """Saved from a device, restored on the host, and back: every array the same."""
    model, settings = MODELS[name], TrainConfig()
    config = run.describe("x", None, byte_dataset("x", {}, ""), model, settings)
    state = run.new_state(model, settings, np)
    fresh = run.new_state(model, settings, strictxp)
    assert_same(fresh.flat, state.flat)  # the same seed, the same start, wherever
    with strictxp.reading():
        run.save(tmp_path / "a.npz", fresh._replace(step=3), config)
    home = run.restore(tmp_path / "a.npz", run.load(tmp_path / "a.npz"), state, config, np)
    assert home.step == 3
    np.testing.assert_array_equal(home.flat, state.flat)
    run.save(tmp_path / "b.npz", home, config)
    back = run.restore(tmp_path / "b.npz", run.load(tmp_path / "b.npz"), fresh, config, strictxp)
    assert_same(back.flat, state.flat)
    assert_same(back.optimizer["m"], state.optimizer["m"])


@pytest.mark.parametrize("interval, reads", [(1, 6), (3, 3)])
def test_training_script_waits_once_per_log_line(tmp_path, monkeypatch, interval, reads):
    """train.py on device arrays ends with the same model as on the host, and between log lines
    the host never waits."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 117)) * 100)
    flags = [str(text), "--seq-len", "32", "--window", "8", "--block", "8", "--n-layers", "1",
             "--width", "16", "--ffn-width", "16", "--steps", "6", "--log-every", str(interval),
             "--eval-every", "0", "--eval-windows", "2", "--parts", "1"]
    monkeypatch.setattr(train, "select_device", lambda _: (np, "plain"))
    with redirect_stdout(io.StringIO()):
        train.main([*flags, "--out", str(tmp_path / "host")])
    waits = []

    def counted(function):
        def call(*args, **kwargs):
            waits.append(function.__name__)
            with strictxp.reading():
                return function(*args, **kwargs)
        return call

    monkeypatch.setattr(train, "select_device", lambda _: (strictxp, "strict"))
    for name in ("check_finite", "log_row", "evaluate", "sample"):
        monkeypatch.setattr(train, name, counted(getattr(train, name)))
    monkeypatch.setattr(run, "save", counted(run.save))
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
