"""How each kind of head (heads.py) decodes: what it keeps of the text, and one token with it.

    store(cfg, heads, batch, capacity, xp, dtype) -> what decoding keeps, empty
    fill(q, k, v, p, context, store, routed)  puts a prompt into it, and what stays constant
    step(q, k, v, p, context, store, position) -> o for one token, which it adds to the store

q, k, v are (B, H, T, D), or (B, H, D) for one token, of the heads of that kind; k is None where
keys are queries and not shifted. p holds the parameters of the layer's attention. A store is
written in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from rt_scratch.attention import distance_rows, relative_tables
from rt_scratch.dispatch import array_module
from rt_scratch.kmeans import unit_length
from rt_scratch.layers import normalize
from rt_scratch.multiprobe import best_several
from rt_scratch.routing import MEAN_FLOOR, by_cluster, gather, random_clusters


class Decoding(NamedTuple):
    """How one kind of head decodes."""

    store: Callable
    fill: Callable
    step: Callable


# ------------------------------------------------------------------------------------ local, full

class Seen(NamedTuple):
    """Keys and values that a query may see, the oldest first, and rows of Shaw's tables."""

    k: Any         # (B, H, N, D)
    v: Any
    rows_k: Any    # (N, D) for the distances 1 - N .. 0; None without relative positions
    rows_v: Any


def local_store(cfg, heads, batch, capacity, xp, dtype):
    """An empty store for the (lookback + 1) S positions that a block may see."""
    return full_store(cfg, heads, batch, min((cfg.lookback + 1) * cfg.block, capacity), xp, dtype)


def full_store(cfg, heads, batch, capacity, xp, dtype):
    """An empty store for every key and value."""
    kept = batch, heads, capacity, cfg.head_width
    return Seen(xp.zeros(kept, dtype), xp.zeros(kept, dtype),
                *_empty_rows(cfg.local_max_distance, capacity, cfg, xp, dtype))


def local_fill(q, k, v, p, context, store, routed):
    """Store the part of the prompt that its last token may see."""
    first = _first_seen(context.cfg, k.shape[2] - 1)
    full_fill(q, k[:, :, first:], v[:, :, first:], p, context, store, routed)


def full_fill(q, k, v, p, context, store, routed):
    """Store the whole prompt."""
    t = k.shape[2]
    store.k[:, :, :t], store.v[:, :, :t] = k, v
    _fill_rows(store, p, "local")


def local_step(q, k, v, p, context, store, position):
    """One token of `local_forward`.  Where its block begins, the oldest block is dropped."""
    first, s = _first_seen(context.cfg, position), context.cfg.block
    if first and position % s == 0:
        for kept in store.k, store.v:
            kept[:, :, :-s] = kept[:, :, s:].copy()
    return full_step(q, k, v, p, context, store, position - first)


def full_step(q, k, v, p, context, store, position):
    """One token of `full_forward`."""
    store.k[:, :, position], store.v[:, :, position] = k, v
    n = position + 1
    return _attend_one(q, store.k[:, :, :n], store.v[:, :, :n], *_newest_rows(store, n))


