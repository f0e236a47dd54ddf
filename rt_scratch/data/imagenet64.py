"""ImageNet at 64 x 64 pixels, of which there are two versions; their scores do not compare.

`npz`: Chrabaszcz et al. 2017, 1,281,167 + 50,000 images with classes; what image-net.org offers.
`png`: van den Oord et al. 2016 (PixelRNN), 1,281,149 + 49,999 images without classes, down-sampled
another way; what the Sparse Transformer and Routing Transformer papers used.
Papers report the official validation set: here it is `test`, and `valid` is held out of train.
"""

from __future__ import annotations

import io
import os
import tarfile
import tokenize
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rt_scratch.data.cache import cached
from rt_scratch.data.dataset import Dataset
from rt_scratch.data.files import DAMAGE, find, opened
from rt_scratch.data.images import interleave, take_labels, write_images
from rt_scratch.errors import UserError

SIDE = 64
VALUES = 3 * SIDE * SIDE
COUNTS = {"npz": (1_281_167, 50_000), "png": (1_281_149, 49_999)}  # train, official validation
NPZ_TRAIN = [f"train_data_batch_{i}.npz" for i in range(1, 11)]
NPZ_TEST = "val_data.npz"
NPZ_ARCHIVES = ["Imagenet64_train_part1_npz.zip", "Imagenet64_train_part2_npz.zip",
                "Imagenet64_val_npz.zip"]
PNG = {"train": "train_64x64", "test": "valid_64x64"}  # folders, or the tar files of that name
HOLD_OUT = 128       # one image of train in so many is for valid: 10,009 images
BATCH = 512          # images in memory at a time
HOW_TO_GET_IT = (
    "ImageNet needs an account and an accepted request at https://image-net.org/download.php; "
    "then fetch either the 64x64 npz files at https://image-net.org/data/downsample/ "
    f"({', '.join(NPZ_ARCHIVES)}; 14.1 GB) or the older train_64x64.tar and valid_64x64.tar, put "
    "them, packed or unpacked, into one folder and name it with --data-dir")


def load(folder: Path) -> Dataset:
    """From the npz files (in their zips or not), or from the PNG files (in their tars or not).

    UserError when there is neither, or both; a part of train is accepted, the protocol says so.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. {HOW_TO_GET_IT}")
    npz = find(folder, [*NPZ_TRAIN, NPZ_TEST], [Path(a).stem for a in NPZ_ARCHIVES], NPZ_ARCHIVES)
    png = {split: path for split, name in PNG.items()
           for path in (folder / f"{name}.tar", folder / name) if path.exists()}
    has_npz = NPZ_TEST in npz and len(npz) > 1
    if has_npz and len(png) == len(PNG):
        raise UserError(f"{folder}: holds both versions of ImageNet 64x64, whose scores do not "
                        "compare; keep them in two folders")
    if has_npz:
        version, sources = "npz", {f.path for f in npz.values()}
        batches = _npz_batches(npz)
    elif len(png) == len(PNG):
        version, sources = "png", set(png.values())
        batches = _png_batches(png)
    else:
        raise UserError(f"{folder}: no complete ImageNet 64x64 (train and validation) here. "
                        f"{HOW_TO_GET_IT}")
    recipe = {"version": version, "hold_out": HOLD_OUT}
    data = cached(folder, "imagenet64", f"imagenet64-{version}", recipe, sources,
                  lambda new: write_images(new, batches, VALUES, 1000, HOLD_OUT))
    splits, labels = take_labels(data.arrays)
    n = {split: len(images) for split, images in splits.items()}
    have, official = (n["train"] + n["valid"], n["test"]), COUNTS[version]
    part = "" if have == official else (
        f" (PART of it: {have[0]:,} of {official[0]:,} and {have[1]:,} of {official[1]:,})")
    name = {"npz": "the npz version of ImageNet 64x64 (Chrabaszcz et al. 2017)",
            "png": "the older PNG version of ImageNet 64x64 (PixelRNN)"}[version]
    protocol = (f"bits per dimension over all {VALUES:,} colour values of {name}{part}: "
                f"train {n['train']:,}, valid {n['valid']:,} (every {HOLD_OUT}th image of train), "
                f"test {n['test']:,} (the official validation set)")
    return Dataset("imagenet64", "image", 256, "bits/dim", splits, protocol, labels=labels,
                   n_classes=1000 if labels else 0, image_shape=(SIDE, SIDE, 3))


def download(folder: Path) -> None:
    """UserError that says where to request access: there is no download without it."""
    raise UserError(HOW_TO_GET_IT)


def _npz_batches(found):
    for name in [n for n in NPZ_TRAIN if n in found] + [NPZ_TEST]:
        split = "test" if name == NPZ_TEST else "train"
        with opened(found[name]) as stream:
            try:
                for pixels, labels in _npz_rows(stream, name):
                    yield split, interleave(pixels), labels
            except (ValueError, KeyError, tokenize.TokenError) as e:  # the last: npy headers
                raise UserError(f"{found[name].path}: {name} is no npz batch of 64 x 64 images "
                                f"({e})") from e


def _npz_rows(stream, name):
    """(pixels (k, VALUES), labels (k,) from 0) of a batch, without reading it whole."""
    with zipfile.ZipFile(stream) as npz:
        with npz.open("labels.npy") as f:
            labels = np.lib.format.read_array(f, allow_pickle=False).astype(np.int64) - 1
        with npz.open("data.npy") as f:
            version = np.lib.format.read_magic(f)
            if version != (1, 0):
                raise ValueError(f"npy version {version}")
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(f)
            if shape != (len(labels), VALUES) or by_column or dtype != np.uint8:
                raise ValueError(f"data is {dtype}{shape}, not uint8({len(labels)}, {VALUES})")
            if len(labels) and not (0 <= labels.min() and labels.max() < 1000):
                raise ValueError("labels are not from 1 to 1000")
            for at in tqdm(range(0, shape[0], BATCH), desc=name, disable=None):
                rows = f.read(BATCH * VALUES)
                part = labels[at : at + BATCH]
                yield np.frombuffer(rows, np.uint8).reshape(len(part), VALUES), part


def _png_batches(paths):
    try:
        from PIL import Image
    except ImportError as e:
        raise UserError("reading PNG files needs pillow: pip install pillow, or "
                        "pip install 'rt_scratch[data]'") from e
    for split, path in paths.items():
        pixels = []
        for name, content in _png_files(path):
            try:
                with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                    if image.size != (SIDE, SIDE):
                        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels")
                    pixels.append(np.asarray(image.convert("RGB")).reshape(VALUES))
            except (OSError, ValueError, SyntaxError) as e:  # pillow's for damaged files
                raise UserError(f"{path}: {name} is no 64 x 64 PNG image ({e})") from e
            if len(pixels) == BATCH:
                yield split, np.stack(pixels), None
                pixels = []
        if pixels:
            yield split, np.stack(pixels), None


def _png_files(path):
    """(name, content) of the PNG files in a folder, by name, or in a tar, in its order."""
    if path.is_dir():
        for name in tqdm(sorted(os.listdir(path)), desc=path.name, disable=None):
            if name.endswith(".png"):
                yield name, (path / name).read_bytes()
        return
    try:
        with tarfile.open(path, "r|") as tar:  # as a stream: no index of a million files
            for member in tqdm(tar, desc=path.name, disable=None):
                if member.isreg() and member.name.endswith(".png"):
                    yield member.name, tar.extractfile(member).read()
    except DAMAGE as e:
        raise UserError(f"{path}: damaged or cut short ({e}); remove it and fetch it again") from e
