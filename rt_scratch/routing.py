"""Routing attention: tokens meet in clusters found by online k-means (paper section 4).

Four verbs, in the order of use:

    route           choose: which token belongs to which cluster. Integers, no gradient.
    gather          bring the members of each cluster together
    attend          attention inside clusters (attention.py)
    scatter_mean    bring the results back to their tokens

and beside them the centroids: `cluster_statistics` during the forward pass, `update_centroids` once
per optimizer step.

Modes. `topk` is the paper: each centroid takes the W tokens of the whole sequence nearest to it,
so *whether an early token is a member depends on later tokens*: the mask inside the cluster hides
their content, not their influence on membership. The mode leaks the future. `causal` is ours: each
token joins its nearest centroid and sees the W most recent members, itself included; nothing
depends on later tokens. `random` is `causal` with the cluster of each place drawn by lot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rt_scratch.attention import (
    attend,
    attend_backward,
    distance_rows,
    distance_rows_backward,
    local_attention,
    local_attention_backward,
)
from rt_scratch.backend import accelerated, array_module, segment_sum
from rt_scratch.layers import normalize, normalize_backward

SMOOTHING = 1e-5  # added to the counts of k-means (released code)
MEAN_FLOOR = 1e-2  # added to the number of clusters a token is in, so that none gives 0 (released)


# ------------------------------------------------------------------------------ online k-means

class Centroids(NamedTuple):
    """State of one layer's routing heads: means mu (H, K, D) and the averages they come from."""

    mu: Any        # (H, K, D)
    count: Any     # (H, K) moving average of the number of tokens won per step
    total: Any     # (H, K, D) moving average of their sum


def nearest(x, mu, equal_length: bool = False):
    """Winner of each token: argmax_k x . mu_k, the lowest index on ties.

    x (B, H, T, D), mu (H, K, D) -> integers (B, H, T). With `equal_length` the
    centroids are scaled to length 1 first (mode `causal`): a long centroid would otherwise win more
    tokens than its direction deserves.
    """
    xp = array_module(x)
    if equal_length:
        tiny = xp.finfo(mu.dtype).tiny
        mu = mu / xp.sqrt(xp.maximum((mu * mu).sum(-1, keepdims=True), tiny))
    return (x.astype(mu.dtype, copy=False) @ mu.swapaxes(-1, -2)).argmax(-1)


@accelerated
def cluster_statistics(x, winner, n_clusters: int):
    """Counts (H, K) and sums (H, K, D) of the tokens x (B, H, T, D) that each centroid won."""
    xp = array_module(x)
    hot = (winner[:, :, None, :] == xp.arange(n_clusters)[:, None]).astype(x.dtype)  # (B, H, K, T)
    return hot.sum((0, 3)), (hot @ x).sum(0)


def update_centroids(state: Centroids, counts, sums, decay: float) -> Centroids:
    """One step of online k-means; call it once per optimizer step.

    c <- c + (1 - decay) (counts - c),   m <- m + (1 - decay) (sums - m),
    mu = m / c',   c' = n (c + 1e-5) / (n + 1e-5 K),  n = sum_k c.

    Paper section 4.1 and the released code, with two repairs: the released averages start at 0
    counts but non-zero sums, so its first means are hundreds of times too long (ours start at
    count 1), and a centroid that won no token keeps its place.
    """
    xp = array_module(state.mu)
    count = state.count + (1 - decay) * (counts - state.count)
    total = state.total + (1 - decay) * (sums - state.total)
    n = count.sum(-1, keepdims=True)  # (H, 1)
    smooth = (count + SMOOTHING) * n / (n + SMOOTHING * count.shape[-1])
    mu = total / xp.maximum(smooth, xp.finfo(smooth.dtype).tiny)[..., None]
    return Centroids(xp.where((counts > 0)[..., None], mu, state.mu), count, total)


def commitment(x, mu, winner):
    """loss = mean over all entries of (x - mu[winner])^2: keeps tokens near their centroid.

    Computed in the dtype of mu, float32 even where x has half the bits; so are its gradient and
    all choices.

    x (B, H, T, D), mu (H, K, D), winner (B, H, T). No gradient reaches mu.
    """
    xp = array_module(x)
    own = mu[xp.arange(x.shape[1])[:, None], winner]  # (B, H, T, D)
    apart = x.astype(mu.dtype, copy=False) - own
    return (apart * apart).mean(), apart


def commitment_backward(dloss, cache):
    """dx = 2 dloss (x - mu[winner]) / size."""
    return cache * (2 * dloss / cache.size)


# ---------------------------------------------------------------------------------------- route

class Route(NamedTuple):
    """Which token went where; integers only. Gradients hold it fixed."""

    winner: Any       # (B, H, T) nearest centroid of each query
    key_winner: Any   # the same of each key; is `winner` when keys are queries
    index: Any        # topk: members by time (B, H, K, W); else places by cluster, time (B, H, T)
    key_index: Any    # topk with separate keys: the members among them; else is `index`


