"""Checkpoints: one .npz per state, written whole or not at all, verified when read.

A file holds plain arrays and one JSON text; nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from rt_scratch.dispatch import to_host
from rt_scratch.errors import UserError

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


def check_matches(saved: dict, wanted: dict, what: str) -> None:
    """UserError that names the fields in which two configurations differ."""
    fields = [k for k in {**saved, **wanted} if saved.get(k) != wanted.get(k)]
    if fields:
        shown = ", ".join(f"{k} {saved.get(k)} there, {wanted.get(k)} here" for k in fields[:3])
        raise UserError(f"{what} has another configuration: {shown}")


def newest_run(root) -> Path:
    """The run folder below `root` whose checkpoint is newest."""
    runs = sorted(Path(root).glob("*/last.npz"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f"no run with a checkpoint in {root}; python train.py makes one")
    return runs[-1].parent


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
