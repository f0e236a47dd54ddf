"""Finding and reading the official files: in a folder, in a zip or in a tar.

Archives are read member by member, never unpacked: a member is looked up by its own name, so what
paths an archive claims cannot matter, and no half-unpacked folder can be left behind.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rt_scratch.errors import UserError

CHUNK = 1 << 20  # bytes read at a time: keeps a disk busy and takes little memory

# The last two from zip: unknown compression, undecodable names.
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error,
          EOFError, NotImplementedError, UnicodeDecodeError)


class Location(NamedTuple):
    """Where an official file is: a file on disk, or a member of an archive."""

    path: Path
    member: str | None = None


def find(folder: Path, names: list[str], subfolders=(), archives=(),
         itself=True) -> dict[str, Location]:
    """Those of the official files `names` that are there.

    Looks in `folder` (if `itself`), its `subfolders`, then in those of its files that are named in
    `archives`; the first location that has a file counts. UserError when there is no `folder`.
    """
    if not folder.is_dir():
        raise no_folder(folder)
    found = {}
    for parent in ([folder] if itself else []) + [folder / s for s in subfolders]:
        for name in names:
            if (parent / name).is_file():
                found.setdefault(name, Location(parent / name))
    for archive in (folder / a for a in archives):
        if len(found) < len(names) and archive.is_file():
            members = {PurePosixPath(m).name: m for m in member_names(archive)}
            for name in members.keys() & set(names):
                found.setdefault(name, Location(archive, members[name]))
    return found


def no_folder(folder: Path) -> UserError:
    """The error for a --data-dir that does not exist."""
    return UserError(f"{folder}: no such folder; --data-dir names the folder with the data, "
                     "--download fetches it")


def missing(folder: Path, dataset: str, wanted: str) -> UserError:
    """The error for data that is not there."""
    return UserError(f"{folder}: no {wanted} here; `python -m rt_scratch.data {dataset} "
                     "--download` fetches it, --data-dir says where it is")


def member_names(archive: Path) -> list[str]:
    """Paths of the ordinary files in a zip or tar."""
    with _reading(archive):
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as z:
                return [i.filename for i in z.infolist() if not i.is_dir()]
        with tarfile.open(archive) as t:
            names = [m.name for m in t if m.isreg()]
            while t.fileobj.read(CHUNK):  # to the end, where gzip's checksum is
                pass
            return names


@contextmanager
def opened(location: Location):
    """A binary stream of an official file; UserError where the archive turns out damaged."""
    with _reading(location.path):
        if location.member is None:
            with open(location.path, "rb") as f:
                yield f
        elif location.path.suffix == ".zip":
            with zipfile.ZipFile(location.path) as z:
                if z.getinfo(location.member).flag_bits & 1:
                    raise UserError(f"{location.path}: encrypted; unpack it first")
                with z.open(location.member) as f:
                    yield f
        else:
            with tarfile.open(location.path) as t, t.extractfile(location.member) as f:
                yield f


@contextmanager
def _reading(path):
    try:
        yield
    except DAMAGE as e:
        raise UserError(f"{path}: damaged or cut short ({e}); remove it and fetch it again") from e


def chunks(stream):
    """Pieces of a binary stream."""
    while chunk := stream.read(CHUNK):
        yield chunk


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal checksum of a file of any size."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as f:
        for chunk in chunks(f):
            digest.update(chunk)
    return digest.hexdigest()
