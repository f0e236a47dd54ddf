"""CIFAR-10: 60,000 photographs of 32 x 32 pixels in 10 classes (Krizhevsky 2009), binary version.

A record is a byte with the class, then 1,024 bytes each of red, green and blue. Official splits
are train (five files) and test; every tenth image of train is held out as valid.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rt_scratch.data.cache import cached
from rt_scratch.data.dataset import Dataset
from rt_scratch.data.download import Source
from rt_scratch.data.files import find, missing, opened
from rt_scratch.data.images import PICKLED, hold_out, interleave, take_labels, write_images
from rt_scratch.errors import UserError

SOURCE = Source("cifar-10-binary.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",), 170_052_171,
                "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST = "test_batch.bin"
OFFICIAL = {  # sha256 of the files
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
OTHERS = {pattern: PICKLED for pattern in (
    "cifar-10-python*", "cifar-10-batches-py", "batches.meta", "data_batch_1")} | {
    pattern: "this is the version for Matlab" for pattern in (
        "cifar-10-matlab*", "cifar-10-batches-mat", "data_batch_1.mat")}
RECORDS = 10_000     # per file
VALUES = 3 * 32 * 32
HOLD_OUT = 10        # one image of train in so many is for valid


def load(folder: Path) -> Dataset:
    """From the .bin files or the official tar.gz; train files may be missing, and the protocol
    says so. UserError on files of the wrong size or with impossible labels."""
    found = find(folder, [*TRAIN, TEST], ["cifar-10-batches-bin"], [SOURCE.name])
    train = [name for name in TRAIN if name in found]
    if TEST not in found or not train:
        wanted = f"{TRAIN[0]} ... {TEST} (the binary version) or {SOURCE.name}"
        if found:
            wanted = TEST if train else f"{TRAIN[0]} ... {TRAIN[-1]}"
        raise missing(folder, wanted, SOURCE.origin(), OTHERS, dataset="cifar10")
    recipe = {"files": [*train, TEST], "hold_out": HOLD_OUT}
    data = cached(folder, "cifar10", "cifar10", recipe, {f.path for f in found.values()},
                  lambda new: _encode(found, train, new))
    splits, labels = take_labels(data.arrays)
    n = {split: len(images) for split, images in splits.items()}
    part = "" if len(train) == len(TRAIN) else f" (only {', '.join(train)})"
    strange = [name for name in [*train, TEST] if data.info[name] != OFFICIAL[name]]
    verified = (f"NOT VERIFIED: {', '.join(strange)}" if strange else
                "verified by the sha256 of the files")
    protocol = (f"bits per dimension over all {VALUES:,} colour values of CIFAR-10 images{part}: "
                f"train {n['train']:,}, valid {n['valid']:,} (every {HOLD_OUT}th image of train), "
                f"test {n['test']:,} ({TEST}); {verified}; pixels and labels sha256 "
                f"{data.sha256[:12]}")
    return Dataset("cifar10", "image", 256, "bits/dim", splits, protocol, labels=labels,
                   n_classes=10, image_shape=(32, 32, 3))


def _encode(found, train, new):
    """Writes the arrays; returns the sha256 of each file, which archives do not tell."""
    digests = {}
    write_images(new, hold_out(_batches(found, train, digests), HOLD_OUT), VALUES, 10)
    return digests


def _batches(found, train, digests):
    for name in tqdm([*train, TEST], desc="encoding", unit=" files", disable=None):
        with opened(found[name]) as stream:
            content = stream.read(RECORDS * (1 + VALUES) + 1)
        if len(content) != RECORDS * (1 + VALUES):
            raise UserError(f"{found[name].path}: {name} is no file of {RECORDS:,} images; it "
                            f"should have {RECORDS * (1 + VALUES):,} bytes")
        digests[name] = hashlib.sha256(content).hexdigest()
        records = np.frombuffer(content, np.uint8).reshape(RECORDS, 1 + VALUES)
        if records[:, 0].max() > 9:
            raise UserError(f"{found[name].path}: {name} has labels above 9; it is not the binary "
                            "version of CIFAR-10")
        yield "test" if name == TEST else "train", interleave(records[:, 1:]), records[:, 0]
