"""Encoded data on disk: memory-mapped .npy files beside a JSON that says what they were made from.

    rt_cache/NAME/cache.json    recipe; folder, size, times, sha256 of each source; type, shape and
                                sha256 of each array, of the codec, and of this file itself
                  train.npy ... tokens, one array per split, of the smallest integer type
                  vocab.txt or tokenizer.json, where the tokens need one

A cache is made in a folder beside it and renamed when it is complete, so that it is whole or not
there, and a failure leaves the earlier one as it was. It is verified whenever it is opened, all of
it, at the speed of sha256; one that is damaged is made again.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rt_scratch.data.files import CHUNK, checking, digest_of
from rt_scratch.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 3            # raise it when the encoding of any dataset changes
ABANDONED = 3600      # seconds without a write after which unfinished work is removed that has no
                      # lock to tell whether anyone is still at it
NO_SPACE = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
ANY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
HEADER_BYTES = 128    # of a .npy file; the format asks for a multiple of 64


class Cache(NamedTuple):
    """An encoded dataset: its folder, its memory-mapped arrays, and what `build` said of it."""

    folder: Path
    arrays: dict[str, np.ndarray]
    info: dict
    sha256: str              # of all arrays
    sources: dict[str, str]  # sha256 of each


def cached(folder: Path, dataset: str, name: str, recipe: dict, sources: Iterable[Path],
           build: Callable[[Path], dict]) -> Cache:
    """The cache `name` of the data in `folder`, made by `build(new_folder) -> info` if need be.

    It is used again while `recipe` (all settings that decide the result) and the sources are the
    same: same folder, sizes and times, or else same sha256. `build` writes ArrayFiles and perhaps
    other files, and returns JSON values. UserError on a full disk and other trouble with files.
    """
    sources, why = sorted(sources), ""
    roots = [folder / "rt_cache", Path("data") / dataset / "rt_cache"]
    root = roots[0]
    try:
        for root in roots:
            _remove_left_over(root)
            if os.path.lexists(root / name):
                try:
                    return _lookup(root / name, folder, recipe, sources)
                except Exception as e:  # a damaged file raises nearly anything
                    why = f", for what is there {e if isinstance(e, _Unusable) else 'is damaged'}"
        root = next((r for r in roots if _writable(r)), None)
        if root is None:
            raise UserError(f"neither {roots[0]} nor {roots[1]} can be written, to keep the "
                            "encoded data")
        print(f"{name}: encoding into {root / name}, once{why}", file=sys.stderr)
        return _make(root, name, folder, recipe, sources, build)
    except _Unusable as e:
        raise UserError(f"{root / name}: {e}; another process is at it too; start again") from e
    except OSError as e:
        if e.errno in NO_SPACE:
            raise UserError(f"no space left in {root} for the encoded {dataset}; nothing was "
                            "changed there: make room, or put the data on another disk") from e
        raise UserError(f"{e.filename or root}: {e.strerror or e}") from e


class _Unusable(Exception):
    """Why a cache does not serve, to follow 'what is there'."""


class ArrayFile:
    """A .npy file written piece by piece:  (n, *row_shape), n known only at the end."""

    def __init__(self, path: Path, dtype, row_shape: tuple[int, ...] = ()):
        self.dtype, self.row_shape, self.n = np.dtype(dtype), row_shape, 0
        self._file = open(path, "xb")
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
    """The cache in `path`, verified; an exception if it is not whole or not of these sources."""
    about = _read_json(path)
    if about["format"] != FORMAT or about["recipe"] != recipe:
        raise _Unusable("was made with other settings")
    old = about["sources"]
    now = [_quick(p, folder) for p in sources]
    if [(s["name"], s["size"]) for s in old] != [(s["name"], s["size"]) for s in now]:
        raise _Unusable("was made from other files")
    where = str(folder.resolve())
    if (about["folder"], [s["times"] for s in old]) != (where, [s["times"] for s in now]):
        for s, path_of_s in zip(now, sources, strict=True):
            s["sha256"] = _digest(path_of_s)
        if [s["sha256"] for s in old] != [s["sha256"] for s in now]:
            raise _Unusable("was made from other files")
        about |= {"sources": now, "folder": where}
        if _writable(path):
            part = path / _temporary("cache.json")
            with contextlib.suppress(OSError):  # it only makes the next look quicker
                _write_json(part, about)
                part.replace(path / "cache.json")
    for name, digest in about["files"].items():
        if not (path / name).is_file() or digest_of(path / name) != digest:
            raise _Unusable(f"is damaged ({name})")
    return _open(path, about, verify=True)


def _open(path, about, verify):
    """Memory-mapped arrays. Those are verified that will be used: the file could be replaced."""
    arrays = {}
    for name, (dtype, shape, digest) in about["arrays"].items():
        file = path / f"{name}.npy"
        if not file.is_file():  # a pipe would keep us waiting
            raise _Unusable(f"is damaged ({file.name})")
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if (array.dtype.str, list(array.shape)) != (dtype, shape) \
                or verify and _digest_of_array(array, file.name) != digest:
            raise _Unusable(f"is damaged ({file.name})")
        arrays[name] = array
    return Cache(path, arrays, about["info"], _digest_of_json(about["arrays"]),
                 {s["name"]: s["sha256"] for s in about["sources"]})


def _make(root, name, folder, recipe, sources, build):
    new, lock = _new_folder(root, name)
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
                arrays[path.stem] = [array.dtype.str, list(array.shape),
                                     _digest_of_array(array, path.name)]
                del array  # an open map would keep Windows from renaming the folder
            else:
                files[path.name] = digest_of(path)
        _write_json(new / "cache.json", {
            "format": FORMAT, "recipe": recipe, "info": info, "arrays": arrays, "files": files,
            "folder": str(folder.resolve()), "sources": entries})
        _swap(new, root, name, lambda: _lookup(root / name, folder, recipe, sources))
        return _open(root / name, _read_json(root / name), verify=False)
    finally:
        _remove(new)
        _unlock(lock)


def _temporary(name):
    """A name that no other writer has, on this or any other machine."""
    host = re.sub(r"\W", "_", platform.node())[:64]
    return f"{name}.tmp-{host}-{os.getpid()}-{secrets.token_hex(4)}"


def _new_folder(root, name):
    """(a new folder for unfinished work, the lock that shows that somebody is at it or None)."""
    while True:
        new = root / _temporary(name)
        new.mkdir()  # fails on anything that is there, a link too
        lock = _lock(new, wait=True)
        if new.is_dir():  # else another process, quicker than the lock, took it for left over
            return new, lock
        _unlock(lock)


def _remove_left_over(root):
    """Remove what killed processes left behind.

    The lock on unfinished work goes with the process that holds it. Where there are no locks
    (Windows, some network disks), unfinished work is live while something is written there.
    """
    at = glob.escape(str(root))  # glob, not Path.glob: it passes over what vanishes meanwhile
    for found in [*glob.glob(f"{at}/*.tmp-*"), *glob.glob(f"{at}/*/cache.json.tmp-*")]:
        old = Path(found)
        with contextlib.suppress(OSError):  # another process may just remove or finish it
            lock = _lock(old, wait=False)
            if lock is not None or _silent_for(old) > ABANDONED:
                _remove(old)
            _unlock(lock)


def _silent_for(path):
    """Seconds since something was last written below a path."""
    files = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    return time.time() - max(p.lstat().st_mtime for p in [path, *files])


def _lock(path, wait):
    """An exclusive lock on a file or folder, None where there are no locks; BlockingIOError if
    another process has it and we do not wait."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError as e:
        _unlock(handle)
        if isinstance(e, BlockingIOError):
            raise
        return None


