"""The kinds of attention head, one row each: forward, backward, decoding, cost.

A layer is a list of (kind, number of heads); `parts` says which queries, keys and values belong to
which. A new kind is its functions and a row of `KINDS`: every choice of a kind reads that table.

    forward(q, k, v, p, context) -> o, cache, Routed or None
    backward(do, dcommitment, cache) -> dq, dk, dv, {name: gradient} of its own parameters
    store(cfg, heads, batch, capacity, xp, dtype) -> what decoding keeps
    fill(q, k, v, context, store, routed)     puts a prompt into it
    step(q, k, v, p, context, store, position) -> o for one token, which it adds to the store

q, k, v are (B, H, T, D), or (B, H, D) for one token, of the heads of that kind; k is None where
keys are queries. p holds the parameters of the layer's attention. A store is written in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numpy.random import Generator, Philox

from rt_scratch.attention import local_attention, local_attention_backward
from rt_scratch.dispatch import array_module
from rt_scratch.kmeans import nearest
from rt_scratch.layers import normalize
from rt_scratch.multiprobe import (
    MULTIPROBE,
    multiprobe_fill,
    multiprobe_step,
    multiprobe_store,
)
from rt_scratch.routing import (
    CAUSAL,
    MEAN_FLOOR,
    RANDOM,
    TOPK,
    Membership,
    Mode,
    Route,
    Rule,
    gather,
    routing_attention,
    routing_attention_backward,
    top_members,
)


class Context(NamedTuple):
    """What a kind of head is told beside queries, keys, values and parameters."""

    cfg: Any               # ModelConfig
    layer: int
    mu: Any = None         # (H, K, D) centroids of the layer
    fixed: Any = None      # a Route to use instead of choosing one
    dropped: Any = None    # attention dropout, see dropout.py


class Routed(NamedTuple):
    """What a routing kind reports."""

    commitment: Any        # loss, a 0-d array
    membership: Membership
    route: Route


class Kind(NamedTuple):
    """One kind of head."""

    family: str            # 'local' or 'routing': whose settings and relative tables it takes
    mode: Mode | None      # how it forms clusters; None: it does not route
    forward: Callable
    backward: Callable
    store: Callable
    fill: Callable
    step: Callable
    keys: Callable         # cfg -> keys that each query is multiplied with, for the cost of a step

    @property
    def routes(self) -> bool:
        """Whether it has centroids; its keys may then be its queries (share_qk)."""
        return self.mode is not None

    def parameters(self, cfg) -> dict[str, tuple]:
        """Shaw's tables (2 m + 1, D) for keys and values, shared by the layer's heads."""
        reach = cfg.routing_max_distance if self.routes else cfg.local_max_distance
        shape = 2 * reach + 1, cfg.head_width
        return {f"{self.family}_rel_{x}": shape for x in "kv"} if reach else {}


class Part(NamedTuple):
    """The heads of one kind in a layer."""

    kind: Kind
    heads: slice           # which of the layer's queries, values and outputs
    keys: slice | None     # which of its keys; None: keys are queries


@functools.lru_cache
def parts(cfg, layer: int) -> list[Part]:
    """How the heads of a layer are divided among its kinds, in the order of the projections."""
    found, head, key = [], 0, 0
    for name, n in cfg.layer_heads(layer):
        kind = KINDS[name]
        own = not (kind.routes and cfg.share_qk)
        found.append(Part(kind, slice(head, head + n), slice(key, key + n) if own else None))
        head, key = head + n, key + n * own
    return found


def key_heads(cfg, layer: int) -> int:
    """Heads of a layer that have keys of their own."""
    return max((part.keys.stop for part in parts(cfg, layer) if part.keys), default=0)


def _tables(p, family):
    return p.get(f"{family}_rel_k"), p.get(f"{family}_rel_v")


def _table_gradients(family, drel_k, drel_v):
    return {} if drel_k is None else {f"{family}_rel_k": drel_k, f"{family}_rel_v": drel_v}


# ------------------------------------------------------------------------------------ local, full

def local_forward(q, k, v, p, context):
    """Blocks of S queries see their own block, causally, and the `lookback` blocks before."""
    cfg = context.cfg
    return *local_attention(q, k, v, *_tables(p, "local"), cfg.block, cfg.lookback, 1.0,
                            dropped=context.dropped), None


def full_forward(q, k, v, p, context):
    """Causal attention to everything: one block that holds the text."""
    return *local_attention(q, k, v, *_tables(p, "local"), q.shape[2], 0, 1.0,
                            dropped=context.dropped), None


def local_backward(do, dcommitment, cache):
    """Of local and of full heads, which differ in the cached reach alone.

    docs/derivations.md (40).
    """
    dq, dk, dv, *drel = local_attention_backward(do, cache)
    return dq, dk, dv, _table_gradients("local", *drel)


class Ring(NamedTuple):
    """The latest N keys and values: slot j holds the latest position p with p mod N = j."""

    k: Any     # (B, H, N, D)
    v: Any


def local_store(cfg, heads, batch, capacity, xp, dtype):
    """A ring of the (lookback + 1) S positions that a block may see."""
    shape = batch, heads, min((cfg.lookback + 1) * cfg.block, capacity), cfg.head_width
    return Ring(xp.zeros(shape, dtype), xp.zeros(shape, dtype))


def full_store(cfg, heads, batch, capacity, xp, dtype):
    """Every key and value."""
    shape = batch, heads, capacity, cfg.head_width
    return Ring(xp.zeros(shape, dtype), xp.zeros(shape, dtype))


def ring_fill(q, k, v, context, store, routed):
    """Of local and of full heads: the latest positions of the prompt."""
    t, n = k.shape[2], store.k.shape[2]
    recent = array_module(k).arange(max(0, t - n), t)
    store.k[:, :, recent % n], store.v[:, :, recent % n] = k[:, :, recent], v[:, :, recent]


def local_step(q, k, v, p, context, store, position):
    """One token of `local_forward`."""
    cfg = context.cfg
    first = max(0, (position // cfg.block - cfg.lookback) * cfg.block)
    return _ring_step(q, k, v, p, store, position, first)


def full_step(q, k, v, p, context, store, position):
    """One token of `full_forward`."""
    return _ring_step(q, k, v, p, store, position, 0)


def _ring_step(q, k, v, p, store, position, first):
    n = store.k.shape[2]
    store.k[:, :, position % n], store.v[:, :, position % n] = k, v
    back = (position - array_module(q).arange(n)) % n                # how long ago: (N,)
    return _attend_one(q, store.k, store.v, *_tables(p, "local"), -back, back <= position - first,
                       scale=1.0)


# -------------------------------------------------------------- causal, topk, random, multiprobe

def causal_forward(q, k, v, p, context):
    """Ours: the nearest centroid's W most recent members; logits scaled by D^-1/2."""
    cfg = context.cfg
    return _routing_forward(q, k, v, p, context,
                            Rule(CAUSAL, cfg.window, cfg.head_width ** -0.5))


