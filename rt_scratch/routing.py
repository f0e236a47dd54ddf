"""Routing attention: tokens meet in clusters and attend inside them (paper section 4).

Four verbs, in the order of use:

    choose          which token belongs to which cluster: a Route. Integers, no gradient
    gather          bring the members of each cluster together
    attend          attention inside clusters (attention.py)
    scatter_mean    bring the results back to their tokens (topk); where clusters are sorted a
                    `gather` by the inverse order does

Five modes form clusters. TOPK is the paper: each centroid takes the W tokens of the whole sequence
nearest to it, so *whether an early token is a member depends on later tokens*: the mask inside the
cluster hides their content, not their influence on membership. The mode leaks the future. CAUSAL is
ours: each token joins its nearest centroid and sees the W latest members up to itself; nothing
depends on later tokens. RANDOM is CAUSAL with clusters drawn at random, SHIFTED is CAUSAL where the
key of a position is the query of the one before. MULTIPROBE (multiprobe.py) is CAUSAL with any keys
and with several clusters per query.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

from numpy.random import Generator, Philox

from rt_scratch.attention import (
    attend,
    attend_backward,
    distance_rows,
    distance_rows_backward,
    local_attention,
    local_attention_backward,
)
from rt_scratch.dispatch import accelerated, array_module
from rt_scratch.kmeans import (
    MAX_CLUSTERS,
    add_commitment_gradient,
    cluster_statistics,
    commitment,
    compare,
    nearest,
)
from rt_scratch.layers import normalize, normalize_backward, segment_sum

MEAN_FLOOR = 1e-2  # added to the number of clusters a token is in, so that none gives 0 (released)


class Mode(NamedTuple):
    """How clusters are formed and attended in."""

    choose: Callable            # (q, k, mu, rule) -> Route
    attend: Callable            # (q, k, v, rel_k, rel_v, Route, rule, dropped) ->
    #                             o, cache, Coverage
    attend_backward: Callable   # (do, cache) -> dq, dk, dv, drel_k, drel_v; where keys are queries
    #                             dq is the sum for both roles, dk None
    learns: bool                # whether centroids follow the tokens


class Rule(NamedTuple):
    """How the routing heads of a layer attend."""

    mode: Mode
    window: int            # W
    scale: float           # of the logits; 1 in the released code, whose q and k have length sqrt D
    clusters: Any = None   # (H, T) with RANDOM: the cluster of each position
    n_probes: int = 1      # R, with MULTIPROBE (multiprobe.py)


class Route(NamedTuple):
    """Which token went where; integers only. Gradients hold it fixed."""

    winner: Any            # (B, H, T) cluster of each query
    key_winner: Any        # the same of each key; is `winner` when keys are queries
    order: Any = None      # CAUSAL, RANDOM: (B, H, T) positions sorted by cluster, then time;
    #                        SHIFTED: (B, H, T + 1) of the keys and, as position T, the last query
    members: Any = None    # TOPK: (B, H, K, W) positions of each cluster's queries, by time
    key_members: Any = None  # TOPK: of its keys; is `members` when keys are queries
    probes: Any = None     # MULTIPROBE: (B, H, T, R) clusters that each query looks into


class Coverage(NamedTuple):
    """Shares of tokens that see nothing and of those in several clusters."""

    uncovered: Any   # share of (batch, head, token) in no cluster, or with no key to see
    several: Any     # share in more than one


class Membership(NamedTuple):
    """What one routing layer reports: for the centroids' update and for the log."""

    counts: Any      # (H, K) tokens won, queries and, when separate, keys
    sums: Any        # (H, K, D)
    uncovered: Any   # see Coverage
    several: Any


RoutingCache = namedtuple(
    "RoutingCache", "rule query key attention commitment key_commitment")


def routing_attention(q, k, v, rel_k, rel_v, mu, rule: Rule, fixed=None, dropped=None):
    """Attention inside clusters.  q, k, v (B, H, T, D) -> (B, H, T, D) and the commitment loss.

    q and k are normalised (no gain, no bias); k = None means that keys are queries. rel_k, rel_v
    (2 m + 1, D) or None; distance is the difference of ranks inside the cluster (where a query of
    sorted or multi-probe clusters is no member, the latest key that it sees has 0). mu (H, K, D). A
    `fixed` Route is used as it is (gradient checks, recomputation). Returns (o, loss), cache,
    Membership, Route. The loss is the commitment of q plus that of k, so twice the same when keys
    are queries (released code); 0 where centroids do not follow the tokens. Released code:
    clustered_local_attention_helper; where it masks separate keys by rank, which is not causal,
    this masks by position. docs/derivations.md (47) to (49).
    """
    n_clusters = mu.shape[1]
    qn, cache_q = normalize(q)
    kn, cache_k = (qn, None) if k is None else normalize(k)
    route = fixed or rule.mode.choose(qn, kn, mu, rule)

    loss, own, own_k = array_module(q).zeros((), mu.dtype), None, None
    counts, sums = cluster_statistics(qn, route.winner, n_clusters)
    if rule.mode.learns:
        loss, own = commitment(qn, mu, route.winner)
        if k is None:
            loss = 2 * loss
        else:
            loss_k, own_k = commitment(kn, mu, route.key_winner)
            counts_k, sums_k = cluster_statistics(kn, route.key_winner, n_clusters)
            loss, counts, sums = loss + loss_k, counts + counts_k, sums + sums_k

    o, cache, coverage = rule.mode.attend(qn, kn, v, rel_k, rel_v, route, rule, dropped)
    return ((o, loss), RoutingCache(rule, cache_q, cache_k, cache, own, own_k),
            Membership(counts, sums, *coverage), route)


