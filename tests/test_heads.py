"""Kinds of head: how a layer divides its projections, what each kind computes, full layers."""

import dataclasses

import numpy as np
import pytest
from helpers.loops import loop_attention
from helpers.models import NOISE, SMALL, check_decoding, check_gradient, setup
from helpers.strategies import configs, normal, seeds
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch.decode import Memory
from rt_scratch.heads import KINDS, Context, head_groups, key_heads
from rt_scratch.layers import normalize
from rt_scratch.parameters import init_centroids


@given(configs())
def test_groups_divide_the_heads(cfg):
    """Every query, value and key column belongs to one kind; shared keys have no columns."""
    for i in range(cfg.n_layers):
        divided = head_groups(cfg, i)
        queries = [h for group in divided for h in range(group.heads.start, group.heads.stop)]
        keys = [h for group in divided if group.keys
                for h in range(group.keys.start, group.keys.stop)]
        assert queries == list(range(cfg.n_heads))
        assert keys == list(range(key_heads(cfg, i)))
        for group, (name, n) in zip(divided, cfg.layer_heads(i), strict=True):
            assert group.kind is KINDS[name] and group.heads.stop - group.heads.start == n
            if group.kind.routes and cfg.share_qk:
                assert group.keys is None
            else:
                assert group.keys.stop - group.keys.start == n


def test_groups_of_a_mixed_layer():
    cfg = dataclasses.replace(SMALL, n_routing_heads=2, n_local_heads=1)
    assert [group[1:] for group in head_groups(cfg, 0)] == [
        (slice(0, 2), None, False), (slice(2, 3), slice(0, 1), False)]
    apart = dataclasses.replace(cfg, share_qk=False)
    assert [group[1:3] for group in head_groups(apart, 0)] == [
        (slice(0, 2),) * 2, (slice(2, 3),) * 2]


@pytest.mark.parametrize("share_qk", [True, False])
def test_shifted_keys_are_those_of_the_position_before(share_qk):
    """In routing and full heads; local heads keep theirs. `unshifted` is the transpose."""
    cfg = dataclasses.replace(SMALL, n_layers=2, full_layers=(1,), n_routing_heads=2,
                              n_local_heads=1, share_qk=share_qk, shift_keys=True)
    rng = np.random.default_rng(0)
    for layer in range(2):
        q, k = normal(rng, (2, 3, 6, 4)), normal(rng, (2, key_heads(cfg, layer), 6, 4))
        for group in head_groups(cfg, layer):
            queries, keys = group.queries_and_keys(q, k)
            own = k[:, group.keys] if group.keys else q[:, group.heads]
            assert (queries == q[:, group.heads]).all()
            if group.kind is KINDS["local"]:
                assert (keys == own).all()
                continue
            assert (keys[:, :, 1:] == own[:, :, :-1]).all() and not keys[:, :, 0].any()
            dq, dk = normal(rng, queries.shape), normal(rng, keys.shape)
            back, back_k = group.unshifted(dq, dk)
            assert (back_k is None) == (group.keys is None)
            into_k = back - dq if back_k is None else back_k
            np.testing.assert_allclose((into_k * own).sum(), (dk * keys).sum())


@pytest.mark.parametrize("changes", [{"shift_keys": True}, {"share_qk": False}, {"n_probes": 2}])
def test_a_causal_key_joins_the_cluster_of_its_own_vector(changes):
    """And a query sees what is in its own clusters, whichever way they are computed."""
    t, d = 12, 12
    cfg = dataclasses.replace(SMALL, seq_len=t, width=3 * d, window=t, n_clusters=3, **changes)
    rng = np.random.default_rng(0)
    group, _ = head_groups(cfg, 0)
    q, k = normal(rng, (1, cfg.n_heads, t, d)), normal(rng, (1, cfg.n_heads, t, d))
    queries, keys = group.queries_and_keys(q, k)
    mu = normal(rng, (queries.shape[1], 3, d))
    o, _, routed = group.kind.forward(queries, keys, np.broadcast_to(np.eye(t), queries.shape), {},
                                     Context(cfg, 0, mu))
    into = normalize(queries)[0] @ mu.swapaxes(-1, -2) / np.linalg.norm(mu, axis=-1)[:, None]
    joined = normalize(queries if keys is None else keys)[0] @ mu.swapaxes(
        -1, -2) / np.linalg.norm(mu, axis=-1)[:, None]
    probes = np.argsort(-into, axis=-1)[..., : cfg.n_probes]         # (1, H, T, R)
    meet = (probes[:, :, :, None] == joined.argmax(-1)[:, :, None, :, None]).any(-1)
    np.testing.assert_array_equal(o > 0, meet & np.tri(t, dtype=bool))


