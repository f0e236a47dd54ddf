"""The whole model: gradients, causality, special cases that equal full attention, parameters."""

import dataclasses

import numpy as np
import pytest
from helpers.models import NOISE, SMALL, check_gradient, setup
from helpers.strategies import configs, lengths, normal, seeds, widths
from hypothesis import assume, given

from rt_scratch import dispatch, model
from rt_scratch.kernels import cpu
from rt_scratch.layers import normalize
from rt_scratch.parameters import views
from rt_scratch.routing import CAUSAL, MEAN_FLOOR, TOPK, Rule, routing_attention


@given(configs(), seeds)
def test_gradients(cfg, seed):
    check_gradient(setup(cfg, seed), seed)


@given(configs(), seeds)
def test_recomputing_changes_no_bit(cfg, seed):
    m = setup(cfg, seed)
    runs = [m.loss(noise=NOISE, recompute=recompute) for recompute in (False, True)]
    assert runs[0][0] == runs[1][0]
    np.testing.assert_array_equal(m.gradient(runs[0][1]), m.gradient(runs[1][1]))


@given(configs(dropout=False), seeds)
def test_gradient_reaches_every_parameter(cfg, seed):
    """But for those that cannot matter: unused rows of tables."""
    assume(cfg.seq_len > 4 and cfg.lookback > 0 and cfg.block > 1)
    m = setup(cfg, seed, batch=8)
    _, cache, _ = m.loss()
    g = m.gradient(cache)
    for leaf in m.table:
        if "_rel_" not in leaf.name and not (
                cfg.n_clusters * cfg.window < 2 or cfg.window == 1):
            assert np.abs(g[leaf.start : leaf.stop]).max() > 0, leaf.name


# ---------------------------------------------------------------------------------- look-ahead

def change_suffix(m, seed):
    """(cut, logits before and after the ids from `cut` on are drawn again, both reports)."""
    rng = np.random.default_rng(seed)
    cut = int(rng.integers(0, m.cfg.seq_len))
    ids = m.ids.copy()
    ids[:, cut:] = rng.integers(0, m.cfg.vocab_size, ids[:, cut:].shape)
    reports = [model.forward(m.params, m.centroids, m.cfg, x, m.labels)[2] for x in (m.ids, ids)]
    return cut, m.logits(), m.logits(ids), reports


@given(configs(routings=("causal", "random")), seeds)
def test_no_look_ahead(cfg, seed):
    """Logits up to and including `cut` depend on earlier tokens alone; memberships likewise."""
    cut, before, after, (a, b) = change_suffix(setup(cfg, seed), seed)
    np.testing.assert_allclose(after[:, : cut + 1], before[:, : cut + 1], rtol=0, atol=1e-12)
    for layer, route in a.routes.items():
        np.testing.assert_array_equal(
            route.winner[:, :, : cut + 1], b.routes[layer].winner[:, :, : cut + 1])


def test_topk_looks_ahead():
    """The paper's mode: later tokens change earlier logits. If this fails, the leak is gone."""
    cfg = dataclasses.replace(SMALL, routing="topk", seq_len=64, window=8)
    change = suffix_effect(setup(cfg))
    assert (change[:48] > 1e-3).sum() > 10
    change = suffix_effect(setup(dataclasses.replace(cfg, attention="local")))
    assert (change[:49] == 0).all() and (change[49:] > 0).all()


def suffix_effect(m, cut=48):
    """By how much other tokens from `cut` on change the logits of each position."""
    ids = m.ids.copy()
    ids[:, cut:] = (ids[:, cut:] + 1) % m.cfg.vocab_size
    return np.abs(m.logits(ids) - m.logits()).max((0, 2))


# ------------------------------------------------------------------- clusters that hold everything

def full_attention(q, v, scale):
    """Causal attention with the queries as keys, dense."""
    z = scale * np.einsum("bhid,bhjd->bhij", q, q)
    z = np.where(np.tri(q.shape[2], dtype=bool), z, -np.inf)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


@given(seeds, lengths, widths)
def test_one_cluster_is_full_attention(seed, t, d):
    rng = np.random.default_rng(seed)
    q, v, mu = normal(rng, (2, 2, t, d)), normal(rng, (2, 2, t, d)), normal(rng, (2, 1, d))
    want = full_attention(normalize(q)[0], v, 0.6)
    for window in (t, t + 3):
        rule = Rule(CAUSAL, window, 0.6)
        (o, _), _, _, _ = routing_attention(q, None, v, None, None, mu, rule)
        np.testing.assert_allclose(o, want, rtol=1e-11, atol=1e-12)
    (o, _), _, _, _ = routing_attention(q, None, v, None, None, mu, Rule(TOPK, t, 0.6))
    np.testing.assert_allclose(o * (1 + MEAN_FLOOR), want, rtol=1e-11, atol=1e-12)


@given(seeds, lengths)
def test_wide_block_is_full_attention(seed, t):
    """`local` with a block of everything and `full` are one model."""
    cfg = dataclasses.replace(SMALL, seq_len=t, attention="full")
    local = dataclasses.replace(cfg, attention="local", block=t + 2, lookback=1)
    np.testing.assert_allclose(setup(cfg, seed).logits(), setup(local, seed).logits(),
                               rtol=1e-11, atol=1e-12)


def test_padding_is_not_scored():
    cfg = dataclasses.replace(SMALL, pad_id=0)
    ids = np.array([[0, 3, 0], [1, 2, 0]])
    np.testing.assert_array_equal(model.target_weights(cfg, ids, "float32"),
                                  [[0, 1, 0], [1, 1, 0]])
    assert model.target_weights(SMALL, ids, "float32").all()


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("changes", [
    dict(routing="causal"), dict(routing="topk", ffn="relu", share_qk=False),
    dict(routing="random", ffn="swiglu", norm="post", timing_signal=True),
    dict(kind="image", image_size=3, seq_len=27, vocab_size=256, n_classes=3)], ids=str)
def test_float32_stays_float32(changes, twins, monkeypatch):
    """With every dropout on, by the plain functions and by the twins: no wide array is promoted."""
    if twins:
        for name, function in cpu.TWINS.items():
            monkeypatch.setitem(dispatch.twins[name], "numpy", (function, None))
    rates = dict.fromkeys(("embed_dropout", "attention_dropout", "ffn_dropout",
                           "residual_dropout"), 0.2)
    m = setup(dataclasses.replace(SMALL, **rates, **changes).validate(), dtype="float32")
    loss, cache, report = m.loss(noise=NOISE)
    assert loss.dtype == m.logits().dtype == np.float32
    assert all(x.counts.dtype == np.float32 for x in report.memberships.values())
    assert promoted(cache) == 0
    grads = views(np.zeros_like(m.flat), m.table)
    for i, block in enumerate(cache.forward.blocks):
        dy = np.ones((*m.ids.shape, m.cfg.width), "float32")
        assert model.block_backward(dy, 0.1, block, grads["layers"][i]).dtype == np.float32


def promoted(tree):
    """How many arrays of float64 are in it, numbers aside."""
    if isinstance(tree, tuple | list):
        return sum(map(promoted, tree))
    return int(getattr(tree, "dtype", None) == np.float64 and np.ndim(tree) > 0)
