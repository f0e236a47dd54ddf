"""Checkpoints: the state of a run in one .npz, written whole or not at all, verified when read.

A file holds plain arrays and one JSON text; nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig, from_json
from rt_scratch.dispatch import array_module, to_host
from rt_scratch.errors import UserError
from rt_scratch.kmeans import Centroids
from rt_scratch.optim import LossScale
from rt_scratch.step import State, new_state

VERSION = 1
OTHER_COPY = "copy best.npz or a backup over it, or train again"
_META = "__meta__"


def save(path, arrays: dict, meta: dict) -> None:
    """Write arrays and JSON-able meta to `path` (.npz).

    Goes to `path`.tmp, which is synced and then renamed: whatever happens, `path` is either the
    old file or the new one. UserError when the disk is full or not writable.
    """
    path = Path(path)
    host = {name: np.asarray(to_host(a), order="C") for name, a in arrays.items()}
    header = {"rt_scratch": VERSION, "sha256": _digest(host, meta), "meta": meta}
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **{_META: text}, **host)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; the checkpoint from "
                        "before, if any, is intact") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load(path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, meta) of a file written by `save`; UserError if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train first, or name a run folder")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop(_META).tobytes()) if _META in arrays else {}
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged zip or array header raises nearly anything
        raise UserError(f"{path} is damaged ({type(error).__name__}); {OTHER_COPY}") from error
    if not isinstance(header, dict) or "rt_scratch" not in header:
        raise UserError(f"{path} is not a checkpoint of rt_scratch")
    if header["rt_scratch"] != VERSION:
        raise UserError(f"{path} has format {header['rt_scratch']}, this version reads {VERSION}; "
                        "update rt_scratch")
    if header.get("sha256") != _digest(arrays, header.get("meta")):
        raise UserError(f"{path} is damaged (checksum); {OTHER_COPY}")
    return arrays, header["meta"]


# --------------------------------------------------------------------------------- state of a run

class Progress(NamedTuple):
    """How far a run is, beside its State."""

    best: float = float("inf")   # best validation loss so far, nats per token
    seconds: float = 0.0         # training time so far


class Loaded(NamedTuple):
    """A checkpoint of a run, ready for use."""

    state: State
    progress: Progress
    config: dict
    model: ModelConfig
    train: TrainConfig


def save_state(path: Path, state: State, progress: Progress, config: dict) -> None:
    """Write the state as a checkpoint; UserError, and nothing written, if it is not finite."""
    if not array_module(state.flat).isfinite(state.flat).all():
        raise UserError(f"the parameters are not finite after step {state.step}; "
                        f"{kept(path.parent)}; lower --lr, or set --clip 1")
    arrays = {"params": state.flat}
    for i, centroids in state.centroids.items():
        for name, array in centroids._asdict().items():
            arrays[f"centroids.{i}.{name}"] = array
    arrays |= {f"opt.{name}": array for name, array in state.optimizer.items()}
    save(path, arrays, {"config": config, "step": state.step, **progress._asdict(),
                        "scale": state.scale})


def read_state(path: Path) -> tuple[dict, dict]:
    """(arrays, meta) of a checkpoint of a run."""
    arrays, meta = load(path)
    if not {"config", "step", "best", "seconds", "scale"} <= set(meta):
        raise UserError(f"{path} is not the checkpoint of a training run")
    return arrays, meta


def restore(path: Path, saved: tuple[dict, dict], fresh: State, model: ModelConfig, xp):
    """(State, Progress) `saved` at `path`; `fresh` says which arrays and shapes it must have.

    UserError when the saved configuration of the model is not `model`.
    """
    arrays, meta = saved
    check_matches(from_json(ModelConfig, meta["config"]["model"]), model, str(path))

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
    state = State(take("params", fresh.flat), fresh.table, centroids, optimizer, meta["step"],
                  LossScale(*meta["scale"]))
    return state, Progress(meta["best"], meta["seconds"])


def load_model(folder: Path, xp, name: str | None = None) -> Loaded:
    """The checkpoint of a run folder to sample from or to score: `name`, else the best."""
    path = folder / name if name else best_checkpoint(folder)
    saved = read_state(path)
    config = saved[1]["config"]
    model = from_json(ModelConfig, config["model"])
    train = from_json(TrainConfig, config["train"])
    blank = new_state(model, train, xp, drawn=False)
    return Loaded(*restore(path, saved, blank, model, xp), config, model, train)


def best_checkpoint(folder: Path) -> Path:
    """best.npz, or last.npz before there is one."""
    best = folder / "best.npz"
    return best if best.is_file() else folder / "last.npz"


def kept(folder: Path) -> str:
    """What is left of a run that stops here."""
    for path in (folder / "last.npz", folder / "best.npz"):
        if path.is_file():
            return f"the checkpoint before, {path}, is kept"
    return "there is no checkpoint yet"


def check_matches(saved: ModelConfig, wanted: ModelConfig, what: str) -> None:
    """UserError that names the fields in which two configurations differ."""
    pairs = {f.name: (getattr(saved, f.name), getattr(wanted, f.name)) for f in fields(saved)}
    apart = [f"{name} {a} there, {b} here" for name, (a, b) in pairs.items() if a != b]
    if apart:
        raise UserError(f"{what} has another configuration: {', '.join(apart[:3])}")


def _digest(arrays, meta) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(f"{name} {a.dtype.str} {a.shape}".encode())
        digest.update(np.ascontiguousarray(a).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
