"""Pictures of a run: the loss curve, and images that a model drew."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np

from rt_scratch.data.images import colours
from rt_scratch.errors import UserError
from rt_scratch.run.folder import whole
from rt_scratch.run.log import read_log

SMOOTHED = 21  # log lines around each that the training curve is the mean of


def plot_loss(folder: Path) -> None:
    """loss.png from log.csv, where matplotlib is installed."""
    os.environ["MPLBACKEND"] = "agg"  # that of another environment would not import
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not (rows := read_log(folder)):
        return
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    points = {split: np.array([(int(r["step"]), float(r["score"])) for r in rows
                               if r["split"] == split]).reshape(-1, 2).T
              for split in ("train", "valid")}
    steps, scores = points["train"]
    smooth = [scores[max(0, i - SMOOTHED // 2) : i + SMOOTHED // 2 + 1].mean()
              for i in range(len(scores))]
    axes.plot(steps, scores, color="C0", lw=0.8, alpha=0.25)
    axes.plot(steps, smooth, color="C0", lw=1.5, label=f"train, mean of {SMOOTHED} log lines")
    axes.plot(*points["valid"], "o-", color="C1", lw=1.5, ms=4, label="valid")
    unit = rows[0]["unit"]
    axes.set(xlabel="optimizer step", ylabel=unit, yscale="log" if "ppl" in unit else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole(folder / "loss.png") as file:
        figure.savefig(file, format="png", dpi=150)


def pillow():
    """Pillow's Image module; UserError when it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images need Pillow: pip install -e '.[data]'") from None
    return Image


def read_picture(path: Path, size: int):
    """A picture as (size, size, 3) uint8, with the colours that a viewer shows; UserError where
    Pillow cannot read it."""
    Image = pillow()
    if not path.is_file():  # a pipe would keep us waiting
        raise UserError(f"{path}: no such file, or none that can be read twice")
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("ignore")  # of what is damaged Pillow says much
            return np.asarray(Image.fromarray(colours(picture)).resize((size, size)))
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: not an image that Pillow reads ({error})") from None


@contextlib.contextmanager
def picture(path: Path):
    """Yield write(images (n, P, P, 3)), which puts them into one picture at `path`, about square.

    UserError where there can be no such picture, found before anything is drawn for it.
    """
    Image = pillow()
    kind = Image.registered_extensions().get(path.suffix.lower())

    def write(pixels):
        n, size = pixels.shape[:2]
        columns = int(np.ceil(np.sqrt(n)))
        grid = np.zeros((-(-n // columns) * size, columns * size, 3), np.uint8)
        for i, one in enumerate(pixels):
            y, x = i // columns * size, i % columns * size
            grid[y : y + size, x : x + size] = one
        Image.fromarray(grid).save(file, kind)

    try:
        if kind not in Image.SAVE:
            raise ValueError(f"{path.suffix or 'no suffix'} is no kind of picture")
        with whole(path) as file:
            yield write
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; give a "
                        ".png in a folder that exists") from error
