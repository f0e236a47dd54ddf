"""Checkpoints: the state of a run in one .npz, written whole or not at all, verified when read.

A file holds plain arrays and one JSON text; nothing in it is code, and nothing is unpickled. What
it says of itself is checked before any array is read: types and ranges of its settings, then the
shape and type of every array against them, so a file from a stranger costs no more memory than the
model it claims to be.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig, from_json
from rt_scratch.dispatch import array_module, to_host
from rt_scratch.errors import UserError
from rt_scratch.kmeans import Centroids
from rt_scratch.optim import OPTIMIZERS, LossScale
from rt_scratch.parameters import parameter_table
from rt_scratch.run.costs import check_memory
from rt_scratch.run.folder import RunFolder, whole
from rt_scratch.step import State, Step

VERSION = 1
_META = "__meta__"
META_BYTES = 1 << 20  # settings take a few thousand


def save(path, arrays: dict, meta: dict) -> None:
    """Write arrays and JSON-able meta to `path` (.npz).

    Whatever happens, `path` is either the old file or the new one (folder.whole). UserError when
    the disk is full or not writable.
    """
    path = Path(path)
    host = {name: np.asarray(to_host(a), order="C") for name, a in arrays.items()}
    header = {"rt_scratch": VERSION, "sha256": _digest(host, meta), "meta": meta}
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    try:
        with whole(path) as file:
            np.savez(file, **{_META: text}, **host)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; the checkpoint from "
                        "before, if any, is intact") from error


def load(path, expected=None) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, meta) of a file written by `save`; UserError if it is missing or damaged.

    `expected(meta)` gives {name: (shape, dtype)} of the arrays that may be in it, before any is
    read; UserError on others.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train first, or name a run folder")
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            header = _header(path, file, members.pop(_META, None))
            if expected is not None:
                _check_shapes(path, file, members, expected(header.get("meta")))
            arrays = {name: _read(file, member) for name, member in members.items()}
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged zip or array header raises nearly anything
        raise UserError(f"{path} is damaged ({type(error).__name__}); {_instead(path)}") from error
    if header.get("sha256") != _digest(arrays, header.get("meta")):
        raise UserError(f"{path} is damaged (checksum); {_instead(path)}")
    return arrays, header["meta"]


def _instead(path):
    other = "last" if path.name == "best.npz" else "best"
    return f"copy {other}.npz or a backup over it, or train again"


def _header(path, file, member):
    """The JSON text of a checkpoint."""
    header = None
    if member is not None and member.file_size <= META_BYTES:
        header = json.loads(_read(file, member).tobytes())
    if not isinstance(header, dict) or "rt_scratch" not in header:
        raise UserError(f"{path} is not a checkpoint of rt_scratch")
    if header["rt_scratch"] != VERSION:
        raise UserError(f"{path} has format {header['rt_scratch']!r:.20}, this version reads "
                        f"{VERSION}; update rt_scratch")
    return header


def _check_shapes(path, file, members, expected):
    for name, member in members.items():
        with file.open(member) as stream:
            shape, _, dtype = _array_header(stream)
            size = stream.tell() + math.prod(shape) * dtype.itemsize
        if expected.get(name) != (shape, dtype) or member.file_size != size:
            raise UserError(f"{path}: {name!r:.50} is not an array of the model and optimizer that "
                            "the file describes, or has another shape or precision")


def _array_header(stream):
    """(shape, Fortran order, dtype) at the start of a .npy file."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):  # later ones are for types that no checkpoint has
        raise ValueError("format of the array")
    return np.lib.format.read_array_header_1_0(stream)


def _read(file, member):
    with file.open(member) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):
            raise ValueError("bytes after the array")
        return array


# --------------------------------------------------------------------------------- state of a run

class Progress(NamedTuple):
    """How far a run is, beside its State."""

    best: float = math.inf     # best validation loss so far, nats per token
    seconds: float = 0.0       # training time so far
    scored: int = 0            # step of the last evaluation
    valid: float = math.inf    # its loss, nats per token
    drawn: int = 0             # windows or images trained on


class Saved(NamedTuple):
    """A checkpoint as it was read, its settings validated."""

    path: Path
    arrays: dict
    config: dict
    model: ModelConfig
    train: TrainConfig
    step: int
    progress: Progress
    scale: LossScale


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


def save_into(run: RunFolder, name: str, state: State, progress: Progress, seconds: float) -> None:
    """`save_state` as the file `name` of an open run folder, made again where it was deleted."""
    if not run.writes:
        return
    if not run.path.is_dir():
        run.open()
    save_state(run.path / name, state, progress._replace(seconds=seconds), run.config)


