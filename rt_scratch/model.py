"""The Routing Transformer: parameters, one block, the whole model, forward and backward.

Data flow, text:   ids -> shift right -> embedding -> dense -> blocks -> [LayerNorm] -> output
           image:  values -> shift right -> channel table + positions -> blocks -> output

A parameter tree mirrors the calls; every leaf is a view of one flat buffer. Gradients are an
identical tree, and the functions here are the only ones that write `+=` into it.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

from numpy.random import Generator, Philox

from rt_scratch.attention import local_attention, local_attention_backward
from rt_scratch.backend import array_module
from rt_scratch.config import ModelConfig
from rt_scratch.layers import (
    dropout,
    dropout_backward,
    dropout_mask,
    embedding,
    embedding_backward,
    geglu_ffn,
    geglu_ffn_backward,
    image_embedding,
    image_embedding_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    normalize,
    relu_ffn,
    relu_ffn_backward,
    shift_right,
    timing_signal,
)
from rt_scratch.routing import (
    Centroids,
    Membership,
    Route,
    Rule,
    routing_attention,
    routing_attention_backward,
)

# --------------------------------------------------------------------------------- parameters


class Leaf(NamedTuple):
    """One parameter: its name, its shape, its place in the flat buffer, its initialiser."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    init: str  # 'uniform', 'zeros', 'ones', 'positions'


def parameter_table(cfg: ModelConfig) -> list[Leaf]:
    """Every parameter of the model, in the order of the flat buffer."""
    c, e, m, d = cfg.width, cfg.token_width, cfg.ffn_width, cfg.head_width
    shapes: list[tuple[str, tuple[int, ...], str]] = []

    def add(name, *shape, init="uniform"):
        shapes.append((name, shape, init))

    def add_norm(name):
        add(f"{name}.gain", c, init="ones")
        add(f"{name}.bias", c, init="zeros")

    if cfg.kind == "text":
        add("embed.table", cfg.vocab_size, e)
        add("embed.w", e, c)
        add("embed.b", c, init="zeros")
    else:
        add("embed.table", 3 * cfg.vocab_size, c)
        add("embed.rows", cfg.image_size, 1, 3 * c, init="positions")
        add("embed.columns", 1, cfg.image_size, 3 * c, init="positions")
        if cfg.n_classes:
            add("embed.classes", cfg.n_classes, c)
    for i in range(cfg.n_layers):
        routed, local = cfg.heads(i)
        at = f"layers.{i}"
        add_norm(f"{at}.norm_attention")
        add(f"{at}.attention.w_q", c, c)
        if n_keys := local + (0 if cfg.share_qk else routed):
            add(f"{at}.attention.w_k", c, n_keys * d)
        add(f"{at}.attention.w_v", c, c)
        add(f"{at}.attention.w_o", c, c)
        for kind, heads, reach in (("local", local, cfg.local_max_distance),
                                   ("routing", routed, cfg.routing_max_distance)):
            if heads and reach:
                add(f"{at}.attention.{kind}_rel_k", 2 * reach + 1, d)
                add(f"{at}.attention.{kind}_rel_v", 2 * reach + 1, d)
        add_norm(f"{at}.norm_ffn")
        if cfg.ffn == "geglu":
            add(f"{at}.ffn.w_gate", c, m)
            add(f"{at}.ffn.w_value", c, m)
            add(f"{at}.ffn.w_out", m, c)
        else:
            add(f"{at}.ffn.w_in", c, m)
            add(f"{at}.ffn.b_in", m, init="zeros")
            add(f"{at}.ffn.w_out", m, c)
            add(f"{at}.ffn.b_out", c, init="zeros")
    if cfg.norm == "pre":
        add_norm("norm")
    if cfg.kind == "text" and e != c:
        add("output.w_embed", c, e)
        add("output.b_embed", e, init="zeros")
    if not cfg.tie_embedding:
        add("output.w", e, cfg.vocab_size)
    add("output.b", cfg.vocab_size, init="zeros")

    table, start = [], 0
    for name, shape, init in shapes:
        stop = start + math.prod(shape)
        table.append(Leaf(name, shape, start, stop, init))
        start = stop
    return table


def views(flat, table: list[Leaf]) -> dict:
    """The tree of the flat buffer: tree['layers'][0]['attention']['w_q'] is a view of it."""
    tree: dict[str, Any] = {}
    for leaf in table:
        *path, last = leaf.name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(int(part) if part.isdigit() else part, {})
        node[last] = flat[leaf.start : leaf.stop].reshape(leaf.shape)
    return tree


