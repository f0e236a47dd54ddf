"""What a dataset is, and what its score means."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rt_scratch.errors import UserError


class Dataset(NamedTuple):
    """Tokens of the three splits, and how to score them."""

    name: str                         # 'stdlib', 'enwik8', ...; a file name for own text
    kind: str                         # 'text' or 'image'
    vocab_size: int                   # V
    unit: str                         # 'bits/byte', 'ppl/token', 'ppl/word' or 'bits/dim'
    splits: dict[str, np.ndarray]     # train, valid, test; text: (n,) integers, images: (N, T)
                                      # uint8, row-major list of R, G, B. Often memory-mapped
    protocol: str                     # one line to print with every score
    labels: dict[str, np.ndarray] | None = None  # class of each image, 0 .. n_classes - 1
    n_classes: int = 0
    pad_id: int = -1                  # -1: every token counts, which is so for all of these
    units: dict[str, int] | None = None  # words of the original text, where unit is 'ppl/word'
    image_shape: tuple[int, int, int] | None = None  # (height, width, 3)
    encode: Callable[[bytes], np.ndarray] | None = None  # text to ids; None for images
    decode: Callable[[np.ndarray], bytes] | None = None  # ids to text
    codec_file: Path | None = None    # all that encode and decode need besides code; None: bytes


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
        per_token *= len(dataset.splits[split]) / dataset.units[split]
    try:
        return math.exp(per_token)
    except OverflowError:
        return math.inf


def codec(path: str | Path | None):
    """(encode, decode) from a `codec_file`: None is bytes, .txt a list of words, .json subwords.

    A run folder that keeps a copy of this file can be sampled from without the dataset.
    """
    if path is None:
        return encode_bytes, decode_bytes
    if not Path(path).is_file():
        raise UserError(f"{path}: missing; a run folder needs it to read and write text")
    if Path(path).suffix == ".txt":
        from rt_scratch.data.wikitext103 import word_codec

        return word_codec(path)
    from rt_scratch.data.tokenizer import subword_codec

    return subword_codec(path)


def encode_bytes(text: bytes) -> np.ndarray:
    """(n,) uint8, one id per byte."""
    return np.frombuffer(text, np.uint8)


def decode_bytes(ids) -> bytes:
    """The inverse of `encode_bytes`."""
    return np.asarray(ids).astype(np.uint8).tobytes()


def byte_dataset(name: str, splits: dict[str, np.ndarray], protocol: str) -> Dataset:
    """A dataset whose tokens are bytes: V = 256, scored in bits per byte, byte 0 like any other."""
    return Dataset(name, "text", 256, "bits/byte", splits, protocol,
                   encode=encode_bytes, decode=decode_bytes)
