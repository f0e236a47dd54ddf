"""The Routing Transformer: one block, the whole model, forward and backward.

Data flow, text:   ids -> shift right -> embeddings -> dense -> blocks -> [LayerNorm] -> output
           image:  values -> shift right -> channel table + positions -> blocks -> [LayerNorm]
                   -> output

Two conventions meet here. Plain functions (layers, attention, routing) return gradients. The parts
of the model below take the parameter tree and add the gradients of their parameters to an identical
tree of gradients; they alone change it (`add_gradients`, `+=`), and return their input's gradient.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

from rt_scratch.config import ModelConfig
from rt_scratch.dispatch import array_module
from rt_scratch.dropout import Dropped, dropout, dropout_backward
from rt_scratch.heads import Context, head_groups
from rt_scratch.layers import (
    FEED_FORWARDS,
    add_gradients,
    embedding,
    embedding_backward,
    image_embedding,
    image_embedding_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    ngram,
    recent,
    residual,
    residual_backward,
    shift_right,
    timing_signal,
)
from rt_scratch.routing import Membership, Route

# ------------------------------------------------------------------------------------ the model


class Noise(NamedTuple):
    """What dropout masks depend on, apart from where in the model they are."""

    seed: int
    step: Any       # int, or a 0-d uint32 array on a GPU
    first: int = 0  # position of the first window among those of the whole step


class Report(NamedTuple):
    """What a forward pass reports besides its result, per routing layer."""

    memberships: dict[int, Membership]
    routes: dict[int, Route]


ForwardCache = namedtuple("ForwardCache", "cfg embed dropped blocks recompute output")


def forward(params, centroids, cfg: ModelConfig, ids, labels=None, noise=None, fixed=None,
            recompute=False):
    """Tokens (B, T) -> last hidden state (B, T, E), ready for the output matrix.

    Position t depends on tokens before t only (topk heads aside). `labels` (B,) condition images
    on a class. `noise` turns dropout on. `fixed` maps layers to Routes to use instead of choosing.
    With `recompute` the cache of a block is (input, arguments, Route), and the backward runs the
    block again.
    Returns (hidden, commitment loss), cache, Report.
    """
    shifted = shift_right(ids)
    if noise and cfg.target_dropout:
        kept, _ = dropout(array_module(ids).ones(ids.shape, "float32"),
                          _dropped(cfg.target_dropout, noise, "target"))
        shifted = shifted * (kept > 0)
    x, cache_embed = embed(params, cfg, shifted, 0, labels, noise)
    x, dropped = dropout(x, _dropped(cfg.residual_dropout, noise, "input"))
    caches, memberships, routes, commitment = [], {}, {}, 0
    for i in range(cfg.n_layers):
        args = params["layers"][i], cfg, i, mu_of(centroids, i), noise
        y, cache, routed = block(x, *args, (fixed or {}).get(i))
        if routed is not None:
            memberships[i], routes[i] = routed.membership, routed.route
            commitment = commitment + routed.commitment
        caches.append((x, args, routes.get(i)) if recompute else cache)
        x = y
    h, cache_out = before_output(params, cfg, x)
    return ((h, commitment), ForwardCache(cfg, cache_embed, dropped, caches, recompute, cache_out),
            Report(memberships, routes))


def forward_backward(dh, dcommitment, cache: ForwardCache, grads):
    """Adds the gradients of all parameters to the tree `grads`.

    Consumes the cache: the list of block caches is emptied on the way, so that memory is freed.
    docs/derivations.md (54).
    """
    cfg = cache.cfg
    dx = _before_output_backward(dh, cache.output, grads)
    for i in reversed(range(cfg.n_layers)):
        stored = cache.blocks.pop()  # freed as soon as it is used
        if cache.recompute:
            x, args, route = stored
            stored = block(x, *args, route)[1]
        dx = block_backward(dx, dcommitment, stored, grads["layers"][i])
    _embed_backward(dropout_backward(dx, cache.dropped), cache.embed, grads["embed"])


LossCache = namedtuple("LossCache", "forward output shape")


def loss(params, centroids, cfg: ModelConfig, ids, weights, labels=None, noise=None, fixed=None,
         recompute=False):
    """Cross-entropy sum(weights * nats) of the tokens ids (B, T), each predicted from those before.

    Returns (nats, commitment), cache, Report. The training loss is nats + beta * commitment; the
    reported metric is nats alone. docs/derivations.md (56).
    """
    (h, commitment), cache, report = forward(
        params, centroids, cfg, ids, labels, noise, fixed, recompute)
    rows = h.reshape(-1, h.shape[-1])
    nats, cache_loss = linear_cross_entropy(
        rows, *_output(params, cfg), ids.reshape(-1), weights.reshape(-1))
    return (nats, commitment), LossCache(cache, cache_loss, h.shape), report


def loss_backward(dnats, dcommitment, cache: LossCache, grads):
    """Adds to `grads` the gradients of dnats * nats + dcommitment * commitment.

    docs/derivations.md (56).
    """
    dh = add_gradients(linear_cross_entropy_backward, dnats, cache.output,
                       _output(grads, cache.forward.cfg))
    forward_backward(dh.reshape(cache.shape), dcommitment, cache.forward, grads)


def logits(params, centroids, cfg: ModelConfig, ids, labels=None):
    """Logits (B, T, V) of each token given those before it."""
    (h, _), _, _ = forward(params, centroids, cfg, ids, labels)
    return linear(h, *_output(params, cfg))[0]


def target_weights(cfg: ModelConfig, ids, dtype):
    """1 for every target that counts, 0 for padding (pad_id).  (B, T)."""
    xp = array_module(ids)
    return xp.ones(ids.shape, dtype) if cfg.pad_id < 0 else (ids != cfg.pad_id).astype(dtype)


def mu_of(centroids, layer: int):
    """The centroids (H, K, D) of a layer, None where it has no routing heads."""
    return centroids[layer].mu if layer in centroids else None


# ---------------------------------------------------------------------------------- input, output

EmbedCache = namedtuple("EmbedCache", "cfg table dense ngrams classes dropped")


def embed(params, cfg: ModelConfig, shifted, start: int, labels=None, noise=None, before=None):
    """Embeddings (B, T, C) of already shifted ids at positions start, start + 1, ...

    text: x_t = [embedding(id_t), embedding(id_(t - 1)), ..., row of the n-gram] w + b over the last
    input_tokens ids: a causal convolution. Released code: one id, no n-gram. `before`: see
    layers.recent.
    docs/derivations.md (2), (4); images (6), plus the vector of the class.
    """
    p = params["embed"]
    drop = _dropped(cfg.embed_dropout, noise, "embed")
    cache_class = None
    if cfg.kind == "image":
        x, cache = image_embedding(shifted, start, p["table"], p["rows"], p["columns"])
        if cfg.n_classes:
            c, cache_class = embedding(labels, p["classes"])
            x = x + c[:, None]
        x, dropped = dropout(x, drop)
        return x, EmbedCache(cfg, cache, None, None, cache_class, dropped)
    seen, cache_ngrams = recent(shifted, cfg.input_tokens, before), None
    e, cache = embedding(seen, p["table"])
    e = e.reshape(*shifted.shape, -1)                                # (B, T, n E)
    if cfg.ngram_rows:
        row, cache_ngrams = embedding(ngram(seen, cfg.vocab_size, cfg.ngram_rows), p["ngrams"])
        e = array_module(e).concatenate([e, row], axis=-1)
    e, dropped = dropout(e, drop)
    x, cache_dense = linear(e, p["w"], p["b"])
    if cfg.timing_signal:
        x = x + timing_signal(array_module(x), x.shape[1], x.shape[2], x.dtype, start)
    return x, EmbedCache(cfg, cache, cache_dense, cache_ngrams, None, dropped)


def _embed_backward(dx, cache: EmbedCache, g):
    if cache.cfg.kind == "image":
        dx = dropout_backward(dx, cache.dropped)
        if cache.cfg.n_classes:
            g["classes"] += embedding_backward(dx.sum(1), cache.classes)
        dtable, drows, dcolumns = image_embedding_backward(dx, cache.table)
        g["table"] += dtable
        g["rows"] += drows
        g["columns"] += dcolumns
        return
    de = add_gradients(linear_backward, dx, cache.dense, (g["w"], g["b"]))
    de = dropout_backward(de, cache.dropped)
    if cache.cfg.ngram_rows:
        de, drow = array_module(de).split(de, [-cache.cfg.ngram_width], axis=-1)
        g["ngrams"] += embedding_backward(drow, cache.ngrams)
    g["table"] += embedding_backward(de.reshape(*cache.table.ids.shape, -1), cache.table)


OutputCache = namedtuple("OutputCache", "norm dense")


def before_output(params, cfg: ModelConfig, x):
    """The last LayerNorm (pre-norm) and the projection from C to E, where the model has them."""
    cache_norm = cache_dense = None
    if cfg.norm == "pre":
        x, cache_norm = layer_norm(x, **params["norm"])
    if cfg.kind == "text" and cfg.token_width != cfg.width:
        p = params["output"]
        x, cache_dense = linear(x, p["w_embed"], p["b_embed"])
    return x, OutputCache(cache_norm, cache_dense)


def _before_output_backward(dx, cache: OutputCache, grads):
    if cache.dense is not None:
        g = grads["output"]
        dx = add_gradients(linear_backward, dx, cache.dense, (g["w_embed"], g["b_embed"]))
    if cache.norm is not None:
        dx = add_gradients(layer_norm_backward, dx, cache.norm, _leaves(grads["norm"]))
    return dx


def next_logits(params, cfg: ModelConfig, x):
    """Logits (B, V) of what follows the tokens x (B, C), for decoding."""
    h, _ = before_output(params, cfg, x)
    return linear(h, *_output(params, cfg))[0]


def _output(params, cfg):
    """(w, b) of the output layer, or their gradients; w is the token table's where tied to it."""
    p = params["output"]
    return (params["embed"]["table"].T if cfg.tie_embedding else p["w"]), p["b"]


