"""The table of datasets, and what can be done with one of them by its name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rt_scratch.data.codecs import Codec, open_codec
from rt_scratch.data.dataset import Dataset
from rt_scratch.data.download import fetch as fetch_source
from rt_scratch.data.released_subwords import RELEASED
from rt_scratch.data.text import load as load_text
from rt_scratch.errors import UserError


class Row(NamedTuple):
    """What is known of a dataset without its files."""

    about: str                    # what it is, for lists
    vocab_size: int = 256         # V of the official files
    image_size: int = 0           # height and width of its images; 0: text
    n_classes: int = 0            # of its images
    chooses_vocab: bool = False   # True: its `load(folder, vocab_size)` trains subwords
    needs_files: bool = True      # False: every Python has it


DATASETS = {  # the name is also that of its module in this folder
    "stdlib": Row("bytes of the Python standard library's own source files", needs_files=False),
    "enwik8": Row("100 MB of Wikipedia, bytes"),
    "wikitext103": Row("Wikipedia articles, words", 267_735),
    "pg19": Row("books before 1919, subwords", 98_304, chooses_vocab=True),  # the paper's "98k"
    "cifar10": Row("32 x 32 images of 10 classes", image_size=32, n_classes=10),
    "imagenet64": Row("64 x 64 images of 1000 classes", image_size=64, n_classes=1000),
}
OLD_CODECS = {"": "bytes", ".txt": "words", ".json": "subwords"}


def load(name: str | Sequence[str], data_dir: str | Path | None = None, vocab_size: int = 0,
         codec: Codec | None = None, seq_len: int = 0) -> Dataset:
    """The dataset `name` of the table, or any file or folder of files as text, or several of them.

    data_dir: folder with the official files; default data/NAME. Encoded copies go to its
    rt_cache/, or to data/NAME/rt_cache/ when data_dir cannot be written.
    vocab_size: V for a dataset whose subwords are trained here (pg19), 0 for its default; for the
    others a V that is not theirs is a UserError, as is everything the user can fix. A file named
    like a dataset is reached as ./NAME.
    codec: of a run whose subwords were made elsewhere (`given_codec`), instead of the dataset's
    own; seq_len: T of that run, into whose sequences the text is packed.
    """
    paths = [name] if isinstance(name, str | Path) else list(name)
    name = " ".join(map(str, paths))
    if codec is not None:
        if name not in DATASETS or not hasattr(_module(name), "load_packed"):
            raise UserError(f"{name}: cannot be prepared in the subwords of {codec.file}")
        data = _module(name).load_packed(_folder(name, data_dir), codec, seq_len)
    elif name in DATASETS:
        row = DATASETS[name]
        chosen = [vocab_size or row.vocab_size] if row.chooses_vocab else []
        data = _module(name).load(_folder(name, data_dir), *chosen)
    elif data_dir is not None:
        raise UserError(f"--data-dir {data_dir}: not used with a text file ({name})")
    elif absent := [path for path in paths if not Path(path).exists()]:
        if set(absent[0]) & set("*?["):
            raise UserError(f"{absent[0]}: no such file; to train on several files, name them, or "
                            "give the folder that holds them")
        if absent[0] in DATASETS:
            raise UserError(f"{absent[0]}: a dataset, which is trained on alone")
        raise UserError(f"{absent[0]}: no such file, and no such dataset; datasets are "
                        f"{', '.join(DATASETS)}")
    else:
        data = load_text(*paths)
    if vocab_size and data.vocab_size != vocab_size:
        raise UserError(f"{name} has {data.vocab_size} token values, not {vocab_size}: the "
                        "checkpoint or --vocab-size belongs to other data")
    return data


def outline(name: str, vocab_size: int = 0) -> Dataset:
    """The dataset `name` as far as it is known without its files: no splits. For planning a run."""
    row = DATASETS[name]
    size = row.image_size
    return Dataset(name, "image" if size else "text", vocab_size or row.vocab_size, "", {},
                   f"{row.about}; no files here, sizes are those of the official files",
                   n_classes=row.n_classes, image_shape=(size, size, 3) if size else None)


def present(name: str | tuple[str, ...], data_dir: str | Path | None = None) -> bool:
    """False if `name` needs files and there is no folder for them."""
    return (name not in DATASETS or not DATASETS[name].needs_files
            or _folder(name, data_dir).is_dir())


def fetch(name: str, data_dir: str | Path | None = None) -> None:
    """Download the official files of `name` into data_dir (default data/NAME); see download.py."""
    if name not in DATASETS:
        raise UserError(f"{name}: not a dataset; there are {', '.join(DATASETS)}")
    module, folder = _module(name), _folder(name, data_dir)
    if hasattr(module, "SOURCE"):
        fetch_source(module.SOURCE, folder)
    elif hasattr(module, "download"):
        module.download(folder)
    else:
        raise UserError(f"{name}: nothing to download; leave out --download")


def saved_codec(config: dict, folder: Path) -> Codec:
    """The codec that `Codec.to_config` described, with the copy of its file in the run folder.

    Older configs have no "codec_file": their "codec" is the file's name, None for bytes.
    """
    name, file = (str(config.get(key) or "") for key in ("codec", "codec_file"))
    if "codec_file" not in config:
        name, file = OLD_CODECS.get(Path(name).suffix, name), name
    if name in DATASETS:
        _module(name)  # adds its own codec to CODECS
    return open_codec(name, folder / Path(file).name if file else None)


def given_codec(config: dict, folder: Path) -> Codec | None:
    """The codec of a run folder if its dataset is encoded with it; None: the dataset makes its own.
    """
    return saved_codec(config, folder) if config.get("codec") == RELEASED else None


def _module(name):
    return importlib.import_module(f"rt_scratch.data.{name}")


def _folder(name, data_dir):
    return Path("data") / name if data_dir is None else Path(data_dir)
