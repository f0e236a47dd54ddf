"""Attention in plain loops, and what it is tested on."""

import math

import numpy as np
from hypothesis import strategies as st

from helpers.strategies import normal
from rt_scratch.dropout import Dropped

dropouts = st.sampled_from([None, Dropped(0.3, (1, 2, 3), first=5)])
reaches = st.sampled_from([0, 1, 2, 50])  # 0: no relative positions
clusters = st.sampled_from([1, 2, 3, 7])


def loop_attention(q, k, v, visible, scale, rel=None):
    """One head in plain Python. q (S, D); visible(i, j); rel(i, j) -> vectors for key and value."""
    out = np.zeros_like(q)
    for i in range(len(q)):
        keys = [j for j in range(len(k)) if visible(i, j)]
        logits = []
        for j in keys:
            key = k[j] + (rel(i, j)[0] if rel else 0)
            logits.append(scale * sum(a * b for a, b in zip(q[i], key, strict=True)))
        weights = [math.exp(z - max(logits)) for z in logits]
        for w, j in zip(weights, keys, strict=True):
            out[i] += w / sum(weights) * (v[j] + (rel(i, j)[1] if rel else 0))
    return out


def tables(rng, reach, d):
    """Relative-position tables, or a pair of None."""
    return (normal(rng, (2 * reach + 1, d)), normal(rng, (2 * reach + 1, d))) if reach \
        else (None, None)


def clipped(rel_k, rel_v, reach):
    """rel(i, j) for `loop_attention`, by position."""
    if not reach:
        return None
    row = lambda i, j: max(-reach, min(reach, j - i)) + reach  # noqa: E731
    return lambda i, j: (rel_k[row(i, j)], rel_v[row(i, j)])


def routing_inputs(seed, t, d, k, layout="plain", ties=False):
    """q, k, v (2, 2, T, D) and centroids (2, K, D); with ties, tokens that are exact copies."""
    rng = np.random.default_rng(seed)
    q, key, v = (normal(rng, (2, 2, t, d), layout) for _ in "qkv")
    if ties:
        q, key = (np.take(x, rng.integers(0, max(1, t // 3), t), axis=2) for x in (q, key))
    return rng, q, key, v, normal(rng, (2, k, d))