# What a kind sees: a query (last position) with one key per token. Values are the unit vectors, so
# that the output shows the weights; every key of a routing head is its query.
SCALE = {"local": 1.0, "full": 1.0, "causal": 5 ** -0.5, "topk": 1.0, "random": 5 ** -0.5}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_kind_computes(name):
    """The released code scales queries of all heads before; routing heads normalise that away, and
    topk keeps logits of length D, ours divides them by sqrt(D)."""
    t, d = 5, 5
    cfg = dataclasses.replace(SMALL, seq_len=t, width=3 * d, window=t, n_clusters=1, block=2,
                              lookback=1)
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, (1, 1, t, d)), normal(rng, (1, 1, t, d)), np.eye(t)[None, None]
    mu = normal(rng, (1, 1, d))
    kind = KINDS[name]
    o, _, routed = kind.forward(q, k, v, {}, Context(cfg, 0, mu))
    if kind.routes:
        q, k = normalize(q)[0], normalize(k)[0]
        assert (routed.route.winner == 0).all() and routed.membership.counts.sum() in (t, 2 * t)
    else:
        assert routed is None
    first = [0, 0, 0, 0, 2] if name == "local" else [0] * t  # blocks of two, one before
    want = loop_attention(q[0, 0], k[0, 0], v[0, 0], lambda i, j: first[i] <= j <= i, SCALE[name])
    if name == "topk":
        want /= 1.01  # members of one cluster: sum / (1 + 1e-2)
    np.testing.assert_allclose(o[0, 0], want, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------- full layers

def test_full_layers_everywhere_are_the_full_model():
    """The same parameters, the same bits, whichever flag says so."""
    ends = []
    for changes in (dict(full_layers=(0, 1)), dict(full_layers=(-1, -2)), dict(attention="full")):
        m = setup(dataclasses.replace(SMALL, **changes).validate())
        assert not m.centroids
        loss, cache, _ = m.loss(noise=NOISE)
        ends.append((m.logits(), loss, m.gradient(cache)))
    for end in ends[1:]:
        for a, b in zip(end, ends[0], strict=True):
            np.testing.assert_array_equal(a, b)


@given(seeds, st.sampled_from([(0,), (-1,), (0, 1)]),
       st.sampled_from(["causal", "random"]), st.sampled_from([True, False]),
       st.sampled_from([0, 5]))
def test_hybrid(seed, full_layers, routing, share_qk, prompt):
    """Gradient of the whole model; decoding keeps everything in full layers alone."""
    cfg = dataclasses.replace(SMALL, full_layers=full_layers, routing=routing, share_qk=share_qk,
                              n_layers=3, attention_dropout=0.2).validate()
    m = setup(cfg, seed)
    full = {i % 3 for i in full_layers}
    assert set(init_centroids(cfg, np, "float64", 0)) == {0, 1, 2} - full
    check_gradient(m, seed)
    check_decoding(m, prompt)
    sizes = [[sum(array.size for store in stores for array in store.seen)
              for stores in Memory(m.params, cfg, 1, capacity).stores] for capacity in (500, 5000)]
    assert {i for i in range(3) if sizes[0][i] < sizes[1][i]} == full


def test_a_full_layer_sees_beyond_the_block():
    """One layer, blocks of one, no lookback: local heads see nothing else, full heads all."""
    for changes, seen in ((dict(full_layers=(0,)), True), (dict(attention="local"), False)):
        cfg = dataclasses.replace(SMALL, n_layers=1, block=1, lookback=0, **changes).validate()
        m = setup(cfg)
        ids = m.ids.copy()
        ids[:, 0] = (ids[:, 0] + 1) % cfg.vocab_size
        change = np.abs(m.logits(ids) - m.logits()).max((0, 2))
        assert change[1] > 0 and (change[2:] > 0).all() == seen and (change[2:] > 0).any() == seen
