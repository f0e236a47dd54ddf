"""What a dataset is, and what its score means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from rt_scratch.data.codecs import Codec, open_codec


class Dataset(NamedTuple):
    """Tokens of the three splits, and how to score them."""

    name: str                         # 'stdlib', 'enwik8', ...; a file name for own text
    kind: str                         # 'text' or 'image'
    vocab_size: int                   # V
    unit: str                         # 'bits/byte', 'ppl/token', 'ppl/word' or 'bits/dim'
    splits: Mapping[str, np.ndarray]  # train, valid, test; text: (n,) integers, images: (N, T)
                                      # uint8, row-major list of R, G, B. Often memory-mapped
    protocol: str                     # one line to print with every score
    labels: dict[str, np.ndarray] | None = None  # class of each image, 0 .. n_classes - 1
    n_classes: int = 0
    pad_id: int = -1                  # tokens that do not count; -1: every token does
    units: Mapping[str, int] | None = None  # words of the original text, where unit is 'ppl/word';
    words: Callable[[str, int, int], int] | None = None  # words(split, i, j): in tokens i .. j - 1
    counted: Mapping[str, int] | None = None  # tokens of a split without padding, where it has some
    aligned: bool = False             # True: windows of T tokens start at multiples of T
    tokens: str = "tokens"            # what they are called next to a score
    image_shape: tuple[int, int, int] | None = None  # (height, width, 3)
    codec: Codec = open_codec("bytes")  # text to tokens and back


def words_scored(dataset: Dataset, split: str, weights: np.ndarray, index: np.ndarray,
                 stride: int) -> int:
    """Words of the original text in the tokens that a batch of `eval_windows` scores, for `score`.

    weights (B, T), index (B,): as they came; stride: tokens from one window to the next. 0 where
    the unit is not 'ppl/word'.
    """
    if dataset.unit != "ppl/word":
        return 0
    n_words = 0
    for window, scored in zip(index.tolist(), (np.flatnonzero(w) for w in weights), strict=True):
        if len(scored):
            start = window * stride
            n_words += dataset.words(split, start + int(scored[0]), start + int(scored[-1]) + 1)
    return n_words


def score(nats_sum: float, n_tokens: int, dataset: Dataset, split: str,
          n_words: int = 0) -> float:
    """The score of `n_tokens` tokens of a split that cost `nats_sum` nats, in `dataset.unit`.

    bits/byte and bits/dim: nats / tokens / ln 2.  ppl/token: exp(nats / tokens).
    ppl/word: exp(nats / words), words of the original text between white space: `n_words` of the
    tokens that were scored (see `words_scored`); 0: in proportion to the tokens of the split.
    """
    per_token = float(nats_sum) / n_tokens
    if dataset.unit.startswith("bits/"):
        return per_token / math.log(2)
    if dataset.unit == "ppl/word":
        per_token *= n_tokens / n_words if n_words > 0 else tokens_per_word(dataset, split)
    try:
        return math.exp(per_token)
    except OverflowError:
        return math.inf


def tokens_per_word(dataset: Dataset, split: str) -> float:
    """Scored tokens of a split over words of its original text."""
    counted = dataset.counted[split] if dataset.counted else len(dataset.splits[split])
    return counted / dataset.units[split]


def byte_dataset(name: str, splits: dict[str, np.ndarray], protocol: str) -> Dataset:
    """A dataset whose tokens are bytes: V = 256, scored in bits per byte, byte 0 like any other."""
    return Dataset(name, "text", 256, "bits/byte", splits, protocol)
