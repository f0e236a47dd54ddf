"""Multi-probe routing: a key joins one cluster, a query looks into one or several.

Every key joins the cluster nearest to its own vector, and a query looks into the R clusters nearest
to it, at the W latest keys of each: strictly causal, at most R W keys per token, one softmax over
all of them. With R = 1 the one key that a query needs is lost whenever a border between clusters
runs between the two. Looking into several cells is multi-probe search (Lv et al. 2007, for hashing;
Jegou et al. 2011, for k-means). With keys that are queries and R = 1 it is CAUSAL or, with
shifted keys, SHIFTED (routing.py). Not in the paper.
"""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any, NamedTuple

from rt_scratch.attention import distance_rows, distance_rows_backward, outer
from rt_scratch.dispatch import accelerated, array_module
from rt_scratch.dropout import dropout_mask
from rt_scratch.kmeans import MAX_CLUSTERS, nearest, unit_length
from rt_scratch.layers import segment_sum
from rt_scratch.routing import Coverage, Mode, Route, Rule, by_cluster, gather, inverse


def multiprobe_route(q, k, mu, rule: Rule) -> Route:
    """A key joins its nearest centroid, a query looks into its R nearest, all of them if K < R."""
    probes = nearest_several(q, mu, rule.n_probes)
    winner = probes[..., 0]
    key_winner = winner if k is q else nearest(k, mu, equal_length=True)
    return Route(winner, key_winner, probes=probes)


def nearest_several(x, mu, n: int):
    """The n nearest centroids of each token by direction, best first, the lowest index on ties.

    x (B, H, T, D), mu (H, K, D) -> integers (B, H, T, min(n, K)). The first is that of
    `kmeans.nearest`.
    """
    return best_several(x.astype(mu.dtype, copy=False) @ unit_length(mu).swapaxes(-1, -2), n)


def best_several(scores, n: int):
    """Indices of the n highest of scores (..., K), the highest first: (..., min(n, K))."""
    xp, (*_, k), found = array_module(scores), scores.shape, []
    for _ in range(min(n, k)):
        if found:
            scores = xp.where(found[-1][..., None] == xp.arange(k), -math.inf, scores)
        found.append(scores.argmax(-1))
    return xp.stack(found, axis=-1)


# ------------------------------------------------------------------------------------- integers

class Runs(NamedTuple):
    """What each row sees, a row being a query in one of its clusters: a run of slots."""

    order: Any     # (B, H, T) positions of the keys, sorted by (cluster, time): the slots
    low: Any       # (B, H, T R) first slot that the row sees
    end: Any       # the slot behind the last


def runs(probes, key_winner, window: int) -> Runs:
    """probes (B, H, T, R), key_winner (B, H, T).

    What a row sees ends at the latest key of its cluster that is not after the query, and begins W
    keys before or where the cluster does. docs/derivations.md (67).
    """
    xp = array_module(probes)
    b, h, t, r = probes.shape
    position, span = xp.arange(t), MAX_CLUSTERS * t
    order = by_cluster(key_winner)                                   # (B, H, T)
    time = xp.take_along_axis(key_winner * t + position, order, 2)   # increasing
    first = _below(time, probes * t, span).reshape(b, h, r * t)      # slot of the cluster's start
    end = _below(time, probes * t + position[:, None] + 1, span).reshape(b, h, r * t)
    return Runs(order, xp.maximum(first, end - min(window, t)), end)


class Tiles(NamedTuple):
    """Blocks of S rows and the keys of each block."""

    query: Any     # (B, H, N, S) position of the row's query; 0 for rows to spare
    rows: Any      # (B, H, T, R) rows of each query, among the N S
    keys: Any      # (B, H, N, 3 S) positions
    column: Any    # (B, H, N, S, 1) of the latest key that the row sees, always >= 2 S - 1
    visible: Any   # (B, H, N, S, 3 S) True where the row sees the key; nothing in rows to spare
    order: Any     # (B, H, T) positions of the keys, sorted by (cluster, time)
    block: Any     # (B, H, N) of that order, the last of the three whose keys the tile meets


