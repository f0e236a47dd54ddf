"""Finding and reading the official files: in a folder, in a zip or in a tar.

Archives are read member by member, never unpacked: a member is looked up by its own name, so what
paths an archive claims cannot matter, and no half-unpacked folder can be left behind. What is read
is the very member that was found, ordinary and listed once, and no more of it than is expected.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import lzma
import os
import shlex
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from rt_scratch.errors import UserError

CHUNK = 1 << 20      # bytes read at a time: keeps a disk busy and takes little memory
MAX_TAR = 1 << 30    # bytes that a tar.gz may unpack to; that of CIFAR-10 has 185 MB

# What a damaged archive raises inside zipfile, tarfile and below.
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error,
          struct.error, EOFError, RuntimeError, ValueError, LookupError, OverflowError)


class Location(NamedTuple):
    """Where an official file is: a file on disk, or a member of an archive."""

    path: Path
    member: zipfile.ZipInfo | tarfile.TarInfo | None = None


def find(folder: Path, names: list[str], subfolders=(), archives=(),
         itself=True) -> dict[str, Location]:
    """Those of the official files `names` that are there.

    Looks in `folder` (if `itself`), its `subfolders`, then in those of its files that are named in
    `archives`; the first location that has a file counts. UserError on a damaged archive, and on
    one that has a file twice.
    """
    found = {}
    for parent in ([folder] if itself else []) + [folder / s for s in subfolders]:
        for name in names:
            if (parent / name).is_file():
                found.setdefault(name, Location(parent / name))
    for archive in (folder / a for a in archives):
        if len(found) < len(names) and archive.is_file():
            here = {}
            for member, path in _members(archive):
                name = PurePosixPath(path).name
                if here.setdefault(name, member) is not member and name in names:
                    raise UserError(f"{archive}: holds {name} twice; unpack the right one")
            for name in names:
                if name in here:
                    found.setdefault(name, Location(archive, here[name]))
    return found


def missing(folder: Path, wanted: str, origin: str, lookalikes: dict[str, str] | None = None,
            dataset: str | None = None) -> UserError:
    """The error for data that are not there: what, where it comes from, and how to get it.

    lookalikes: what the files are, by pattern, that are often taken for the right ones. dataset:
    the name to fetch it by, where that can be done.
    """
    problem, home = f"no {wanted} here", folder
    if folder.is_file():
        problem, home = f"a file, not the folder that holds {wanted}", folder.parent
    elif not folder.is_dir():
        problem = f"no such folder, to hold {wanted}"
    problem += "".join(f"; {what}" for pattern, what in (lookalikes or {}).items()
                       if next(home.glob(pattern), None))
    if dataset:
        at = "" if home == Path("data") / dataset else f" --data-dir {shlex.quote(str(home))}"
        origin += (f"; `python -m rt_scratch.data {dataset} --download{at}` fetches it, "
                   "--data-dir DIR says where it is")
    return UserError(f"{folder}: {problem}; {origin}")


def _members(archive):
    """(member, path) of the ordinary files in a zip or tar, as they are listed."""
    with reading(archive):
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as z:
                yield from ((m, m.filename) for m in z.infolist() if not m.is_dir())
            return
        with _tar(archive) as t:
            yield from ((m, m.name) for m in ordinary(t))


def ordinary(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members that are plain files: no links, no devices, no sparse maps.

    Reads to the very end, where gzip's checksum is. What follows the members must be zeros: tarfile
    takes a damaged header for the end.
    """
    at = -1
    for member in tar:
        if member.offset <= at:  # a negative size would lead back for ever
            raise tarfile.ReadError("members overlap")
        at = member.offset
        if member.isreg() and not member.issparse():
            yield member
    for rest in chunks(tar.fileobj):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("a damaged header")


@contextmanager
def opened(location: Location, limit: int | None = None):
    """A binary stream of an official file; UserError where the archive turns out damaged, or its
    member has more than `limit` bytes."""
    path, member = location
    if member is None:
        with open(path, "rb") as f:
            yield f
        return
    with reading(path):
        size = member.file_size if isinstance(member, zipfile.ZipInfo) else member.size
        if limit is not None and size > limit:
            raise UserError(f"{path}: unpacks to {size:,} bytes, more than the {limit:,} that may "
                            "be; fetch it again")
        if isinstance(member, tarfile.TarInfo):
            with _tar(path) as t, t.extractfile(member) as f:
                yield f
        elif member.flag_bits & 1:
            raise UserError(f"{path}: encrypted; unpack it first")
        else:
            with zipfile.ZipFile(path) as z, z.open(member) as f:
                yield f


class _Bounded(gzip.GzipFile):
    """What a gzip file unpacks to, up to MAX_TAR bytes."""

    def read(self, size=-1):
        self._check(self.tell() + size if size is not None and size >= 0 else MAX_TAR + 1)
        return super().read(size)

    def seek(self, offset, whence=0):
        self._check(offset)
        return super().seek(offset, whence)

    def _check(self, end):
        if end > MAX_TAR:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_TAR:,} bytes")


@contextmanager
def _tar(path):
    with _Bounded(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        yield tar


@contextmanager
def reading(path: Path):
    """Inside `with`, what a damaged archive raises is a UserError that names it."""
    try:
        yield
    except (*DAMAGE, OSError) as e:
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):  # EINVAL: a wild seek
            raise
        raise damaged(path, e) from e


def damaged(path: Path, why: object) -> UserError:
    """The error for an archive that cannot be read to its end."""
    return UserError(f"{path}: damaged or cut short ({why}); remove it and fetch it again")


def chunks(stream):
    """Pieces of a binary stream."""
    while chunk := stream.read(CHUNK):
        yield chunk


def bucket(name: str, n: int) -> int:
    """A number from 0 to n - 1 that a name alone decides, the same everywhere and for ever."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") % n


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal checksum of a file of any size, with a bar if it takes more than a second."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as f, checking(path.name) as bar:
        for chunk in chunks(f):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def checking(name: str) -> tqdm:
    """A bar of bytes that shows up after a second."""
    return tqdm(desc=f"checking {name}", unit="B", unit_scale=True, disable=None, leave=False,
                delay=1)
