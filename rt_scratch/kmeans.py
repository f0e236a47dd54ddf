"""Online k-means: the centroids of routing heads, and the loss that keeps tokens near them.

Centroids are state, not parameters: no gradient reaches them. `cluster_statistics` counts during
the forward pass what each centroid won, `replace_centroids` moves them once per optimizer step.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

from rt_scratch.dispatch import accelerated, array_module

MAX_CLUSTERS = 1024  # per head: the GPU kernels count them in the memory of one block
SMOOTHING = 1e-5     # added to the counts (released code)


class Centroids(NamedTuple):
    """State of one layer's routing heads: means mu and the averages they come from."""

    mu: Any        # (H, K, D)
    count: Any     # (H, K) moving average of the number of tokens won per step
    total: Any     # (H, K, D) moving average of their sum


def nearest(x, mu, equal_length: bool = False):
    """Winner of each token: argmax_k x . mu_k, the lowest index on ties.

    x (B, H, T, D), mu (H, K, D) -> integers (B, H, T). With `equal_length` the centroids are scaled
    to length 1 first (`causal` heads): a long centroid would otherwise win more tokens than its
    direction deserves. docs/derivations.md (47).
    """
    return compare(x, mu, equal_length)[0]


@accelerated
def compare(x, mu, equal_length: bool = False):
    """The winners (B, H, T) of `nearest`, and every token's product with every centroid.

    Products (B, H, K, T), in the dtype of mu.
    """
    if equal_length:
        mu = unit_length(mu)
    products = x.astype(mu.dtype, copy=False) @ mu.swapaxes(-1, -2)  # (B, H, T, K)
    return products.argmax(-1), products.swapaxes(-1, -2)


def unit_length(mu):
    """Centroids scaled to length 1. docs/derivations.md (47)."""
    xp = array_module(mu)
    return mu / xp.sqrt(xp.maximum((mu * mu).sum(-1, keepdims=True), xp.finfo(mu.dtype).tiny))


@accelerated
def cluster_statistics(x, winner, n_clusters: int):
    """Counts (H, K) and sums (H, K, D) of the tokens x (B, H, T, D) that each centroid won.

    |W_k| and the sum over W_k in docs/derivations.md (50).
    """
    xp = array_module(x)
    hot = (winner[:, :, None, :] == xp.arange(n_clusters)[:, None]).astype(x.dtype)  # (B, H, K, T)
    return hot.sum((0, 3)), (hot @ x).sum(0)


def update_centroids(state: Centroids, counts, sums, decay: float) -> Centroids:
    """One step of online k-means; call it once per optimizer step.

    c <- c + (1 - decay) (counts - c),   m <- m + (1 - decay) (sums - m),
    mu = m / c',   c' = n (c + 1e-5) / (n + 1e-5 K),  n = sum_k c.

    The released code (the paper's section 4.1 prints an update without a division). Ours differs: a
    centroid that won no token stays where it is, counts are per head, and the averages start at
    count 1, see docs/differences.md. docs/derivations.md (50) to (52).
    """
    xp = array_module(state.mu)
    count = state.count + (1 - decay) * (counts - state.count)
    total = state.total + (1 - decay) * (sums - state.total)
    n = count.sum(-1, keepdims=True)  # (H, 1)
    smooth = (count + SMOOTHING) * n / (n + SMOOTHING * count.shape[-1])
    mu = total / xp.maximum(smooth, xp.finfo(smooth.dtype).tiny)[..., None]
    return Centroids(xp.where((counts > 0)[..., None], mu, state.mu), count, total)


@accelerated
def replace_centroids(state: Centroids, counts, sums, decay: float) -> None:
    """`update_centroids` in place: the arrays of the state then hold the result."""
    for own, new in zip(state, update_centroids(state, counts, sums, decay), strict=True):
        own[...] = new


CommitmentCache = namedtuple("CommitmentCache", "apart")


@accelerated
def commitment(x, mu, winner):
    """loss = mean over all entries of (x - mu[winner])^2: keeps tokens near their centroid.

    x (B, H, T, D), mu (H, K, D), winner (B, H, T). No gradient reaches mu. Computed in the dtype of
    mu, float32 even where x has half the bits; so is its gradient. docs/derivations.md (48).
    """
    xp = array_module(x)
    own = mu[xp.arange(x.shape[1])[:, None], winner]  # (B, H, T, D)
    apart = x.astype(mu.dtype, copy=False) - own
    return (apart * apart).mean(), CommitmentCache(apart)


def commitment_backward(dloss, cache):
    """dx = 2 dloss (x - mu[winner]) / size. docs/derivations.md (48)."""
    return cache.apart * (2 * dloss / cache.apart.size)


@accelerated
def add_commitment_gradient(dx, dloss, cache):
    """dx += commitment_backward(dloss, cache), to what attention sent back to x, in place."""
    dx += commitment_backward(dloss, cache).astype(dx.dtype, copy=False)


LLOYD_ROUNDS = 20


def seeded_centroids(x, n_clusters: int, rng) -> Centroids:
    """Centroids drawn from vectors x (H, N, D): k-means++, then Lloyd's rounds.

    k-means++ (Arthur and Vassilvitskii 2007): the first is one of the vectors, each further one a
    vector drawn with a probability in proportion to its squared distance to the nearest so far.
    Lloyd's rounds: assign by direction, as `causal` heads do, then move to the means. rng: a numpy
    Generator. The averages start with the counts and sums of these vectors.
    """
    xp = array_module(x)
    h, n, _ = x.shape
    draws = xp.asarray(rng.random((n_clusters, h, 1)).astype(x.dtype))
    weight, chosen = xp.ones((h, n), x.dtype), []
    for draw in range(n_clusters):
        total = xp.cumsum(xp.where(weight.any(-1, keepdims=True), weight, 1), axis=-1)
        index = xp.minimum((total <= draws[draw] * total[:, -1:]).sum(-1), n - 1)  # (H,)
        chosen.append(x[xp.arange(h), index])
        distance = ((x - chosen[-1][:, None]) ** 2).sum(-1)          # (H, N)
        weight = xp.minimum(weight, distance) if draw else distance
    mu = xp.stack(chosen, axis=1)                                    # (H, K, D)
    for _ in range(LLOYD_ROUNDS):
        counts, sums = cluster_statistics(x[None], nearest(x[None], mu, True), n_clusters)
        mu = xp.where((counts > 0)[..., None], sums / xp.maximum(counts, 1)[..., None], mu)
    return Centroids(mu, counts, sums)