def init_parameters(cfg: ModelConfig, xp, dtype, seed: int):
    """(flat buffer, table). Drawn on the host, so that every device starts from the same numbers.

    Released initialisers: matrices and tables uniform with variance gain / average of fan-in and
    fan-out, image positions N(0, 1 / sqrt(3 C)), biases 0, LayerNorm 1 and 0. The released gain is
    0.2. Each leaf draws from a stream of its own, keyed by its name.
    """
    table = parameter_table(cfg)
    flat = xp.empty(table[-1].stop, dtype)
    for leaf in table:
        rng = Generator(Philox(key=[seed, zlib.crc32(leaf.name.encode())]))
        if leaf.init == "uniform":
            bound = math.sqrt(3 * cfg.init_gain / (sum(leaf.shape) / 2))
            values = rng.uniform(-bound, bound, leaf.shape)
        elif leaf.init == "positions":
            values = rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape)
        else:
            values = rng.uniform(1, 1, leaf.shape) if leaf.init == "ones" else rng.uniform(
                0, 0, leaf.shape)
        flat[leaf.start : leaf.stop] = xp.asarray(values.astype(dtype).reshape(-1))
    return flat, table


def init_centroids(cfg: ModelConfig, xp, dtype, seed: int) -> dict[int, Centroids]:
    """Centroids of the layers with routing heads: LayerNorm of a Gaussian (released code).

    The averages start at count 1 and total mu, so that the first update is sane.
    """
    state = {}
    for i in range(cfg.n_layers):
        if routed := cfg.heads(i)[0]:
            rng = Generator(Philox(key=[seed, zlib.crc32(f"centroids.{i}".encode())]))
            draw = rng.normal(size=(routed, cfg.n_clusters, cfg.head_width))
            mu = normalize(xp.asarray(draw.astype(dtype)))[0]
            state[i] = Centroids(mu, xp.ones(mu.shape[:2], dtype), mu.copy())
    return state


# ------------------------------------------------------------------------------------ the model

class Noise(NamedTuple):
    """What dropout masks depend on, apart from the place in the model."""

    seed: int
    step: int
    part: int = 0  # which of the forward passes of the step


class Report(NamedTuple):
    """What a forward pass says beside its result, per routing layer."""

    memberships: dict[int, Membership]
    routes: dict[int, Route]


def forward(params, centroids, cfg: ModelConfig, ids, labels=None, noise=None, fixed=None,
            recompute=False):
    """Tokens (B, T) -> last hidden state (B, T, E), ready for the output matrix.

    Position t depends on tokens before t only (mode `topk` aside). `labels` (B,) condition images
    on a class. `noise` turns dropout on. `fixed` maps layers to Routes to use instead of choosing.
    With `recompute` a block's cache is its input alone, and the backward runs the block again.
    Returns (hidden, commitment loss), cache, Report.
    """
    x, cache_embed = _embed(params, cfg, ids, labels, noise)
    x, cache_drop = dropout(x, _rate(cfg.residual_dropout, noise, "input"))
    caches, memberships, routes = [], {}, {}
    commitment = 0
    for i in range(cfg.n_layers):
        mu = centroids[i].mu if i in centroids else None
        args = (params["layers"][i], cfg, i, mu, noise)
        (y, loss), cache, membership, path = block(x, *args, (fixed or {}).get(i))
        caches.append((x, args, path) if recompute else cache)
        x = y
        if membership is not None:
            memberships[i], routes[i] = membership, path
            commitment = commitment + loss
    h, cache_out = _before_output(params, cfg, x)
    cache = (cfg, cache_embed, cache_drop, caches, recompute, cache_out)
    return (h, commitment), cache, Report(memberships, routes)


def forward_backward(dh, dcommitment, cache, grads):
    """Adds the gradients of all parameters to the tree `grads`.

    Uses the cache up: the list of block caches is emptied on the way, so that memory is freed.
    """
    cfg, cache_embed, cache_drop, caches, recompute, cache_out = cache
    dx = _before_output_backward(dh, cache_out, grads)
    for i in reversed(range(cfg.n_layers)):
        stored = caches.pop()  # freed as soon as it is used
        if recompute:
            x, args, path = stored
            stored = block(x, *args, path)[1]
        dx = block_backward(dx, dcommitment, stored, grads["layers"][i])
    dx = dropout_backward(dx, cache_drop)
    _embed_backward(dx, cache_embed, grads["embed"])


