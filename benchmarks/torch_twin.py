"""The same model in PyTorch with autograd: a second oracle for every gradient, and a rival.

    python benchmarks/torch_twin.py        logits and gradients of both in float64, side by side

Written from the paper and the definitions of `rt_scratch.model`, not from its code: relative
positions are gathered, blocks are cut with `unfold`, clusters are sorted and scattered by torch;
full attention without relative positions is torch's fused kernel.
Text, gated feed-forward layers, heads local, full, causal and topk, shared or separate keys.
"""

import dataclasses
import sys

import numpy as np
import torch
from common import size_model
from torch.nn.functional import (
    cross_entropy,
    gelu,
    layer_norm,
    one_hot,
    pad,
    scaled_dot_product_attention,
    silu,
)

from rt_scratch import init_centroids, init_parameters, model, views


def tree(values):
    """NumPy arrays as torch leaves, in the same tree."""
    if isinstance(values, dict):
        return {name: tree(value) for name, value in values.items()}
    if isinstance(values, list):
        return [tree(value) for value in values]
    return torch.tensor(values, requires_grad=True)


def leaves(values):
    """The leaves of a tree in order."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from leaves(value)
    else:
        yield values


def loss(params, mu, cfg, ids):
    """Mean cross-entropy + beta commitment of ids (B, T); mu: layer -> (H, K, D)."""
    logits, commitment = forward(params, mu, cfg, ids)
    nats = cross_entropy(logits.reshape(-1, cfg.vocab_size), ids.reshape(-1))
    return nats + cfg.commitment * commitment


def forward(params, mu, cfg, ids):
    """(logits (B, T, V), commitment loss)."""
    e = params["embed"]
    seen = [pad(ids, (j, -j)) for j in range(1, cfg.input_tokens + 1)]
    rows = [e["table"][token] for token in seen]
    if cfg.ngram_rows:
        number = sum(token * cfg.vocab_size**j for j, token in enumerate(seen))
        rows.append(e["ngrams"][number % cfg.ngram_rows])
    x = torch.cat(rows, -1) @ e["w"] + e["b"]
    if cfg.timing_signal:
        half = cfg.width // 2
        rate = 10000 ** (-torch.arange(half, dtype=x.dtype) / max(half - 1, 1))
        angle = torch.arange(ids.shape[1], dtype=x.dtype)[:, None] * rate
        x = x + torch.cat([angle.sin(), angle.cos()], 1)
    commitment = 0.0
    for i in range(cfg.n_layers):
        p = params["layers"][i]
        before = norm(x, p["norm_attention"]) if cfg.norm == "pre" else x
        y, own = attention(before, p["attention"], mu.get(i), cfg, cfg.layer_heads(i))
        commitment = commitment + own
        x = x + y
        if cfg.norm == "post":
            x = norm(x, p["norm_attention"])
        f = p["ffn"]
        before = norm(x, p["norm_ffn"]) if cfg.norm == "pre" else x
        gate = before @ f["w_gate"]
        gate = gelu(gate, approximate="tanh") if cfg.ffn == "geglu" else silu(gate)
        x = x + (gate * (before @ f["w_value"])) @ f["w_out"]
        if cfg.norm == "post":
            x = norm(x, p["norm_ffn"])
    if cfg.norm == "pre":
        x = norm(x, params["norm"])
    out = params["output"]
    if "w_embed" in out:
        x = x @ out["w_embed"] + out["b_embed"]
    return x @ (e["table"].T if cfg.tie_embedding else out["w"]) + out["b"], commitment


def norm(x, p):
    return layer_norm(x, x.shape[-1:], p["gain"], p["bias"], 1e-6)


def attention(x, p, mu, cfg, kinds):
    b, t, _ = x.shape

    def heads(y):
        return y.view(b, t, -1, cfg.head_width).transpose(1, 2)

    q, v = heads(x @ p["w_q"]) * cfg.head_width ** -0.5, heads(x @ p["w_v"])
    k = heads(x @ p["w_k"]) if "w_k" in p else None
    out, commitment, first, first_key = [], 0.0, 0, 0
    for kind, n in kinds:
        routes = kind in ("causal", "topk")
        own, key = slice(first, first + n), slice(first_key, first_key + n)
        first, first_key = own.stop, key.start if routes and cfg.share_qk else key.stop
        keys = q[:, own] if routes and cfg.share_qk else k[:, key]
        if cfg.shift_keys and kind != "local":
            keys = pad(keys[:, :, :-1], (0, 0, 1, 0))
        elif routes and cfg.share_qk:
            keys = None
        if routes:
            o, commitment = routing(q[:, own], keys, v[:, own], mu, p, cfg)
        elif kind == "full" and "local_rel_k" not in p:
            o = scaled_dot_product_attention(q[:, own], keys, v[:, own], is_causal=True, scale=1.0)
        else:
            s, lookback = (t, 0) if kind == "full" else (cfg.block, cfg.lookback)
            o = local(q[:, own], keys, v[:, own], p.get("local_rel_k"), p.get("local_rel_v"), s,
                      lookback, 1.0)
        out.append(o)
    return torch.cat(out, 1).transpose(1, 2).reshape(b, t, -1) @ p["w_o"], commitment


def softmax_attention(q, k, v, rel_k, rel_v, distance, hidden, scale):
    """q (..., S, D), k and v (..., N, D), distance (S, N), hidden True where not to look."""
    z = q @ k.transpose(-1, -2)
    if rel_k is not None:
        reach = len(rel_k) // 2
        index = (distance.clamp(-reach, reach) + reach).expand(z.shape)
        z = z + (q @ rel_k.T).gather(-1, index)
    w = (scale * z).masked_fill(hidden, -1e30).softmax(-1)
    w = w.masked_fill(hidden.all(-1, keepdim=True), 0)  # nothing to look at
    o = w @ v
    if rel_v is not None:
        by_distance = w.new_zeros(*w.shape[:-1], len(rel_v)).scatter_add(-1, index, w)
        o = o + by_distance @ rel_v
    return o


def local(q, k, v, rel_k, rel_v, s, lookback, scale, segment=None, window=None):
    """Blocks of s queries see their own block and `lookback` earlier ones."""
    t = q.shape[2]
    n = -(-t // s)
    extra = n * s - t

    def windows(x):  # (B, H, T, D) -> (B, H, n, (lookback + 1) s, D)
        return pad(x, (0, 0, lookback * s, extra)).unfold(2, (lookback + 1) * s, s).transpose(3, 4)

    i, j = torch.arange(s)[:, None], torch.arange((lookback + 1) * s)[None]
    distance = j - lookback * s - i
    position = (torch.arange(n) * s)[:, None, None] + distance + i
    hidden = (distance > 0) | (position < 0)
    if window is not None:
        hidden = hidden | (distance <= -window)
    if segment is not None:
        own = pad(segment, (0, extra), value=-1).unflatten(2, (n, s))
        seen = pad(segment, (lookback * s, extra), value=-1).unfold(2, (lookback + 1) * s, s)
        hidden = hidden | (own[..., :, None] != seen[..., None, :])
    queries = pad(q, (0, 0, 0, extra)).unflatten(2, (n, s))
    o = softmax_attention(queries, windows(k), windows(v), rel_k, rel_v, distance, hidden, scale)
    return o.flatten(2, 3)[:, :, :t]


def routing(q, k, v, mu, p, cfg):
    d, t = q.shape[-1], q.shape[2]
    q = layer_norm(q, (d,), eps=1e-6)
    keys = q if k is None else layer_norm(k, (d,), eps=1e-6)
    rel = p.get("routing_rel_k"), p.get("routing_rel_v")
    unit = mu if cfg.routing == "topk" else mu / mu.norm(dim=-1, keepdim=True)

    def apart(x):
        winner = (x @ unit.transpose(-1, -2)).argmax(-1)
        nearest = mu.expand(len(x), -1, -1, -1).gather(2, winner[..., None].expand(x.shape))
        return ((x - nearest) ** 2).mean(), winner

    loss_q, winner = apart(q)
    loss_k, key_winner = (loss_q, winner) if k is None else apart(keys)
    commitment = loss_q + loss_k
    if cfg.routing == "topk":
        w = min(cfg.window, t)

        def members(x):
            return (mu @ x.transpose(-1, -2)).topk(w, -1).indices.sort(-1).values.flatten(2)

        def pick(x, index):
            rows = x.gather(2, index[..., None].expand(-1, -1, -1, d))
            return rows.unflatten(2, (cfg.n_clusters, w))

        at = members(q)
        key_at = at if k is None else members(keys)
        later = key_at.unflatten(2, (-1, w))[..., None, :] > at.unflatten(2, (-1, w))[..., None]
        distance = torch.arange(w)[None] - torch.arange(w)[:, None]
        o = softmax_attention(pick(q, at), pick(keys, key_at), pick(v, key_at), *rel, distance,
                              later, 1.0).flatten(2, 3)
        index = at[..., None].expand(o.shape)
        total = torch.zeros_like(q).scatter_add(2, index, o)
        times = torch.zeros_like(q).scatter_add(2, index, torch.ones_like(o))
        return total / (times + 1e-2), commitment
    if k is not None or cfg.n_probes > 1:
        own = one_hot(key_winner, cfg.n_clusters)                      # (B, H, T, K)
        cluster = key_winner[:, :, None].expand(-1, -1, t, -1)         # of key j, for each query
        count = own.cumsum(2).gather(3, cluster)                       # of its keys up to query i
        later = count - count.diagonal(dim1=2, dim2=3)[:, :, None]     # after key j
        probes = (q @ unit.transpose(-1, -2)).topk(min(cfg.n_probes, cfg.n_clusters)).indices
        missed = (probes[..., None] != key_winner[:, :, None, None]).all(3)
        hidden = missed | (later >= cfg.window) | ~torch.ones(t, t, dtype=bool).tril()
        return softmax_attention(q, keys, v, *rel, -later, hidden, d ** -0.5), commitment
    order = winner.argsort(dim=-1, stable=True)

    def pick(x):
        return x.gather(2, order[..., None].expand(x.shape))

    o = local(pick(q), pick(keys), pick(v), *rel, cfg.window, 1, d ** -0.5,
              winner.gather(2, order), cfg.window)
    return torch.zeros_like(o).scatter(2, order[..., None].expand(o.shape), o), commitment


def compare(cfg, seed=0, batch=2):
    """Largest relative differences (loss, logits, gradient) between this and ours, in float64."""
    flat, table = init_parameters(cfg, np, "float64", seed)
    flat += 0.05 * np.random.default_rng(seed).normal(size=flat.shape)
    centroids = init_centroids(cfg, np, "float64", seed)
    ids = np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, cfg.seq_len))
    ours, own_gradient = views(flat, table), np.zeros_like(flat)
    (nats, commitment), cache, _ = model.loss(
        ours, centroids, cfg, ids, np.full(ids.shape, 1 / ids.size))
    model.loss_backward(1.0, cfg.commitment, cache, views(own_gradient, table))
    own_logits = model.logits(ours, centroids, cfg, ids)

    params, gradient = tree(ours), np.zeros_like(flat)
    mu = {i: torch.tensor(c.mu) for i, c in centroids.items()}
    theirs = loss(params, mu, cfg, torch.tensor(ids))
    theirs.backward()
    for into, leaf in zip(leaves(views(gradient, table)), leaves(params), strict=True):
        into[...] = leaf.grad.numpy()
    logits = forward(params, mu, cfg, torch.tensor(ids))[0].detach().numpy()

    def apart(a, b):
        return float(np.abs(a - b).max() / np.abs(b).max())

    return (abs(theirs.item() / float(nats + cfg.commitment * commitment) - 1),
            apart(own_logits, logits), apart(own_gradient, gradient))


def cases():
    """Configurations that between them use everything the twin knows."""
    small, _ = size_model("1.1M", width=32, n_layers=2, seq_len=100, window=16, block=16,
                          vocab_size=50, ffn_width=24, n_clusters=5, commitment=0.1,
                          local_max_distance=9, routing_max_distance=7)
    change = dataclasses.replace
    return {
        "causal": small,
        "three input tokens": change(small, input_tokens=3),
        "trigrams": change(small, input_tokens=3, ngram_rows=13),
        # In `topk` equal tokens at other positions score equally; the timing signal breaks ties.
        "topk": change(small, routing="topk", timing_signal=True),
        "causal, shifted keys": change(small, shift_keys=True),
        "causal, shifted keys, full attention in the first layer": change(
            small, shift_keys=True, full_layers=(0,)),
        "causal, two probes": change(small, n_probes=2),
        "causal, separate keys, post-norm": change(small, share_qk=False, norm="post"),
        "topk, separate keys, two lookback blocks": change(
            small, routing="topk", share_qk=False, lookback=2, timing_signal=True),
        "no relative positions, timing signal, factorised tied embedding": change(
            small, local_max_distance=0, routing_max_distance=0, timing_signal=True,
            embed_width=12, tie_embedding=True),
        "routing in the last layer only": change(small, routing="topk", routing_layers=(-1,)),
        "full attention in the first layer, SwiGLU": change(small, full_layers=(0,), ffn="swiglu"),
        "full attention, fused": change(small, attention="full", local_max_distance=0),
    }


if __name__ == "__main__":
    worst = 0.0
    for name, cfg in cases().items():
        errors = compare(cfg)
        worst = max(worst, *errors)
        print("loss {:.1e}  logits {:.1e}  gradient {:.1e}".format(*errors), f" {name}")
    sys.exit(0 if worst < 1e-10 else f"the two models differ by {worst:.1e}")