def topk_forward(q, k, v, p, context):
    """The paper's clusters with the released logits, which are not scaled."""
    return _routing_forward(q, k, v, p, context, Rule(TOPK, context.cfg.window, 1.0))


def random_forward(q, k, v, p, context):
    """The paper's control: as `causal`, with clusters drawn at random by position."""
    cfg = context.cfg
    clusters = random_clusters(cfg, context.layer, array_module(q), q.shape[1], q.shape[2])
    return _routing_forward(q, k, v, p, context, Rule(
        RANDOM, cfg.window, cfg.head_width ** -0.5, clusters=clusters))


def multiprobe_forward(q, k, v, p, context):
    """Ours: each key in its nearest cluster, each query at the W latest keys of its R nearest."""
    cfg = context.cfg
    return _routing_forward(q, k, v, p, context, Rule(
        MULTIPROBE, cfg.window, cfg.head_width ** -0.5, n_probes=cfg.n_probes))


def _routing_forward(q, k, v, p, context, rule):
    (o, loss), cache, membership, route = routing_attention(
        q, k, v, *_tables(p, "routing"), context.mu, rule, context.fixed, context.dropped)
    return o, cache, Routed(loss, membership, route)


def routing_backward(do, dcommitment, cache):
    """Of all routing heads; their cached rule knows the mode. docs/derivations.md (49)."""
    dq, dk, dv, *drel = routing_attention_backward(do, dcommitment, cache)
    return dq, dk, dv, _table_gradients("routing", *drel)


