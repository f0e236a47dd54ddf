"""A TensorFlow checkpoint: found in a folder or a zip, checked, read one variable at a time.

A checkpoint NAME is NAME.index (names, shapes, places) and NAME.data-IIIII-of-NNNNN (the numbers).
TensorFlow's own reader reads both and verifies the checksum of each variable; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from rt_scratch.data.download import check_space
from rt_scratch.data.files import chunks, reading
from rt_scratch.errors import UserError

_SHARD = re.compile(r"\.data-(\d{5})-of-(\d{5})$")


class Variable:
    """An array on disk: its shape is known, its values (float32) are read by np.asarray."""

    dtype = np.dtype("float32")

    def __init__(self, name: str, shape: tuple[int, ...], read):
        self.name, self.shape, self._read = name, shape, read

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._read(self.name)).astype(dtype or self.dtype, copy=False)


class Checkpoint(NamedTuple):
    """An open checkpoint."""

    path: Path                      # of the three names without .index
    variables: dict[str, Variable]  # by full name
    hparams: Path | None            # hparams.json beside it
    files: list[Path]               # that it was read from: the zip, or index and data


@contextlib.contextmanager
def opened(path: Path, scratch: Path) -> Iterator[Checkpoint]:
    """The checkpoint at `path`: a folder with one, its name without .index, or a zip.

    A zip is unpacked into a temporary folder in `scratch`, only the files of the checkpoint and
    under their own names. UserError: nothing there, several, a missing or cut file.
    """
    tensorflow = _tensorflow()
    with contextlib.ExitStack() as stack:
        archive = path if path.is_file() and zipfile.is_zipfile(path) else None
        if archive:
            path = _unpack(path, stack.enter_context(_temporary(scratch)))
        elif path.is_dir():
            files = [p for p in (*path.glob("*"), *path.glob("*/*")) if p.is_file()]
            path = path / _choose([p.relative_to(path).as_posix() for p in files], path,
                                  lambda name: (path / name).read_bytes())
        elif path.suffix == ".zip" and path.exists():
            raise UserError(f"{path}: damaged or cut short (not a zip); fetch it again")
        elif path.suffix == ".index":
            path = path.with_suffix("")
        index = path.with_name(path.name + ".index")
        if not index.is_file():
            raise UserError(f"{path}: no checkpoint; give a folder with NAME.index and "
                            "NAME.data-..., the path to NAME, or the zip")
        shards = _shards(path)
        try:
            reader = tensorflow.train.load_checkpoint(str(path))
            shapes = reader.get_variable_to_shape_map()
            kinds = reader.get_variable_to_dtype_map()
        except Exception as error:  # of a damaged file it raises nearly anything
            raise UserError(f"{index}: damaged or cut short ({_first_line(error)}); fetch it "
                            "again") from error

        def read(name):
            try:
                return reader.get_tensor(name)
            except Exception as error:
                raise UserError(f"{path}: {name} cannot be read, a data file is damaged or cut "
                                f"short ({_first_line(error)}); fetch it again") from error

        variables = {name: Variable(name, tuple(shape), read) for name, shape in shapes.items()}
        needed = sum(v.size * kinds[name].size for name, v in variables.items())
        here = sum(shard.stat().st_size for shard in shards)
        if here < needed:
            raise UserError(f"{shards[0]}: cut short: the variables take {needed:,} bytes, the "
                            f"data files have {here:,}; fetch them again")
        hparams = path.with_name("hparams.json")
        yield Checkpoint(path, variables, hparams if hparams.is_file() else None,
                         [archive] if archive else [index, *shards])


def _tensorflow():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else it greets with a page of notes
    try:
        import tensorflow
    except ImportError as error:
        raise UserError("reading the authors' checkpoint needs TensorFlow, for this conversion "
                        "alone: pip install -e '.[released]'") from error
    return tensorflow


def _choose(names, where, read):
    """The one checkpoint among the files `names`, or that which the file `checkpoint` names."""
    found = sorted(name.removesuffix(".index") for name in names if name.endswith(".index"))
    if not found:
        raise UserError(f"{where}: no checkpoint in it, that is no file NAME.index")
    if len(found) > 1:
        latest = {re.split(r"[/\\]", line.split('"')[1])[-1]
                  for name in names if PurePosixPath(name).name == "checkpoint"
                  for line in read(name).decode("utf-8", "replace").splitlines()
                  if re.match(r'model_checkpoint_path: *".+"', line)}
        named = [name for name in found if PurePosixPath(name).name in latest]
        if len(named) != 1:
            raise UserError(f"{where}: several checkpoints, {', '.join(found)}; give the path of "
                            "one, without .index (a zip: unpack it first)")
        found = named
    return found[0]


def _shards(path):
    """The data files, all of them."""
    here = sorted(p for p in path.parent.glob(f"{_literal(path.name)}.data-*")
                  if _SHARD.search(p.name))
    if not here:
        raise UserError(f"{path}.data-00000-of-...: missing; a checkpoint is its .index and all "
                        "its data files")
    total = int(_SHARD.search(here[-1].name)[2])
    wanted = [path.with_name(f"{path.name}.data-{i:05}-of-{total:05}") for i in range(total)]
    if missing := [p.name for p in wanted if not p.is_file()]:
        raise UserError(f"{path.parent}: {', '.join(missing)} missing; a checkpoint is its .index "
                        "and all its data files")
    return wanted


def _literal(name):
    return re.sub(r"([*?[])", r"[\1]", name)


@contextlib.contextmanager
def _temporary(scratch):
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=scratch) as folder:
        yield Path(folder)


def _unpack(path, folder):
    """Write the files of the zip's checkpoint into `folder`; the path of the checkpoint there."""
    with reading(path), zipfile.ZipFile(path) as z:
        names = [member.filename for member in z.infolist() if not member.is_dir()]
        chosen = PurePosixPath(_choose(names, path, z.read))
        beside = [n for n in names if PurePosixPath(n).parent == chosen.parent
                  and (PurePosixPath(n).name == "hparams.json"
                       or PurePosixPath(n).name.startswith(f"{chosen.name}."))]
        check_space(folder, sum(z.getinfo(name).file_size for name in beside))
        for name in beside:
            with z.open(name) as source, open(folder / PurePosixPath(name).name, "wb") as out:
                for chunk in chunks(source):
                    out.write(chunk)
    return folder / chosen.name


def _first_line(error):
    return (getattr(error, "message", None) or str(error)).strip().partition("\n")[0][:200]
