"""Encoded data on disk: memory-mapped .npy files beside a JSON that says what they were made from.

    rt_cache/NAME/cache.json    recipe; folder, size, time, sha256 of each source; shapes of the
                                arrays, checksum of the codec
                  train.npy ... tokens, one array per split, of the smallest integer type
                  vocab.txt or tokenizer.json, where the tokens need one

A cache is made in a folder beside it and renamed when it is complete, so that it is whole or not
there, and a failure leaves the earlier one as it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rt_scratch.data.files import digest_of
from rt_scratch.errors import UserError

FORMAT = 2            # raise it when the encoding of any dataset changes
ABANDONED = 3600      # seconds without a write after which an unfinished cache is removed
NO_SPACE = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
ANY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
HEADER_BYTES = 128    # of a .npy file; the format asks for a multiple of 64


class Cache(NamedTuple):
    """An encoded dataset: its folder, its memory-mapped arrays, and what `build` said of it."""

    folder: Path
    arrays: dict[str, np.ndarray]
    info: dict


def cached(folder: Path, dataset: str, name: str, recipe: dict, sources: Iterable[Path],
           build: Callable[[Path], dict]) -> Cache:
    """The cache `name` of the data in `folder`, made by `build(new_folder) -> info` if need be.

    It is used again while `recipe` (all settings that decide the result) and the sources are the
    same: same folder, sizes and times, or else same sha256. `build` writes ArrayFiles and perhaps
    other files, and returns JSON values. UserError on a full disk and other trouble with files.
    """
    sources = sorted(sources)
    roots = [folder / "rt_cache", Path("data") / dataset / "rt_cache"]
    try:
        for root in roots:
            if (root / name).is_dir() and (found := _lookup(root / name, folder, recipe, sources)):
                return found
        root = next((r for r in roots if _writable(r)), None)
        if root is None:
            raise UserError(f"neither {roots[0]} nor {roots[1]} can be written, to keep the "
                            "encoded data")
        _make(root, name, folder, recipe, sources, build)
        return _open(root / name, _read_json(root / name))
    except OSError as e:
        if e.errno in NO_SPACE:
            raise UserError(f"no space left in {root} for the encoded {dataset}; nothing was "
                            "changed there: make room, or put the data on another disk") from e
        raise UserError(f"{e.filename or root}: {e.strerror or e}") from e


class ArrayFile:
    """A .npy file written piece by piece:  (n, *row_shape), n known only at the end."""

    def __init__(self, path: Path, dtype, row_shape: tuple[int, ...] = ()):
        self.dtype, self.row_shape, self.n = np.dtype(dtype), row_shape, 0
        self._file = open(path, "wb")
        self._file.write(bytes(HEADER_BYTES))

    def append(self, rows) -> None:
        """Add rows (k, *row_shape); they must fit the type exactly."""
        rows = np.asarray(rows)
        exact = rows.astype(self.dtype)
        if rows.shape[1:] != self.row_shape or not (exact == rows).all():
            raise ValueError(f"{rows.dtype}{rows.shape} rows do not fit {self.dtype}")
        self._file.write(np.ascontiguousarray(exact).data)
        self.n += len(rows)

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, kind, *_) -> None:
        with self._file:
            if kind is None:  # now that n is known, the header
                head = repr({"descr": self.dtype.str, "fortran_order": False,
                             "shape": (self.n, *self.row_shape)}).encode()
                text = head.ljust(HEADER_BYTES - 11) + b"\n"  # 11: magic, version, length, newline
                self._file.seek(0)
                self._file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
                self._file.flush()
                os.fsync(self._file.fileno())


def smallest_type(n_values: int) -> np.dtype:
    """The smallest unsigned integer type that holds 0 .. n_values - 1."""
    return np.min_scalar_type(n_values - 1)


def _lookup(path, folder, recipe, sources):
    """The cache in `path` if it is whole and made from these sources, else None."""
    try:
        about = _read_json(path)
    except (OSError, ValueError):
        return None
    if not isinstance(about, dict) or about.get("format") != FORMAT \
            or about.get("recipe") != recipe:
        return None
    old = about["sources"]
    now = [_quick(p, folder) for p in sources]
    if [(s["name"], s["size"]) for s in old] != [(s["name"], s["size"]) for s in now]:
        return None
    where = str(folder.resolve())
    if about["folder"] != where or [s["mtime_ns"] for s in old] != [s["mtime_ns"] for s in now]:
        for s, path_of_s in zip(now, sources, strict=True):
            s["sha256"] = _digest(path_of_s)
        if [s["sha256"] for s in old] != [s["sha256"] for s in now]:
            return None
        if _writable(path):
            _write_json(path, about | {"sources": now, "folder": where})
    for name, digest in about["files"].items():
        if not (path / name).is_file() or digest_of(path / name) != digest:
            return None
    return _open(path, about)


def _open(path, about):
    """Memory-mapped arrays, or None when one is not what the JSON says."""
    arrays = {}
    for name, (dtype, shape) in about["arrays"].items():
        try:
            array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
        if array.dtype.str != dtype or list(array.shape) != shape:
            return None
        arrays[name] = array
    return Cache(path, arrays, about["info"])


def _make(root, name, folder, recipe, sources, build):
    _remove_abandoned(root, name)
    print(f"{name}: encoding into {root / name}, once", file=sys.stderr)
    new = root / f"{name}.tmp-{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        entries = [_quick(p, folder) for p in sources]
        info = build(new)
        for entry, path in zip(entries, sources, strict=True):
            digest = _digest(path)
            if _quick(path, folder) != entry:
                raise UserError(f"{path}: changed while it was read; start again")
            entry["sha256"] = digest
        arrays, files = {}, {}
        for path in sorted(new.iterdir(), key=_in_order):
            if path.suffix == ".npy":
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                arrays[path.stem] = (array.dtype.str, list(array.shape))
                del array  # an open map would keep Windows from renaming the folder
            else:
                files[path.name] = digest_of(path)
        _write_json(new, {"format": FORMAT, "recipe": recipe, "info": info, "arrays": arrays,
                          "files": files, "folder": str(folder.resolve()), "sources": entries})
        _swap(new, root / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove_abandoned(root, name):
    """Remove what killed processes left behind; a live one writes all the time."""
    for old in root.glob(f"{name}.tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # another process may just finish it
            if time.time() - max(p.stat().st_mtime for p in [old, *old.iterdir()]) > ABANDONED:
                shutil.rmtree(old, ignore_errors=True)


def _in_order(path):
    """train, valid, test, then the rest by name."""
    return {"train": 0, "valid": 1, "test": 2}.get(path.stem, 3), path.name


def _swap(new, path):
    """Put the new cache in place of the old one, unless another process was quicker."""
    old = path.with_name(f"{new.name}.old")
    with contextlib.suppress(FileNotFoundError):
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    shutil.rmtree(old, ignore_errors=True)


def _quick(path, folder):
    """What tells that a source is unchanged without reading it. A folder counts by its names."""
    status = path.stat()
    size = sum(1 for _ in os.scandir(path)) if path.is_dir() else status.st_size
    name = path.relative_to(folder).as_posix()
    return {"name": name, "size": size, "mtime_ns": status.st_mtime_ns}


def _digest(path):
    if path.is_dir():
        return hashlib.sha256("\n".join(sorted(os.listdir(path))).encode()).hexdigest()
    return digest_of(path)


def _writable(path):
    """Can files be made in `path`, itself made where missing? A folder marked read-only is left
    alone even where its mark does not bind, as for root: somebody meant it."""
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(above, os.W_OK) or not above.stat().st_mode & ANY_WRITE:
        return False
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        if e.errno in NO_SPACE:
            raise
        return False
    return True


def _read_json(path):
    return json.loads((path / "cache.json").read_text(encoding="utf-8"))


def _write_json(path, about):
    part = path / "cache.json.part"
    with open(part, "w", encoding="utf-8") as f:
        json.dump(about, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path / "cache.json")