def routing_attention_backward(do, dloss, cache: RoutingCache):
    """Gradients of q, k (None when keys are queries), v, rel_k, rel_v. docs/derivations.md (49)."""
    dqn, dkn, dv, drel_k, drel_v = cache.rule.mode.attend_backward(do, cache.attention)
    if cache.key is None:  # keys are queries: the loss was counted twice
        if cache.commitment is not None:
            add_commitment_gradient(dqn, 2 * dloss, cache.commitment)
        return normalize_backward(dqn, cache.query), None, dv, drel_k, drel_v
    if cache.commitment is not None:
        add_commitment_gradient(dqn, dloss, cache.commitment)
        add_commitment_gradient(dkn, dloss, cache.key_commitment)
    return (normalize_backward(dqn, cache.query), normalize_backward(dkn, cache.key), dv, drel_k,
            drel_v)


# --------------------------------------------------------------------- topk: the paper's clusters

def topk_route(q, k, mu, rule: Rule) -> Route:
    """Each centroid takes the W queries, and the W keys, that score highest with it.

    q, k (B, H, T, D), mu (H, K, D) -> members (B, H, K, W). Paper section 4.1.
    """
    window = min(rule.window, q.shape[2])
    winner, scores = compare(q, mu)
    members = top_members(scores, window)
    if k is q:
        return Route(winner, winner, members=members, key_members=members)
    key_winner, key_scores = compare(k, mu)
    return Route(winner, key_winner, members=members, key_members=top_members(key_scores, window))


@accelerated
def top_members(scores, window: int):
    """The W best positions per row, in order of time; ties go to the earlier position.

    scores (..., T) -> integers (..., W), increasing along the last axis.
    """
    xp = array_module(scores)
    best = xp.argsort(-scores, axis=-1, kind="stable")[..., :window]
    return xp.sort(best, axis=-1)


TopkCache = namedtuple("TopkCache", "attend mean rows_k rows_v route")


def topk_attention(q, k, v, rel_k, rel_v, route: Route, rule: Rule, dropped=None):
    """Each cluster is one block of W queries and W keys; a token gets the mean over its clusters.

    A query sees members that are not later than itself; where keys are queries, the order of time
    is the order in the cluster. docs/derivations.md (26), (27) in each cluster, (42).
    """
    shared, window = route.key_members is route.members, route.members.shape[-1]
    mask = None if shared else (                                     # (B, H, K, W, W)
        route.key_members[..., None, :] <= route.members[..., :, None])
    rows_k = rows_v = cache_k = cache_v = None
    if rel_k is not None:
        last = 0 if shared else window - 1
        rows_k, cache_k = distance_rows(rel_k, 1 - window, last)
        rows_v, cache_v = distance_rows(rel_v, 1 - window, last)
    queries = gather(q, route.members)                               # (B, H, K, W, D)
    keys = queries if k is q else gather(k, route.key_members)
    o, cache = attend(queries, keys, gather(v, route.key_members), rows_k, rows_v, mask, rule.scale,
                      dropped)
    out, cache_mean = scatter_mean(o, route.members, q.shape[2])     # (B, H, T, D)
    return (out, TopkCache(cache, cache_mean, cache_k, cache_v, route),
            coverage(cache_mean.times))


@accelerated
def coverage(times) -> Coverage:
    """The Coverage, from the number of clusters that each token is in, (B, H, T, 1)."""
    return Coverage((times == 0).mean(), (times > 1).mean())