def route(q, k, mu, mode: str, window: int, places=None) -> Route:
    """Choose the clusters of normalised queries q and keys k (B, H, T, D).

    `places` (H, T) holds the drawn cluster of each place in mode `random`. Keys are queries when
    k is q. In the modes other than `topk` a key lives in the cluster of its token's query.
    """
    xp = array_module(q)
    if mode == "topk":
        winner, index = nearest(q, mu), top_members(_scores(q, mu), min(window, q.shape[2]))
        if k is q:
            return Route(winner, winner, index, index)
        key_index = top_members(_scores(k, mu), min(window, q.shape[2]))
        return Route(winner, nearest(k, mu), index, key_index)
    if mode == "random":
        winner = xp.broadcast_to(places[None], q.shape[:3])
        return Route(winner, winner, by_cluster(winner), None)
    winner = nearest(q, mu, equal_length=True)
    key_winner = winner if k is q else nearest(k, mu, equal_length=True)
    return Route(winner, key_winner, by_cluster(winner), None)


def _scores(x, mu):
    return mu @ x.astype(mu.dtype, copy=False).swapaxes(-1, -2)  # (B, H, K, T)


@accelerated
def top_members(scores, window: int):
    """The W best places per row, in order of time; ties go to the earlier place.

    scores (..., T) -> integers (..., W), increasing along the last axis.
    """
    xp = array_module(scores)
    best = xp.argsort(-scores, axis=-1, kind="stable")[..., :window]
    return xp.sort(best, axis=-1)


@accelerated
def by_cluster(winner):
    """Places sorted by (cluster, time): the stable order of winner (B, H, T) along time."""
    xp = array_module(winner)
    return xp.argsort(winner, axis=-1, kind="stable")


# ------------------------------------------------------------------------------ gather, scatter

@accelerated
def gather(x, index):
    """Rows of x (B, H, T, D) at index (B, H, ...) -> (B, H, ..., D)."""
    xp = array_module(x)
    b, h = x.shape[:2]
    lead = (1,) * (index.ndim - 2)
    return x[xp.arange(b).reshape(b, 1, *lead), xp.arange(h).reshape(1, h, *lead), index]


@accelerated
def scatter_sum(rows, index, n_tokens: int):
    """out[t] = sum of the rows whose index is t: rows (B, H, ..., D) -> (B, H, T, D).

    The transpose of `gather`, hence its backward.
    """
    xp = array_module(rows)
    b, h, d = *rows.shape[:2], rows.shape[-1]
    sequence = xp.arange(b * h).reshape(b, h, *(1,) * (index.ndim - 2)) * n_tokens
    flat = segment_sum(rows.reshape(-1, d), (sequence + index).reshape(-1), b * h * n_tokens)
    return flat.reshape(b, h, n_tokens, d)


@accelerated
def scatter_mean(rows, index, n_tokens: int):
    """out[t] = sum of rows with index t / (their number + 1e-2); a token without rows gets 0.

    rows (B, H, K, W, D), index (B, H, K, W) -> (B, H, T, D). Released code; the paper has no 1e-2.
    """
    xp = array_module(rows)
    times = scatter_sum(xp.ones((*index.shape, 1), rows.dtype), index, n_tokens)  # (B, H, T, 1)
    return scatter_sum(rows, index, n_tokens) / (times + MEAN_FLOOR), (index, times)


def scatter_mean_backward(dout, cache):
    """drows = (dout / (times + 1e-2))[index]."""
    index, times = cache
    return gather((dout / (times + MEAN_FLOOR)).astype(dout.dtype, copy=False), index)


# ---------------------------------------------------------------------------- routing attention

class Membership(NamedTuple):
    """What one routing layer reports: for the centroids' update and for the log."""

    counts: Any      # (H, K) tokens won, queries and, when separate, keys
    sums: Any        # (H, K, D)
    uncovered: Any   # share of (batch, head, token) in no cluster
    several: Any     # share in more than one


class Rule(NamedTuple):
    """How routing heads attend."""

    mode: str              # 'causal', 'topk' or 'random'
    window: int            # W
    scale: float           # of the logits; 1 in the released code, whose q and k have length sqrt D
    causal: bool = True    # False, with `topk` only: members see each other whatever their time