# ------------------------------------------------------------------------------------ one block

BlockCache = namedtuple(
    "BlockCache", "cfg norm_attention attention residual_attention norm_ffn ffn residual_ffn")


def block(x, p, cfg: ModelConfig, layer: int, mu, noise=None, fixed=None, stores=None):
    """pre:  x = x + drop(attention(LN(x)));  x = x + drop(ffn(LN(x)))
    post: x = LN(x + drop(attention(x)));  x = LN(x + drop(ffn(x)))

    x (B, T, C). `post` is what the released recipes use. For `stores` see `attention`. Returns x,
    cache, Routed (None in layers without routing heads).
    docs/derivations.md (53).
    """
    pre = cfg.norm == "pre"
    n, cache_n1 = layer_norm(x, **p["norm_attention"]) if pre else (x, None)
    a, cache_a, routed = attention(n, p["attention"], cfg, layer, mu, noise, fixed, stores)
    x, cache_r1 = residual(x, a, _dropped(cfg.residual_dropout, noise, "attention_out", layer),
                           **({} if pre else p["norm_attention"]))

    n, cache_n2 = layer_norm(x, **p["norm_ffn"]) if pre else (x, None)
    f, cache_f = FEED_FORWARDS[cfg.ffn].forward(
        n, **p["ffn"], dropped=_dropped(cfg.ffn_dropout, noise, "ffn", layer))
    x, cache_r2 = residual(x, f, _dropped(cfg.residual_dropout, noise, "ffn_out", layer),
                           **({} if pre else p["norm_ffn"]))
    return x, BlockCache(cfg, cache_n1, cache_a, cache_r1, cache_n2, cache_f, cache_r2), routed


