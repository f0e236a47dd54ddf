"""What a change costs: each addition here is its functions and one row of one table.

A feed-forward layer, a kind of head, an optimizer, a schedule; then all four at once through
train.py's own flags.
"""

import dataclasses

import numpy as np
import pytest
from helpers.models import NOISE, SMALL, check_decoding, check_gradient, setup
from helpers.strategies import seeds
from hypothesis import given
from hypothesis import strategies as st

import sample
import train
from rt_scratch import model, step
from rt_scratch.attention import (
    attend,
    distance_rows,
    local_attention,
    local_attention_backward,
)
from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.dispatch import array_module
from rt_scratch.dropout import dropout, dropout_backward
from rt_scratch.errors import UserError
from rt_scratch.heads import KINDS, Context, Kind
from rt_scratch.layers import (
    FEED_FORWARDS,
    FeedForward,
    LinearCache,
    linear,
    linear_backward,
)
from rt_scratch.optim import OPTIMIZERS, SCHEDULES, Optimizer, learning_rate
from rt_scratch.parameters import init_parameters, parameter_table
from rt_scratch.run.costs import flops_per_token
from rt_scratch.stores import Decoding, full_fill, full_store

# ------------------------------------------------------------------------ a feed-forward layer


def squared_ffn(x, w_in, b_in, w_out, dropped=None):
    """y = dropout(max(x w_in + b_in, 0)^2) w_out (So et al. 2021)."""
    a, _ = linear(x, w_in, b_in)
    a = array_module(x).maximum(a, 0)
    h, _ = dropout(a * a, dropped)
    return linear(h, w_out)[0], (x, w_in, w_out, a, h, dropped)


def squared_ffn_backward(dy, cache):
    x, w_in, w_out, a, h, dropped = cache
    dh, dw_out, _ = linear_backward(dy, LinearCache(h, w_out, False))
    da = 2 * a * dropout_backward(dh, dropped)
    dx, dw_in, db_in = linear_backward(da, LinearCache(x, w_in, True))
    return dx, dw_in, db_in, dw_out


SQUARED = FeedForward(squared_ffn, squared_ffn_backward,
                      lambda c, m: {"w_in": (c, m), "b_in": (m,), "w_out": (m, c)})


# ----------------------------------------------------------------------------- a kind of head

STRIDE = 3  # a query sees its own block and those before it, of every third position


