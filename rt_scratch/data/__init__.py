"""Datasets: `load(name, data_dir)` gives arrays of tokens, their codec, and how they are scored.

A dataset is one file in this folder with a function `load(folder) -> Dataset` (and, where there is
something to download, a `SOURCE` or a function `download(folder)`), and one row of `DATASETS` in
table.py. Reading order: dataset.py (what a dataset is), codecs.py (text to token ids and back),
stdlib.py and text.py (the two simplest), table.py, batches.py, then enwik8, wikitext103, pg19,
cifar10, imagenet64 (with images.py); files.py, cache.py and download.py are plumbing.
"""

from rt_scratch.data.codecs import CODECS, Codec, open_codec
from rt_scratch.data.dataset import Dataset, score, tokens_per_word
from rt_scratch.data.table import (
    DATASETS,
    fetch,
    given_codec,
    load,
    outline,
    present,
    saved_codec,
)

__all__ = ["CODECS", "DATASETS", "Codec", "Dataset", "fetch", "given_codec", "load", "open_codec",
           "outline", "present", "saved_codec", "score", "tokens_per_word"]
