"""routing.py: which tokens meet (integers), what they compute, and its gradients."""

import numpy as np
import pytest
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
from helpers.strategies import layouts, lengths, normal, seeds, sizes, widths
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch.config import ModelConfig
from rt_scratch.heads import KINDS, HeadGroup
from rt_scratch.kmeans import nearest
from rt_scratch.layers import normalize
from rt_scratch.routing import (
    CAUSAL,
    MEAN_FLOOR,
    RANDOM,
    SHIFTED,
    TOPK,
    Rule,
    by_cluster,
    gather,
    inverse,
    random_clusters,
    routing_attention,
    routing_attention_backward,
    scatter_mean,
    scatter_mean_backward,
    scatter_sum,
    top_members,
)

EXACT = dict(rtol=1e-11, atol=1e-12)
modes = st.sampled_from([CAUSAL, TOPK, RANDOM, SHIFTED])
windows = st.sampled_from([1, 2, 3, 8, 50])
group = HeadGroup(KINDS["causal"], slice(None), None, shifted=True)  # shifts the keys of SHIFTED


# ------------------------------------------------------------------------------------ integers

@given(seeds, sizes, st.sampled_from([1, 2, 5, 16]), st.integers(1, 16), st.booleans())
def test_top_members(seed, rows, t, window, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (2, rows, t)).astype(float) if ties else normal(rng, (2, rows, t))
    window = min(window, t)
    index = top_members(scores, window)
    assert index.shape == (2, rows, window)
    for row, got in zip(scores.reshape(-1, t), index.reshape(-1, window), strict=True):
        best = sorted(range(t), key=lambda j: (-row[j], j))[:window]  # ties: the earlier position
        assert list(got) == sorted(best)


@given(seeds, lengths, clusters)
def test_by_cluster(seed, t, k):
    winner = np.random.default_rng(seed).integers(0, k, (2, 3, t))
    order = by_cluster(winner)
    for w, o in zip(winner.reshape(-1, t), order.reshape(-1, t), strict=True):
        assert list(o) == sorted(range(t), key=lambda j: (w[j], j))
    np.testing.assert_array_equal(
        np.take_along_axis(order, inverse(order), -1), np.broadcast_to(np.arange(t), order.shape))


@given(seeds, lengths, clusters, widths)
def test_permuting_clusters_permutes_rows(seed, t, k, d):
    rng, q, _, _, mu = routing_inputs(seed, t, d, k)
    order = rng.permutation(k)
    rule = Rule(TOPK, 3, 1.0)
    a, b = (TOPK.choose(q, q, m, rule) for m in (mu, mu[:, order]))
    np.testing.assert_array_equal(b.members, a.members[:, :, order])
    np.testing.assert_array_equal(order[b.winner], a.winner)


@given(seeds, st.sampled_from([2, 7, 16, 23]), clusters, widths)
def test_causal_membership_ignores_the_future(seed, t, k, d):
    rng, q, _, _, mu = routing_inputs(seed, t, d, k)
    cut = int(rng.integers(1, t))
    other = q.copy()
    other[:, :, cut:] = normal(rng, other[:, :, cut:].shape)
    a, b = (CAUSAL.choose(x, x, mu, Rule(CAUSAL, 4, 1.0)) for x in (q, other))
    np.testing.assert_array_equal(a.winner[:, :, :cut], b.winner[:, :, :cut])


def test_topk_membership_leaks_the_future():
    """One centroid, one member: a later token that scores higher throws the first one out."""
    mu, q = np.ones((1, 1, 1)), np.array([1.0, 0.5]).reshape(1, 1, 2, 1)
    louder = q.copy()
    louder[0, 0, 1] = 2.0
    rule = Rule(TOPK, 1, 1.0)
    assert TOPK.choose(q, q, mu, rule).members.item() == 0
    assert TOPK.choose(louder, louder, mu, rule).members.item() == 1


