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
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from rt_scratch.data.cache import cached
from rt_scratch.data.dataset import Dataset
from rt_scratch.data.files import DAMAGE, bucket, damaged, find, missing, opened, ordinary
from rt_scratch.data.images import (
    PICKLED,
    SPLITS,
    colours,
    hold_out,
    interleave,
    take_labels,
    write_images,
)
from rt_scratch.errors import UserError

SIDE = 64
VALUES = 3 * SIDE * SIDE
COUNTS = {"npz": (1_281_167, 50_000), "png": (1_281_149, 49_999)}  # train, official validation
NPZ_TRAIN = [f"train_data_batch_{i}.npz" for i in range(1, 11)]
NPZ_TEST = "val_data.npz"
NPZ_ARCHIVES = ["Imagenet64_train_part1_npz.zip", "Imagenet64_train_part2_npz.zip",
                "Imagenet64_val_npz.zip"]
PNG = {"train": "train_64x64", "test": "valid_64x64"}  # folders, or the tar files of that name
OFFICIAL = {  # sha256
    "Imagenet64_train_part1_npz.zip":
        "9422dc1dc5d092e9814a70a1cb7fc74880d2db5d88a0cb8a34ee363b12bde3f1",
    "Imagenet64_train_part2_npz.zip":
        "9fafc115afb7e6c301e66dc16b2d737152b427bd5dab26e1293487a6819c7f30",
    "Imagenet64_val_npz.zip": "e1e75133158a1924135a9c6f97a80d2d237b158945e0b34074e58e6c8430eeb8",
    "train_64x64.tar": "e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7",
    "valid_64x64.tar": "eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd",
}
HOLD_OUT = 128       # one image of train in so many is for valid: about 10,009 images
BATCH = 512          # images in memory at a time
MAX_NPZ = 2 * 10 ** 9  # bytes of a batch; the largest has 1.6
MAX_PNG = 10 ** 6    # bytes of a picture of 12,288 values
HOW_TO_GET_IT = (
    "ImageNet needs an account and an accepted request at https://image-net.org/download.php; "
    "then fetch either the 64x64 npz files at https://image-net.org/data/downsample/ "
    f"({', '.join(NPZ_ARCHIVES)}; 14.1 GB) or the older train_64x64.tar and valid_64x64.tar, put "
    "them, packed or unpacked, into one folder, and start: python train.py imagenet64 --data-dir "
    "FOLDER")
OTHERS = {pattern: PICKLED for pattern in (
    "Imagenet64_train_part1.zip", "Imagenet64_train_part2.zip", "Imagenet64_val.zip",
    "train_data_batch_1", "val_data")}


def load(folder: Path) -> Dataset:
    """From the npz files (in their zips or not), or from the PNG files (in their tars or not).

    UserError when there is neither, or both; a part of train is accepted, the protocol says so.
    """
    npz = find(folder, [*NPZ_TRAIN, NPZ_TEST], [Path(a).stem for a in NPZ_ARCHIVES], NPZ_ARCHIVES)
    png = {split: path for split, name in PNG.items()
           for path in (folder / f"{name}.tar", folder / name)
           if (path.is_file() if path.suffix else path.is_dir())}
    has_npz = NPZ_TEST in npz and len(npz) > 1
    if has_npz and len(png) == len(PNG):
        raise UserError(f"{folder}: holds both versions of ImageNet 64x64, whose scores do not "
                        "compare; keep them in two folders")
    if has_npz:
        version, sources = "npz", {f.path for f in npz.values()}
        held, batches = f"every {HOLD_OUT}th image", hold_out(_npz_batches(npz), HOLD_OUT)
    elif len(png) == len(PNG):
        version, sources = "png", set(png.values())
        held = f"1 image in {HOLD_OUT}, by a hash of its file's name"
        batches = _png_batches(png)
    else:
        absent = "complete ImageNet 64x64 (train and validation)"
        if npz:
            absent = f"{NPZ_TRAIN[0]} ..." if NPZ_TEST in npz else NPZ_TEST
        elif png:
            absent = next(name for split, name in PNG.items() if split not in png)
        raise missing(folder, absent, HOW_TO_GET_IT, OTHERS)
    recipe = {"version": version, "held": held}
    data = cached(folder, "imagenet64", f"imagenet64-{version}", recipe, sources,
                  lambda new: write_images(new, batches, VALUES, 1000))
    splits, labels = take_labels(data.arrays)
    n = {split: len(images) for split, images in splits.items()}
    have, official = (n["train"] + n["valid"], n["test"]), COUNTS[version]
    part = "" if have == official else (
        f" (PART of it: {have[0]:,} of {official[0]:,} and {have[1]:,} of {official[1]:,})")
    name = {"npz": "the npz version of ImageNet 64x64 (Chrabaszcz et al. 2017)",
            "png": "the older PNG version of ImageNet 64x64 (PixelRNN)"}[version]
    strange = [source for source, sha256 in data.sources.items()
               if OFFICIAL.get(Path(source).name) != sha256]
    verified = (f"NOT VERIFIED: {', '.join(strange)}" if strange else
                "verified by the sha256 of the archives")
    protocol = (f"bits per dimension over all {VALUES:,} colour values of {name}{part}: "
                f"train {n['train']:,}, valid {n['valid']:,} ({held} of train), test "
                f"{n['test']:,} (the validation files); {verified}; pixels and labels sha256 "
                f"{data.sha256[:12]}")
    return Dataset("imagenet64", "image", 256, "bits/dim", splits, protocol, labels=labels,
                   n_classes=1000 if labels else 0, image_shape=(SIDE, SIDE, 3))