def check_finite(result: Step, state: State, folder: Path) -> None:
    """UserError unless the loss and the gradient of the last step are numbers.

    A gradient outside the range of fp16 is no error as long as the loss scale has room to fall.
    """
    overflow = not result.applied and state.scale.can_fall
    for what, value in (("loss", result.nats), ("gradient", 0 if overflow else result.norm)):
        if not math.isfinite(float(value)):
            raise UserError(f"the {what} is not finite at step {state.step}; "
                            f"{kept(folder)}; lower --lr, or set --clip 1")


def read_state(path: Path) -> Saved:
    """The checkpoint of a run, its settings and arrays checked; UserError where they are wrong."""
    saved = None

    def expected(meta):
        nonlocal saved
        saved = _settings(path, meta)
        check_memory(saved.model, saved.train, who=f"{path}: ")
        needed, optional = _shapes(saved)
        return needed | optional

    arrays, _ = load(path, expected)
    missing = sorted(_shapes(saved)[0].keys() - arrays.keys())
    if missing:
        raise UserError(f"{path} lacks {missing[0]}: it is not the checkpoint of a training run")
    return saved._replace(arrays=arrays)


def _settings(path, meta) -> Saved:
    """The JSON of a checkpoint, with its types and ranges checked; older ones lack some of it."""
    try:
        config, step, (value, steady) = meta["config"], meta["step"], meta["scale"]
        model = from_json(ModelConfig, config["model"])
        train = from_json(TrainConfig, config["train"])
        progress = Progress(
            meta["best"], meta["seconds"], meta.get("scored", step),
            meta.get("valid", meta["best"]),
            meta.get("drawn", step * train.batch * train.accumulate))
        whole_numbers = step, steady, progress.scored, progress.drawn
        numbers = value, progress.best, progress.seconds, progress.valid
        names = config["dataset"] if isinstance(config["dataset"], list) else [config["dataset"]]
        texts = names + [text for text in (config["data"], *(
            config.get(key) for key in ("data_dir", "codec", "codec_file", "codec_sha256")))
            if text is not None]
        right = (all(type(n) is int and 0 <= n < 2 ** 62 for n in whole_numbers)
                 and all(type(x) in (int, float) and not math.isnan(x) for x in numbers)
                 and 0 < value < math.inf and names and abs(progress.seconds) < math.inf
                 and all(type(text) is str and "\0" not in text for text in texts))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, KeyError, ValueError, AttributeError):
        right = False
    if not right:
        raise UserError(f"{path} is not the checkpoint of a training run")
    progress = progress._replace(seconds=max(0, progress.seconds))
    return Saved(path, {}, config, model, train, step, progress, LossScale(value, steady))


def _shapes(saved):
    """{name: (shape, dtype)} of the arrays that a state has, and of those of its optimizer."""
    model, dtype = saved.model, np.dtype(saved.train.dtype)
    table = parameter_table(model)
    needed = {"params": (table[-1].stop,)}
    for i in range(model.n_layers):
        if heads := model.routing_heads(i):
            counts = heads, model.n_clusters
            needed |= {f"centroids.{i}.{name}": (*counts, model.head_width)
                       for name in Centroids._fields} | {f"centroids.{i}.count": counts}
    flat = np.zeros(table[-1].stop, dtype)  # takes no memory before it is written to
    state = OPTIMIZERS[saved.train.optimizer].init(flat, table)
    optional = {f"opt.{name}": array.shape for name, array in state.items()}
    return tuple({name: (shape, dtype) for name, shape in shapes.items()}
                 for shapes in (needed, optional))


def restore(saved: Saved, xp, for_training: bool = False) -> tuple[State, Progress]:
    """(State, Progress) of a checkpoint, with the optimizer's state only if `for_training`.

    UserError if it has none then, or if parameters are not finite.
    """
    arrays, (needed, optional) = saved.arrays, _shapes(saved)
    if not all(np.isfinite(arrays[name]).all() for name in needed):
        raise UserError(f"{saved.path}: its parameters are not finite, the run diverged; "
                        f"{_instead(saved.path)} with a lower --lr")
    if for_training and not optional.keys() <= arrays.keys():
        raise UserError(f"{saved.path} has no state of the optimizer: it can be scored and sampled "
                        "from, but not trained on")
    centroids = {
        i: Centroids(*(xp.asarray(arrays[f"centroids.{i}.{name}"]) for name in Centroids._fields))
        for i in range(saved.model.n_layers) if saved.model.routing_heads(i)}
    optimizer = {name.removeprefix("opt."): xp.asarray(arrays[name])
                 for name in optional if for_training}
    state = State(xp.asarray(arrays["params"]), parameter_table(saved.model), centroids, optimizer,
                  saved.step, saved.scale)
    return state, saved.progress


def load_model(folder: Path, xp, name: str | None = None) -> Loaded:
    """The checkpoint of a run folder to sample from or to score: `name`, else the best."""
    saved = read_state(folder / name if name else best_checkpoint(folder))
    return Loaded(*restore(saved, xp), saved.config, saved.model, saved.train)


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