def topk_attention_backward(do, cache: TopkCache):
    """Gradients of q, k, v, rel_k, rel_v. docs/derivations.md (43), (28) to (30), (32), (41)."""
    dq, dk, dv, drel_k, drel_v = attend_backward(scatter_mean_backward(do, cache.mean),
                                                 cache.attend)
    if drel_k is not None:
        drel_k = distance_rows_backward(drel_k, cache.rows_k)
        drel_v = distance_rows_backward(drel_v, cache.rows_v)
    members, key_members = cache.route.members, cache.route.key_members
    n_tokens = do.shape[2]
    dq, dk = (dq + dk, None) if key_members is members else (dq, dk)
    return (scatter_sum(dq, members, n_tokens),
            None if dk is None else scatter_sum(dk, key_members, n_tokens),
            scatter_sum(dv, key_members, n_tokens), drel_k, drel_v)


# ---------------------------------------------------------------- causal, random: sorted clusters

def causal_route(q, k, mu, rule: Rule) -> Route:
    """A token joins its nearest centroid; keys are queries. docs/derivations.md (47), mu / |mu|.

    q (B, H, T, D), mu (H, K, D) -> winner and order (B, H, T).
    """
    winner = nearest(q, mu, equal_length=True)
    return Route(winner, winner, order=by_cluster(winner, mu.shape[1]))


def random_route(q, k, mu, rule: Rule) -> Route:
    """The clusters are those of the rule, whatever the tokens are."""
    winner = array_module(q).broadcast_to(rule.clusters[None], q.shape[:3])
    return Route(winner, winner, order=by_cluster(winner, mu.shape[1]))


def random_clusters(cfg, layer: int, xp, heads: int, n_tokens: int):
    """The cluster (H, T) of each position, the same in training and decoding."""
    drawn = _drawn_clusters(cfg, layer, xp, heads)
    return drawn[:, xp.arange(n_tokens) % cfg.seq_len]


@functools.lru_cache(maxsize=64)
def _drawn_clusters(cfg, layer, xp, heads):
    """(H, seq_len), drawn on the host and moved to the device once."""
    rng = Generator(Philox(key=[cfg.seed_random, layer]))
    return xp.asarray(rng.integers(cfg.n_clusters, size=(cfg.seq_len, heads)).T)


@accelerated
def by_cluster(winner, n_clusters: int = MAX_CLUSTERS):
    """Positions sorted by (cluster, time): the stable order of winner (B, H, T) along time.

    Winners are below n_clusters, at most 1024.
    """
    xp = array_module(winner)
    return xp.argsort(winner, axis=-1, kind="stable")


SortedCache = namedtuple("SortedCache", "local order back shared")


def sorted_attention(q, k, v, rel_k, rel_v, route: Route, rule: Rule, dropped=None):
    """Attention within clusters over the sequence sorted by (cluster, time).

    docs/derivations.md (44), (45).
    """
    order = route.order                                              # (B, H, T)
    segments = gather(route.winner[..., None], order)[..., 0]
    queries = gather(q, order)
    o, cache = _within_clusters(queries, queries if k is q else gather(k, order), gather(v, order),
                                rel_k, rel_v, segments, rule, dropped)
    back, none = inverse(order), array_module(q).zeros((), q.dtype)
    return gather(o, back), SortedCache(cache, order, back, k is q), Coverage(none, none)


