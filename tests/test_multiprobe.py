"""multiprobe.py: whom a query sees, what it computes, its gradients; several clusters per query."""

import dataclasses

import numpy as np
import pytest
from helpers import strictxp
from helpers.gradcheck import check_gradients
from helpers.loops import (
    clipped,
    clusters,
    dropouts,
    loop_attention,
    reaches,
    routing_inputs,
    tables,
)
from helpers.models import SMALL, check_decoding, setup
from helpers.strategies import layouts, lengths, normal, seeds, widths
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch import decode
from rt_scratch.kmeans import nearest
from rt_scratch.layers import normalize, shift_right
from rt_scratch.multiprobe import MULTIPROBE, nearest_several, tiles
from rt_scratch.routing import CAUSAL, SHIFTED, Rule, routing_attention, routing_attention_backward

EXACT = dict(rtol=1e-11, atol=1e-12)
windows = st.sampled_from([1, 2, 3, 8, 50])
several = st.sampled_from([1, 2, 3, 9])


def seen_by(probes, key_winner, window, t):
    """Keys that position t of one head sees, from the definition."""
    return {s for c in probes[t] for s in
            [s for s in range(t + 1) if key_winner[s] == c][-window:]}


@given(seeds, lengths, clusters, several, st.booleans())
def test_nearest_several(seed, t, k, n, ties):
    """In the order of the products with centroids of length 1, ties to the lower index."""
    rng, q, _, _, mu = routing_inputs(seed, t, 4, k)
    if ties:
        mu[:, k // 2:] = mu[:, : k - k // 2]
    found = nearest_several(q, mu, n)
    scores = q @ (mu / np.linalg.norm(mu, axis=-1, keepdims=True)).swapaxes(-1, -2)
    want = np.argsort(-scores.round(9), axis=-1, kind="stable")[..., :n]
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(found[..., 0], nearest(q, mu, equal_length=True))


@given(seeds, lengths, clusters, several, windows)
def test_tiles(seed, t, k, r, window):
    """Every query has a row of its own for each of its clusters, and they see what they should."""
    rng = np.random.default_rng(seed)
    probes = np.argsort(rng.random((2, 3, t, k)))[..., :r]
    key_winner = rng.integers(0, k, (2, 3, t))
    tile = tiles(probes, key_winner, window)
    n, s = tile.query.shape[2:]
    assert n * s <= probes.shape[-1] * t + t + 2 * s and s == -(-min(window, t) // 2)
    for b, h in np.ndindex(2, 3):
        rows, used = tile.rows[b, h], set()
        for i, c in np.ndindex(rows.shape):
            at = divmod(rows[i, c], s)
            assert tile.query[b, h][at] == i and rows[i, c] not in used
            used.add(rows[i, c])
            visible = tile.visible[b, h][at]
            keys = tile.keys[b, h, at[0]][visible]
            want = seen_by(probes[b, h, :, c : c + 1], key_winner[b, h], window, i)
            assert set(keys) == want and len(keys) == len(want)
            if len(keys):
                assert tile.column[b, h][at] == np.flatnonzero(visible)[-1]
        spare = set(range(n * s)) - used
        assert not tile.visible[b, h].reshape(n * s, -1)[sorted(spare)].any()


@given(seeds, lengths, clusters, several, windows, widths, reaches, st.booleans())
def test_against_loops(seed, t, k, r, window, d, reach, shared):
    """One softmax over the latest keys of all clusters that a query looks into."""
    rng, q, key, v, mu = routing_inputs(seed, t, d, k)
    rel_k, rel_v = tables(rng, reach, d)
    (o, loss), _, membership, route = routing_attention(
        q, None if shared else key, v, rel_k, rel_v, mu, Rule(MULTIPROBE, window, 0.5, n_probes=r))
    qn, kn = normalize(q)[0], normalize(q if shared else key)[0]
    nothing = 0
    for b, h in np.ndindex(2, 2):
        probes, own = route.probes[b, h], nearest(kn, mu, equal_length=True)[b, h]
        np.testing.assert_array_equal(own, route.key_winner[b, h])
        seen = [seen_by(probes, own, window, i) for i in range(t)]
        nothing += sum(not x for x in seen)
        before = [[(own[: i + 1] == c).sum() for c in range(k)] for i in range(t)]
        rank = [before[j][own[j]] - 1 for j in range(t)]
        rel = clipped(rel_k, rel_v, reach)
        want = loop_attention(
            qn[b, h], kn[b, h], v[b, h], lambda i, j, seen=seen: j in seen[i], 0.5,
            rel and (lambda i, j, rank=rank, before=before, own=own, rel=rel:
                     rel(before[i][own[j]] - 1, rank[j])))
        np.testing.assert_allclose(o[b, h], want, **EXACT)
    np.testing.assert_allclose(membership.uncovered, nothing / (4 * t))
    assert not (shared and nothing) and membership.several == 0
    assert membership.counts.sum() == 4 * t * (1 if shared else 2)


@given(seeds, lengths, clusters, several, windows, widths, reaches, layouts, st.booleans(),
       st.booleans(), dropouts)
def test_gradients(seed, t, k, r, window, d, reach, layout, shared, ties, dropped):
    rng, q, key, v, mu = routing_inputs(seed, t, d, k, layout, ties)
    args = (q, None if shared else key, v, *tables(rng, reach, d))
    rule = Rule(MULTIPROBE, window, 0.5, n_probes=r)
    route = routing_attention(*args, mu, rule)[3]
    check_gradients(lambda *args: routing_attention(*args, mu, rule, route, dropped)[:2],
                    routing_attention_backward, args, rng,
                    step=1e-4 * min(1, min(x.std(-1).min() for x in (q, key)) / 3))


@given(seeds, st.sampled_from([CAUSAL, SHIFTED]), lengths, clusters, windows, widths, reaches,
       layouts, st.booleans())
def test_one_probe_of_shared_keys_is_sorted(seed, sort, t, k, window, d, reach, layout, ties):
    """What is faster is the same: results, statistics, routes, gradients."""
    rng, q, _, v, mu = routing_inputs(seed, t, d, k, layout, ties)
    key = shift_right(q.swapaxes(1, 2)).swapaxes(1, 2) if sort is SHIFTED else None
    ends = []
    for mode in (MULTIPROBE, sort):
        args = (q, key, v, *tables(np.random.default_rng(1), reach, d))
        (o, loss), cache, membership, route = routing_attention(*args, mu, Rule(mode, window, 0.5))
        ends.append((o, loss, *membership, route.winner, route.key_winner,
                     *routing_attention_backward(np.cos(o), 0.3, cache)))
    for a, b in zip(*ends, strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * (1 + np.abs(a).max()))


@given(seeds, lengths, clusters, several, windows)
def test_later_tokens_have_no_influence(seed, t, k, r, window):
    """Gradients at later tokens are exactly 0; other later tokens change outputs by rounding."""
    rng, q, key, v, mu = routing_inputs(seed, t, 4, k)
    rule = Rule(MULTIPROBE, window, 0.5, n_probes=r)
    cut = int(rng.integers(0, t))
    (o, _), cache, *_ = routing_attention(q, key, v, None, None, mu, rule)
    do = np.zeros_like(o)
    do[:, :, cut] = 1
    for g in routing_attention_backward(do, 0.0, cache)[:3]:
        assert (g[:, :, cut + 1:] == 0).all()
    q, key, v = (np.concatenate([x[:, :, : cut + 1], 9 * normal(rng, x[:, :, cut + 1:].shape)], 2)
                 for x in (q, key, v))
    (after, _), *_ = routing_attention(q, key, v, None, None, mu, rule)
    np.testing.assert_allclose(after[:, :, : cut + 1], o[:, :, : cut + 1], rtol=0, atol=1e-13)


def test_a_second_cluster_finds_the_key_behind_the_border():
    """Query and key on both sides of a border: causal misses it, two probes do not."""
    mu = np.array([[[1.0, -1, 0, 0], [-1.0, 1, 0, 0]]])
    key, query = [0.1, -0.1, 3, -3], [-0.1, 0.1, 3, -3]
    q = np.array([[[query, query]]])
    k = np.array([[[key, [-3.0, 3, 0.1, -0.1]]]])
    v = np.array([[[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]]])
    seen = [routing_attention(q, k, v, None, None, mu, Rule(MULTIPROBE, 4, 1.0, n_probes=r))[0][0]
            for r in (1, 2)]
    np.testing.assert_allclose(seen[0][0, 0], [[0, 0, 0, 0], [0, 1, 0, 0]], atol=1e-12)
    assert seen[1][0, 0, 1, 0] > 0.9
    np.testing.assert_allclose(seen[1][0, 0].sum(-1), 1)


@pytest.mark.parametrize("share_qk", [True, False])
def test_decoding_memory_and_reads_do_not_grow(share_qk):
    """K rings of W keys, whatever the length of the text."""
    cfg = dataclasses.replace(SMALL, n_probes=2, share_qk=share_qk).validate()
    m = setup(cfg)
    sizes = [sum(a.size for layer in decode.Memory(m.params, cfg, 1, n).stores for store in layer
                 for a in store.seen) for n in (100, 100_000)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("share_qk", [True, False])
@pytest.mark.parametrize("prompt", [1, 12, 22])
def test_decoding_after_a_prompt(share_qk, prompt):
    """Rings filled by a prompt hold each key in the cluster of its own vector."""
    cfg = dataclasses.replace(SMALL, n_probes=2, share_qk=share_qk, window=3).validate()
    check_decoding(setup(cfg), prompt)


@pytest.mark.parametrize("reach", [0, 2])
def test_the_host_never_waits(reach):
    """Forward and backward on device arrays: the same numbers, and nothing is read back."""
    rng, q, key, v, mu = routing_inputs(0, 23, 5, 3)
    args = (q, key, v, *tables(rng, reach, 5))
    rule, ends = Rule(MULTIPROBE, 6, 0.5, n_probes=2), []
    for put in (np.asarray, strictxp.asarray):
        moved = [None if a is None else put(a) for a in args]
        (o, loss), cache, told, _ = routing_attention(*moved, put(mu), rule)
        ends.append([o, loss, *told, *routing_attention_backward(put(np.cos(q)), 0.3, cache)])
    with strictxp.reading():
        for host, device in zip(*ends, strict=True):
            if host is not None:
                np.testing.assert_allclose(device.get(), host, rtol=1e-12, atol=1e-14)


def test_half_precision_is_computed_in_float32():
    """The result is that of float32 on the same rounded inputs, rounded once."""
    rng, q, key, v, mu = routing_inputs(0, 23, 8, 3)
    rule = Rule(MULTIPROBE, 6, 0.5, n_probes=2)
    half = [x.astype("float16") for x in (q, key, v)]
    wide = [x.astype("float32") for x in half]
    a, b = (MULTIPROBE.choose(*x[:2], mu.astype("float32"), rule) for x in (half, wide))
    np.testing.assert_array_equal(a.probes, b.probes)
    (got, cache, _), (want, exact, _) = (MULTIPROBE.attend(*x, None, None, a, rule)
                                         for x in (half, wide))
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, want.astype("float16"))
    do = np.cos(want).astype("float16")
    for x in MULTIPROBE.attend_backward(do, cache)[:3]:
        assert x.dtype == np.float16 and np.isfinite(x).all()
