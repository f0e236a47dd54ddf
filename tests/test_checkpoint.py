"""Checkpoints: whole or absent, verified, never unpickled."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rt_scratch.config import ModelConfig
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint, folder

ARRAYS = {"w": np.arange(6.0).reshape(2, 3), "n": np.array(3, np.int64),
          "f": np.zeros(0, np.float32)}
META = {"step": 7, "config": {"a": [1, 2]}}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "last.npz", ARRAYS, META)
    return tmp_path / "last.npz"


def test_round_trip(path):
    arrays, meta = checkpoint.load(path)
    assert meta == META and set(arrays) == set(ARRAYS)
    for name, a in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], a)
        assert arrays[name].dtype == a.dtype and arrays[name].shape == a.shape
    assert os.listdir(path.parent) == ["last.npz"]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "array", "meta"])
def test_damage_is_seen(path, damage):
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = b""
    elif damage == "text":
        data = b"hello"
    else:  # a well-formed file with other contents
        with np.load(path) as file:
            arrays = dict(file)
        if damage == "array":
            arrays["w"] = arrays["w"] + 1
        else:
            header = json.loads(arrays["__meta__"].tobytes())
            header["meta"]["step"] = 8
            arrays["__meta__"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        np.savez(path, **arrays)
        data = path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


def test_every_flipped_byte_is_harmless_or_seen(path):
    """No flipped byte gives wrong numbers: the file is refused or reads as it was."""
    data = path.read_bytes()
    for i in range(0, len(data), 17):
        wrong = bytearray(data)
        wrong[i] ^= 0x10
        path.write_bytes(wrong)
        try:
            arrays, meta = checkpoint.load(path)
        except UserError:
            continue
        assert meta == META
        for name, a in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], a)


def test_pickles_are_refused(tmp_path):
    """An object array would run code when read; it is never read."""
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.savez(tmp_path / "x.npz", a=np.array([Trap()], object))
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "x.npz")
    assert not (tmp_path / "sprung").exists()


def test_foreign_and_missing_files(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none.npz")
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as file:
        file.writestr("notes.txt", "hello")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "y.npz")


def test_a_failed_save_keeps_the_old_file(path, monkeypatch):
    """Disk full while writing, or before the rename: the old checkpoint stays, no litter."""
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for target in ("numpy.savez", "os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(UserError, match="No space left"):
                checkpoint.save(path, {"w": np.ones(3)}, {})
        assert checkpoint.load(path)[1] == META
        assert os.listdir(path.parent) == ["last.npz"]


def test_newest_run(tmp_path):
    with pytest.raises(UserError, match="no run"):
        folder.newest_run(tmp_path)
    for name, age in (("a", 1), ("b", 3), ("c", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.npz").touch()
        os.utime(tmp_path / name / "last.npz", (age, age))
    assert folder.newest_run(tmp_path).name == "b"


def test_other_configurations_are_named():
    cfg = ModelConfig(width=8)
    with pytest.raises(UserError, match="x.npz has another configuration: width 8 there, 16 here"):
        checkpoint.check_matches(cfg, ModelConfig(width=16), "x.npz")
    checkpoint.check_matches(cfg, ModelConfig(width=8), "x.npz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files there")
def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    """A pipe or a device among the outputs stays what it is."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no ordinary file"), folder.whole(tmp_path / "pipe"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("text, name", [("a.txt", "a"), ("..txt", "text"), (".txt", "txt")])
def test_default_folder_is_below_runs(text, name):
    assert folder.default_folder(text) == Path("runs") / name
