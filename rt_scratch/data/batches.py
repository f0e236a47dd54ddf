"""Which tokens a step trains on, and which windows of a split are scored.

Training batches are pure functions of (seed, step): a resumed run continues the same order with
nothing stored. Evaluation scores every token exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from rt_scratch.data.dataset import Dataset
from rt_scratch.errors import UserError


def random_windows(split: np.ndarray, n_tokens: int, batch: int, seed: int, step: int,
                   hop: int = 1) -> np.ndarray:
    """B windows of T tokens of a text split:  (B, T) int32.

    Starts are uniform over the multiples of `hop` that leave room for a window. hop 1, every
    start, is the usual choice; hop T cuts the text into non-overlapping windows; the released
    WikiText-103 problem makes an example every 3 tokens (hop 3), its other text problems examples
    of about T tokens that do not overlap. UserError when the split is shorter than a window.
    """
    if len(split) < n_tokens:
        raise UserError(f"the text has {len(split)} tokens, fewer than the {n_tokens} of one "
                        "window: give a longer text or a smaller --seq-len")
    rng = _generator(seed, step, purpose=0)
    starts = hop * rng.integers(0, (len(split) - n_tokens) // hop + 1, batch)
    return np.stack([split[s : s + n_tokens] for s in starts]).astype(np.int32)


def shuffled_images(split: np.ndarray, batch: int, seed: int, drawn: int):
    """B images of an (N, T) split, each seen once per epoch:  (B, T) int32, (B,) their indices.

    After `drawn` images, the next is entry drawn mod N of the permutation of its epoch, so epochs
    follow each other without a gap, even inside a batch, and whatever the batches before were.
    """
    n = len(split)
    if n == 0:
        raise UserError("the split has no images")
    position = drawn + np.arange(batch)
    index = np.array([_permutation(n, seed, p // n)[p % n] for p in position.tolist()])
    return split[index].astype(np.int32), index


def training_batch(dataset: Dataset, n_tokens: int, batch: int, seed: int, step: int, drawn: int):
    """What a step trains on: (ids (B, T), labels (B,) or None where the dataset has none).

    `drawn` windows or images were trained on before.
    """
    split = dataset.splits["train"]
    if dataset.kind == "text":
        hop = n_tokens if dataset.aligned else 1
        return random_windows(split, n_tokens, batch, seed, step, hop), None
    ids, index = shuffled_images(split, batch, seed, drawn)
    return ids, dataset.labels["train"][index] if dataset.labels else None


def eval_windows(
    split: np.ndarray, n_tokens: int, batch: int, stride: int = 0, limit: int = 0, pad_id: int = -1,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of tokens (B, T) int32, weights (B, T) float32: 1 where the token is scored, else 0,
    and the number of each row's window in the split (B,).

    Text, stride 0: consecutive windows. Text, 0 < stride < T: a window every `stride` tokens; the
    first scores all its tokens, each other its last `stride`, so that after the first T a token
    has at least T - stride tokens of context. Either way each token is scored once. A last window
    that the text does not fill is a batch of its own, at its own length: padding would compete
    with its tokens for the clusters of mode `topk`. Images (N, T): one per row, `stride` unused.
    All other batches have B rows; spare rows have weight 0, as tokens `pad_id` have (-1: none).
    `limit`: only so many windows, evenly spread over the split (0: all); the first window with
    stride < T is then left out, because its tokens have less context than the others.
    """
    if split.ndim == 2 and split.shape[1] != n_tokens:
        raise UserError(f"images have {split.shape[1]} values, --seq-len is {n_tokens}")
    stride = stride or n_tokens
    if not 0 < stride <= n_tokens:
        raise UserError(f"--stride {stride}: must be from 1 to --seq-len {n_tokens}")
    total = count_windows(split, n_tokens, stride)
    n_windows = min(limit or total, total)
    first = int(split.ndim == 1 and stride < n_tokens and n_windows < total)
    chosen = [first + i * (total - first) // n_windows for i in range(n_windows)]
    full = [w for w in chosen if split.ndim == 2 or w * stride + n_tokens <= len(split)]
    groups = [(full[i : i + batch], batch, n_tokens) for i in range(0, len(full), batch)]
    groups += [([w], 1, len(split) - w * stride) for w in chosen[len(full) :]]
    for windows, n_rows, length in groups:
        tokens = np.zeros((n_rows, length), np.int32)
        weights = np.zeros((n_rows, length), np.float32)
        index = np.zeros(n_rows, np.int64)
        for row, window in enumerate(windows):
            index[row] = window
            if split.ndim == 2:
                part, scored_from = split[window], 0
            else:
                part = split[window * stride : window * stride + n_tokens]
                scored_from = n_tokens - stride if window else 0
            tokens[row, : len(part)] = part
            weights[row, scored_from : len(part)] = np.asarray(part[scored_from:]) != pad_id
        yield tokens, weights, index


def count_windows(split: np.ndarray, n_tokens: int, stride: int = 0) -> int:
    """Number of windows in a whole split: 1 + ceil((n - T) / stride) for text."""
    if split.ndim == 2:
        return len(split)
    if len(split) == 0:
        return 0
    return 1 + -(-max(len(split) - n_tokens, 0) // (stride or n_tokens))


def _generator(seed, step, purpose):
    """An independent stream for each (seed, step, purpose): Philox is a function of its counter.

    A step has 2^128 values of its own before it would reach those of the next.
    """
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, step, 0]))


@lru_cache(maxsize=2)  # a batch touches at most two epochs, unless it is larger than the split
def _permutation(n, seed, epoch):
    return _generator(seed, epoch, purpose=1).permutation(n)
