"""Own text: the bytes of a file, cut into the first 90 %, the next 5 % and the last 5 %; or of
several files and folders of files, of which whole files are held out."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from pathlib import Path

import numpy as np

from rt_scratch.data.cache import ArrayFile, cached
from rt_scratch.data.dataset import Dataset, byte_dataset
from rt_scratch.data.files import chunks, digest_of
from rt_scratch.errors import UserError

MIN_BYTES = 100        # below this the 5 % splits hold next to nothing
IN_MEMORY = 10 ** 9    # bytes of text that are read at once; of more, parts are read when needed
NOT_PLAIN = [          # first bytes of files that are not text yet, what they are, what to do
    (rb"\x1f\x8b\x08", "packed with gzip", "gunzip -k {}"),
    (rb"PK\x03\x04", "a zip archive, or a document that is one", "unzip {}"),
    (rb"BZh[1-9](1AY&SY|\x17rE8)", "packed with bzip2", "bunzip2 -k {}"),
    (rb"\xfd7zXZ\0", "packed with xz", "unxz -k {}"),
    (rb"\x28\xb5\x2f\xfd", "packed with zstd", "unzstd {}"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", "iconv -f UTF-32 -t UTF-8 {} > text.txt"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8 {} > text.txt"),
]


def load(*given: str | Path) -> Dataset:
    """Bytes of a file, or of folders and several files; UserError if one cannot be read or is no
    text, or if all of it is too short."""
    path, *more = map(Path, given)
    try:
        for one in (path, *more):
            if not one.is_dir() and not one.is_file():
                raise UserError(f"{one}: a pipe or a device, which can be read only once; write "
                                "the text to a file, and give that")
        if more or path.is_dir():
            return _load_several([path, *more])
        n = path.stat().st_size
        _check_plain(path)
        data = (_Watched(path, np.uint8, "r") if n > IN_MEMORY
                else np.frombuffer(path.read_bytes(), np.uint8))
        digest = digest_of(path) if n > IN_MEMORY else hashlib.sha256(data).hexdigest()
    except OSError as e:
        raise UserError(f"{e.filename or path}: cannot be read ({e.strerror or e})") from e
    n = len(data)
    if n < MIN_BYTES:
        raise UserError(f"{path}: {n} bytes; at least {MIN_BYTES} are needed for three splits")
    cut, last = n * 9 // 10, n - n // 20
    splits = {"train": data[:cut], "valid": data[cut:last], "test": data[last:]}
    protocol = (f"bits per byte on a text file: first {cut:,} bytes train, next {last - cut:,} "
                f"valid, last {n - last:,} test; sha256 {digest[:12]}")
    return byte_dataset(path.name, splits, protocol)


def whole_files(name: str, root: Path, parts: dict[str, list[str]], what: str) -> Dataset:
    """A dataset of the files `parts` (paths below root, by split), each split's files joined with
    a newline between two. `what` they are, for the protocol."""
    sources = [root / path for paths in parts.values() for path in paths]
    try:
        if sum(path.stat().st_size for path in sources) <= IN_MEMORY:
            texts = {split: b"\n".join([(root / path).read_bytes() for path in paths])
                     for split, paths in parts.items()}
            splits = {split: np.frombuffer(text, np.uint8) for split, text in texts.items()}
            digest = hashlib.sha256(b"".join(texts.values())).hexdigest()
        else:
            data = cached(root, name, "text", {"parts": parts}, sources,
                          lambda new: _join(root, parts, new))
            splits, digest = data.arrays, data.sha256
    except OSError as e:
        raise UserError(f"{e.filename or root}: cannot be read ({e.strerror or e})") from e
    counts = ", ".join(f"{split} {len(text):,} bytes in {len(parts[split]):,} files"
                       for split, text in splits.items())
    return byte_dataset(name, splits, f"bits per byte on whole held-out files of {what}; {counts}; "
                                      f"sha256 {digest[:12]}")


def common_folder(given: list[str | Path]) -> Path:
    """The folder itself, or the nearest that holds all the files and folders."""
    paths = [Path(os.path.abspath(path)) for path in given]
    try:
        return Path(os.path.commonpath([p if p.is_dir() else p.parent for p in paths]))
    except ValueError:  # Windows
        raise UserError("the files are on several drives; copy them to one") from None


def _load_several(given):
    """5 % of the files, at least one, to valid and to test each, by a hash of the path alone, which
    is taken from the nearest folder that holds them all."""
    folder = common_folder(given)
    paths = []
    for one in given:
        if not one.is_dir():
            paths.append(one)
            continue
        for parent, below, files in os.walk(one, onerror=_raise):
            if {"last.npz", "best.npz"} & set(files):  # a run, perhaps on this very text
                below.clear()
                continue
            below[:] = [d for d in below if not d.startswith(".") and d != "rt_cache"]
            paths += [path for path in (Path(parent) / f for f in files if not f.startswith("."))
                      if path.is_file()]
    paths = sorted(Path(os.path.abspath(path)) for path in paths if path.stat().st_size)
    found = {path.resolve(): path for path in paths}  # none twice: both trained on and held out
    for path in found.values():
        _check_plain(path)
    if len(found) < 3:
        raise UserError(f"{' '.join(map(str, given))}: {len(found)} files of text; whole files are "
                        "held out, which takes 3 or more: give more, or all of it in one file")
    names = sorted((p.relative_to(folder).as_posix() for p in found.values()),
                   key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    k = max(1, len(names) // 20)
    parts = {"train": sorted(names[2 * k :]), "valid": sorted(names[:k]),
             "test": sorted(names[k : 2 * k])}
    return whole_files(folder.resolve().name or "text", folder, parts,
                       "a folder" if len(given) == 1 else "several texts")


def _raise(error):
    raise error


def _join(root, parts, new):
    for split, paths in parts.items():
        with ArrayFile(new / f"{split}.npy", np.uint8) as out:
            for i, path in enumerate(paths):
                out.append(np.frombuffer(b"\n" if i else b"", np.uint8))
                with open(root / path, "rb") as f:
                    for chunk in chunks(f):
                        out.append(np.frombuffer(chunk, np.uint8))
    return {}


def _check_plain(path):
    with open(path, "rb") as f:
        head = f.read(16)
    for pattern, what, command in NOT_PLAIN:
        if re.match(pattern, head, re.DOTALL):
            raise UserError(f"{path}: {what}, not plain text; first: "
                            f"{command.format(shlex.quote(str(path)))}")


class _Watched(np.memmap):
    """A mapped file that must not change. One that shrinks would end the process with a bus error
    on the next look at what is gone, so each look at a part first asks for size and time."""

    def __new__(cls, path, *args):
        self = super().__new__(cls, path, *args)
        self.status = cls._ask(path)
        return self

    def __array_finalize__(self, obj):
        super().__array_finalize__(obj)
        self.status = getattr(obj, "status", None)

    def __getitem__(self, index):
        if self.filename is not None and self._ask(self.filename) != self.status:
            raise UserError(f"{self.filename}: changed while it was read; start again")
        return super().__getitem__(index)

    @staticmethod
    def _ask(path):
        try:
            status = os.stat(path)
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns
