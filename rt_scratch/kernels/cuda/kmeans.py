"""Online k-means: winners, statistics, commitment, new centroids."""

from __future__ import annotations

from rt_scratch import kmeans
from rt_scratch.dispatch import array_module
from rt_scratch.kernels.cuda.arrays import as_float32, as_int32, contiguous
from rt_scratch.kernels.cuda.sizes import THREADS, n_blocks
from rt_scratch.kernels.cuda.sums import column_threads, sum_all, sum_strips
from rt_scratch.kernels.launch import launch
from rt_scratch.kmeans import MAX_CLUSTERS, SMOOTHING, CommitmentCache

TILE = 4096  # floats of sums that a block holds, as in kmeans.cu


def compare(x, mu, equal_length=False):
    """Twin of kmeans.compare: int32 winners and float32 products from one kernel."""
    xp, x, mu = array_module(x), contiguous(x), as_float32(mu)
    b, h, tokens, width = x.shape
    winner = xp.empty((b, h, tokens), xp.int32)
    products = xp.empty((b, h, mu.shape[1], tokens), xp.float32)
    launch("compare", (n_blocks(tokens, 32), b * h), (256,), x, mu, winner, products, h, tokens,
           width, mu.shape[1], bool(equal_length))
    return winner, products


def cluster_statistics(x, winner, n_clusters: int):
    """Twin of kmeans.cluster_statistics; float32 results."""
    xp = array_module(x)
    x, winner = contiguous(x), as_int32(winner)
    b, h, tokens, width = x.shape
    chunk = max(64, n_blocks(tokens, 256))  # many short walks: a block reads its tokens in turn
    chunks, tile = n_blocks(tokens, chunk), min(n_clusters, MAX_CLUSTERS, TILE // width)
    sums = xp.empty((chunks * b, h, n_clusters, width), xp.float32)
    counts = xp.empty((chunks * b, h, n_clusters), xp.float32)
    launch("cluster_sums", (chunks, b * h, n_blocks(n_clusters, tile)), (column_threads(width),),
           x, winner, sums, counts, tokens, width, n_clusters, chunk, tile)
    out = xp.empty((h, n_clusters), xp.float32), xp.empty((h, n_clusters, width), xp.float32)
    sum_strips((counts, sums), out)
    return out


def commitment(x, mu, winner):
    """Twin of kmeans.commitment."""
    xp, x, mu, winner = array_module(x), contiguous(x), as_float32(mu), as_int32(winner)
    _, h, tokens, width = x.shape
    rows, apart = x.size // width, xp.empty(x.shape, xp.float32)
    chunk = max(64, n_blocks(rows, 1024))
    squares = xp.empty(n_blocks(rows, chunk), xp.float32)
    launch("commitment", (squares.size,), (256,), x, mu, winner, apart, squares, rows, h, tokens,
           width, mu.shape[1], chunk)
    return sum_all(squares, 1 / x.size), CommitmentCache(apart)


def add_commitment_gradient(dx, dloss, cache):
    """Twin of kmeans.add_commitment_gradient."""
    if not dx.flags.c_contiguous:  # heads of a width that is no multiple of 8
        kmeans.add_commitment_gradient.reference(dx, dloss, cache)
        return
    launch("add_scaled", (n_blocks(dx.size, 8 * THREADS),), (THREADS,), dx, cache.apart, dx.size,
           2 * dloss / dx.size)


def replace_centroids(state, counts, sums, decay) -> None:
    """Twin of kmeans.replace_centroids, one launch per layer."""
    heads, clusters, width = state.mu.shape
    launch("replace_centroids", (heads,), (THREADS,), *state, counts, sums, clusters, width,
           1 - decay, SMOOTHING)
