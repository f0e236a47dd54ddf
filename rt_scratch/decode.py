"""Incremental decoding: one token at a time, at a cost that does not grow with the text.

A local head keeps the keys of its last (lookback + 1) S places in a ring; a `causal` or `random`
head keeps the W most recent members of each cluster in a ring of its own. Both then compute what
`model.forward` computes for the whole text, up to rounding. A `topk` head must choose its members
again for every token; it chooses among the tokens so far (as the released code does when decoding),
while training and teacher-forced evaluation let it choose among later ones too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from rt_scratch.backend import array_module, to_host
from rt_scratch.config import ModelConfig
from rt_scratch.layers import geglu_ffn, layer_norm, linear, normalize, relu_ffn
from rt_scratch.model import (
    _before_output,
    _output,
    block,
    embed,
    local_reach,
    project,
    random_places,
    routing_rule,
)
from rt_scratch.routing import MEAN_FLOOR, gather, nearest, top_members


class Ring(NamedTuple):
    """Keys and values of local heads (B, H, N, D) or of one cluster after another."""

    k: Any
    v: Any


class Members(NamedTuple):
    """Rings (B, H, K, W, D) of routing heads and how many tokens each cluster has seen."""

    k: Any
    v: Any
    count: Any  # (B, H, K)


class Everything(NamedTuple):
    """What `topk` heads must keep: all keys and values, and all scores (B, H, K, capacity)."""

    k: Any
    v: Any
    scores: Any
    key_scores: Any


class Cache:
    """State of decoding: per layer (routing heads' store, local heads' ring), and the place.

    `step` writes into its arrays; a cache belongs to one text per batch row.
    """

    def __init__(self, layers, labels, capacity):
        self.layers, self.labels, self.capacity = layers, labels, capacity
        self.place = 0  # places computed so far


def new_cache(params, cfg: ModelConfig, batch: int, capacity: int, labels=None) -> Cache:
    """An empty cache for texts of up to `capacity` places."""
    table = params["embed"]["table"]
    xp, dtype, d = array_module(table), table.dtype, cfg.head_width
    layers = []
    for i in range(cfg.n_layers):
        routed, local = cfg.heads(i)
        s, lookback = local_reach(cfg, capacity)
        ring = Ring(*(xp.zeros((batch, local, (lookback + 1) * s, d), dtype) for _ in "kv"))
        k, w = cfg.n_clusters, cfg.window
        store = None
        if routed and cfg.routing == "topk":
            rows, scores = (batch, routed, capacity, d), (batch, routed, k, capacity)
            store = Everything(xp.zeros(rows, dtype), xp.zeros(rows, dtype),
                               xp.zeros(scores, dtype), xp.zeros(scores, dtype))
        elif routed:
            # One spare slot per ring takes the writes of members that are too old to matter.
            rings = (batch, routed, k, w + 1, d)
            store = Members(xp.zeros(rings, dtype), xp.zeros(rings, dtype),
                            xp.zeros((batch, routed, k), xp.int64))
        layers.append((store, ring))
    return Cache(layers, labels, capacity)


def prefill(params, centroids, cfg: ModelConfig, ids, capacity: int, labels=None):
    """Read a prompt ids (B, n), n >= 0, in one pass -> (logits (B, V) of the next token, Cache)."""
    xp = array_module(ids)
    cache = new_cache(params, cfg, ids.shape[0], capacity, labels)
    shifted = xp.concatenate([xp.zeros((ids.shape[0], 1), ids.dtype), ids], axis=1)
    x, _ = embed(params, cfg, shifted, 0, labels)
    for i in range(cfg.n_layers):
        p = params["layers"][i]
        mu = centroids[i].mu if i in centroids else None
        n = layer_norm(x, **p["norm_attention"])[0] if cfg.norm == "pre" else x
        _fill(cache.layers[i], *project(n, p["attention"], cfg)[0], cfg, i, mu)
        (x, _), _, _, _ = block(x, p, cfg, i, mu)
    cache.place = shifted.shape[1]
    return _scores_of_next(params, cfg, x[:, -1:]), cache


def step(params, centroids, cfg: ModelConfig, cache: Cache, ids):
    """Take the tokens ids (B,) that were chosen -> logits (B, V) of those that follow."""
    x, _ = embed(params, cfg, ids[:, None], cache.place, cache.labels)
    for i in range(cfg.n_layers):
        p = params["layers"][i]
        mu = centroids[i].mu if i in centroids else None
        x = _block_step(x, p, cfg, i, mu, cache)
    cache.place += 1
    return _scores_of_next(params, cfg, x)


def _block_step(x, p, cfg, layer, mu, cache):
    pre = cfg.norm == "pre"
    n = layer_norm(x, **p["norm_attention"])[0] if pre else x
    x = x + _attention_step(n, p["attention"], cfg, layer, mu, cache)
    if not pre:
        x = layer_norm(x, **p["norm_attention"])[0]
    n = layer_norm(x, **p["norm_ffn"])[0] if pre else x
    x = x + (geglu_ffn if cfg.ffn == "geglu" else relu_ffn)(n, **p["ffn"])[0]
    return x if pre else layer_norm(x, **p["norm_ffn"])[0]


def _attention_step(x, p, cfg, layer, mu, cache):
    xp = array_module(x)
    routed, _ = cfg.heads(layer)
    store, ring = cache.layers[layer]
    q, k, v = (z[:, :, 0] for z in project(x, p, cfg)[0])            # (B, H, D)
    o = xp.empty((x.shape[0], cfg.n_heads, cfg.head_width), x.dtype)  # (B, H, D)
    if routed:
        own_q = normalize(q[:, :routed])[0]
        own_k = own_q if cfg.share_qk else normalize(k[:, :routed])[0]
        args = (own_q, own_k, v[:, :routed], p.get("routing_rel_k"), p.get("routing_rel_v"))
        if cfg.routing == "topk":
            o[:, :routed] = _topk_step(*args, mu, cfg, store, cache.place)
        else:
            o[:, :routed] = _cluster_step(*args, mu, cfg, layer, store, cache.place)
    if routed < cfg.n_heads:
        first = 0 if cfg.share_qk else routed
        o[:, routed:] = _local_step(q[:, routed:], k[:, first:], v[:, routed:],
                                    p.get("local_rel_k"), p.get("local_rel_v"), cfg, ring,
                                    cache.place, cache.capacity)
    return linear(o.reshape(x.shape[0], 1, -1), p["w_o"])[0]


def _local_step(q, k, v, rel_k, rel_v, cfg, ring, place, capacity):
    """The ring's slot j holds the latest place p with p mod N = j."""
    xp = array_module(q)
    n = ring.k.shape[2]
    ring.k[:, :, place % n], ring.v[:, :, place % n] = k, v
    back = (place - xp.arange(n)) % n                                # how long ago: (N,)
    block_size, lookback = local_reach(cfg, capacity)
    first = max(0, (place // block_size - lookback) * block_size)
    return _attend_one(q, ring.k, ring.v, rel_k, rel_v, -back, back <= place - first,
                       scale=1.0)


def _cluster_step(q, k, v, rel_k, rel_v, mu, cfg, layer, store, place):
    """causal, random: join a cluster, take the oldest slot of its ring, see the ring."""
    xp = array_module(q)
    b, h = q.shape[:2]
    if cfg.routing == "random":
        winner = xp.broadcast_to(random_places(cfg, layer, xp, 1, place)[:, 0], (b, h))
    else:
        winner = nearest(q[:, :, None], mu, equal_length=True)[:, :, 0]
    at = (xp.arange(b)[:, None], xp.arange(h)[None, :], winner)
    rank, w = store.count[at], cfg.window                            # (B, H)
    store.k[(*at, rank % w)], store.v[(*at, rank % w)] = k, v
    store.count[at] = rank + 1
    back = (rank[..., None] - xp.arange(w)) % w                      # (B, H, W) ranks ago
    return _attend_one(q, store.k[at][:, :, :w], store.v[at][:, :, :w], rel_k, rel_v, -back,
                       back <= rank[..., None], routing_rule(cfg).scale)


def _topk_step(q, k, v, rel_k, rel_v, mu, cfg, store, place):
    """Membership among the tokens so far; the newest is the last member where it is one."""
    xp = array_module(q)
    n, w = place + 1, min(cfg.window, place + 1)
    store.k[:, :, place], store.v[:, :, place] = k, v
    store.scores[..., place] = (mu @ q[..., None])[..., 0]           # (B, H, K)
    index = top_members(store.scores[..., :n], w)                    # (B, H, K, W)
    key_index = index
    if not cfg.share_qk:
        store.key_scores[..., place] = (mu @ k[..., None])[..., 0]
        key_index = top_members(store.key_scores[..., :n], w)
    member = (index[..., -1] == place).astype(q.dtype)               # (B, H, K)
    o = _attend_one(q[:, :, None], gather(store.k, key_index), gather(store.v, key_index),
                    rel_k, rel_v, xp.arange(1 - w, 1), xp.ones(w, bool), routing_rule(cfg).scale)
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


def _fill(stores, q, k, v, cfg, layer, mu):
    """Put a whole prompt (B, H, T, D) into one layer's stores."""
    xp = array_module(q)
    store, ring = stores
    routed, t = cfg.heads(layer)[0], q.shape[2]
    if routed < cfg.n_heads:
        first, n = (0 if cfg.share_qk else routed), ring.k.shape[2]
        recent = xp.arange(max(0, t - n), t)
        ring.k[:, :, recent % n], ring.v[:, :, recent % n] = (
            k[:, first:, recent], v[:, routed:, recent])
    if not routed:
        return
    qn = normalize(q[:, :routed])[0]
    kn = qn if cfg.share_qk else normalize(k[:, :routed])[0]
    vr = v[:, :routed]
    if cfg.routing == "topk":
        store.k[:, :, :t], store.v[:, :, :t] = kn, vr
        store.scores[..., :t] = mu @ qn.swapaxes(-1, -2)
        store.key_scores[..., :t] = mu @ kn.swapaxes(-1, -2)
        return
    if cfg.routing == "random":
        winner = xp.broadcast_to(random_places(cfg, layer, xp, t)[None], q[:, :routed].shape[:3])
    else:
        winner = nearest(qn, mu, equal_length=True)
    hot = winner[..., None] == xp.arange(cfg.n_clusters)             # (B, H, T, K)
    so_far = xp.cumsum(hot, axis=2)
    rank = xp.take_along_axis(so_far, winner[..., None], axis=3)[..., 0] - 1
    total = so_far[:, :, -1]                                         # (B, H, K)
    newest = rank >= xp.take_along_axis(total, winner, axis=2) - cfg.window
    slot = xp.where(newest, rank % cfg.window, cfg.window)
    b, h = q.shape[0], routed
    at = (xp.arange(b)[:, None, None], xp.arange(h)[None, :, None], winner, slot)
    store.k[at], store.v[at] = kn, vr
    store.count[...] = total


def _scores_of_next(params, cfg, x):
    h, _ = _before_output(params, cfg, x)
    return linear(h[:, -1], *_output(params, cfg))[0]


# ------------------------------------------------------------------------------------- sampling

def choose(logits, rng, temperature=1.0, top_k=0, top_p=0.0):
    """Draw a token per row of logits (B, V), NumPy.  Temperature 0 takes the best.

    top_k keeps the k likeliest tokens, top_p the fewest whose probabilities reach p (Holtzman et
    al. 2020); 0 switches either off. Both together: top_k first.
    """
    xp = array_module(logits)
    if temperature == 0:
        return logits.argmax(-1)
    z = logits.astype("float64") / temperature
    order = xp.argsort(-z, axis=-1, kind="stable")                   # best first
    z = xp.take_along_axis(z, order, axis=-1)
    if top_k:
        z[:, top_k:] = -math.inf
    p = xp.exp(z - z[:, :1])
    p /= p.sum(-1, keepdims=True)
    if 0 < top_p < 1:
        p[xp.cumsum(p, axis=-1) - p >= top_p] = 0                    # the first always stays
        p /= p.sum(-1, keepdims=True)
    draw = rng.random((len(p), 1))
    picked = xp.minimum((xp.cumsum(p, axis=-1) < draw).sum(-1), (p > 0).sum(-1) - 1)
    return xp.take_along_axis(order, picked[:, None], axis=-1)[:, 0]


def generate(params, centroids, cfg: ModelConfig, n_tokens: int, *, rng, prompt=None, batch=1,
             labels=None, temperature=1.0, top_k=0, top_p=0.0):
    """Yield n_tokens arrays (B,) of token ids, each as soon as it is drawn (NumPy).

    prompt (B, n) ids; without one, `batch` texts from nothing. rng is a numpy Generator.
    """
    xp = array_module(params["embed"]["table"])
    ids = xp.zeros((batch, 0), "int64") if prompt is None else xp.asarray(prompt)
    scores, cache = prefill(params, centroids, cfg, ids, ids.shape[1] + n_tokens + 1, labels)
    for i in range(n_tokens):
        chosen = choose(to_host(scores), rng, temperature, top_k, top_p)
        yield chosen
        if i + 1 < n_tokens:
            scores = step(params, centroids, cfg, cache, xp.asarray(chosen))
