"""A run folder: config.json, log.csv, last.npz, best.npz, loss.png, and the file of its codec."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rt_scratch.config import ModelConfig, TrainConfig, to_json
from rt_scratch.data import Dataset
from rt_scratch.errors import UserError


def default_folder(dataset: str) -> Path:
    """Where a run on this dataset or text file goes unless told."""
    return Path("runs") / Path(dataset).stem


def newest_run(root: Path) -> Path:
    """The run folder below `root` whose checkpoint is newest."""
    runs = sorted(root.glob("*/last.npz"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f"no run with a checkpoint in {root}; python train.py makes one")
    return runs[-1].parent


def describe(name: str, location: str | None, dataset: Dataset, model: ModelConfig,
             train: TrainConfig) -> dict:
    """What config.json and every checkpoint say; name and location: how the data are found."""
    return {"dataset": name, "data_dir": location, "data": dataset.protocol,
            "model": to_json(model), "train": to_json(train), **dataset.codec.to_config()}


def open_folder(folder: Path, config: dict, codec_file: Path | None) -> None:
    """Make the run folder with config.json and, where tokens are not bytes, their codec."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if codec_file is not None and codec_file.resolve() != (folder / codec_file.name).resolve():
        shutil.copyfile(codec_file, folder / codec_file.name)
