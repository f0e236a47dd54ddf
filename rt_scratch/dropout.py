"""Dropout with masks that are computed, not stored: a counter-based generator draws them again."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from rt_scratch.dispatch import accelerated, array_module


class Dropped(NamedTuple):
    """Which mask an array (B, ...) of B windows is multiplied by."""

    rate: float                  # share of the entries that become 0
    key: tuple[int, int, Any]    # (seed, stream, step); the step may be a 0-d uint32 array
    first: int = 0               # position of its first window among those of the whole step


@accelerated
def dropout(x, dropped):
    """y = x keep / (1 - rate), keep drawn by `dropout_mask`.

    `dropped` is a Dropped, or None for no dropout. The cache is `dropped` itself: the backward
    draws the same mask again. docs/derivations.md (8).
    """
    if dropped is None or not dropped.rate:
        return x, None
    return x * dropout_mask(array_module(x), x.shape, dropped, x.dtype), dropped


def dropout_backward(dy, cache):
    """dx = dy keep / (1 - rate). docs/derivations.md (8)."""
    return dropout(dy, cache)[0]


def dropout_mask(xp, shape, dropped: Dropped, dtype, start: int | None = None):
    """Array of 0 and 1 / (1 - rate): entry i depends only on the key and on start + i.

    `start` is the position of the first entry among those of all windows of the step (default:
    that of an array of whole windows). So a window draws the same mask whatever part of the batch
    it is in. Philox4x32-10 (Salmon et al. 2011) with key (seed, 0) and counter (i // 8 in 64 bits,
    stream, step) gives eight numbers of 16 bits; entry i is kept when number i % 8 is at least
    rate x 65536. The rate is rounded to a multiple of 1 / 65536.
    """
    n, (seed, stream, step) = math.prod(shape), dropped.key
    start = first_entry(dropped, shape) if start is None else start
    first, last = start // 8, (start + n + 7) // 8
    halves = philox(xp, seed, xp.arange(first, last, dtype=xp.uint64), stream, step)
    threshold = round(dropped.rate * 65536)
    keep = halves.reshape(-1)[start - 8 * first : start - 8 * first + n] >= threshold
    return keep.astype(dtype).reshape(shape) * (65536 / (65536 - threshold))


def first_entry(dropped: Dropped, shape) -> int:
    """Position of the first entry of an array (B, ...) among those of all windows of the step."""
    return dropped.first * math.prod(shape[1:])


def philox(xp, seed: int, index, stream: int, step):
    """Philox4x32-10: (n,) uint64 counters -> (n, 8) uint16 random numbers."""
    mask = 0xFFFFFFFF
    c0, c1 = index & mask, index >> 32
    c2, c3 = xp.full_like(c0, stream & mask), xp.full_like(c0, step & mask)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 32 x 32 -> 64 bits
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    words = xp.stack([c0, c1, c2, c3], axis=1).astype(xp.uint32)  # (n, 4)
    return xp.stack([words & 0xFFFF, words >> 16], axis=2).reshape(-1, 8)
