"""How work is cut into blocks of threads, and into chunks, which tests make small."""

from __future__ import annotations

from rt_scratch.threads import tiles

THREADS = 256
WARPS = THREADS // 32
CHUNK_ENTRIES = 5 << 24  # of wide intermediates (logits) alive at a time: 320 MB in float32


def n_blocks(n: int, per_block: int = THREADS) -> int:
    return -(-n // per_block)


def chunks(n_rows: int, row_size: int) -> list[slice]:
    return tiles(n_rows, CHUNK_ENTRIES // row_size)
