"""Datasets: `load(name, data_dir)` gives token arrays and how they are scored.

A dataset is one file in this folder with a function `load(folder) -> Dataset` (and
`download(folder)` where there is something to download), and one line in `DATASETS`.
Reading order: dataset.py (what a dataset is), stdlib.py and text.py (the two simplest),
batches.py, then enwik8, wikitext103, pg19 (with tokenizer.py), cifar10, imagenet64 (with
images.py); files.py, cache.py and download.py are plumbing.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from rt_scratch.data.dataset import Dataset, codec, score
from rt_scratch.errors import UserError

__all__ = ["DATASETS", "Dataset", "codec", "fetch", "load", "outline", "present", "score"]

DATASETS = {  # name: (module in this folder, what it is, V and image size of the official files)
    "stdlib": ("stdlib", "bytes of the Python standard library's own source files", 256, 0),
    "enwik8": ("enwik8", "100 MB of Wikipedia, bytes", 256, 0),
    "wikitext103": ("wikitext103", "Wikipedia articles, words", 267_735, 0),
    "pg19": ("pg19", "books before 1919, subwords", 98_304, 0),
    "cifar10": ("cifar10", "32 x 32 images of 10 classes", 256, 32),
    "imagenet64": ("imagenet64", "64 x 64 images of 1000 classes", 256, 64),
}


def load(name: str, data_dir: str | Path | None = None, vocab_size: int = 0) -> Dataset:
    """The dataset `name` of the table, or any file as text.

    data_dir: folder with the official files; default data/NAME. Encoded copies go to its
    rt_cache/, or to data/NAME/rt_cache/ when data_dir cannot be written.
    vocab_size: V for a dataset whose subwords are trained here (pg19), 0 for its default; for the
    others a V that is not theirs is a UserError, as is everything the user can mend. A file named
    like a dataset is reached as ./NAME.
    """
    if name not in DATASETS:
        if data_dir is not None:
            raise UserError(f"--data-dir {data_dir}: not used with a text file ({name})")
        from rt_scratch.data import text

        data = text.load(name)
    else:
        module = _module(name)
        chosen = {}
        if hasattr(module, "VOCAB_SIZE"):
            chosen = {"vocab_size": vocab_size or module.VOCAB_SIZE}
        data = module.load(_folder(name, data_dir), **chosen)
    if vocab_size and data.vocab_size != vocab_size:
        raise UserError(f"{name} has {data.vocab_size} token values, not {vocab_size}: the "
                        "checkpoint or --vocab-size belongs to other data")
    return data


def outline(name: str, vocab_size: int = 0) -> Dataset:
    """`name` as far as it is known without its files: no splits. For planning a run."""
    _, about, v, size = DATASETS[name]
    return Dataset(name, "image" if size else "text", vocab_size or v, "", {},
                   f"{about}; not here, so as the official files are",
                   image_shape=(size, size, 3) if size else None)


def present(name: str, data_dir: str | Path | None = None) -> bool:
    """False if `name` needs files and there is no folder for them."""
    return name not in DATASETS or name == "stdlib" or _folder(name, data_dir).is_dir()


def fetch(name: str, data_dir: str | Path | None = None) -> None:
    """Download the official files of `name` into data_dir (default data/NAME); see download.py."""
    if name not in DATASETS:
        raise UserError(f"{name}: not a dataset; there are {', '.join(DATASETS)}")
    module = _module(name)
    if not hasattr(module, "download"):
        raise UserError(f"{name}: nothing to download, every Python has it")
    module.download(_folder(name, data_dir))


def _module(name):
    return importlib.import_module(f"rt_scratch.data.{DATASETS[name][0]}")


def _folder(name, data_dir):
    return Path("data") / name if data_dir is None else Path(data_dir)
