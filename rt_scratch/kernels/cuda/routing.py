"""Routing: sorting tokens by cluster, gathering and scattering their rows."""

from __future__ import annotations

import math

from rt_scratch.dispatch import array_module
from rt_scratch.kernels.cuda.arrays import (
    as_float32,
    as_int32,
    by_rows,
    contiguous,
    each,
    widest_word,
)
from rt_scratch.kernels.cuda.sizes import THREADS, WARPS, n_blocks
from rt_scratch.kernels.gemm import aligned_rows
from rt_scratch.kernels.launch import launch
from rt_scratch.kmeans import MAX_CLUSTERS
from rt_scratch.routing import MEAN_FLOOR, Coverage, ScatterMeanCache


def top_members(scores, window: int):
    """Twin of routing.top_members: int32 positions."""
    xp = array_module(scores)
    scores = as_float32(scores)
    index = xp.empty((*scores.shape[:-1], window), xp.int32)
    launch("top_members", (math.prod(scores.shape[:-1]),), (256,), scores, index,
           scores.shape[-1], window)
    return index


def by_cluster(winner, n_clusters: int = MAX_CLUSTERS):
    """Twin of routing.by_cluster: int32 positions."""
    xp = array_module(winner)
    winner = as_int32(winner)
    tokens = winner.shape[-1]
    rows = winner.size // tokens
    chunk = max(512, n_blocks(tokens, 64 * 32) * 32)  # at most 64 chunks, a multiple of the warp
    chunks = n_blocks(tokens, chunk)
    starts = xp.empty((rows, n_clusters, chunks), xp.int32)
    order = xp.empty_like(winner)
    grid = (chunks, rows)
    launch("cluster_counts", grid, (32,), winner, starts, tokens, n_clusters, chunk)
    launch("cluster_starts", (rows,), (256,), starts, n_clusters * chunks)
    launch("cluster_positions", grid, (32,), winner, starts, order, tokens, n_clusters, chunk)
    return order


def inverse(order):
    """Twin of routing.inverse: int32."""
    order = as_int32(order)
    tokens = order.shape[-1]
    rank = array_module(order).empty_like(order)
    launch("invert", (n_blocks(tokens), order.size // tokens), (THREADS,), order, rank, tokens)
    return rank


def gather(x, index):
    """Twin of routing.gather, for any dtype; x may be strided except along its last axis."""
    if x.strides[-1] != x.itemsize:
        x = contiguous(x)
    index = as_int32(index)
    shape = (*index.shape, x.shape[-1])  # integers enter no product
    out = array_module(x).empty(shape, x.dtype) if x.dtype.kind in "iub" else aligned_rows(shape, x)
    heads, rows = x.shape[1], math.prod(index.shape[2:])
    size, word = widest_word(x.shape[-1] * x.itemsize, x, out)
    words = x.shape[-1] * x.itemsize // size
    launch("gather_rows", (n_blocks(rows * words), x.shape[0] * heads), (THREADS,), x, index, out,
           heads, rows, words, out.strides[-2] // size,
           *(stride // size for stride in x.strides[:-1]), word=word)
    return out


def scatter_sum(rows, index, n_tokens: int):
    """Twin of routing.scatter_sum for lists that ascend along the last axis of index."""
    return _scatter(rows, index, n_tokens, -1.0)[0]


def scatter_mean(rows, index, n_tokens: int):
    """Twin of routing.scatter_mean for lists that ascend along the last axis of index."""
    out, times = _scatter(rows, index, n_tokens, MEAN_FLOOR)
    return out, ScatterMeanCache(index, times)


def _scatter(rows, index, n_tokens, floor):
    xp = array_module(rows)
    rows, index = by_rows(rows), as_int32(index)
    b, h = index.shape[:2]
    window, width = index.shape[-1], rows.shape[-1]
    out = xp.empty((b, h, n_tokens, width), rows.dtype)
    times = None if floor < 0 else xp.empty((b, h, n_tokens, 1), rows.dtype)
    launch("scatter_rows", (n_blocks(n_tokens, WARPS), b * h), (THREADS,), rows, index, out, times,
           math.prod(index.shape[2:-1]), window, n_tokens, width,
           rows.strides[-2] // rows.itemsize, floor)
    return out, times


def scatter_mean_backward(dout, cache):
    """Twin of routing.scatter_mean_backward: division and gather in one kernel."""
    index, times = cache
    if dout.strides[-1] != dout.itemsize:
        dout = contiguous(dout)
    index, (_, h, t, d) = as_int32(index), dout.shape
    out, rows = aligned_rows((*index.shape, d), dout), math.prod(index.shape[2:])
    strides = [stride // dout.itemsize for stride in dout.strides[:3]]
    launch("gather_mean", (n_blocks(rows * d), dout.shape[0] * h), (THREADS,), dout, times, index,
           out, h, rows, t, d, out.strides[-2] // out.itemsize, MEAN_FLOOR, *strides)
    return out


def coverage(times):
    """Twin of routing.coverage."""
    shares = array_module(times).empty(2, "float32")
    launch("coverage", (1,), (256,), contiguous(times), shares, times.size)
    return Coverage(*each(shares))
