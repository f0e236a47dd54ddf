"""Incremental decoding: one token at a time, and sampling.

Each kind of head keeps what its next token needs (stores.py): local heads the blocks that it may
see, causal and random heads the W most recent members of each cluster, topk heads the W with the
highest scores. Only the cost of full attention grows with the text. All compute what
`model.forward` computes for the whole text, up to rounding, but for topk heads, whose members in
one pass depend on later tokens too. Where keys are shifted the latest is kept for the next token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from rt_scratch.config import ModelConfig
from rt_scratch.dispatch import array_module, to_host
from rt_scratch.heads import Context, head_groups
from rt_scratch.layers import FEED_FORWARDS, layer_norm
from rt_scratch.model import block, embed, mu_of, next_logits


class Store(NamedTuple):
    """What the heads of one kind in a layer keep."""

    seen: Any      # as the kind needs it
    key: Any       # (B, H, D) of the latest position where keys are shifted, else None


class Memory:
    """The text so far: per layer the store of each kind of head, the ids that the input layer still
    sees, and the next position.

    `prefill` and `step` write into it; it belongs to one text per batch row. It also holds the
    matrices of queries (scaled by D^-1/2), keys and values as one, for one product per token.
    """

    def __init__(self, params, cfg: ModelConfig, batch: int, capacity: int, labels=None):
        """Empty, for texts of up to `capacity` positions."""
        table = params["embed"]["table"]
        xp = array_module(table)
        self.position, self.labels = 0, labels
        self.recent = xp.zeros((batch, cfg.input_tokens - 1), "int64")
        self.projections = [_projection(params["layers"][i]["attention"], cfg)
                            for i in range(cfg.n_layers)]
        self.groups = [head_groups(cfg, i) for i in range(cfg.n_layers)]
        self.stores = [
            [Store(group.kind.decoding.store(cfg, n, batch, capacity, xp, table.dtype),
                   xp.zeros((batch, n, cfg.head_width), table.dtype) if group.shifted else None)
             for group in layer for n in [group.heads.stop - group.heads.start]]
            for layer in self.groups]

    def advance(self, ids):
        """Go on to the position after ids (B, n), already shifted."""
        seen = array_module(ids).concatenate([self.recent, ids], axis=1)
        self.recent = seen[:, seen.shape[1] - self.recent.shape[1] :]
        self.position += ids.shape[1]


def _projection(p, cfg):
    own = [p[name] for name in ("w_k", "w_v") if name in p]
    return array_module(p["w_q"]).concatenate([p["w_q"] * cfg.head_width ** -0.5, *own], axis=1)


def prefill(params, centroids, cfg: ModelConfig, ids, capacity: int, labels=None):
    """Read a prompt ids (B, n), n >= 0, in one pass -> (logits (B, V) of the next token, Memory).

    `capacity`: tokens of prompt and continuation together, and one more.
    """
    xp = array_module(ids)
    memory = Memory(params, cfg, ids.shape[0], capacity, labels)
    shifted = xp.concatenate([xp.zeros((ids.shape[0], 1), ids.dtype), ids], axis=1)
    x, _ = embed(params, cfg, shifted, 0, labels)
    for i in range(cfg.n_layers):
        x, _, _ = block(x, params["layers"][i], cfg, i, mu_of(centroids, i),
                        stores=memory.stores[i])
    memory.advance(shifted)
    return next_logits(params, cfg, x[:, -1]), memory


def step(params, centroids, cfg: ModelConfig, memory: Memory, ids):
    """Take the tokens ids (B,) that were chosen -> logits (B, V) of those that follow."""
    ids = ids[:, None]
    x, _ = embed(params, cfg, ids, memory.position, memory.labels, before=memory.recent)
    x = x[:, 0]                                                      # (B, C)
    for i in range(cfg.n_layers):
        x = _block(x, params["layers"][i], Context(cfg, i, mu_of(centroids, i)), memory)
    memory.advance(ids)
    return next_logits(params, cfg, x)


def _block(x, p, context, memory):
    """`model.block` for one token per text: x (B, C), no dropout, no cache."""
    pre = context.cfg.norm == "pre"
    n = layer_norm(x, **p["norm_attention"])[0] if pre else x
    x = x + _attention(n, p["attention"], context, memory)
    if not pre:
        x, _ = layer_norm(x, **p["norm_attention"])

    n = layer_norm(x, **p["norm_ffn"])[0] if pre else x
    x = x + FEED_FORWARDS[context.cfg.ffn].forward(n, **p["ffn"])[0]
    return x if pre else layer_norm(x, **p["norm_ffn"])[0]


def _attention(x, p, context, memory):
    """`model.attention` for one token per text: each kind of head with its store."""
    b, d, h = x.shape[0], context.cfg.head_width, context.cfg.n_heads
    qkv = (x @ memory.projections[context.layer]).reshape(b, -1, d)  # (B, 2 H + heads of keys, D)
    q, k, v = qkv[:, :h], qkv[:, h:-h], qkv[:, -h:]
    o = array_module(x).empty(v.shape, x.dtype)
    groups, stores = memory.groups[context.layer], memory.stores[context.layer]
    for group, store in zip(groups, stores, strict=True):
        own, key = q[:, group.heads], k[:, group.keys] if group.keys else None
        if group.shifted:
            latest, key = own if key is None else key, store.key.copy()
            store.key[...] = latest
        o[:, group.heads] = group.kind.decoding.step(
            own, key, v[:, group.heads], p, context, store.seen, memory.position)
    return o.reshape(b, -1) @ p["w_o"]


# ------------------------------------------------------------------------------------- sampling

def choose(logits, rng, temperature=1.0, top_k=0, top_p=0.0):
    """Draw a token per row of logits (B, V), NumPy.  Temperature 0 takes the likeliest.

    top_k keeps the k likeliest tokens, top_p the fewest whose probabilities reach p (Holtzman et
    al. 2020); 0 switches either off. Both together: top_k first. rng: a numpy Generator, or one per
    row, so that what a row draws does not depend on the others.
    """
    if temperature == 0:
        return logits.argmax(-1)
    z = logits.astype("float64")
    with np.errstate(over="ignore"):  # next to 0 all but the best become -inf
        z = (z - z.max(-1, keepdims=True)) / temperature
    order = np.argsort(-z, axis=-1, kind="stable")                   # best first
    rows = np.arange(len(z))
    z = z[rows[:, None], order]
    if top_k:
        z[:, top_k:] = -math.inf
    p = np.exp(z - z[:, :1])
    p /= p.sum(-1, keepdims=True)
    if 0 < top_p < 1:
        p[np.cumsum(p, axis=-1) - p >= top_p] = 0                    # the first always stays
        p /= p.sum(-1, keepdims=True)
    draw = rng.random((len(p), 1)) if isinstance(rng, np.random.Generator) else np.array(
        [[row.random()] for row in rng])
    picked = np.minimum((np.cumsum(p, axis=-1) < draw).sum(-1), (p > 0).sum(-1) - 1)
    return order[rows, picked]


def generate(params, centroids, cfg: ModelConfig, n_tokens: int, *, rng, prompt=None, batch=1,
             labels=None, temperature=1.0, top_k=0, top_p=0.0):
    """Yield n_tokens arrays (B,) of token ids, each as soon as it is drawn (NumPy).

    prompt (B, n) ids; without one, `batch` texts start from nothing. rng: see `choose`. Full
    attention has seen no text longer than T, so with such heads each token is drawn from the latest
    T - 1, which are read again once the text is longer. The other kinds go on without end.
    """
    xp = array_module(params["embed"]["table"])
    ids = xp.zeros((batch, 0), "int64") if prompt is None else xp.asarray(prompt)
    capacity = ids.shape[1] + n_tokens + 1
    slides = "full" in cfg.kinds() and capacity > cfg.seq_len
    if slides:
        capacity = cfg.seq_len
        ids = ids[:, max(0, ids.shape[1] - capacity + 1) :]
    logits, memory = prefill(params, centroids, cfg, ids, capacity, labels)
    for i in range(n_tokens):
        chosen = choose(to_host(logits), rng, temperature, top_k, top_p)
        yield chosen
        if i + 1 == n_tokens:
            return
        new = xp.asarray(chosen)
        if slides:
            ids = xp.concatenate([ids, new[:, None]], axis=1)
            ids = ids[:, max(0, ids.shape[1] - capacity + 1) :]
        if memory.position < capacity:
            logits = step(params, centroids, cfg, memory, new)
        else:
            logits, memory = prefill(params, centroids, cfg, ids, capacity, labels)