def download(folder: Path) -> None:
    """UserError that says where to request access: there is no download without it."""
    raise UserError(HOW_TO_GET_IT)


def _npz_batches(found):
    for name in [n for n in NPZ_TRAIN if n in found] + [NPZ_TEST]:
        split = "test" if name == NPZ_TEST else "train"
        with opened(found[name], MAX_NPZ) as stream:
            try:
                for pixels, labels in _npz_rows(stream, name):
                    yield split, interleave(pixels), labels
            except (*DAMAGE, MemoryError, tokenize.TokenError) as e:  # the last: npy headers
                raise UserError(f"{found[name].path}: {name} is damaged, or no npz batch of "
                                f"64 x 64 images ({e})") from e


def _npz_rows(stream, name):
    """(pixels (k, VALUES), labels (k,) from 0) of a batch, without reading it whole."""
    with zipfile.ZipFile(stream) as npz:
        with npz.open("labels.npy") as f:
            shape, dtype = _npy_header(f)
            if len(shape) != 1 or shape[0] > COUNTS["npz"][0] or dtype.kind not in "ui":
                raise ValueError(f"labels are {dtype}{shape}, not one whole number per image")
            labels = np.frombuffer(f.read(shape[0] * dtype.itemsize), dtype).astype(np.int64) - 1
            _check_end(f)
        if len(labels) and not (0 <= labels.min() and labels.max() < 1000):
            raise ValueError("labels are not from 1 to 1000")
        with npz.open("data.npy") as f:
            shape, dtype = _npy_header(f)
            if shape != (len(labels), VALUES) or dtype != np.uint8:
                raise ValueError(f"data is {dtype}{shape}, not uint8({len(labels)}, {VALUES})")
            for at in tqdm(range(0, shape[0], BATCH), desc=name, disable=None):
                part = labels[at : at + BATCH]
                rows = f.read(len(part) * VALUES)
                yield np.frombuffer(rows, np.uint8).reshape(len(part), VALUES), part
            _check_end(f)


def _npy_header(f):
    version = np.lib.format.read_magic(f)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(f)
    if by_column and len(shape) > 1:
        raise ValueError("in the order of columns")
    return shape, dtype


def _check_end(f):
    if f.read(1):  # at the end, zipfile looks at the checksum
        raise ValueError("more than its header says")


def _png_batches(paths):
    waiting = {split: [] for split in SPLITS}
    for split, path in paths.items():
        for name, content in _png_files(path):
            target = "valid" if split == "train" and bucket(name, HOLD_OUT) == 0 else split
            waiting[target].append(_pixels(content, path, name))
            if len(waiting[target]) == BATCH:
                yield target, np.stack(waiting[target]), None
                waiting[target].clear()
    for target, pixels in waiting.items():
        if pixels:
            yield target, np.stack(pixels), None


def _png_files(path):
    """(name, content) of the PNG files in a folder, by name, or in a tar, in its order."""
    if path.is_dir():
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
        for name in tqdm(names, desc=path.name, disable=None):
            if _is_png(name):
                with open(path / name, "rb") as f:
                    yield name, f.read(MAX_PNG)
        return
    try:
        with tarfile.open(path, "r|") as tar:  # as a stream: no index of a million files
            for member in tqdm(ordinary(tar), desc=path.name, disable=None):
                name = PurePosixPath(member.name).name
                if _is_png(name):
                    yield name, tar.extractfile(member).read(MAX_PNG)
    except DAMAGE as e:
        raise damaged(path, e) from e


def _is_png(name):
    return name.endswith(".png") and not name.startswith(".")  # ._x.png: what macOS keeps beside x


def _pixels(content, path, name):
    """The colours of a PNG file:  (VALUES,) uint8."""
    try:
        from PIL import Image
    except ImportError as e:
        raise UserError("reading PNG files needs pillow: pip install pillow, or "
                        "pip install 'rt_scratch[data]'") from e
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (SIDE, SIDE):
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels")
            return colours(image).reshape(VALUES)
    except Exception as e:  # pillow's plug-ins raise nearly anything on damaged files
        raise UserError(f"{path}: {name} is no 64 x 64 PNG image ({e})") from e
