"""docs/differences.md: the numbers it prints and the rows that no other test shows."""

import numpy as np
import pytest
from test_golden import CONFIGS, Golden

from rt_scratch import model, released
from rt_scratch.kmeans import Centroids, cluster_statistics, nearest, update_centroids
from rt_scratch.layers import normalize
from rt_scratch.routing import CAUSAL, TOPK, Rule, routing_attention


def test_released_counts_mix_the_heads():
    """The stored counts are those of a reshape that leaves the head axis where it is."""
    z = Golden("A")
    x, mu = z["in/x1"], z["in/means0"]  # (2, 3, 32, 8), (3, 4, 8)
    winner = nearest(x, mu)
    real = (x != 0).any(-1, keepdims=True)  # zero rows are padding in the released code
    hot = (winner[..., None] == np.arange(4)) & real
    stored = z["out/fresh_decay0.999/step1/ema_count"] / 0.001
    np.testing.assert_allclose(hot.reshape(-1, 3, 4).sum(0), stored)
    assert np.abs(hot.sum((0, 2)) - stored).max() > 5  # per head, as everything else is
    counts, _ = cluster_statistics(x, winner, 4)  # ours; padding counts, as every token does
    assert np.abs(counts - hot.sum((0, 2))).max() <= (~real).sum()


def test_released_means_start_too_long():
    """231 after the first step; ours stays where the tokens are."""
    z = Golden("A")
    x, mu = z["in/x1"], z["in/means0"]
    stored = np.abs(z["out/fresh_decay0.999/step1/means"]).max()
    assert round(float(stored)) == 231
    state = Centroids(mu, np.ones((3, 4)), mu)
    ours = update_centroids(state, *cluster_statistics(x, nearest(x, mu), 4), 0.999)
    assert np.abs(ours.mu).max() < np.abs(x).max()


def test_released_empty_cluster_runs_away():
    """5.4e6 after one step without a token; ours keeps its place."""
    z = Golden("A")
    x, mu = z["in/x_raw"], z["in/means0_empty"]
    assert 5.3e6 < np.abs(z["out/empty_cluster_decay0.9/step1/means"]).max() < 5.5e6
    counts, sums = cluster_statistics(x, nearest(x, mu), 4)
    assert (counts[:, 3] == 0).all()
    ours = update_centroids(Centroids(mu, np.ones((3, 4)), mu), counts, sums, 0.9)
    np.testing.assert_array_equal(ours.mu[:, 3], mu[:, 3])


@pytest.mark.parametrize("mode", [TOPK, CAUSAL])
def test_the_scale_of_queries_cancels(mode):
    """LayerNorm takes the D^-1/2 of the projection away again, but for its epsilon."""
    rng = np.random.default_rng(0)
    q, v, mu = (rng.normal(size=s) for s in ((1, 1, 32, 16), (1, 1, 32, 16), (1, 4, 16)))
    rule = Rule(mode, 8, 1.0)
    (a, _), *_ = routing_attention(q, None, v, None, None, mu, rule)
    (b, _), *_ = routing_attention(q * 16 ** -0.5, None, v, None, None, mu, rule)
    np.testing.assert_allclose(a, b, atol=1e-3)
    n = normalize(q)[0]
    assert (n * n).sum(-1).min() > 15.9  # a query's product with itself: D, unscaled


def test_rank_is_not_time_with_separate_keys():
    """Masking by rank in the cluster, as released, lets queries see later keys; ours does not."""
    rng = np.random.default_rng(0)
    q, k, mu = (rng.normal(size=s) for s in ((1, 1, 32, 16), (1, 1, 32, 16), (1, 4, 16)))
    (weights, _), _, _, route = routing_attention(
        q, k, np.eye(32)[None, None], None, None, mu, Rule(TOPK, 8, 1.0))
    later = route.key_members[..., None, :] > route.members[..., :, None]
    assert (later & np.tri(8, dtype=bool)).any()
    assert (np.triu(weights[0, 0], 1) == 0).all()


@pytest.mark.parametrize("name", ["E1", "E2"])
def test_released_weights_leak(name):
    """Other tokens from 40 on move earlier logits, up to 2.9 and 3.4, in 79 of 82 rows."""
    z, cfg = Golden(name), CONFIGS[name]
    params, state = released.convert(z.below("w/"), cfg)
    ids = z["in/targets"].reshape(2, -1)
    other = ids.copy()
    other[:, 40:] = (other[:, 40:] + 7) % cfg.vocab_size
    change = np.abs(model.logits(params, state, cfg, other)
                    - model.logits(params, state, cfg, ids)).max(-1)[:, :41]
    assert round(float(change.max()), 1) == {"E1": 2.9, "E2": 3.4}[name]
    assert ((change > 1e-9).sum(), change.size) == (79, 82)
