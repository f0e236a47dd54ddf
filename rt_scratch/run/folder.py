"""A run folder: config.json, log.csv, clusters.csv, samples, checkpoints, and the codec's file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import secrets
from pathlib import Path

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig, to_json
from rt_scratch.console import harmless, warn
from rt_scratch.data import Codec, Dataset, saved_codec
from rt_scratch.data.files import digest_of
from rt_scratch.data.text import common_folder
from rt_scratch.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

TEMPORARY = re.compile(r".+\.\d+-[0-9a-f]{16}\.tmp|(last|best)\.npz\.tmp|log\.csv\.tmp")
LOCKED_BYTE = 1 << 20  # Windows locks bytes, and a locked one cannot be read


def default_folder(dataset: str | tuple[str, ...]) -> Path:
    """Where a run on this dataset, text file or files goes by default."""
    path = Path(dataset).resolve() if isinstance(dataset, str) else common_folder(dataset)
    return Path("runs") / (path.stem.strip(".") or "text")


def newest_run(root: Path) -> Path:
    """The run folder below `root` whose checkpoint is newest."""
    runs = sorted(root.glob("*/last.npz"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f"no run with a checkpoint in {root}; python train.py makes one")
    return runs[-1].parent


def describe(name: str | list[str], location: str | None, dataset: Dataset, model: ModelConfig,
             train: TrainConfig) -> dict:
    """What config.json and every checkpoint say; name and location: how the data are found."""
    codec = dataset.codec
    return {"dataset": name, "data_dir": location, "data": dataset.protocol,
            "model": to_json(model), "train": to_json(train), **codec.to_config(),
            "codec_sha256": codec.file and digest_of(codec.file)}


def run_codec(config: dict, folder: Path, vocab_size: int) -> Codec:
    """The codec in a run folder; UserError unless it is the one that the checkpoint was made with.
    """
    file = config.get("codec_file", config.get("codec"))  # older runs: see data.saved_codec
    if file:
        path = folder / file
        if Path(file).name != file or path.is_symlink():
            raise UserError(f"{path}: the codec of a run is a file in its folder")
        if path.is_file() and config.get("codec_sha256") not in (None, digest_of(path)):
            raise UserError(f"{path}: not the file that the checkpoint was made with (checksum); "
                            "copy it from the run's backup, or from the encoded data")
    codec = saved_codec(config, folder)
    if codec.name == "bytes":
        fits = vocab_size <= 256
    else:
        try:
            codec.decode(np.arange(vocab_size))
            fits = True
        except (IndexError, KeyError, UserError):
            fits = False
    if not fits:
        raise UserError(f"{folder}: the codec {codec.name} has fewer than the {vocab_size} token "
                        "values of the checkpoint; it belongs to another run")
    return codec


class RunFolder:
    """A run folder that this process alone writes to, until it is closed or the process ends.

    When it is opened, config.json and the codec are written, and what killed runs left behind is
    removed. UserError where another process trains into it.
    """

    def __init__(self, path: Path, config: dict, codec_file: Path | None, writes: bool = True):
        self.path, self.config, self.writes = path, config, writes
        self._codec = codec_file and (codec_file.name, codec_file.read_bytes())
        self._lock = None
        self.open()

    def open(self) -> None:
        """Make the folder, or make it again where it was deleted."""
        if not self.writes:
            return
        self.close()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.path}: a file is in the way of the run folder; choose another "
                            "--out") from None
        self._lock = _locked(self.path)
        try:
            self._fill()
        except BaseException:  # a full disk, Ctrl-C
            self.close()
            raise

    def _fill(self):
        for name in ("last.npz", "best.npz"):
            if (self.path / name).is_dir():
                raise UserError(f"{self.path / name} is a folder, where a checkpoint is to be "
                                "written: move it away")
        for old in self.path.iterdir():
            if TEMPORARY.fullmatch(old.name):
                with contextlib.suppress(OSError):
                    old.unlink()
        with whole(self.path / "config.json") as file:
            file.write(json.dumps(self.config, indent=1).encode() + b"\n")
        if self._codec:
            name, content = self._codec
            with whole(self.path / name) as file:
                file.write(content)

    def close(self) -> None:
        """Let others train into the folder."""
        if self._lock:
            with contextlib.suppress(OSError), self._lock:
                (self.path / "lock").unlink(missing_ok=True)
            self._lock = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@contextlib.contextmanager
def whole(path: Path):
    """A binary file that becomes `path`, synced, when the block ends; no trace of it if it fails.

    Until then it has a name that no other writer has, and is opened only if nothing has that name:
    writers at the same time do not meet, and no link is followed.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # a device would become a file
        raise OSError(errno.EINVAL, "is no ordinary file", str(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # x: O_CREAT and O_EXCL, which a link fails too
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # what the user knows
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _locked(folder):
    """The open file `lock`, locked; its lock ends with this process, however that ends."""
    path = folder / "lock"
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = open(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.seek(LOCKED_BYTE)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                warn(f"note: {folder}: no locks here ({error.strerror}); two trainings into it "
                     "would not notice each other")
                return file
            file.seek(0)
            holder = file.read(200).decode(errors="replace") or "another process"
            file.close()
            raise UserError(f"{folder}: {holder} is training into it; wait for its end, or choose "
                            "another folder with --out") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break  # else its owner removed it in between
        file.close()
    with harmless(str(path)):
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
    return file


def _sync_folder(folder):
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
