"""Pictures of a run: the loss curve, and images that a model drew."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rt_scratch.errors import UserError
from rt_scratch.run.log import read_log


def plot_loss(folder: Path) -> bool:
    """loss.png from log.csv; False when matplotlib is not installed."""
    try:
        import matplotlib
        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    rows = read_log(folder)
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for split, style in (("train", "-"), ("valid", "o-")):
        points = [(int(r["step"]), float(r["score"])) for r in rows if r["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=split, lw=1.2, ms=4,
                      alpha=0.6 if split == "train" else 1)
    unit = rows[0]["unit"] if rows else ""
    axes.set(xlabel="optimizer step", ylabel=unit, yscale="log" if "ppl" in unit else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    plt.close(figure)
    return True


def pillow():
    """Pillow's Image module; UserError when it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images need Pillow: pip install -e '.[data]'") from None
    return Image


def save_images(pixels, path: Path) -> None:
    """Write images (n, P, P, 3) as one PNG grid, as square as can be."""
    n, size = pixels.shape[:2]
    columns = int(np.ceil(np.sqrt(n)))
    grid = np.zeros((-(-n // columns) * size, columns * size, 3), np.uint8)
    for i, picture in enumerate(pixels):
        y, x = i // columns * size, i % columns * size
        grid[y : y + size, x : x + size] = picture
    try:
        pillow().fromarray(grid).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}; give a .png in a folder that exists") \
            from error