def test_random_clusters():
    """Drawn once per position and head, by seed and layer, whatever the text; all are used."""
    cfg = ModelConfig(seq_len=200, n_clusters=4)
    drawn = random_clusters(cfg, 1, np, 3, 200)
    assert drawn.shape == (3, 200) and set(drawn.flat) == {0, 1, 2, 3}
    assert np.bincount(drawn.ravel()).min() > 100
    assert (drawn[0] != drawn[1]).any()
    np.testing.assert_array_equal(random_clusters(cfg, 1, np, 3, 7), drawn[:, :7])
    np.testing.assert_array_equal(random_clusters(cfg, 1, np, 3, 203)[:, 200:], drawn[:, :3])
    for other in (random_clusters(cfg, 0, np, 3, 200), random_clusters(
            ModelConfig(seq_len=200, n_clusters=4, seed_random=1), 1, np, 3, 200)):
        assert (drawn != other).any()


# ------------------------------------------------------------------------------ gather, scatter

@given(seeds, lengths, clusters, st.integers(1, 5))
def test_gather_and_scatter(seed, t, k, w):
    """Tokens in no cluster, in one, in several."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, t, (2, 2, k, w))
    x, rows = normal(rng, (2, 2, t, 3)), normal(rng, (2, 2, k, w, 3))
    sums, times = np.zeros_like(x), np.zeros((2, 2, t, 1))
    members = gather(x, index)
    for b, h, c, i in np.ndindex(index.shape):
        position = index[b, h, c, i]
        assert (members[b, h, c, i] == x[b, h, position]).all()
        sums[b, h, position] += rows[b, h, c, i]
        times[b, h, position] += 1
    np.testing.assert_allclose(scatter_sum(rows, index, t), sums, **EXACT)
    mean, _ = scatter_mean(rows, index, t)
    np.testing.assert_allclose(mean, sums / (times + MEAN_FLOOR), **EXACT)
    assert (mean[times[..., 0] == 0] == 0).all()
    check_gradients(lambda r: scatter_mean(r, index, t),
                    lambda d, cache: (scatter_mean_backward(d, cache),), (rows,), rng)


# ---------------------------------------------------------------------------- routing attention

@given(seeds, modes, lengths, clusters, windows, widths, reaches, layouts, st.booleans(),
       st.booleans(), dropouts)
def test_gradients(seed, mode, t, k, window, d, reach, layout, shared, ties, dropped):
    """Every mode, keys shared or not, empty clusters, ties, tokens in none and in several."""
    rng, q, key, v, mu = routing_inputs(seed, t, d, k, layout, ties)
    args = (q, None if shared or mode is SHIFTED else key, v, *tables(rng, reach, d))
    drawn = rng.integers(0, k, (2, t)) if mode is RANDOM else None
    rule = Rule(mode, window, 0.5, clusters=drawn)

    def forward(q, key, *others, route=None):
        own = group.queries_and_keys(q, key) if mode is SHIFTED else (q, key)
        return routing_attention(*own, *others, mu, rule, route, dropped)

    def backward(do, dloss, cache):
        dq, dk, *others = routing_attention_backward(do, dloss, cache)
        return *(group.unshifted(dq, dk) if mode is SHIFTED else (dq, dk)), *others

    route = forward(*args)[3]
    spread = min(x.std(-1).min() for x in (q, key))
    check_gradients(lambda *args: forward(*args, route=route)[:2], backward, args, rng,
                    step=1e-4 * min(1, spread / 3))


@given(seeds, lengths, clusters, windows, widths, reaches)
def test_shifted_against_loops(seed, t, k, window, d, reach):
    """The key of a position is the query of the one before it; distance counts from the latest."""
    rng, q, _, v, mu = routing_inputs(seed, t, d, k)
    rel_k, rel_v = tables(rng, reach, d)
    _, key = group.queries_and_keys(q, None)
    (o, _), _, membership, route = routing_attention(
        q, key, v, rel_k, rel_v, mu, Rule(SHIFTED, window, 0.5))
    qn, kn, nothing = normalize(q)[0], normalize(key)[0], 0
    np.testing.assert_array_equal(route.winner, nearest(qn, mu, equal_length=True))
    np.testing.assert_array_equal(route.key_winner, nearest(kn, mu, equal_length=True))
    for b, h in np.ndindex(2, 2):
        seen = [[j for j in range(i + 1) if route.key_winner[b, h, j] == c][-window:]
                for i, c in enumerate(route.winner[b, h])]
        nothing += sum(not keys for keys in seen)
        rel = clipped(rel_k, rel_v, reach)
        want = loop_attention(
            qn[b, h], kn[b, h], v[b, h], lambda i, j, seen=seen: j in seen[i], 0.5,
            rel and (lambda i, j, seen=seen, rel=rel: rel(len(seen[i]) - 1, seen[i].index(j))))
        np.testing.assert_allclose(o[b, h], want, **EXACT)
    np.testing.assert_allclose(membership.uncovered, nothing / (4 * t))
    assert membership.counts.sum() == 8 * t


@given(seeds, st.sampled_from([CAUSAL, RANDOM]), lengths, clusters, windows, widths, reaches,
       st.booleans())
def test_causal_against_loops(seed, mode, t, k, window, d, reach, shared):
    """A token sees the `window` latest members of its own cluster; distance counts members."""
    shared |= mode is CAUSAL
    rng, q, key, v, mu = routing_inputs(seed, t, d, k)
    rel_k, rel_v = tables(rng, reach, d)
    drawn = rng.integers(0, k, (2, t)) if mode is RANDOM else None
    (o, loss), _, membership, route = routing_attention(
        q, None if shared else key, v, rel_k, rel_v, mu, Rule(mode, window, 0.5, clusters=drawn))
    qn, kn = normalize(q)[0], normalize(q if shared else key)[0]
    winner = route.winner
    if mode is RANDOM:
        assert loss == 0 and (winner == drawn).all()
    for b in range(2):
        for h in range(2):
            members = [[i for i in range(t) if winner[b, h, i] == c] for c in range(k)]
            rank = {i: m.index(i) for m in members for i in m}
            rel = clipped(rel_k, rel_v, reach)
            want = loop_attention(
                qn[b, h], kn[b, h], v[b, h],
                lambda i, j, b=b, h=h, rank=rank: winner[b, h, i] == winner[b, h, j]
                and rank[i] - window < rank[j] <= rank[i],
                0.5, rel and (lambda i, j, rank=rank, rel=rel: rel(rank[i], rank[j])))
            np.testing.assert_allclose(o[b, h], want, **EXACT)
    assert membership.counts.sum() == 2 * 2 * t


@given(seeds, lengths, clusters, windows, widths, reaches, st.booleans())
def test_topk_against_loops(seed, t, k, window, d, reach, shared):
    rng, q, key, v, mu = routing_inputs(seed, t, d, k)
    rel_k, rel_v = tables(rng, reach, d)
    (o, loss), _, membership, route = routing_attention(
        q, None if shared else key, v, rel_k, rel_v, mu, Rule(TOPK, window, 1.0))
    qn, kn = normalize(q)[0], normalize(q if shared else key)[0]
    rel = clipped(rel_k, rel_v, reach)
    none = several = 0
    for b in range(2):
        for h in range(2):
            total, times = np.zeros((t, d)), np.zeros((t, 1))
            for c in range(k):
                index, seen = route.members[b, h, c], route.key_members[b, h, c]
                assert len(set(index)) == len(index) == min(window, t)
                assert list(index) == sorted(index) and 0 <= index[0] and index[-1] < t
                inside = loop_attention(
                    qn[b, h, index], kn[b, h, seen], v[b, h, seen],
                    lambda i, j, index=index, seen=seen: seen[j] <= index[i],
                    1.0, rel)
                total[index] += inside
                times[index] += 1
            np.testing.assert_allclose(o[b, h], total / (times + MEAN_FLOOR), **EXACT)
            none += (times == 0).sum()
            several += (times > 1).sum()
    np.testing.assert_allclose(membership.uncovered, none / (4 * t))
    np.testing.assert_allclose(membership.several, several / (4 * t))
    own = [((x - mu[np.arange(2)[:, None], nearest(x, mu)]) ** 2).mean() for x in (qn, kn)]
    np.testing.assert_allclose(loss, sum(own), **EXACT)


@pytest.mark.parametrize("mode", [CAUSAL, TOPK])
def test_commitment_counts_shared_keys_twice(mode):
    _, q, _, v, mu = routing_inputs(0, 13, 5, 3)
    rule = Rule(mode, 4, 1.0)
    shared = routing_attention(q, None, v, None, None, mu, rule)[0][1]
    separate = routing_attention(q, q, v, None, None, mu, rule)[0][1]
    np.testing.assert_allclose(shared, separate)