def block_backward(dx, dcommitment, cache: BlockCache, g):
    """Gradient of the block's input; parameters' gradients are added to g. May overwrite dx.

    Either norm: the block's input went two ways, to the sublayer (or its LayerNorm) and to the
    sum, so dx is the sum of two gradients. docs/derivations.md (54).
    """
    pre, feed_forward = cache.cfg.norm == "pre", FEED_FORWARDS[cache.cfg.ffn].backward
    ends = ((), ()) if pre else (_leaves(g["norm_attention"]), _leaves(g["norm_ffn"]))

    dx, df = add_gradients(residual_backward, dx, cache.residual_ffn, ends[1])
    if pre:
        dn = add_gradients(feed_forward, df, cache.ffn, _leaves(g["ffn"]))
        dx = add_gradients(layer_norm_backward, dn, cache.norm_ffn, _leaves(g["norm_ffn"]), dx)
    else:
        dx = add_gradients(feed_forward, df, cache.ffn, _leaves(g["ffn"]), dx)

    dx, da = add_gradients(residual_backward, dx, cache.residual_attention, ends[0])
    if pre:
        dn = attention_backward(da, dcommitment, cache.attention, g["attention"])
        return add_gradients(layer_norm_backward, dn, cache.norm_attention,
                             _leaves(g["norm_attention"]), dx)
    return attention_backward(da, dcommitment, cache.attention, g["attention"], dx)


def _leaves(tree):
    """The arrays of one layer's parameters, in the order of the arguments."""
    return tuple(tree.values())