def loss(params, centroids, cfg: ModelConfig, ids, weights, labels=None, noise=None, fixed=None,
         recompute=False):
    """Cross-entropy sum(weights * nats) of the tokens ids (B, T), each predicted from those before.

    Returns (nats, commitment), cache, Report. The training loss is
    nats + beta * commitment; the reported metric is nats alone.
    """
    (h, commitment), cache, report = forward(
        params, centroids, cfg, ids, labels, noise, fixed, recompute)
    w, b = _output(params, cfg)
    rows = h.reshape(-1, h.shape[-1])
    nats, cache_loss = linear_cross_entropy(rows, w, b, ids.reshape(-1), weights.reshape(-1))
    return (nats, commitment), (cache, cache_loss, h.shape), report


def loss_backward(dnats, dcommitment, cache, grads):
    """Adds to `grads` the gradients of dnats * nats + dcommitment * commitment."""
    cache, cache_loss, shape = cache
    cfg = cache[0]
    dh, dw, db = linear_cross_entropy_backward(dnats, cache_loss)
    if cfg.tie_embedding:
        grads["embed"]["table"] += dw.T
    else:
        grads["output"]["w"] += dw
    grads["output"]["b"] += db
    forward_backward(dh.reshape(shape), dcommitment, cache, grads)


def logits(params, centroids, cfg: ModelConfig, ids, labels=None, fixed=None):
    """Scores (B, T, V) of each token given those before it."""
    (h, _), _, _ = forward(params, centroids, cfg, ids, labels, fixed=fixed)
    return linear(h, *_output(params, cfg))[0]


def target_weights(cfg: ModelConfig, ids, dtype):
    """1 for every target that counts, 0 for padding (pad_id).  (B, T)."""
    xp = array_module(ids)
    return xp.ones(ids.shape, dtype) if cfg.pad_id < 0 else (ids != cfg.pad_id).astype(dtype)


# ---------------------------------------------------------------------------------- input, output

def _embed(params, cfg, ids, labels, noise):
    shifted = shift_right(ids)
    if noise and cfg.target_dropout:
        key = _rate(cfg.target_dropout, noise, "target")
        keep = dropout_mask(array_module(ids), ids.shape, *key, "float32") > 0
        shifted = shifted * keep
    return embed(params, cfg, shifted, 0, labels, noise)


def embed(params, cfg: ModelConfig, shifted, start: int, labels=None, noise=None):
    """Embeddings (B, T, C) of already shifted ids at places start, start + 1, ..."""
    p = params["embed"]
    drop = _rate(cfg.embed_dropout, noise, "embed")
    cache_class = None
    if cfg.kind == "image":
        x, cache = image_embedding(shifted, start, p["table"], p["rows"], p["columns"])
        if cfg.n_classes:
            c, cache_class = embedding(labels, p["classes"])
            x = x + c[:, None]
        x, cache_drop = dropout(x, drop)
        return x, (cfg, cache, None, cache_class, cache_drop)
    e, cache = embedding(shifted, p["table"])
    e, cache_drop = dropout(e, drop)
    x, cache_dense = linear(e, p["w"], p["b"])
    if cfg.timing_signal:
        x = x + timing_signal(array_module(x), x.shape[1], x.shape[2], x.dtype, start)
    return x, (cfg, cache, cache_dense, None, cache_drop)


def _embed_backward(dx, cache, g):
    cfg, cache, cache_dense, cache_class, cache_drop = cache
    if cfg.kind == "image":
        dx = dropout_backward(dx, cache_drop)
        if cfg.n_classes:
            g["classes"] += embedding_backward(dx.sum(1), cache_class)
        dtable, drows, dcolumns = image_embedding_backward(dx, cache)
        g["table"] += dtable
        g["rows"] += drows
        g["columns"] += dcolumns
        return
    de, dw, db = linear_backward(dx, cache_dense)
    g["w"] += dw
    g["b"] += db
    g["table"] += embedding_backward(dropout_backward(de, cache_drop), cache)


def _before_output(params, cfg, x):
    cache_norm = cache_dense = None
    if cfg.norm == "pre":
        x, cache_norm = layer_norm(x, **params["norm"])
    if cfg.kind == "text" and cfg.token_width != cfg.width:
        p = params["output"]
        x, cache_dense = linear(x, p["w_embed"], p["b_embed"])
    return x, (cache_norm, cache_dense)


def _before_output_backward(dx, cache, grads):
    cache_norm, cache_dense = cache
    if cache_dense is not None:
        dx, dw, db = linear_backward(dx, cache_dense)
        grads["output"]["w_embed"] += dw
        grads["output"]["b_embed"] += db
    if cache_norm is not None:
        dx = _norm_backward(dx, cache_norm, grads["norm"])
    return dx


def _output(params, cfg):
    """(w, b) of the output layer; tied to the token table if so configured."""
    p = params["output"]
    return (params["embed"]["table"].T if cfg.tie_embedding else p["w"]), p["b"]