def _unlock(lock):
    if lock is not None:
        os.close(lock)


def _remove(path):
    """Remove a file, a link or a folder; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _in_order(path):
    """train, valid, test, then the rest by name."""
    return {"train": 0, "valid": 1, "test": 2}.get(path.stem, 3), path.name


def _swap(new, root, name, lookup):
    """Put the new cache in place of the old one, unless another process was quicker.

    One process at a time, where there are locks: what `lookup` finds to be good is never moved.
    """
    path, old, lock = root / name, root / f"{new.name}.old", _lock(root, wait=True)
    try:
        if path.is_dir():
            with contextlib.suppress(Exception):  # a damaged file raises nearly anything
                lookup()
                return
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        _unlock(lock)
        _remove(old)


def _quick(path, folder):
    """What tells that a source is unchanged without reading it. A folder counts by its names."""
    status = path.stat()
    size = sum(1 for _ in os.scandir(path)) if path.is_dir() else status.st_size
    name = path.relative_to(folder).as_posix()
    return {"name": name, "size": size, "times": [status.st_mtime_ns, status.st_ctime_ns]}


def _digest(path):
    if path.is_dir():
        return hashlib.sha256(os.fsencode("\n".join(sorted(os.listdir(path))))).hexdigest()
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
    """What `_write_json` wrote; an exception if it is anything else."""
    file = path / "cache.json"
    if not file.is_file():
        raise _Unusable("is not whole")
    about = json.loads(file.read_text(encoding="utf-8"))
    if about.pop("sha256") != _digest_of_json(about):
        raise _Unusable("is damaged (cache.json)")
    return about


def _write_json(file, about):
    with open(file, "x", encoding="utf-8") as f:
        json.dump({**about, "sha256": _digest_of_json(about)}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _digest_of_json(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of_array(array, name):
    values = array.reshape(-1).view(np.uint8)
    digest = hashlib.sha256()
    with checking(name) as bar:
        for at in range(0, len(values), CHUNK):
            digest.update(values[at : at + CHUNK])
            bar.update(CHUNK)
    return digest.hexdigest()