def spread(x):
    """(B, H, T, D) -> (B, 3 H, T / 3, D): every third position from 0, from 1, from 2."""
    b, h, t, d = x.shape
    xp, n = array_module(x), -(-t // STRIDE)
    padded = xp.concatenate([x, xp.zeros((b, h, n * STRIDE - t, d), x.dtype)], axis=2)
    return padded.reshape(b, h, n, STRIDE, d).swapaxes(2, 3).reshape(b, h * STRIDE, n, d)


def gathered(y, t):
    """The inverse of `spread`."""
    b, h, n, d = y.shape
    y = y.reshape(b, h // STRIDE, STRIDE, n, d).swapaxes(2, 3)
    return y.reshape(b, h // STRIDE, n * STRIDE, d)[:, :, :t]


def dilated_forward(q, k, v, p, context):
    cfg = context.cfg
    o, cache = local_attention(
        spread(q), spread(k), spread(v), p.get("local_rel_k"), p.get("local_rel_v"), cfg.block,
        cfg.lookback, 1.0, dropped=context.dropped)
    return gathered(o, q.shape[2]), (cache, q.shape[2]), None


def dilated_backward(do, dcommitment, cache):
    local, t = cache
    dq, dk, dv, *drel = local_attention_backward(spread(do), local)
    tables = {} if drel[0] is None else dict(zip(("local_rel_k", "local_rel_v"), drel, strict=True))
    return gathered(dq, t), gathered(dk, t), gathered(dv, t), tables


def dilated_step(q, k, v, p, context, store, position):
    cfg, xp = context.cfg, array_module(q)
    store.k[:, :, position], store.v[:, :, position] = k, v
    own = slice(position % STRIDE, position + 1, STRIDE)
    keys, values, now = store.k[:, :, own], store.v[:, :, own], position // STRIDE
    tables = [p.get(f"local_rel_{x}") for x in "kv"]
    rows = [None if table is None else distance_rows(table, -now, 0)[0] for table in tables]
    seen = xp.arange(now + 1)[None] >= (now // cfg.block - cfg.lookback) * cfg.block
    return attend(q[:, :, None], keys, values, *rows, seen, 1.0)[0][:, :, 0]


DILATED = Kind("local", None, dilated_forward, dilated_backward,
               Decoding(full_store, full_fill, dilated_step), KINDS["local"].keys)


# ---------------------------------------------------------------------- an optimizer, a schedule

def momentum_update(flat, grads, state, table, lr, step, *, weight_decay=0.0):
    """m <- 0.9 m + g,  w <- w - lr (m + weight_decay w)."""
    state["m"] *= 0.9
    state["m"] += grads
    flat -= lr * (state["m"] + weight_decay * flat)


MOMENTUM = Optimizer(lambda flat, table: {"m": array_module(flat).zeros_like(flat)},
                     momentum_update)


def quadratic(step, lr, warmup, total):
    """From lr to 0 along a parabola."""
    return lr * (1 - step / total) ** 2


ROWS = [(FEED_FORWARDS, "squared", SQUARED), (KINDS, "dilated", DILATED),
        (OPTIMIZERS, "momentum", MOMENTUM), (SCHEDULES, "quadratic", quadratic)]


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    for table, name, row in ROWS:
        monkeypatch.setitem(table, name, row)


# ------------------------------------------------------------------------------------ the drills

@given(seeds, st.sampled_from(["pre", "post"]), st.sampled_from(["causal", "topk"]))
def test_a_feed_forward(seed, norm, routing):
    cfg = dataclasses.replace(SMALL, ffn="squared", norm=norm, routing=routing, ffn_dropout=0.2,
                              timing_signal=True).validate()
    m = setup(cfg, seed)
    assert {x.name for x in m.table if ".0.ffn." in x.name} == {
        f"layers.0.ffn.{name}" for name in ("w_in", "b_in", "w_out")}
    check_gradient(m, seed)
    if routing == "causal":
        check_decoding(m, 4)


@given(seeds, st.sampled_from([1, 2, 7, 23]), st.sampled_from([0, 3]), st.sampled_from([0, 1]),
       st.sampled_from([0, 1, 5]))
def test_a_kind_of_head(seed, t, reach, lookback, prompt):
    """Gradient of the whole model, decoding, and what it is: see every third position alone."""
    cfg = dataclasses.replace(SMALL, attention="dilated", seq_len=t, lookback=lookback, block=2,
                              local_max_distance=reach, attention_dropout=0.2).validate()
    m = setup(cfg, seed)
    assert cfg.layer_heads(0) == (("dilated", 3),) and not m.centroids
    check_gradient(m, seed)
    check_decoding(m, prompt)
    q, k, v = np.random.default_rng(seed).normal(size=(3, 1, 1, t, 4))
    o, _, _ = dilated_forward(q, k, v, {}, Context(cfg, 0))
    for i in range(t):
        first = max(0, i // STRIDE // 2 - lookback) * 2
        seen = [j for j in range(i + 1) if j % STRIDE == i % STRIDE and j // STRIDE >= first]
        w = np.exp(k[0, 0, seen] @ q[0, 0, i])
        np.testing.assert_allclose(o[0, 0, i], w / w.sum() @ v[0, 0, seen], rtol=1e-10)


def test_the_cost_of_a_new_row():
    local = dataclasses.replace(SMALL, attention="local")
    assert flops_per_token(dataclasses.replace(local, attention="dilated")) == \
        flops_per_token(local)


def test_an_optimizer_and_a_schedule():
    m = setup(SMALL)
    recipe = TrainConfig(optimizer="momentum", schedule="quadratic", lr=0.1, steps=4, clip=0.0,
                         weight_decay=0.5, precision="float64").validate()
    state = step.new_state(SMALL, recipe, np)._replace(flat=m.flat.copy(), centroids=m.centroids)
    flat, momentum, grads = m.flat.copy(), 0, np.empty_like(m.flat)
    for i in range(2):
        parts = step.cut(m.ids, None, SMALL, recipe, np)
        expected = step.gradients(state, grads, parts, SMALL, recipe)
        momentum = 0.9 * momentum + grads
        flat -= 0.1 * (1 - i / 4) ** 2 * (momentum + 0.5 * flat)
        state, result = step.train_step(state, grads, parts, SMALL, recipe)
        assert result.lr == 0.1 * (1 - i / 4) ** 2 and result.nats == expected.nats
        np.testing.assert_allclose(state.flat, flat, rtol=1e-12)


def test_all_rows_through_the_scripts(tmp_path, capsys):
    """New names are choices of train.py's flags; a run with them resumes exactly and samples."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 117)) * 100)
    flags = ("--attention dilated --ffn squared --optimizer momentum --schedule quadratic "
             "--lr 0.03 --device cpu --seq-len 16 --n-layers 1 --width 8 --ffn-width 8 --block 4 "
             "--batch 2 --eval-windows 2 --steps 4 --eval-every 2").split()
    train.main([str(text), *flags, "--out", str(tmp_path / "a")])
    train.main([str(text), *flags, "--out", str(tmp_path / "b"), "--stop-after", "2"])
    train.main(["--resume", "--device", "cpu", "--out", str(tmp_path / "b")])
    a, b = (np.load(tmp_path / x / "last.npz") for x in "ab")
    for name in ("params", "opt.m"):
        np.testing.assert_array_equal(a[name], b[name])
    sample.main([str(tmp_path / "a"), "--tokens", "5", "--device", "cpu"])
    assert "dilated heads" in capsys.readouterr().out


# ------------------------------------------------------------------------------- unknown names

@pytest.mark.parametrize("cls, field, choices", [
    (ModelConfig, "ffn", "geglu, swiglu, relu, squared"),
    (ModelConfig, "attention", "routing, local, full, dilated"),
    (ModelConfig, "routing", "causal, topk, random"),
    (TrainConfig, "optimizer", "adamw, muon, adafactor, momentum"),
    (TrainConfig, "schedule", "linear, cosine, constant, rsqrt, quadratic")])
def test_an_unknown_name_is_refused(cls, field, choices):
    """The choices are those of the table now, rows that were added included."""
    with pytest.raises(UserError, match=f"--{field} nonsense: choose from {choices}$"):
        cls(**{field: "nonsense"}).validate()


def test_the_script_refuses_unknown_names(tmp_path):
    for field in ("ffn", "attention", "routing", "optimizer", "schedule"):
        with pytest.raises((UserError, SystemExit)):
            train.main(["--dry-run", f"--{field}", "nonsense"])


@pytest.mark.parametrize("change", [
    dict(ffn="nonsense"), dict(attention="nonsense"), dict(routing="nonsense")])
def test_no_name_falls_through(change):
    """Also where nobody called validate: no other layer is built in its place."""
    with pytest.raises(KeyError, match="nonsense"):
        parameter_table(dataclasses.replace(SMALL, **change))
    m = setup(SMALL)
    with pytest.raises(KeyError, match="nonsense"):
        model.loss(m.params, m.centroids, dataclasses.replace(SMALL, **change), m.ids, m.weights,
                   noise=NOISE)
    with pytest.raises(KeyError, match="nonsense"):
        flops_per_token(dataclasses.replace(SMALL, **change))


def test_no_optimizer_or_schedule_falls_through():
    with pytest.raises(KeyError, match="nonsense"):
        learning_rate(0, "nonsense", 0.1, 1, 2)
    with pytest.raises(KeyError, match="nonsense"):
        step.new_state(SMALL, TrainConfig(optimizer="nonsense"), np)
    flat, _ = init_parameters(SMALL, np, "float32", 0)
    state = step.new_state(SMALL, TrainConfig(), np)
    with pytest.raises(KeyError, match="nonsense"):
        step.train_step(state, np.empty_like(flat), step.cut(
            setup(SMALL).ids, None, SMALL, TrainConfig(), np), SMALL,
                        TrainConfig(optimizer="nonsense"))