# ------------------------------------------------------------------------------------ one block

def block(x, p, cfg: ModelConfig, layer: int, mu, noise=None, fixed=None):
    """pre:  x = x + drop(attention(LN(x)));  x = x + drop(ffn(LN(x)))
    post: x = LN(x + drop(attention(x)));  x = LN(x + drop(ffn(x)))

    x (B, T, C). `post` is what the released recipes use. Returns (x, commitment loss), cache,
    Membership, Route (None in layers without routing heads).
    """
    pre = cfg.norm == "pre"
    n, cache_n1 = layer_norm(x, **p["norm_attention"]) if pre else (x, None)
    (a, loss), cache_a, membership, path = attention(
        n, p["attention"], cfg, layer, mu, noise, fixed)
    a, cache_d1 = dropout(a, _rate(cfg.residual_dropout, noise, "attention_out", layer))
    x = x + a
    if not pre:
        x, cache_n1 = layer_norm(x, **p["norm_attention"])

    n, cache_n2 = layer_norm(x, **p["norm_ffn"]) if pre else (x, None)
    ffn = geglu_ffn if cfg.ffn == "geglu" else relu_ffn
    f, cache_f = ffn(n, **p["ffn"], dropped=_rate(cfg.ffn_dropout, noise, "ffn", layer))
    f, cache_d2 = dropout(f, _rate(cfg.residual_dropout, noise, "ffn_out", layer))
    x = x + f
    if not pre:
        x, cache_n2 = layer_norm(x, **p["norm_ffn"])
    return (x, loss), (cfg, cache_n1, cache_a, cache_d1, cache_n2, cache_f, cache_d2), membership, \
        path


def block_backward(dx, dloss, cache, g):
    """Gradient of the block's input; parameters' gradients are added to g."""
    cfg, cache_n1, cache_a, cache_d1, cache_n2, cache_f, cache_d2 = cache
    pre = cfg.norm == "pre"
    if not pre:
        dx = _norm_backward(dx, cache_n2, g["norm_ffn"])
    df = dropout_backward(dx, cache_d2)
    dn = _ffn_backward(df, cache_f, g["ffn"])
    dx = dx + (_norm_backward(dn, cache_n2, g["norm_ffn"]) if pre else dn)

    if not pre:
        dx = _norm_backward(dx, cache_n1, g["norm_attention"])
    da = dropout_backward(dx, cache_d1)
    dn = attention_backward(da, dloss, cache_a, g["attention"])
    return dx + (_norm_backward(dn, cache_n1, g["norm_attention"]) if pre else dn)


def _norm_backward(dy, cache, g):
    dx, dgain, dbias = layer_norm_backward(dy, cache)
    g["gain"] += dgain
    g["bias"] += dbias
    return dx


def _ffn_backward(dy, cache, g):
    backward = geglu_ffn_backward if "w_gate" in g else relu_ffn_backward
    dx, *gradients = backward(dy, cache)
    for name, gradient in zip(g, gradients, strict=True):  # both in the order of the arguments
        g[name] += gradient
    return dx


def attention(x, p, cfg: ModelConfig, layer: int, mu, noise=None, fixed=None):
    """Multi-head attention of one layer: routing heads first, local heads last (released order).

    x (B, T, C) -> (B, T, C). Returns (y, commitment loss), cache, Membership, Route.
    """
    xp = array_module(x)
    routed, _ = cfg.heads(layer)
    (q, k, v), (cache_q, cache_k, cache_v) = project(x, p, cfg)      # (B, H, T, D)
    o = xp.empty((*x.shape[:2], cfg.n_heads, cfg.head_width), x.dtype)
    heads = o.swapaxes(1, 2)                                         # a view (B, H, T, D)

    loss = membership = path = cache_routed = cache_local = None
    if routed:
        own_k = None if cfg.share_qk else k[:, :routed]
        (heads[:, :routed], loss), cache_routed, membership, path = routing_attention(
            q[:, :routed], own_k, v[:, :routed], p.get("routing_rel_k"), p.get("routing_rel_v"),
            mu, routing_rule(cfg), random_places(cfg, layer, xp, x.shape[1]), fixed,
            _rate(cfg.attention_dropout, noise, "routing", layer))
    if routed < cfg.n_heads:
        first = 0 if cfg.share_qk else routed
        heads[:, routed:], cache_local = local_attention(
            q[:, routed:], k[:, first:], v[:, routed:], p.get("local_rel_k"),
            p.get("local_rel_v"), *local_reach(cfg, x.shape[1]), scale=1.0,
            dropped=_rate(cfg.attention_dropout, noise, "local", layer))
    y, cache_o = linear(o.reshape(x.shape), p["w_o"])
    cache = (cfg, routed, cache_q, cache_k, cache_v, cache_routed, cache_local, cache_o)
    return (y, loss), cache, membership, path


