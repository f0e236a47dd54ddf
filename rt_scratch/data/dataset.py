"""What a dataset is, and what its score means."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    units: Mapping[str, int] | None = None  # words of the original text, where unit is 'ppl/word'
    counted: Mapping[str, int] | None = None  # tokens of a split without padding, where it has some
    aligned: bool = False             # True: windows of T tokens start at multiples of T
    tokens: str = "tokens"            # what they are called next to a score
    image_shape: tuple[int, int, int] | None = None  # (height, width, 3)
    codec: Codec = open_codec("bytes")  # text to tokens and back


def score(nats_sum: float, n_tokens: int, dataset: Dataset, split: str) -> float:
    """The score of `n_tokens` tokens of a split that cost `nats_sum` nats, in `dataset.unit`.

    bits/byte and bits/dim: nats / tokens / ln 2.  ppl/token: exp(nats / tokens).
    ppl/word: exp(nats / words), words of the original text between white space; for a part of the
    split, the words are taken in proportion to the tokens.
    """
    per_token = float(nats_sum) / n_tokens
    if dataset.unit.startswith("bits/"):
        return per_token / math.log(2)
    if dataset.unit == "ppl/word":
        per_token *= tokens_per_word(dataset, split)
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