def routing_attention(q, k, v, rel_k, rel_v, mu, rule, places=None, fixed=None, dropped=None):
    """Attention inside clusters.  q, k, v (B, H, T, D) -> (B, H, T, D) and the commitment loss.

    q and k are normalised (no gain, no bias); k = None means that keys are queries. rel_k, rel_v
    (2 m + 1, D) or None; distance is the difference of ranks inside the cluster. mu (H, K, D). A
    `fixed` Route is used as it is (gradient checks). Returns (o, loss), cache, membership, route.
    The loss is the commitment of q plus that of k, so twice the same when keys are queries
    (released code); 0 in mode `random`. Released code: clustered_local_attention_helper; where it
    masks separate keys by rank, which is not causal, this masks by place.
    """
    xp = array_module(q)
    mode, n_tokens, n_clusters = rule.mode, q.shape[2], mu.shape[1]
    qn, cache_q = normalize(q)
    kn, cache_n = (qn, None) if k is None else normalize(k)
    path = fixed or route(qn, kn, mu, mode, rule.window, places)

    loss, apart, apart_k = xp.zeros((), mu.dtype), None, None
    counts, sums = cluster_statistics(qn, path.winner, n_clusters)
    if mode != "random":
        loss, apart = commitment(qn, mu, path.winner)
        if k is None:
            loss = 2 * loss
        else:
            loss_k, apart_k = commitment(kn, mu, path.key_winner)
            counts_k, sums_k = cluster_statistics(kn, path.key_winner, n_clusters)
            loss, counts, sums = loss + loss_k, counts + counts_k, sums + sums_k

    if mode == "topk":
        o, cache, times = _clusters(qn, kn, v, rel_k, rel_v, path, rule, dropped)
        uncovered, several = (times == 0).mean(), (times > 1).mean()
    else:
        o, cache = _sorted_clusters(qn, kn, v, rel_k, rel_v, path, rule, dropped)
        uncovered = several = xp.zeros((), mu.dtype)
    return ((o, loss), (cache, cache_q, cache_n, apart, apart_k, mode, n_tokens),
            Membership(counts, sums, uncovered, several), path)


def routing_attention_backward(do, dloss, cache):
    """Gradients of q, k (None when keys are queries), v, rel_k, rel_v."""
    cache, cache_q, cache_n, apart, apart_k, mode, n_tokens = cache
    backward = _clusters_backward if mode == "topk" else _sorted_clusters_backward
    dqn, dkn, dv, drel_k, drel_v = backward(do, cache, n_tokens)
    if cache_n is None:  # keys are queries: the loss was counted twice
        dqn = dqn + dkn
        if apart is not None:
            dqn += (2 * commitment_backward(dloss, apart)).astype(dqn.dtype, copy=False)
        return normalize_backward(dqn, cache_q), None, dv, drel_k, drel_v
    if apart is not None:
        dqn = dqn + commitment_backward(dloss, apart).astype(dqn.dtype, copy=False)
        dkn = dkn + commitment_backward(dloss, apart_k).astype(dkn.dtype, copy=False)
    return normalize_backward(dqn, cache_q), normalize_backward(dkn, cache_n), dv, drel_k, drel_v


def _clusters(q, k, v, rel_k, rel_v, path, rule, dropped):
    """topk: each cluster is one block of W queries and W keys."""
    xp = array_module(q)
    window = path.index.shape[-1]
    mask = xp.ones((window, window), bool)
    if rule.causal and path.key_index is path.index:  # members are in order of time
        mask = xp.tril(mask)
    elif rule.causal:
        mask = path.key_index[..., None, :] <= path.index[..., :, None]  # (B, H, K, W, W)
    rows_k = rows_v = cache_k = cache_v = None
    if rel_k is not None:
        last = 0 if rule.causal and path.key_index is path.index else window - 1
        rows_k, cache_k = distance_rows(rel_k, 1 - window, last)
        rows_v, cache_v = distance_rows(rel_v, 1 - window, last)
    queries = gather(q, path.index)
    members = queries, queries if k is q else gather(k, path.key_index), gather(v, path.key_index)
    o, cache = attend(*members, rows_k, rows_v, mask, rule.scale, dropped)  # (B, H, K, W, D)
    out, cache_mean = scatter_mean(o, path.index, q.shape[2])
    return out, (cache, cache_mean, cache_k, cache_v, path), cache_mean[1]


def _clusters_backward(do, cache, n_tokens):
    cache, cache_mean, cache_k, cache_v, path = cache
    dq, dk, dv, drel_k, drel_v = attend_backward(scatter_mean_backward(do, cache_mean), cache)
    if drel_k is not None:
        drel_k = distance_rows_backward(drel_k, cache_k)
        drel_v = distance_rows_backward(drel_v, cache_v)
    return (scatter_sum(dq, path.index, n_tokens), scatter_sum(dk, path.key_index, n_tokens),
            scatter_sum(dv, path.key_index, n_tokens), drel_k, drel_v)


def _sorted_clusters(q, k, v, rel_k, rel_v, path, rule, dropped):
    """causal, random: local attention over the sequence sorted by (cluster, time).

    With blocks of W and one block of lookback, a query's block window holds the W members of its
    cluster up to and including itself; the mask leaves same cluster and rank distance < W.
    """
    xp = array_module(q)
    order = path.index                                              # (B, H, T)
    segments = xp.take_along_axis(path.winner, order, axis=2)
    queries = gather(q, order)
    o, cache = local_attention(queries, queries if k is q else gather(k, order), gather(v, order),
                               rel_k, rel_v, rule.window, 1, rule.scale, segments, rule.window,
                               dropped)
    back = inverse(order)
    return gather(o, back), (cache, order, back)


def _sorted_clusters_backward(do, cache, n_tokens):
    cache, order, back = cache
    dq, dk, dv, drel_k, drel_v = local_attention_backward(gather(do, order), cache)
    return gather(dq, back), gather(dk, back), gather(dv, back), drel_k, drel_v


@accelerated
def inverse(order):
    """The inverse of permutations along the last axis."""
    return array_module(order).argsort(order, axis=-1)
