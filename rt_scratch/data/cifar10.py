"""CIFAR-10: 60,000 photographs of 32 x 32 pixels in 10 classes (Krizhevsky 2009), binary version.

A record is a byte with the class, then 1,024 bytes each of red, green and blue. Official splits
are train (five files) and test; every tenth image of train is held out as valid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rt_scratch.data.cache import cached
from rt_scratch.data.dataset import Dataset
from rt_scratch.data.download import Source
from rt_scratch.data.files import find, missing, opened
from rt_scratch.data.images import interleave, take_labels, write_images
from rt_scratch.errors import UserError

SOURCE = Source("cifar-10-binary.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",), None,
                "md5:c32a1d4ab5d03f1284b67883e8d87530")
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST = "test_batch.bin"
RECORDS = 10_000     # per file
VALUES = 3 * 32 * 32
HOLD_OUT = 10        # one image of train in so many is for valid


def load(folder: Path) -> Dataset:
    """From the .bin files or the official tar.gz; train files may be missing, and the protocol
    says so. UserError on files of the wrong size or with impossible labels."""
    found = find(folder, [*TRAIN, TEST], ["cifar-10-batches-bin"], [SOURCE.name])
    train = [name for name in TRAIN if name in found]
    if TEST not in found or not train:
        raise missing(folder, "cifar10", f"{TRAIN[0]} ... {TEST} or {SOURCE.name} (the binary "
                      "version, not the one for Python)")
    recipe = {"files": [*train, TEST], "hold_out": HOLD_OUT}
    data = cached(folder, "cifar10", "cifar10", recipe, {f.path for f in found.values()},
                  lambda new: write_images(new, _batches(found, train), VALUES, 10, HOLD_OUT))
    splits, labels = take_labels(data.arrays)
    counts = ", ".join(f"{split} {len(images):,}" for split, images in splits.items())
    part = "" if len(train) == len(TRAIN) else f" (only {', '.join(train)})"
    protocol = (f"bits per dimension over all {VALUES:,} colour values of CIFAR-10 images{part}: "
                f"{counts}; test is the official one, valid every {HOLD_OUT}th image of train")
    return Dataset("cifar10", "image", 256, "bits/dim", splits, protocol, labels=labels,
                   n_classes=10, image_shape=(32, 32, 3))


def _batches(found, train):
    for name in [*train, TEST]:
        with opened(found[name]) as stream:
            content = stream.read(RECORDS * (1 + VALUES) + 1)
        if len(content) != RECORDS * (1 + VALUES):
            raise UserError(f"{found[name].path}: {name} is no file of {RECORDS:,} images; it "
                            f"should have {RECORDS * (1 + VALUES):,} bytes")
        records = np.frombuffer(content, np.uint8).reshape(RECORDS, 1 + VALUES)
        if records[:, 0].max() > 9:
            raise UserError(f"{found[name].path}: {name} has labels above 9; it is not the binary "
                            "version of CIFAR-10")
        yield "test" if name == TEST else "train", interleave(records[:, 1:]), records[:, 0]
