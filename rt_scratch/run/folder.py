"""A run folder: config.json, log.csv, last.npz, best.npz, loss.png, and the codec of its tokens."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rt_scratch import checkpoint
from rt_scratch.config import ModelConfig, TrainConfig, from_json, to_json
from rt_scratch.data import Dataset
from rt_scratch.dispatch import array_module, to_host
from rt_scratch.errors import UserError
from rt_scratch.model import init_centroids, init_parameters
from rt_scratch.optim import FIRST_SCALE, OPTIMIZERS, LossScale
from rt_scratch.routing import Centroids

COLUMNS = ("step", "split", "nats", "score", "unit", "tokens_per_s", "seconds", "lr", "grad_norm",
           "uncovered", "several", "smallest", "largest", "dead")


class State(NamedTuple):
    """All that training changes; saving and loading it is an exact resume."""

    flat: Any                         # parameters
    table: list                       # their names and shapes
    centroids: dict[int, Centroids]
    optimizer: dict[str, Any]
    step: int                         # optimizer steps done
    best: float                       # best validation loss so far, nats per token
    seconds: float                    # training time so far
    scale: LossScale


def new_state(model: ModelConfig, train: TrainConfig, xp) -> State:
    """Fresh parameters, centroids and optimizer state."""
    flat, table = init_parameters(model, xp, train.dtype, train.seed)
    centroids = init_centroids(model, xp, train.dtype, train.seed)
    optimizer = OPTIMIZERS[train.optimizer][0](flat, table)
    scale = FIRST_SCALE if train.precision == "fp16" else LossScale(1.0, 0)
    return State(flat, table, centroids, optimizer, 0, float("inf"), 0.0, scale)


def save(path: Path, state: State, config: dict) -> None:
    """Write the state as a checkpoint; UserError, and nothing written, if it is not finite."""
    if not array_module(state.flat).isfinite(state.flat).all():
        raise UserError(f"the parameters are not finite after step {state.step}; "
                        f"{kept(path.parent)}; lower --lr, or set --clip 1")
    arrays = {"params": state.flat}
    for i, centroids in state.centroids.items():
        for name, array in centroids._asdict().items():
            arrays[f"centroids.{i}.{name}"] = array
    arrays |= {f"opt.{name}": array for name, array in state.optimizer.items()}
    checkpoint.save(path, arrays, {"config": config, "step": state.step, "best": state.best,
                                   "seconds": state.seconds, "scale": state.scale})


def kept(folder: Path) -> str:
    """What is left of a run that stops here."""
    for path in (folder / "last.npz", folder / "best.npz"):
        if path.is_file():
            return f"the checkpoint before, {path}, is kept"
    return "there is no checkpoint yet"


def load(path: Path) -> tuple[dict, dict]:
    """(arrays, meta) of a checkpoint of a run."""
    arrays, meta = checkpoint.load(path)
    if not {"config", "step", "best", "seconds", "scale"} <= set(meta):
        raise UserError(f"{path} is not the checkpoint of a training run")
    return arrays, meta


def restore(path: Path, saved: tuple[dict, dict], fresh: State, config: dict, xp) -> State:
    """The state `saved` at `path`; `fresh` says which arrays and shapes it must have."""
    arrays, meta = saved
    checkpoint.check_matches(meta["config"]["model"], config["model"], str(path))

    def take(name, like):
        array = arrays.get(name)
        if array is None or array.shape != like.shape or array.dtype != like.dtype:
            raise UserError(f"{path}: {name} is missing or has another shape or precision; the "
                            "checkpoint belongs to another configuration")
        return xp.asarray(array)

    centroids = {i: Centroids(*(take(f"centroids.{i}.{name}", like)
                                for name, like in c._asdict().items()))
                 for i, c in fresh.centroids.items()}
    optimizer = {name: take(f"opt.{name}", like) for name, like in fresh.optimizer.items()}
    return State(take("params", fresh.flat), fresh.table, centroids, optimizer, meta["step"],
                 meta["best"], meta["seconds"], LossScale(*meta["scale"]))


def load_model(run: Path, xp, name: str | None = None):
    """(State, config, ModelConfig) of a run folder, for sampling and evaluation.

    Takes best.npz if there is one, else last.npz, unless `name` says which.
    """
    path = run / name if name else best_checkpoint(run)
    saved = load(path)
    config = saved[1]["config"]
    model = from_json(ModelConfig, config["model"])
    train = from_json(TrainConfig, config["train"])
    return restore(path, saved, new_state(model, train, xp), config, xp), config, model


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint to sample from and to score: best.npz, or last.npz before there is one."""
    best = folder / "best.npz"
    return best if best.is_file() else folder / "last.npz"


def describe(name: str, place: str | None, dataset: Dataset, model: ModelConfig,
             train: TrainConfig) -> dict:
    """What config.json and every checkpoint say; name and place: how train.py finds the data."""
    return {"dataset": name, "data_dir": place, "data": dataset.protocol, "model": to_json(model),
            "train": to_json(train), "codec": dataset.codec_file and dataset.codec_file.name}


def open_folder(folder: Path, config: dict, codec_file: Path | None) -> None:
    """Make the run folder with config.json and, where tokens are not bytes, their codec."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if codec_file is not None:
        shutil.copyfile(codec_file, folder / codec_file.name)


def append_log(folder: Path, row: dict) -> None:
    """One line of log.csv; the header on the first."""
    path = folder / "log.csv"
    _write_rows(path, [row], "a", header=not path.exists())


def read_log(folder: Path) -> list[dict]:
    """The whole lines of log.csv; none where there is no log."""
    path = folder / "log.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if len(line) < 1000 and "\0" not in line]
    return [row for row in csv.DictReader(lines) if _whole(row)]


def trim_log(folder: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again, and any that was cut off."""
    rows = [row for row in read_log(folder) if int(row["step"]) <= step]
    _write_rows(folder / "log.csv.tmp", rows, "w", header=True)
    os.replace(folder / "log.csv.tmp", folder / "log.csv")


def _write_rows(path, rows, mode, header):
    with path.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if header:
            writer.writeheader()
        writer.writerows(rows)


def _whole(row):
    try:
        return (set(row) == set(COLUMNS) and None not in row.values()
                and int(row["step"]) >= 0 and float(row["score"]) >= 0)
    except (TypeError, ValueError):
        return False


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


def health(memberships) -> dict[str, float]:
    """Cluster health over all routing heads: shares of tokens, and centroids that won none."""
    if not memberships:
        return {}
    counts = np.concatenate([to_host(m.counts) for m in memberships.values()])  # (heads, K)
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return {
        "uncovered": float(np.mean([float(m.uncovered) for m in memberships.values()])),
        "several": float(np.mean([float(m.several) for m in memberships.values()])),
        "smallest": float(share.min()), "largest": float(share.max()),
        "dead": int((counts == 0).sum()),
    }
