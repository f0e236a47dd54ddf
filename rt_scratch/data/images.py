"""What the image datasets share: colour order, and how their arrays are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from rt_scratch.data.cache import ArrayFile, smallest_type
from rt_scratch.errors import UserError

SPLITS = ("train", "valid", "test")
PICKLED = "this is the version for Python, made of pickles, which are never read"


def colours(image) -> np.ndarray:
    """The colours (H, W, 3), uint8, of one of Pillow's images, as a viewer shows it: turned
    upright, on white where it is transparent, 16-bit grey scaled to 8."""
    from PIL import Image, ImageOps  # whoever has such an image has Pillow

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257  # 65535 / 255 = 257
        return np.repeat(grey[..., None], 3, -1).astype(np.uint8)
    if image.mode != "RGB" or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(above)
    return np.asarray(image.convert("RGB"))


def interleave(planes: np.ndarray) -> np.ndarray:
    """Red, green and blue planes to the row-major list of R, G, B:  (N, 3 S S) -> (N, S S 3)."""
    n, t = planes.shape
    return planes.reshape(n, 3, t // 3).swapaxes(1, 2).reshape(n, t)


Batch = tuple[str, np.ndarray, np.ndarray | None]  # split, pixels (k, T), labels (k,) or None


def hold_out(batches: Iterable[Batch], every: int) -> Iterator[Batch]:
    """Batches with a third split, which the official data do not have.

    Image i of train goes to valid where i mod `every` is every - 1, which is the same share of
    each class whatever their order.
    """
    seen = 0
    for split, pixels, labels in batches:
        if split == "train":
            held = (seen + np.arange(len(pixels))) % every == every - 1
            seen += len(pixels)
            yield "valid", pixels[held], None if labels is None else labels[held]
            pixels, labels = pixels[~held], None if labels is None else labels[~held]
        yield split, pixels, labels


def write_images(new: Path, batches: Iterable[Batch], width: int,
                 n_classes: int) -> dict[str, int]:
    """Write batches as arrays; returns the counts by split. UserError when a split is empty."""
    with ExitStack() as stack:
        def array(name, dtype, row_shape=()):
            return stack.enter_context(ArrayFile(new / f"{name}.npy", dtype, row_shape))

        pixels_of = {split: array(split, np.uint8, (width,)) for split in SPLITS}
        labels_of = {}
        for split, pixels, labels in batches:
            if labels is not None and not labels_of:
                labels_of = {s: array(f"labels_{s}", smallest_type(n_classes)) for s in SPLITS}
            pixels_of[split].append(pixels)
            if labels is not None:
                labels_of[split].append(labels)
    counts = {split: file.n for split, file in pixels_of.items()}
    for split, n in counts.items():
        if n == 0:
            raise UserError(f"no images for {split}: the files hold {counts['train']} of train, "
                            f"{counts['valid']} held out of it, {counts['test']} of test")
    return counts


def take_labels(arrays: dict[str, np.ndarray]):
    """(pixels by split, labels by split or None) of the arrays that `write_images` wrote."""
    labels = {split: arrays[f"labels_{split}"] for split in SPLITS if f"labels_{split}" in arrays}
    return {split: arrays[split] for split in SPLITS}, labels or None