AttentionCache = namedtuple("AttentionCache", "cfg groups q k v heads out")


def attention(x, p, cfg: ModelConfig, layer: int, mu=None, noise=None, fixed=None, stores=None):
    """Multi-head attention of one layer: each kind of head on its share of the projections.

    x (B, T, C) -> (B, T, C). `stores`, one per kind of head, are filled with what decoding needs of
    x (decode.py). Returns y, cache, Routed or None. docs/derivations.md (55).
    """
    xp = array_module(x)
    (q, k, v), (cache_q, cache_k, cache_v) = project(x, p, cfg)      # (B, H, T, D)
    o = xp.empty((*x.shape[:2], cfg.n_heads, cfg.head_width), x.dtype)
    heads = o.swapaxes(1, 2)                                         # a view (B, H, T, D)
    caches, routed = [], None
    for i, group in enumerate(head_groups(cfg, layer)):
        own = *group.queries_and_keys(q, k), v[:, group.heads]
        context = Context(cfg, layer, mu, fixed,
                          _dropped(cfg.attention_dropout, noise, group.kind.family, layer))
        heads[:, group.heads], cache, found = group.kind.forward(*own, p, context)
        caches.append(cache)
        routed = found or routed
        if stores:
            group.kind.decoding.fill(*own, p, context, stores[i].seen, found)
            if group.shifted:
                stores[i].key[...] = (k[:, group.keys] if group.keys else own[0])[:, :, -1]
    y, cache_o = linear(o.reshape(x.shape), p["w_o"])
    return y, AttentionCache(cfg, head_groups(cfg, layer), cache_q, cache_k, cache_v, caches,
                             cache_o), routed


def attention_backward(dy, dcommitment, cache: AttentionCache, g, dx=None):
    """Gradient of x, added to dx if that is given; parameters' gradients are added to g.

    docs/derivations.md (55).
    """
    cfg = cache.cfg
    do = add_gradients(linear_backward, dy, cache.out, (g["w_o"],))
    do = split_heads(do, cfg)                                        # (B, H, T, D)
    b, h, t, d = do.shape
    n_keys = sum(group.keys.stop - group.keys.start for group in cache.groups if group.keys)
    dq, dk, dv = (array_module(dy).empty((b, t, n, d), dy.dtype) for n in (h, n_keys, h))
    dqh, dkh, dvh = dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    for group, stored in zip(cache.groups, cache.heads, strict=True):
        dq_own, dk_own, dvh[:, group.heads], gradients = group.kind.backward(
            do[:, group.heads], dcommitment, stored)
        dqh[:, group.heads], dk_own = group.unshifted(dq_own, dk_own)
        if group.keys:
            dkh[:, group.keys] = dk_own
        for name, gradient in gradients.items():
            g[name] += gradient
    dx = add_gradients(linear_backward, dq.reshape(b, t, h * d), cache.q, (g["w_q"],), dx)
    dx = add_gradients(linear_backward, dv.reshape(b, t, h * d), cache.v, (g["w_v"],), dx)
    if n_keys:
        dx = add_gradients(linear_backward, dk.reshape(b, t, n_keys * d), cache.k, (g["w_k"],), dx)
    return dx


def project(x, p, cfg: ModelConfig):
    """Queries scaled by D^-1/2, keys of the heads that have their own, values: (B, H, T, D) each.

    Released code: all queries are scaled here; routing heads then normalise them, which cancels
    the scale, up to the epsilon of the LayerNorm.
    """
    q, cache_q = linear(x, p["w_q"], scale=cfg.head_width ** -0.5)
    k, cache_k = linear(x, p["w_k"]) if "w_k" in p else (x[..., :0], None)
    v, cache_v = linear(x, p["w_v"])
    return tuple(split_heads(z, cfg) for z in (q, k, v)), (cache_q, cache_k, cache_v)


def split_heads(x, cfg: ModelConfig):
    """(B, T, H D) -> a view (B, H, T, D)."""
    b, t, n = x.shape
    return x.reshape(b, t, n // cfg.head_width, cfg.head_width).swapaxes(1, 2)


_SITES = ("input", "target", "embed", "attention_out", "ffn_out", "ffn", "routing", "local")


def _dropped(rate: float, noise: Noise | None, site: str, layer: int = 0):
    """What `dropout` takes; None where nothing is dropped."""
    if noise is None or not rate:
        return None
    stream = layer * len(_SITES) + _SITES.index(site)
    return Dropped(rate, (noise.seed, stream, noise.step), noise.first)
