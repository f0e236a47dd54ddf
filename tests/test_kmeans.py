"""kmeans.py: winners, counts and sums, one step of the averages, the commitment loss."""

import numpy as np
import pytest
from helpers.gradcheck import check_gradients
from helpers.loops import clusters, routing_inputs
from helpers.strategies import lengths, normal, seeds, widths
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch.kmeans import (
    Centroids,
    add_commitment_gradient,
    cluster_statistics,
    commitment,
    commitment_backward,
    compare,
    nearest,
    seeded_centroids,
    update_centroids,
)
from rt_scratch.layers import normalize

EXACT = dict(rtol=1e-11, atol=1e-12)


@given(seeds, lengths, clusters, widths, st.booleans())
def test_nearest(seed, t, k, d, equal_length):
    rng, q, _, _, mu = routing_inputs(seed, t, d, k)
    winner = nearest(q, mu, equal_length)
    size = np.linalg.norm(mu, axis=-1, keepdims=True) if equal_length else 1
    products = np.einsum("bhtd,hkd->bhtk", q, mu / size)
    np.testing.assert_array_equal(winner, products.argmax(-1))
    same, all_products = compare(q, mu, equal_length)
    np.testing.assert_array_equal(same, winner)
    np.testing.assert_allclose(all_products, products.swapaxes(-1, -2), **EXACT)


def test_nearest_is_the_lower_index_on_ties():
    assert (nearest(np.ones((1, 1, 2, 3)), np.ones((1, 4, 3))) == 0).all()
    assert (nearest(np.ones((1, 1, 2, 3)), np.zeros((1, 4, 3)), True) == 0).all()  # no 0 / 0


@given(seeds, lengths, clusters, widths)
def test_cluster_statistics(seed, t, k, d):
    rng, q, _, _, mu = routing_inputs(seed, t, d, k)
    winner = rng.integers(0, k, (2, 2, t))
    counts, sums = cluster_statistics(q, winner, k)
    for h in range(2):
        for c in range(k):
            won = q[:, h][winner[:, h] == c]
            assert counts[h, c] == len(won)
            np.testing.assert_allclose(sums[h, c], won.sum(0), **EXACT)


@given(seeds, clusters, widths, st.sampled_from([0.0, 0.9, 0.999, 1.0]))
def test_update_centroids(seed, k, d, decay):
    rng = np.random.default_rng(seed)
    state = Centroids(normal(rng, (2, k, d)), rng.random((2, k)) + 0.1, normal(rng, (2, k, d)))
    before = Centroids(*(a.copy() for a in state))
    counts, sums = rng.integers(0, 4, (2, k)).astype(float), normal(rng, (2, k, d))
    after = update_centroids(state, counts, sums, decay)
    for h in range(2):
        count = [decay * state.count[h, c] + (1 - decay) * counts[h, c] for c in range(k)]
        for c in range(k):
            total = decay * state.total[h, c] + (1 - decay) * sums[h, c]
            smooth = (count[c] + 1e-5) * sum(count) / (sum(count) + 1e-5 * k)
            want = total / max(smooth, 1e-300) if counts[h, c] else state.mu[h, c]
            np.testing.assert_allclose(after.mu[h, c], want, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(after.total[h, c], total, **EXACT)
        np.testing.assert_allclose(after.count[h], count, **EXACT)
    for a, b in zip(state, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_kmeans_finds_the_clusters():
    """Four separate clouds, one centroid near each: the centroids come to rest at their means."""
    rng = np.random.default_rng(0)
    clouds = normal(rng, (4, 8))
    x = normalize(np.repeat(clouds, 30, axis=0) + 0.05 * normal(rng, (120, 8)))[0][None, None]
    mu = normalize(clouds + 0.3 * normal(rng, (4, 8)))[0][None]
    state = Centroids(mu, np.ones((1, 4)), mu)
    for _ in range(300):
        winner = nearest(x, state.mu, equal_length=True)
        state = update_centroids(state, *cluster_statistics(x, winner, 4), decay=0.9)
    want = [x[0, 0, 30 * c : 30 * c + 30].mean(0) for c in range(4)]
    np.testing.assert_allclose(state.mu[0], want, atol=1e-3)


@given(seeds, lengths, clusters, widths)
def test_commitment(seed, t, k, d):
    rng, q, _, _, mu = routing_inputs(seed, t, d, k)
    winner = rng.integers(0, k, (2, 2, t))
    loss, _ = commitment(q, mu, winner)
    want = np.mean([(q[b, h, i] - mu[h, winner[b, h, i]]) ** 2
                    for b in range(2) for h in range(2) for i in range(t)])
    np.testing.assert_allclose(loss, want, **EXACT)
    check_gradients(lambda x: commitment(x, mu, winner),
                    lambda d, cache: (commitment_backward(d, cache),), (q,), rng)
    cache, dx = commitment(q, mu, winner)[1], normal(rng, q.shape)
    want = dx + commitment_backward(0.3, cache)
    add_commitment_gradient(dx, 0.3, cache)
    np.testing.assert_array_equal(dx, want)


@given(seeds, st.sampled_from([1, 2, 5]))
def test_seeded_centroids_find_clusters(seed, k):
    """Vectors around K directions, far from each other: one centroid each, in every head."""
    rng = np.random.default_rng(seed)
    where = np.linalg.qr(rng.normal(size=(2, 6, 6)))[0][:, :k]       # (H, K, D), orthonormal
    label = rng.permuted(np.tile(np.arange(60) % k, (2, 1)), axis=1)
    x = np.take_along_axis(where, label[..., None], 1) * 3 + 0.002 * rng.normal(size=(2, 60, 6))
    mu, count, total = seeded_centroids(x, k, rng)
    assert (count.sum(-1) == 60).all()
    np.testing.assert_allclose(mu, total / count[..., None])
    for h in range(2):
        assert (count[h] == 60 // k).all()
        assert sorted((mu[h] @ where[h].T).argmax(-1)) == list(range(k))
        np.testing.assert_allclose(total[h].sum(0), x[h].sum(0))


@pytest.mark.parametrize("n", [1, 3, 7])
def test_seeded_centroids_of_too_few_vectors(n):
    """Copies, and fewer vectors than clusters: finite centroids, every vector counted once."""
    x = np.repeat(np.random.default_rng(0).normal(size=(2, 1, 4)), n, axis=1)
    mu, count, _ = seeded_centroids(x, 5, np.random.default_rng(1))
    assert np.isfinite(mu).all() and (count.sum(-1) == n).all()
    np.testing.assert_allclose(mu, np.broadcast_to(x[:, :1], mu.shape))