def attention_backward(dy, dloss, cache, g):
    """Gradient of x; parameters' gradients are added to g."""
    cfg, routed, cache_q, cache_k, cache_v, cache_routed, cache_local, cache_o = cache
    xp = array_module(dy)
    do, dw_o, _ = linear_backward(dy, cache_o)
    g["w_o"] += dw_o
    do = split_heads(do, cfg)                                        # (B, H, T, D)
    b, h, t, d = do.shape
    first = 0 if cfg.share_qk else routed
    n_keys = h - routed + first
    dq, dk, dv = (xp.empty((b, t, n, d), dy.dtype) for n in (h, n_keys, h))
    dqh, dkh, dvh = dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    if routed:
        dqh[:, :routed], dk_own, dvh[:, :routed], *drel = routing_attention_backward(
            do[:, :routed], dloss, cache_routed)
        if dk_own is not None:
            dkh[:, :routed] = dk_own
        _add_tables(g, "routing", drel)
    if routed < h:
        dqh[:, routed:], dkh[:, first:], dvh[:, routed:], *drel = local_attention_backward(
            do[:, routed:], cache_local)
        _add_tables(g, "local", drel)
    dq *= cfg.head_width ** -0.5
    dx, dw_q, _ = linear_backward(dq.reshape(b, t, h * d), cache_q)
    dx_v, dw_v, _ = linear_backward(dv.reshape(b, t, h * d), cache_v)
    g["w_q"] += dw_q
    g["w_v"] += dw_v
    dx += dx_v
    if n_keys:
        dx_k, dw_k, _ = linear_backward(dk.reshape(b, t, n_keys * d), cache_k)
        g["w_k"] += dw_k
        dx += dx_k
    return dx


def project(x, p, cfg: ModelConfig):
    """Queries scaled by D^-1/2, keys of the heads that have their own, values: (B, H, T, D) each.

    Released code: all queries are scaled here; routing heads then normalise them, which takes the
    scale away again but for the epsilon of the LayerNorm.
    """
    q, cache_q = linear(x, p["w_q"])
    q *= cfg.head_width ** -0.5
    k, cache_k = linear(x, p["w_k"]) if "w_k" in p else (x[..., :0], None)
    v, cache_v = linear(x, p["w_v"])
    return tuple(split_heads(z, cfg) for z in (q, k, v)), (cache_q, cache_k, cache_v)


def _add_tables(g, kind, drel):
    if drel[0] is not None:
        g[f"{kind}_rel_k"] += drel[0]
        g[f"{kind}_rel_v"] += drel[1]


def split_heads(x, cfg: ModelConfig):
    """(B, T, H D) -> a view (B, H, T, D)."""
    b, t, n = x.shape
    return x.reshape(b, t, n // cfg.head_width, cfg.head_width).swapaxes(1, 2)


def routing_rule(cfg: ModelConfig) -> Rule:
    """The paper's mode keeps the released logits, which are not scaled; ours scale by D^-1/2."""
    scale = 1.0 if cfg.routing == "topk" else cfg.head_width ** -0.5
    return Rule(cfg.routing, cfg.window, scale)


def local_reach(cfg: ModelConfig, n_tokens: int) -> tuple[int, int]:
    """(block, lookback) of local heads; full attention is one block of everything."""
    return (n_tokens, 0) if cfg.attention == "full" else (cfg.block, cfg.lookback)


def random_places(cfg: ModelConfig, layer: int, xp, n_tokens: int, start: int = 0):
    """Mode `random`: the cluster (H, T) of each place, the same in training and decoding."""
    if cfg.routing != "random":
        return None
    rng = Generator(Philox(key=[cfg.seed_random, layer]))
    places = rng.integers(cfg.n_clusters, size=(cfg.seq_len, cfg.heads(layer)[0])).T
    wanted = xp.arange(start, start + n_tokens) % cfg.seq_len
    return xp.asarray(places)[:, wanted]


_SITES = ("input", "target", "embed", "attention_out", "ffn_out", "ffn", "routing", "local")


def _rate(rate: float, noise: Noise | None, site: str, layer: int = 0):
    """(rate, key) for `dropout`, or None where nothing is dropped."""
    if noise is None or not rate:
        return None
    stream = (noise.part * 1024 + layer) * len(_SITES) + _SITES.index(site)
    return rate, (noise.seed, stream, noise.step)