def _first_seen(cfg, position):
    """The first position that a query of local attention sees."""
    return max(0, (position // cfg.block - cfg.lookback) * cfg.block)


def _empty_rows(reach, n, cfg, xp, dtype):
    return [xp.zeros((n, cfg.head_width), dtype) if reach else None for _ in "kv"]


def _newest_rows(store, n):
    return (None, None) if store.rows_k is None else (store.rows_k[-n:], store.rows_v[-n:])


def _fill_rows(store, p, family):
    """Rows of the tables (`attention.distance_rows`) for the keys of a store, the oldest first."""
    for rows, table in zip((store.rows_k, store.rows_v), relative_tables(p, family), strict=True):
        if rows is not None:
            rows[...], _ = distance_rows(table, 1 - len(rows), 0)


# ---------------------------------------------------------------------------------- causal, random

class Members(NamedTuple):
    """The W most recent members of each cluster, those of all B H K clusters in one array.

    A cluster has 2 W rows. Its r-th member stands in row r mod W and again in row r mod W + W, so
    that wherever the newest is, it and the W - 1 before it are one slice.
    """

    members: Any   # (B H K 2 W, 2 D + 1) key, value, and 0; -inf where there is no member yet
    next: Any      # (B H K,) the row, of the first W, for the next member of each cluster
    after: Any     # (B H K 2 W,) the row after each, the first of the cluster after its W-th
    window: Any    # (W,) = 1 .. W, from the row of the newest to the slice that ends with its twin
    rows: Any      # (W, 2 D + 1) of Shaw's tables for the distances 1 - W .. 0; zeros without them
    start: Any     # (B, H) number of each head's first cluster
    guide: Any     # (H, K, D) centroids of length 1; random heads: (H, T) the cluster by position


def causal_store(cfg, heads, batch, capacity, xp, dtype):
    """An empty store of causal heads."""
    return _members(cfg, heads, batch, capacity, xp, dtype, xp.zeros(
        (heads, cfg.n_clusters, cfg.head_width), dtype))


def random_store(cfg, heads, batch, capacity, xp, dtype):
    """An empty store of random heads."""
    return _members(cfg, heads, batch, capacity, xp, dtype, xp.zeros(
        (heads, cfg.seq_len), xp.int64))


def _members(cfg, heads, batch, capacity, xp, dtype, guide):
    n, w = batch * heads * cfg.n_clusters, min(cfg.window, capacity)
    return Members(xp.zeros((2 * n * w, 2 * cfg.head_width + 1), dtype), xp.zeros((n,), xp.int64),
                   xp.zeros((2 * n * w,), xp.int64), xp.zeros((w,), xp.int64),
                   xp.zeros((w, 2 * cfg.head_width + 1), dtype), xp.zeros((batch, heads), xp.int64),
                   guide)


def causal_fill(q, k, v, p, context, store, routed):
    """Store the centroids, and every cluster's latest members of the prompt."""
    winner = routed.route.key_winner
    store.guide[...] = unit_length(context.mu)
    _fill_members(q, k, v, p, context, store, winner, by_cluster(winner, context.cfg.n_clusters))


def random_fill(q, k, v, p, context, store, routed):
    """Store the cluster of each position, and every cluster's latest members of the prompt."""
    cfg, xp = context.cfg, array_module(q)
    store.guide[...] = random_clusters(cfg, context.layer, xp, q.shape[1], cfg.seq_len)
    _fill_members(q, k, v, p, context, store, routed.route.winner, routed.route.order)


def _fill_members(q, k, v, p, context, store, winner, order):
    xp, (b, h, _, d) = array_module(q), q.shape
    n, w = context.cfg.n_clusters, len(store.window)
    slot, first = xp.arange(w), 2 * w * xp.arange(b * h * n)
    store.window[...] = slot + 1
    store.start[...] = n * xp.arange(b * h).reshape(b, h)
    store.after.reshape(-1, 2 * w)[:, :w] = first[:, None] + (slot + 1) % w
    rel_k, rel_v = relative_tables(p, "routing")
    if rel_k is not None:
        store.rows[:, :d], _ = distance_rows(rel_k, 1 - w, 0)
        store.rows[:, d : 2 * d], _ = distance_rows(rel_v, 1 - w, 0)

    count = (winner[..., None] == xp.arange(n)).sum(2)               # (B, H, K)
    store.next[...] = first + count.reshape(-1) % w
    newest = xp.cumsum(count, axis=-1)[..., None] - 1                # in the order by cluster
    back = (count[..., None] - 1 - slot) % w                         # (B, H, K, W) ranks behind it
    member = xp.take_along_axis(order, xp.maximum(newest - back, 0).reshape(b, h, -1), axis=2)
    kn, _ = normalize(q if k is None else k)
    kv = gather(xp.concatenate([kn, v], axis=-1), member)            # (B, H, K W, 2 D)
    twice = store.members.reshape(-1, 2, w, 2 * d + 1)
    twice[..., : 2 * d] = kv.reshape(-1, 1, w, 2 * d)
    twice[..., 2 * d] = xp.where(back < count[..., None], 0, -math.inf).reshape(-1, 1, w)


def causal_step(q, k, v, p, context, store, position):
    """One token: O(K) to choose clusters, R W keys to read, however long the text is."""
    xp = array_module(q)
    both, _ = normalize(q[None] if k is None else xp.stack([q, k]))  # few operations on more rows
    scores = (store.guide @ both[..., None])[..., 0]                 # (1 or 2, B, H, K)
    winner = scores.argmax(-1)                                       # as in `nearest`
    row = _join(both[-1], v, store, winner[-1])
    if context.cfg.n_probes > 1:
        probes = best_several(scores[0], context.cfg.n_probes)       # (B, H, R)
        row = store.next[store.start[..., None] + probes] - 1
    elif k is not None:
        row = store.next[store.start + winner[0]] - 1
    return _attend_members(both[0], store, row)


def random_step(q, k, v, p, context, store, position):
    """One token of `random_forward`."""
    qn, winner = normalize(q)[0], store.guide[:, position % context.cfg.seq_len]
    return _attend_members(qn, store, _join(qn if k is None else normalize(k)[0], v, store, winner))


def _join(kn, v, store, winner):
    """A key and value join a cluster in the place of its oldest member; returns their row."""
    xp, w = array_module(kn), len(store.window)
    cluster = store.start + winner                                   # (B, H)
    row = store.next[cluster]
    store.next[cluster] = store.after[row]
    store.members[row] = store.members[w:][row] = xp.concatenate(
        [kn, v, xp.zeros((*row.shape, 1), v.dtype)], axis=-1)
    return row


def _attend_members(qn, store, row):
    """Attention to all members of the clusters whose newest stands in `row` (B, H[, R])."""
    d = qn.shape[-1]
    seen = store.members.take(row[..., None] + store.window, axis=0)  # (B, H[, R], W, 2 D + 1)
    seen += store.rows
    seen = seen.reshape(*qn.shape[:2], -1, 2 * d + 1)
    return _attend_one(qn * d ** -0.5, seen[..., :d], seen[..., d : 2 * d], hidden=seen[..., 2 * d])


# ------------------------------------------------------------------------------------------ topk

class Best(NamedTuple):
    """The W members of each cluster that score highest so far, those of all B H K clusters.

    A token that has left does not come back: scores stay, and others only join. So nothing else
    need be kept. Members stand in order of time, the newest last, and move up when one leaves.
    """

    members: Any       # (B H K, W, 2 D) key and value
    scores: Any        # (B H K, W) of the members' keys; -inf where there is none yet
    query_scores: Any  # (B H K, W) the W highest of the queries; None where keys are queries
    rows_k: Any        # (W, D) of Shaw's tables for the distances 1 - W .. 0; None without
    rows_v: Any


def topk_store(cfg, heads, batch, capacity, xp, dtype):
    """An empty store of topk heads."""
    shape = batch * heads * cfg.n_clusters, min(cfg.window, capacity)
    own = cfg.shift_keys or not cfg.share_qk
    return Best(xp.zeros((*shape, 2 * cfg.head_width), dtype), xp.zeros(shape, dtype),
                xp.zeros(shape, dtype) if own else None,
                *_empty_rows(cfg.routing_max_distance, shape[1], cfg, xp, dtype))


def topk_fill(q, k, v, p, context, store, routed):
    """Store the members that the whole prompt gives every cluster."""
    xp, mu, route = array_module(q), context.mu, routed.route
    w, d = route.members.shape[-1], q.shape[-1]
    qn, _ = normalize(q)
    kn = qn if k is None else normalize(k)[0]
    store.members[:, -w:] = gather(xp.concatenate([kn, v], axis=-1), route.key_members).reshape(
        -1, w, 2 * d)
    for kept, x, members in ((store.scores, kn, route.key_members),
                             (store.query_scores, qn, route.members)):
        if kept is not None:
            kept[...] = -math.inf
            scores = mu @ x.swapaxes(-1, -2)                         # (B, H, K, T)
            kept[:, -w:] = xp.take_along_axis(scores, members, -1).reshape(-1, w)
    _fill_rows(store, p, "routing")


def topk_step(q, k, v, p, context, store, position):
    """One token: of the tokens so far the best are members, and the newest, if it is one, the last.

    The released code does the same when it decodes, while training and scoring in one pass let
    later tokens take part. O(K) to find out where the token is a member, W keys to read for each.
    """
    xp, (b, h, d), n_clusters = array_module(q), q.shape, context.cfg.n_clusters
    both, _ = normalize(q[None] if k is None else xp.stack([q, k]))
    scores = (context.mu @ both[..., None])[..., 0].reshape(len(both), -1)   # (1 or 2, B H K)
    newest = xp.concatenate([both[-1], v], axis=-1).reshape(b * h, 2 * d)
    joined, left = _outscored(store.scores, scores[-1])
    _replace(store.scores, joined, left, scores[-1][joined])
    _replace(store.members, joined, left, newest[joined // n_clusters])
    if k is not None:  # the query's own clusters
        joined, left = _outscored(store.query_scores, scores[0])
        _replace(store.query_scores, joined, left, scores[0][joined])
    head, w = joined // n_clusters, min(store.scores.shape[1], position + 1)
    seen = store.members[joined, -w:]                                # (J, W, 2 D)
    o = _attend_one(both[0].reshape(b * h, d)[head], seen[..., :d], seen[..., d:],
                    *_newest_rows(store, w))
    own = (xp.arange(b * h)[:, None] == head).astype(q.dtype)        # (B H, J)
    return ((own @ o) / (own.sum(-1, keepdims=True) + MEAN_FLOOR)).reshape(b, h, d)


def _outscored(ranked, new):
    """Where a new score is among the W highest: the clusters (J,), and who leaves each (J,).

    The lowest leaves; among equals the latest, the new one first of all.
    """
    xp, (n, w) = array_module(ranked), ranked.shape
    lowest = w - 1 - ranked[:, ::-1].argmin(-1)
    joined = xp.flatnonzero(new > ranked[xp.arange(n), lowest])
    return joined, lowest[joined]


def _replace(kept, joined, left, new):
    """In the clusters `joined` of kept (B H K, W, ...) those behind the one that leaves move up."""
    slot = array_module(kept).arange(kept.shape[1] - 1)
    kept[joined, :-1] = kept[joined[:, None], slot + (slot >= left[:, None])]
    kept[joined, -1] = new


# ------------------------------------------------------------------------------------- attention

def _attend_one(q, k, v, rows_k=None, rows_v=None, hidden=None):
    """`attention.attend` for one query: q (..., D), k and v (..., N, D), by age, the newest last.

    rows_k, rows_v (N, D) for the distances 1 - N .. 0; hidden (..., N) is -inf at keys not seen. A
    query that sees none gets 0.
    """
    xp = array_module(q)
    z = (k @ q[..., None])[..., 0]                                   # (..., N)
    if rows_k is not None:
        z += q @ rows_k.T
    if hidden is not None:
        z += hidden
    top = z.max(-1, keepdims=True)
    z -= top if hidden is None else xp.maximum(top, xp.finfo(z.dtype).min)
    p = xp.exp(z, out=z)
    o = (p[..., None, :] @ v)[..., 0, :]
    if rows_v is not None:
        o += p @ rows_v
    total = p.sum(-1, keepdims=True)
    o /= total if hidden is None else xp.maximum(total, xp.finfo(z.dtype).tiny)
    return o


LOCAL = Decoding(local_store, local_fill, local_step)
FULL = Decoding(full_store, full_fill, full_step)
CAUSAL = Decoding(causal_store, causal_fill, causal_step)
RANDOM = Decoding(random_store, random_fill, random_step)
TOPK = Decoding(topk_store, topk_fill, topk_step)
