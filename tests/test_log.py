"""Cluster health against numbers worked out by hand, and against the routes of a real step."""

import dataclasses

import numpy as np
import pytest
from helpers.models import SMALL, setup

from rt_scratch.config import TrainConfig
from rt_scratch.routing import Membership
from rt_scratch.run.log import cluster_line, health
from rt_scratch.step import gradients


def told(counts, uncovered=0.0, several=0.0):
    counts = np.array(counts, "float32")
    return Membership(counts, np.zeros((*counts.shape, 2)), np.float32(uncovered),
                      np.float32(several))


def test_health_by_hand():
    """Two layers, three heads of four clusters: shares of a head, means of layers, a count."""
    got = health({0: told([[4, 0, 1, 5]], 0.5, 0.25),
                  3: told([[10, 10, 10, 10], [0, 0, 2, 18]], 0.25, 0.75)})
    assert got == {"uncovered": 0.375, "several": 0.5, "smallest": 0.0,
                   "largest": pytest.approx(0.9), "dead": 3}


def test_health_without_dead_centroids():
    got = health({1: told([[30, 10], [16, 24]])})
    assert got == {"uncovered": 0, "several": 0, "smallest": 0.25, "largest": 0.75, "dead": 0}


def test_health_of_heads_of_several_sizes():
    """Shares are of the own head's tokens, however many those of other heads are."""
    got = health({0: told([[1, 4]]), 1: told([[300, 700]])})
    assert got["smallest"] == pytest.approx(0.2) and got["largest"] == pytest.approx(0.8)
    assert health({0: told([[0, 0]])})["dead"] == 2  # no token at all: no division by 0


def test_no_health_without_routing_heads():
    assert health({}) == {} and cluster_line({}) == ""


def test_cluster_line():
    row = health({0: told([[4, 0, 1, 5]], 0.5, 0.25)})
    assert cluster_line(row) == (
        "clusters: 50.0% of tokens see nothing, 25.0% are in several; smallest 0.0%, largest 50.0% "
        "of a head's tokens; 1 without any\n")


@pytest.mark.parametrize("share_qk", [True, False])
@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_health_of_a_step(routing, share_qk):
    """Counted again from the routes, token by token, over all parts of the batch."""
    cfg = dataclasses.replace(SMALL, routing=routing, share_qk=share_qk, n_clusters=7)
    m = setup(cfg, batch=3)
    result = gradients(m.state(), np.empty_like(m.flat), m.parts(2, 1), cfg, TrainConfig())
    shares, inside, dead = [], [], 0
    for layer in result.memberships:
        routes = [report.routes[layer] for report in result.reports]
        for h in range(cfg.n_routing_heads):
            chosen = [w for r in routes for x in ([r.winner] if share_qk else
                                                  [r.winner, r.key_winner]) for w in x[:, h].flat]
            count = [chosen.count(c) for c in range(7)]
            shares += [n / len(chosen) for n in count]
            dead += count.count(0)
            if routing == "topk":
                inside += [(r.members[b, h] == t).any(-1).sum() for r in routes
                           for b in range(len(r.winner)) for t in range(cfg.seq_len)]
            else:  # a query may see no key: none has joined its cluster yet
                inside += [int((r.key_winner[b, h, : t + 1] == r.winner[b, h, t]).any())
                           for r in routes for b in range(len(r.winner))
                           for t in range(cfg.seq_len)]
    inside = np.array(inside)
    got = health(result.memberships)
    assert got["dead"] == dead and dead > 0
    for name, want in (("smallest", min(shares)), ("largest", max(shares)),
                       ("uncovered", (inside == 0).mean()), ("several", (inside > 1).mean())):
        assert got[name] == pytest.approx(want), name
