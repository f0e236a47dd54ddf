"""README, "What routing attention is": its ten points, one test each, in the same order.

Weights are seen by attending to the identity matrix in place of the values.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from rt_scratch.attention import local_attention
from rt_scratch.config import ModelConfig
from rt_scratch.heads import KINDS, HeadGroup
from rt_scratch.kmeans import commitment, commitment_backward, nearest, update_centroids
from rt_scratch.layers import normalize
from rt_scratch.model import loss, loss_backward
from rt_scratch.parameters import init_centroids, init_parameters, views
from rt_scratch.routing import CAUSAL, MEAN_FLOOR, SHIFTED, TOPK, Rule, routing_attention

T, D, K, W = 64, 16, 8, 8  # K = W = sqrt(T)


@pytest.fixture
def head():
    """Queries (1, 1, T, D) and centroids (1, K, D) of one head, these of different lengths."""
    rng = np.random.default_rng(0)
    mu = normalize(rng.normal(size=(1, K, D)))[0] * rng.uniform(0.5, 1.5, (1, K, 1))
    return 3 * rng.normal(size=(1, 1, T, D)), mu


def attend(q, mu, mode, window=W):
    """(weights (T, T), Route) of one head whose keys are its queries."""
    (o, _), _, _, route = routing_attention(
        q, None, np.eye(q.shape[2])[None, None], None, None, mu, Rule(mode, window, 0.25))
    return o[0, 0], route


def test_1_one_length(head):
    """LayerNorm without gain and bias brings all queries to the length sqrt(D)."""
    q, _ = head
    assert np.ptp(np.linalg.norm(q, axis=-1)) > 1
    n, _ = normalize(q)
    np.testing.assert_allclose(np.linalg.norm(n, axis=-1), D ** 0.5, rtol=1e-5)


def test_2_scores(head):
    """A token's scores are its products with the centroids; the highest wins."""
    q, mu = head
    winner = nearest(q, mu)[0, 0]
    for t in range(T):
        scores = [q[0, 0, t] @ mu[0, k] for k in range(K)]
        assert scores[winner[t]] == max(scores)


def test_3_attention_stays_in_the_cluster(head):
    """Who has another centroid is not seen; at most W tokens are."""
    q, mu = head
    weights, route = attend(q, mu, CAUSAL)
    winner = route.winner[0, 0]
    assert (weights[winner[:, None] != winner[None]] == 0).all()
    assert (weights > 0).sum(1).max() == W
    np.testing.assert_allclose(weights.sum(1), 1)


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_4_cost(tokens):
    """T sqrt(T) scores and at most T sqrt(T) weights, and far tokens among those seen."""
    root = int(tokens ** 0.5)
    rng = np.random.default_rng(0)
    q, mu = rng.normal(size=(1, 1, tokens, D)), normalize(rng.normal(size=(1, root, D)))[0]
    weights, route = attend(q, mu, CAUSAL, root)
    query, key = np.nonzero(weights)
    assert len(query) <= tokens * root
    assert (query - key).max() > 2 * root  # out of reach for a local head of that cost


def test_5_centroids_are_averages():
    """They are no parameters and get no gradient; they move to the mean of what they won."""
    cfg = ModelConfig(n_layers=1, width=16, ffn_width=8, seq_len=32, n_clusters=2, window=8)
    flat, table = init_parameters(cfg, np, "float64", 0)
    centroids = init_centroids(cfg, np, "float64", 0)
    ids = np.random.default_rng(0).integers(0, 256, (1, 32))
    before = centroids[0].mu.copy()
    _, cache, report = loss(views(flat, table), centroids, cfg, ids, np.full((1, 32), 1 / 32))
    grads = np.zeros_like(flat)
    loss_backward(1.0, 1.0, cache, views(grads, table))
    assert not any("centroid" in leaf.name for leaf in table)
    np.testing.assert_array_equal(centroids[0].mu, before)
    won = report.memberships[0]
    state = centroids[0]
    for _ in range(100):  # the same tokens again and again
        state = update_centroids(state, won.counts, won.sums, 0.9)
    some = won.counts > 0
    want = won.sums[some] / won.counts[some][:, None]
    np.testing.assert_allclose(state.mu[some], want, atol=1e-3)


def test_6_commitment_pulls_to_the_centroid(head):
    """The loss is the mean square distance; a step against its gradient makes it smaller."""
    q, mu = head
    winner = nearest(q, mu)
    value, cache = commitment(q, mu, winner)
    np.testing.assert_allclose(value, np.mean((q[0, 0] - mu[0, winner[0, 0]]) ** 2))
    step = q.size / 4  # half the way
    nearer, _ = commitment(q - step * commitment_backward(1.0, cache), mu, winner)
    np.testing.assert_allclose(nearer, value / 4)


def test_7_local_heads(head):
    """Blocks of S see themselves, up to each query, and the block before."""
    q, _ = head
    block = 4
    o, _ = local_attention(q, q, np.eye(T)[None, None], None, None, block, 1, 0.25)
    t = np.arange(T)
    want = (t[None] <= t[:, None]) & (t[None] // block >= t[:, None] // block - 1)
    np.testing.assert_array_equal(o[0, 0] > 0, want)


def test_8_topk(head):
    """A cluster takes the W best of the sequence; a token is averaged over its clusters or 0."""
    q, mu = head
    weights, route = attend(q, mu, TOPK)
    n = normalize(q)[0][0, 0]
    for k in range(K):
        scores = n @ mu[0, k]
        assert set(route.members[0, 0, k]) == set(np.argsort(-scores)[:W])
    times = np.bincount(route.members.ravel(), minlength=T)
    assert times.min() == 0 and times.max() > 1
    np.testing.assert_allclose(weights.sum(1), times / (times + MEAN_FLOOR))


def test_9_causal(head):
    """A token joins its nearest centroid and sees the last W members up to itself."""
    q, mu = head
    weights, route = attend(q, mu, CAUSAL)
    directions = mu[0] / np.linalg.norm(mu[0], axis=1, keepdims=True)
    winner = (normalize(q)[0][0, 0] @ directions.T).argmax(1)
    np.testing.assert_array_equal(winner, route.winner[0, 0])
    for t in range(T):
        members = [j for j in range(t + 1) if winner[j] == winner[t]][-W:]
        assert list(np.flatnonzero(weights[t])) == members


def test_10_shifted_keys(head):
    """A query finds what followed a token like its own, whatever the centroids are."""
    q, mu = head
    q[:, :, 40] = q[:, :, 20]
    group = HeadGroup(KINDS["causal"], slice(1), None, shifted=True)
    queries, keys = group.queries_and_keys(q, None)
    (o, _), _, _, route = routing_attention(queries, keys, np.eye(T)[None, None], None, None, mu,
                                            Rule(SHIFTED, T, 0.25))
    assert route.winner[0, 0, 40] == route.key_winner[0, 0, 21]
    assert o[0, 0, 40].argmax() == 21 and (np.triu(o[0, 0], 1) == 0).all()


def test_the_points_of_the_readme():
    """README lists ten points and links here; each has its test here."""
    root = Path(__file__).parent
    section = (root.parent / "README.md").read_text("utf-8").partition(
        "## What routing attention is")[2].partition("\n## ")[0]
    points = re.findall(r"^(\d+)\. ", section, re.M)
    tests = re.findall(r"^def test_(\d+)_", Path(__file__).read_text("utf-8"), re.M)
    assert points == tests == [str(i) for i in range(1, 11)]
    assert "(tests/test_paper.py)" in section
