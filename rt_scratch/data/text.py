"""Own text: the bytes of a file, cut into the first 90 %, the next 5 % and the last 5 %; or of a
folder of files, of which whole files are held out."""

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


def load(path: str | Path) -> Dataset:
    """Bytes of a file or folder; UserError if it cannot be read, is no text or is too short."""
    path = Path(path)
    try:
        if path.is_dir():
            return _load_folder(path)
        if not path.is_file():
            raise UserError(f"{path}: a pipe or a device, which can be read only once; write the "
                            "text to a file, and give that")
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


def _load_folder(folder):
    """5 % of the files, at least one, to valid and to test each, by a hash of the path alone."""
    paths = []
    for parent, below, files in os.walk(folder):
        below[:] = [d for d in below if not d.startswith(".") and d != "rt_cache"]
        paths += [path for path in (Path(parent) / f for f in files if not f.startswith("."))
                  if path.is_file() and path.stat().st_size]
    for path in paths:
        _check_plain(path)
    if len(paths) < 3:
        raise UserError(f"{folder}: a folder with {len(paths)} files of text; whole files are held "
                        "out, which takes 3 or more: give one file, or cut it into several")
    names = sorted((p.relative_to(folder).as_posix() for p in paths),
                   key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    k = max(1, len(names) // 20)
    parts = {"train": names[2 * k :], "valid": names[:k], "test": names[k : 2 * k]}
    return whole_files(folder.resolve().name, folder, {s: sorted(p) for s, p in parts.items()},
                       "a folder")


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