def random_clusters(cfg, layer: int, xp, heads: int, n_tokens: int, start: int = 0):
    """The cluster (H, T) of each position, the same in training and decoding."""
    rng = Generator(Philox(key=[cfg.seed_random, layer]))
    drawn = rng.integers(cfg.n_clusters, size=(cfg.seq_len, heads)).T
    return xp.asarray(drawn)[:, xp.arange(start, start + n_tokens) % cfg.seq_len]


class Members(NamedTuple):
    """A ring of the W most recent members of each cluster.

    One spare slot per ring takes the writes of members that are too old to matter.
    """

    k: Any         # (B, H, K, W + 1, D), no more than the text can fill
    v: Any
    count: Any     # (B, H, K) tokens that each cluster has seen


def cluster_store(cfg, heads, batch, capacity, xp, dtype):
    """Of causal and random heads."""
    shape = batch, heads, cfg.n_clusters, min(cfg.window, capacity) + 1, cfg.head_width
    return Members(xp.zeros(shape, dtype), xp.zeros(shape, dtype), xp.zeros(shape[:3], xp.int64))


def cluster_fill(q, k, v, context, store, routed):
    """Of causal and random heads: every cluster's latest members of the prompt."""
    cfg, winner, w = context.cfg, routed.route.winner, store.k.shape[3] - 1
    xp = array_module(q)
    kn, _ = normalize(q if k is None else k)
    hot = winner[..., None] == xp.arange(cfg.n_clusters)             # (B, H, T, K)
    so_far = xp.cumsum(hot, axis=2)
    rank = xp.take_along_axis(so_far, winner[..., None], axis=3)[..., 0] - 1
    total = so_far[:, :, -1]                                         # (B, H, K)
    newest = rank >= xp.take_along_axis(total, winner, axis=2) - w
    slot = xp.where(newest, rank % w, w)
    b, h = winner.shape[:2]
    at = (xp.arange(b)[:, None, None], xp.arange(h)[None, :, None], winner, slot)
    store.k[at], store.v[at] = kn, v
    store.count[...] = total


def causal_step(q, k, v, p, context, store, position):
    """One token of `causal_forward`."""
    qn, _ = normalize(q)
    winner = nearest(qn[:, :, None], context.mu, equal_length=True)[:, :, 0]
    return _cluster_step(qn, k, v, p, context, store, winner)


def random_step(q, k, v, p, context, store, position):
    """One token of `random_forward`."""
    xp = array_module(q)
    clusters = random_clusters(context.cfg, context.layer, xp, q.shape[1], 1, position)[:, 0]
    return _cluster_step(normalize(q)[0], k, v, p, context, store,
                         xp.broadcast_to(clusters, q.shape[:2]))


def _cluster_step(qn, k, v, p, context, store, winner):
    """Join a cluster, take the oldest slot of its ring, see the ring."""
    cfg, xp = context.cfg, array_module(qn)
    b, h = qn.shape[:2]
    at = (xp.arange(b)[:, None], xp.arange(h)[None, :], winner)
    rank, w = store.count[at], store.k.shape[3] - 1                  # (B, H)
    store.k[(*at, rank % w)] = qn if k is None else normalize(k)[0]
    store.v[(*at, rank % w)] = v
    store.count[at] = rank + 1
    back = (rank[..., None] - xp.arange(w)) % w                      # (B, H, W) ranks ago
    return _attend_one(qn, store.k[at][:, :, :w], store.v[at][:, :, :w], *_tables(p, "routing"),
                       -back, back <= rank[..., None], cfg.head_width ** -0.5)


class Everything(NamedTuple):
    """What topk heads must keep: any token may become a member again."""

    k: Any             # (B, H, capacity, D)
    v: Any
    scores: Any        # (B, H, K, capacity) of the queries
    key_scores: Any    # of the keys


def topk_store(cfg, heads, batch, capacity, xp, dtype):
    """All keys, all values, all scores."""
    rows = batch, heads, capacity, cfg.head_width
    scores = batch, heads, cfg.n_clusters, capacity
    return Everything(*(xp.zeros(shape, dtype) for shape in (rows, rows, scores, scores)))


def topk_fill(q, k, v, context, store, routed):
    """The whole prompt."""
    t, mu = q.shape[2], context.mu
    qn, _ = normalize(q)
    kn = qn if k is None else normalize(k)[0]
    store.k[:, :, :t], store.v[:, :, :t] = kn, v
    store.scores[..., :t] = mu @ qn.swapaxes(-1, -2)
    store.key_scores[..., :t] = mu @ kn.swapaxes(-1, -2)


def topk_step(q, k, v, p, context, store, position):
    """Membership among the tokens so far; the newest is the last member where it is one.

    So does the released code when it decodes, while training and scoring in one pass let later
    tokens take part.
    """
    xp, mu = array_module(q), context.mu
    n, w = position + 1, min(context.cfg.window, position + 1)
    qn, _ = normalize(q)
    kn = qn if k is None else normalize(k)[0]
    store.k[:, :, position], store.v[:, :, position] = kn, v
    store.scores[..., position] = (mu @ qn[..., None])[..., 0]       # (B, H, K)
    index = key_index = top_members(store.scores[..., :n], w)        # (B, H, K, W)
    if k is not None:
        store.key_scores[..., position] = (mu @ kn[..., None])[..., 0]
        key_index = top_members(store.key_scores[..., :n], w)
    member = (index[..., -1] == position).astype(q.dtype)            # (B, H, K)
    o = _attend_one(qn[:, :, None], gather(store.k, key_index), gather(store.v, key_index),
                    *_tables(p, "routing"), xp.arange(1 - w, 1), xp.ones(w, bool), 1.0)
    return (member[..., None] * o).sum(2) / (member.sum(2) + MEAN_FLOOR)[..., None]


def _attend_one(q, k, v, rel_k, rel_v, distance, visible, scale):
    """`attention.attend` for one query: q (..., D), k and v (..., N, D), distance (..., N)."""
    xp = array_module(q)
    z = (k @ q[..., None])[..., 0]                                   # (..., N)
    if rel_k is not None:
        m = rel_k.shape[0] // 2
        index = xp.broadcast_to(xp.clip(distance, -m, m) + m, z.shape)
        products = xp.broadcast_to(q @ rel_k.T, (*z.shape[:-1], rel_k.shape[0]))
        z = z + xp.take_along_axis(products, index, axis=-1)
    z = xp.where(visible, scale * z, -math.inf)
    p = xp.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = (p[..., None, :] @ v)[..., 0, :]
    if rel_v is not None:
        o = o + (p[..., None, :] @ rel_v[index])[..., 0, :]
    return o


KINDS = {
    "local": Kind(
        "local", None, local_forward, local_backward, local_store, ring_fill, local_step,
        lambda cfg: (cfg.lookback + 1) * cfg.block),
    "full": Kind(
        "local", None, full_forward, local_backward, full_store, ring_fill, full_step,
        lambda cfg: cfg.seq_len),
    "causal": Kind(
        "routing", CAUSAL, causal_forward, routing_backward, cluster_store, cluster_fill,
        causal_step, lambda cfg: 3 * -(-cfg.window // 2)),
    "topk": Kind(
        "routing", TOPK, topk_forward, routing_backward, topk_store, topk_fill, topk_step,
        lambda cfg: cfg.n_clusters * cfg.window ** 2 / cfg.seq_len),
    "random": Kind(
        "routing", RANDOM, random_forward, routing_backward, cluster_store, cluster_fill,
        random_step, lambda cfg: 3 * -(-cfg.window // 2)),
    "multiprobe": Kind(
        "routing", MULTIPROBE, multiprobe_forward, routing_backward, multiprobe_store,
        multiprobe_fill, multiprobe_step,
        lambda cfg: 3 * -(-cfg.window // 2) * (min(cfg.n_probes, cfg.n_clusters) + 1)),
}
