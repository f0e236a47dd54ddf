"""What the image datasets share: colour order, and a valid split taken from train."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from rt_scratch.data.cache import ArrayFile, smallest_type
from rt_scratch.errors import UserError

SPLITS = ("train", "valid", "test")


def interleave(planes: np.ndarray) -> np.ndarray:
    """Red, green and blue planes to the row-major list of R, G, B:  (N, 3 S S) -> (N, S S 3)."""
    n, t = planes.shape
    return planes.reshape(n, 3, t // 3).swapaxes(1, 2).reshape(n, t)


def write_images(new: Path, batches: Iterable[tuple[str, np.ndarray, np.ndarray | None]],
                 width: int, n_classes: int, every: int) -> dict[str, int]:
    """Write batches of ('train' or 'test', pixels (k, width), labels (k,) or None) as arrays.

    The official data have no third split: image i of train goes to valid where i mod `every` is
    every - 1, which is the same share of each class whatever their order. Returns the
    counts; UserError when a split is empty.
    """
    seen = 0
    with ExitStack() as stack:
        def array(name, dtype, row_shape=()):
            return stack.enter_context(ArrayFile(new / f"{name}.npy", dtype, row_shape))

        pixels_of = {split: array(split, np.uint8, (width,)) for split in SPLITS}
        labels_of = {}
        for split, pixels, labels in batches:
            if labels is not None and not labels_of:
                labels_of = {s: array(f"labels_{s}", smallest_type(n_classes)) for s in SPLITS}
            if split == "train":
                held = (seen + np.arange(len(pixels))) % every == every - 1
                seen += len(pixels)
                parts = {"train": ~held, "valid": held}
            else:
                parts = {split: slice(None)}
            for name, rows in parts.items():
                pixels_of[name].append(pixels[rows])
                if labels is not None:
                    labels_of[name].append(labels[rows])
    counts = {split: file.n for split, file in pixels_of.items()}
    for split, n in counts.items():
        if n == 0:
            raise UserError(f"no images for {split}: the files hold {seen} images of train, "
                            f"{counts['test']} of test")
    return counts


def take_labels(arrays: dict[str, np.ndarray]):
    """(pixels by split, labels by split or None) of the arrays that `write_images` wrote."""
    labels = {split: arrays[f"labels_{split}"] for split in SPLITS if f"labels_{split}" in arrays}
    return {split: arrays[split] for split in SPLITS}, labels or None