def tiles(probes, key_winner, window: int) -> Tiles:
    """Which rows are computed together, and what they see.

    Cut the slots of `runs` into blocks of S = W / 2: a run ends in one block and reaches two back.
    Rows are sorted by the slot where their run ends, and each block's rows are cut into tiles of S:
    at most (R T + (S - 1) ceil(T / S)) / S of them, a number known without asking a GPU.
    docs/derivations.md (67), (68).
    """
    xp = array_module(probes)
    b, h, t, r = probes.shape
    s = -(-min(window, t) // 2)
    n_blocks = -(-t // s)
    n_tiles = (r * t + n_blocks * (s - 1)) // s
    lead = xp.arange(b)[:, None, None], xp.arange(h)[None, :, None]

    order, low, end = runs(probes, key_winner, window)
    last = xp.maximum(end - 1, 0)                                    # slot of the latest key
    by_last = xp.argsort(last, axis=-1, kind="stable")
    last, low, end = (xp.take_along_axis(x, by_last, 2) for x in (last, low, end))
    block = last // s
    starts = _below(last, xp.broadcast_to(s * xp.arange(n_blocks + 1), (b, h, n_blocks + 1)), 2 * t)
    needed = -(-(starts[..., 1:] - starts[..., :-1]) // s)           # tiles of each block
    tile = xp.cumsum(needed, axis=-1) - needed
    row = (xp.take_along_axis(tile, block, 2) * s + xp.arange(r * t)
           - xp.take_along_axis(starts, block, 2))                   # (B, H, R T), sorted rows

    def placed(values, index, size):
        out = xp.zeros((b, h, size), xp.int64)
        out[(*lead, index)] = values
        return out

    block = placed(block, row // s, n_tiles)                         # (B, H, N)
    first_slot = s * (block[..., None] - 2)                          # (B, H, N, 1)
    slots = first_slot + xp.arange(3 * s)                            # (B, H, N, 3 S)
    low, high, query = (placed(x, row, n_tiles * s).reshape(b, h, n_tiles, s)
                        for x in (low, end, by_last // r))
    keys = xp.take_along_axis(order, xp.clip(slots, 0, t - 1).reshape(b, h, -1), 2)
    visible = ((slots[..., None, :] >= low[..., None]) & (slots[..., None, :] < high[..., None]))
    return Tiles(query, placed(row, by_last, r * t).reshape(b, h, t, r), keys.reshape(slots.shape),
                 xp.maximum(high - 1 - first_slot, 2 * s - 1)[..., None], visible, order, block)


def _below(rows, x, span: int):
    """How many entries of the increasing rows (B, H, n) are below x (B, H, ...), each in its row.

    Entries are below `span`, x at most `span`.
    """
    xp = array_module(rows)
    b, h, n = rows.shape
    row = xp.arange(b * h).reshape(b, h, 1)
    flat = x.reshape(b, h, -1) + span * row
    found = xp.searchsorted((rows + span * row).reshape(-1), flat.reshape(-1))
    return (found.reshape(flat.shape) - n * row).reshape(x.shape)


# ------------------------------------------------------------------------------------ attention

MultiprobeCache = namedtuple(
    "MultiprobeCache", "q k v rows_k rows_v tables route rule dropped lse o")


@accelerated
def multiprobe_attention(q, k, v, rel_k, rel_v, route: Route, rule: Rule, dropped=None):
    """o_t = sum_s p_ts (v_s + rel_v[d]), p_t = softmax_s scale q_t . (k_s + rel_k[d]).

    s runs over the W latest keys, up to t, of each of the R clusters that t looks into; d is the
    rank of s in its cluster minus that of the latest of them, so 0, -1, ... A query that sees no
    key gets 0; Coverage says how many do. q, k, v (B, H, T, D) -> (B, H, T, D). Half precisions are
    computed in float32. docs/derivations.md (67) to (69).
    """
    xp, t = array_module(q), q.shape[2]
    tile = tiles(route.probes, route.key_winner, rule.window)
    reach = 1 - min(rule.window, t)
    rows_k, cache_k = distance_rows(rel_k, reach, 0) if rel_k is not None else (None, None)
    rows_v, cache_v = distance_rows(rel_v, reach, 0) if rel_v is not None else (None, None)
    z = _logits(q, k, rows_k, tile, rule.scale)                      # (B, H, N, S, 3 S)
    p, top, total = _exp(z, -1)
    _, highest, sums = _exp(_of_queries(_log(top, total), tile), 3)
    lse = xp.maximum(_log(highest, sums)[:, :, :, 0], xp.finfo(z.dtype).min)    # (B, H, T, 1)
    p *= xp.exp(top - gather(lse, tile.query))
    if dropped:
        p *= dropout_mask(xp, p.shape, dropped, p.dtype)
    o = p @ gather(_wide(v), tile.keys)
    if rows_v is not None:
        o += _by_distance(p, tile, rows_v) @ _wide(rows_v)
    o = _of_queries(o, tile).sum(3).astype(q.dtype, copy=False)
    seen_nothing = (lse == xp.finfo(lse.dtype).min).mean(dtype=lse.dtype)
    return (o, MultiprobeCache(q, k, v, rows_k, rows_v, (cache_k, cache_v), route, rule, dropped,
                               lse, o),
            Coverage(seen_nothing, xp.zeros((), lse.dtype)))


@accelerated
def multiprobe_attention_backward(do, cache: MultiprobeCache):
    """dz_ts = p_ts (dp_ts - do_t . o_t), where do_t . o_t is a sum over all rows of query t.

    Returns dq, dk, dv, drel_k, drel_v; where keys are queries, dq is the sum for both roles and
    dk is None. Tiles are cut again. docs/derivations.md (70), (71).
    """
    q, k, v, rows_k, rows_v, tables, route, rule, dropped, lse, o = cache
    tile = tiles(route.probes, route.key_winner, rule.window)
    xp, dtype = array_module(q), q.dtype
    do, o = _wide(do), _wide(o)
    p = xp.exp(_logits(q, k, rows_k, tile, rule.scale) - gather(lse, tile.query))
    keep = dropout_mask(xp, p.shape, dropped, p.dtype) if dropped else None
    used = p if keep is None else p * keep
    do_rows = gather(do, tile.query)                                 # (B, H, N, S, D)
    dv = used.swapaxes(-1, -2) @ do_rows
    dp = do_rows @ gather(_wide(v), tile.keys).swapaxes(-1, -2)
    drel_k = drel_v = None
    if rows_v is not None:
        drel_v = outer(_by_distance(used, tile, rows_v), do_rows)
        dp += _by_key(do_rows @ _wide(rows_v).T, tile)
    if keep is not None:
        dp *= keep
    dz = p * (dp - gather((do * o).sum(-1, keepdims=True), tile.query))
    dz *= rule.scale
    queries = gather(_wide(q), tile.query)
    dq = dz @ gather(_wide(k), tile.keys)
    dk = dz.swapaxes(-1, -2) @ queries
    if rows_k is not None:
        by_distance = _by_distance(dz, tile, rows_k)
        dq += by_distance @ _wide(rows_k)
        drel_k = distance_rows_backward(outer(by_distance, queries).astype(dtype, copy=False),
                                        tables[0])
        drel_v = distance_rows_backward(drel_v.astype(dtype, copy=False), tables[1])
    dq = _of_queries(dq, tile).sum(3)
    dk, dv = (_of_keys(x, tile, k.shape[2]) for x in (dk, dv))
    dq, dk, dv = (x.astype(dtype, copy=False) for x in (dq, dk, dv))
    return *((dq + dk, None) if k is q else (dq, dk)), dv, drel_k, drel_v


def _logits(q, k, rows_k, tile, scale):
    xp = array_module(q)
    queries = gather(_wide(q), tile.query)
    z = queries @ gather(_wide(k), tile.keys).swapaxes(-1, -2)
    if rows_k is not None:
        z += _by_key(queries @ _wide(rows_k).T, tile)
    z *= scale
    return xp.where(tile.visible, z, -math.inf)


def _exp(z, axis):
    """exp(z - top), top, and the sum, over an axis, which stays; zeros where all are -inf."""
    xp = array_module(z)
    top = xp.maximum(z.max(axis, keepdims=True), xp.finfo(z.dtype).min)
    e = xp.exp(z - top)
    return e, top, e.sum(axis, keepdims=True)


def _log(top, total):
    """The logarithm of exp(top) total; -inf where total is 0."""
    xp = array_module(top)
    return xp.where(total > 0, top + xp.log(xp.maximum(total, xp.finfo(top.dtype).tiny)), -math.inf)


def _of_queries(x, tile):
    """Rows (B, H, N, S, D) of tiles -> those of each query (B, H, T, R, D)."""
    return gather(x.reshape(*x.shape[:2], -1, x.shape[-1]), tile.rows)


def _of_keys(x, tile, n_tokens):
    """Gradients (B, H, N, 3 S, D) at the keys of tiles -> (B, H, T, D): the transpose of a gather.

    Added up block by block, then over the three places that a block has among those of its tiles.
    """
    xp, (b, h, _, wide, d) = array_module(x), x.shape
    s = wide // 3
    n = -(-n_tokens // s)
    block = n * xp.arange(b * h).reshape(b, h, 1) + tile.block
    sums = segment_sum(x.reshape(-1, wide * d), block.reshape(-1), b * h * n)
    sums = sums.reshape(b, h, n, 3, s, d)
    slots = xp.zeros((b, h, n + 2, s, d), x.dtype)
    for i in range(3):
        slots[:, :, i : i + n] += sums[:, :, :, i]
    return gather(slots[:, :, 2:].reshape(b, h, -1, d)[:, :, :n_tokens], inverse(tile.order))


def _by_key(x, tile):
    """x (..., S, P) by distance 1 - P .. 0 -> (..., S, 3 S) by key.

    Numbers of other rows, or zeros, where a row sees no key.
    """
    xp, (n, p) = array_module(x), (tile.keys.shape[-1], x.shape[-1])
    edge = xp.zeros(n, x.dtype)
    flat = xp.concatenate([edge, x.reshape(-1), edge])
    row = xp.arange(x.size // p).reshape(tile.column.shape)
    return flat[n + p * row + p - 1 - tile.column + xp.arange(n)]


def _by_distance(y, tile, rows):
    """The inverse and transpose of `_by_key`, for y that is 0 where nothing is seen."""
    xp, (n, p) = array_module(y), (y.shape[-1], rows.shape[0])
    row = xp.arange(y.size // n).reshape(tile.column.shape)
    return y.reshape(-1)[n * row + tile.column - p + 1 + xp.arange(p)]


def _wide(x):
    """float32 for the half precisions, x itself otherwise: CuPy has no batched product of bf16."""
    return x.astype("float32") if x.dtype.itemsize == 2 else x


MULTIPROBE = Mode(multiprobe_route, multiprobe_attention, multiprobe_attention_backward,
                  learns=True)