def _within_clusters(q, k, v, rel_k, rel_v, segments, rule: Rule, dropped):
    """Local attention of sorted slots (B, H, T, D) whose clusters are segments (B, H, T).

    With blocks of W / 2 and two blocks of lookback, a query's block window holds the W members of
    its cluster up to its slot; the mask keeps the same cluster and rank distances < W.
    """
    return local_attention(q, k, v, rel_k, rel_v, -(-rule.window // 2), 2, rule.scale, segments,
                           rule.window, dropped)


def sorted_attention_backward(do, cache: SortedCache):
    """Gradients of q, k, v, rel_k, rel_v. docs/derivations.md (45)."""
    dq, dk, dv, drel_k, drel_v = local_attention_backward(gather(do, cache.order), cache.local)
    back = cache.back
    dq, dk = (dq + dk, None) if cache.shared else (dq, gather(dk, back))
    return gather(dq, back), dk, gather(dv, back), drel_k, drel_v


@accelerated
def inverse(order):
    """The inverse of permutations along the last axis."""
    return array_module(order).argsort(order, axis=-1)


# ----------------------------------------------------------------- shifted: sorted clusters as well

def shifted_route(q, k, mu, rule: Rule) -> Route:
    """Key t is query t - 1, in the cluster of that; key 0, a vector of zeros, is in cluster 0.

    Winners are (B, H, T), order (B, H, T + 1). docs/derivations.md (72), (73).
    """
    xp, (b, h, t) = array_module(q), q.shape[:3]
    winner = nearest(q, mu, equal_length=True)
    both = xp.concatenate([xp.zeros((b, h, 1), winner.dtype), winner], axis=-1)
    return Route(winner, both[..., :t], order=by_cluster(both, mu.shape[1]))


ShiftedCache = namedtuple("ShiftedCache", "local order slot seen")


def shifted_attention(q, k, v, rel_k, rel_v, route: Route, rule: Rule, dropped=None):
    """`sorted_attention` where the key of position t + 1 is the query of t: one vector for both.

    The T + 1 vectors are sorted by (cluster, time). A query sees the keys before its own vector, so
    it goes to the slot of the latest of them: as queries the vectors from the second on, as keys
    all but the last. The first of a cluster sees nothing and gets 0. docs/derivations.md (73).
    """
    xp, t = array_module(q), q.shape[2]
    winners = xp.concatenate([route.key_winner, route.winner[..., -1:]], axis=-1)
    segments = gather(winners[..., None], route.order)[..., 0]       # (B, H, T + 1)
    vectors = gather(xp.concatenate([k, q[:, :, -1:]], axis=2), route.order)
    values = gather(v, xp.minimum(route.order[..., :-1], t - 1))     # nothing sees that of T
    o, cache = _within_clusters(vectors[:, :, 1:], vectors[:, :, :-1], values, rel_k, rel_v,
                                segments[..., :-1], rule, dropped)
    first = segments[..., 1:] != segments[..., :-1]                  # of its cluster
    seen = (~first)[..., None].astype(q.dtype)
    slot = inverse(route.order)
    return (gather(o * seen, slot[..., 1:] - 1), ShiftedCache(cache, route.order, slot, seen),
            Coverage(first.mean(dtype=cache.lse.dtype), xp.zeros((), cache.lse.dtype)))


def shifted_attention_backward(do, cache: ShiftedCache):
    """Gradients of q, k, v, rel_k, rel_v. docs/derivations.md (73)."""
    xp = array_module(do)
    do = gather(do, cache.order[..., 1:] - 1) * cache.seen
    dq, dk, dv, drel_k, drel_v = local_attention_backward(do, cache.local)
    dk, dv = (gather(xp.concatenate([x, xp.zeros_like(x[:, :, :1])], axis=2), cache.slot[..., :-1])
              for x in (dk, dv))  # nothing sees the last slot
    return gather(dq, cache.slot[..., 1:] - 1), dk, dv, drel_k, drel_v


TOPK = Mode(topk_route, topk_attention, topk_attention_backward, learns=True)
CAUSAL = Mode(causal_route, sorted_attention, sorted_attention_backward, learns=True)
SHIFTED = Mode(shifted_route, shifted_attention, shifted_attention_backward, learns=True)
RANDOM = Mode(random_route, sorted_attention, sorted_attention_backward, learns=False)


# ------------------------------------------------------------------------------ gather, scatter

@accelerated
def gather(x, index):
    """Rows of x (B, H, T, D) at index (B, H, ...) -> (B, H, ..., D). docs/derivations.md (41)."""
    xp = array_module(x)
    b, h = x.shape[:2]
    lead = (1,) * (index.ndim - 2)
    return x[xp.arange(b).reshape(b, 1, *lead), xp.arange(h).reshape(1, h, *lead), index]


@accelerated
def scatter_sum(rows, index, n_tokens: int):
    """out[t] = sum of the rows whose index is t: rows (B, H, ..., D) -> (B, H, T, D).

    The transpose of `gather`, hence its backward. docs/derivations.md (41).
    """
    xp = array_module(rows)
    b, h, d = *rows.shape[:2], rows.shape[-1]
    sequence = xp.arange(b * h).reshape(b, h, *(1,) * (index.ndim - 2)) * n_tokens
    flat = segment_sum(rows.reshape(-1, d), (sequence + index).reshape(-1), b * h * n_tokens)
    return flat.reshape(b, h, n_tokens, d)


ScatterMeanCache = namedtuple("ScatterMeanCache", "index times")


@accelerated
def scatter_mean(rows, index, n_tokens: int):
    """out[t] = sum of rows with index t / (their number + 1e-2); a token without rows gets 0.

    rows (B, H, K, W, D), index (B, H, K, W) -> (B, H, T, D). Released code; the paper has no 1e-2.
    docs/derivations.md (42).
    """
    xp = array_module(rows)
    times = scatter_sum(xp.ones((*index.shape, 1), rows.dtype), index, n_tokens)  # (B, H, T, 1)
    return (scatter_sum(rows, index, n_tokens) / (times + MEAN_FLOOR),
            ScatterMeanCache(index, times))


@accelerated
def scatter_mean_backward(dout, cache):
    """drows = (dout / (times + 1e-2))[index]. docs/derivations.md (43)."""
    return gather((dout / (cache.times + MEAN_FLOOR)).astype(dout.dtype, copy=False), cache.index)
