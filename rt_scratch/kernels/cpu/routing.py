"""Routing: faster twins for NumPy arrays."""

from __future__ import annotations

import numpy as np

from rt_scratch.kernels.cpu import sizes
from rt_scratch.kmeans import MAX_CLUSTERS
from rt_scratch.threads import busy, parallel, tiles


def top_members(scores, window):
    """The W-th best score by selection instead of a sort; then every position is in or out."""
    t = scores.shape[-1]
    flat = scores.reshape(-1, t)
    out = np.empty((len(flat), window), np.int64)

    def piece(r):
        worst = np.partition(flat[r], t - window, axis=-1)[:, t - window, None]
        above, equal = flat[r] > worst, flat[r] == worst
        room = window - above.sum(-1, keepdims=True)
        member = above | (equal & (np.cumsum(equal, axis=-1, dtype=np.int32) <= room))
        out[r] = np.nonzero(member)[1].reshape(-1, window)

    parallel(piece, tiles(len(flat), sizes.PIECE // t))
    return out.reshape(*scores.shape[:-1], window)


def by_cluster(winner, n_clusters=MAX_CLUSTERS):
    """Sixteen bits are enough for a cluster's number, and NumPy sorts them by radix."""
    small = winner.astype(np.uint16)
    return small.argsort(axis=-1, kind="stable")


def inverse(order):
    out = np.empty_like(order)
    np.put_along_axis(out, order, np.arange(order.shape[-1]).reshape(
        (1,) * (order.ndim - 1) + (-1,)), axis=-1)
    return out


def gather(x, index):
    b, h = x.shape[:2]
    out = np.empty((*index.shape, x.shape[-1]), x.dtype)

    def head(i):
        at = divmod(i, h)
        np.take(x[at], index[at], axis=0, out=out[at], mode="clip")

    parallel(head, range(b * h))
    return out


def scatter_sum(rows, index, n_tokens):
    """Round after round: the first row of every token, then the second of those that have two, ...

    No token is in a round twice, so a round is one addition. A position below 2^16 is sorted by
    radix.
    """
    b, h, d = *rows.shape[:2], rows.shape[-1]
    flat = rows.reshape(b * h, -1, d)
    positions = index.reshape(b * h, -1).astype(np.min_scalar_type(n_tokens - 1))
    out = np.zeros((b * h, n_tokens, d), rows.dtype)

    def heads(r):
        head = np.arange(r.stop - r.start)[:, None]
        order = positions[r].argsort(axis=-1, kind="stable")
        order += head * order.shape[1]                               # by token
        order = order.reshape(-1)
        count = np.bincount((positions[r] + head * n_tokens).reshape(-1),
                            minlength=len(head) * n_tokens)
        first = np.cumsum(count) - count                             # of each token in the order
        source, total = flat[r].reshape(-1, d), out[r].reshape(-1, d)
        left = np.flatnonzero(count)
        total[left] = source[order[first[left]]]
        done = 1
        while len(left := left[count[left] > done]):
            total[left] += source[order[first[left] + done]]
            done += 1

    parallel(heads, [slice(0, b * h)] if busy() else tiles(b * h, 1))
    return out.reshape(b, h, n_tokens, d)
