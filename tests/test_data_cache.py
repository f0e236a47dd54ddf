"""The cache: made once, whole or not at all, remade when a source or the recipe changes."""

import errno
import fcntl
import json
import os
import shutil
import time

import numpy as np
import pytest

from rt_scratch.data import cache
from rt_scratch.data.cache import ArrayFile, cached, smallest_type
from rt_scratch.errors import UserError


class Maker:
    """Builds a cache from the bytes of source files, and counts how often it is asked to."""

    def __init__(self, folder):
        self.folder, self.built = folder, 0

    def __call__(self, recipe=None, fail=None):
        sources = [p for p in self.folder.iterdir() if p.is_file()]

        def build(new):
            self.built += 1
            with ArrayFile(new / "train.npy", np.uint16) as out:
                for path in sorted(sources):
                    out.append(np.frombuffer(path.read_bytes(), np.uint8))
                    if fail:
                        raise fail
            (new / "vocab.txt").write_text("words")
            return {"built": self.built}

        return cached(self.folder, "set", "set", recipe or {"v": 1}, sources, build)


@pytest.fixture
def maker(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "data" / "a").write_bytes(b"abc")
    (tmp_path / "data" / "b").write_bytes(b"de")
    return Maker(tmp_path / "data")


def content(found):
    return bytes(found.arrays["train"].astype(np.uint8))


def test_made_once(maker):
    first, second = maker(), maker()
    assert maker.built == 1
    assert content(first) == content(second) == b"abcde"
    assert isinstance(second.arrays["train"], np.memmap)
    assert second.arrays["train"].dtype == np.uint16
    assert second.info == {"built": 1}
    assert sorted(os.listdir(maker.folder / "rt_cache")) == ["set"]
    about = json.loads((maker.folder / "rt_cache" / "set" / "cache.json").read_text())
    assert [(s["name"], s["size"], len(s["sha256"])) for s in about["sources"]] == [
        ("a", 3, 64), ("b", 2, 64)]


def test_touched_files_are_recognised_by_their_checksum(maker):
    maker()
    os.utime(maker.folder / "a", (1, 1))
    assert content(maker()) == b"abcde"
    assert maker.built == 1
    about = json.loads((maker.folder / "rt_cache" / "set" / "cache.json").read_text())
    assert about["sources"][0]["times"][0] == 10 ** 9  # so the next look is quick again


def test_another_folder_with_the_same_times_is_another_source(maker):
    """Two read-only folders share the cache in the current folder."""
    other = Maker(maker.folder.parent / "other")
    other.folder.mkdir()
    for m, text in ((maker, b"abc"), (other, b"xyz")):
        (m.folder / "a").write_bytes(text)
        (m.folder / "b").write_bytes(b"de")
        for name in "ab":
            os.utime(m.folder / name, (1, 1))
        m.folder.chmod(0o500)
    assert content(maker()) == b"abcde"
    assert content(other()) == b"xyzde"
    for m in (maker, other):
        m.folder.chmod(0o700)


def test_a_source_that_changes_while_it_is_read(maker, monkeypatch):
    real = cache.digest_of

    def meanwhile(path):
        digest = real(path)
        path.write_bytes(b"new")
        return digest

    monkeypatch.setattr(cache, "digest_of", meanwhile)
    with pytest.raises(UserError, match="changed while it was read"):
        maker()
    monkeypatch.undo()
    assert not (maker.folder / "rt_cache" / "set").exists()


def test_another_process_was_quicker(maker, monkeypatch):
    """Its cache is used, ours is dropped."""
    real = os.rename
    winner = maker.folder / "rt_cache" / "set"

    def rename(self, target):
        if target == winner and not winner.exists():
            shutil.copytree(self, winner)  # what the other process does at this moment
        return real(self, target)

    monkeypatch.setattr("pathlib.Path.rename", rename)
    assert content(maker()) == b"abcde"
    assert os.listdir(winner.parent) == ["set"]


@pytest.mark.parametrize("change", ["content", "size", "more", "fewer", "recipe", "format"])
def test_remade_when_something_changed(maker, change, monkeypatch):
    maker()
    recipe, want = {"v": 1}, b"abcde"
    if change == "content":
        (maker.folder / "a").write_bytes(b"xyz")
        os.utime(maker.folder / "a", (1, 1))
        want = b"xyzde"
    if change == "size":
        (maker.folder / "a").write_bytes(b"abcd")
        want = b"abcdde"
    if change == "more":
        (maker.folder / "c").write_bytes(b"f")
        want = b"abcdef"
    if change == "fewer":
        (maker.folder / "a").unlink()
        want = b"de"
    if change == "recipe":
        recipe = {"v": 2}
    if change == "format":
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert content(maker(recipe)) == want
    assert maker.built == 2
    assert content(maker(recipe)) == want
    assert maker.built == 2
    assert sorted(os.listdir(maker.folder / "rt_cache")) == ["set"]


@pytest.mark.parametrize("damage", ["short array", "no array", "not an array", "another array",
                                    "empty array", "zeros", "pipe", "vocabulary", "no vocabulary",
                                    "json", "other json", "no json", "empty json", "pipe for json",
                                    "other number", "no folder"])
def test_damaged_cache_is_remade(maker, damage, capsys):
    maker()
    path = maker.folder / "rt_cache" / "set"
    if damage == "short array":
        (path / "train.npy").write_bytes((path / "train.npy").read_bytes()[:-1])
    if damage == "no array":
        (path / "train.npy").unlink()
    if damage == "not an array":
        (path / "train.npy").write_bytes(b"text")
    if damage == "another array":
        np.save(path / "train.npy", np.zeros(4, np.uint16))
    if damage == "empty array":
        (path / "train.npy").write_bytes(b"")
    if damage == "zeros":  # as it may be after a crash: the right size, and nothing in it
        whole = (path / "train.npy").read_bytes()
        (path / "train.npy").write_bytes(whole[:128] + bytes(len(whole) - 128))
    if damage in ("pipe", "pipe for json"):
        file = path / ("train.npy" if damage == "pipe" else "cache.json")
        file.unlink()
        os.mkfifo(file)
    if damage == "empty json":
        (path / "cache.json").write_text("")
    if damage == "other number":  # what was said of the data counts like the data
        text = (path / "cache.json").read_text()
        assert text.count('"built": 1') == 1
        (path / "cache.json").write_text(text.replace('"built": 1', '"built": 3'))
    if damage == "no folder":
        shutil.rmtree(path)
        path.write_bytes(b"")
    if damage == "vocabulary":
        (path / "vocab.txt").write_text("wordz")
    if damage == "no vocabulary":
        (path / "vocab.txt").unlink()
    if damage == "json":
        (path / "cache.json").write_text("{")
    if damage == "other json":
        (path / "cache.json").write_text("[]")
    if damage == "no json":
        (path / "cache.json").unlink()
    capsys.readouterr()
    assert content(maker()) == b"abcde"
    assert maker.built == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "what is there is" in said
    assert os.listdir(path.parent) == ["set"]
    assert maker().info == {"built": 2}


@pytest.mark.parametrize("fail", [OSError(errno.ENOSPC, "No space left on device"),
                                  UserError("bad"), KeyboardInterrupt(), ValueError("a bug")])
def test_failure_leaves_the_old_cache_and_nothing_else(maker, fail):
    maker()
    before = {p.name: p.read_bytes() for p in (maker.folder / "rt_cache" / "set").iterdir()}
    want = UserError if isinstance(fail, OSError) else type(fail)
    with pytest.raises(want, match="no space left" if isinstance(fail, OSError) else None):
        maker({"v": 2}, fail)
    assert sorted(os.listdir(maker.folder / "rt_cache")) == ["set"]
    assert before == {p.name: p.read_bytes()
                      for p in (maker.folder / "rt_cache" / "set").iterdir()}
    assert content(maker()) == b"abcde"
    assert maker.built == 2  # the first and the failed one


def test_really_no_space(maker):
    """A limit on the size of files, set in a child, is as good as a full disk."""
    resource = pytest.importorskip("resource")
    import signal

    (maker.folder / "a").write_bytes(b"x" * 3_000_000)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
            maker()
        except UserError as e:
            code = 0 if "no space left" in str(e) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.listdir(maker.folder / "rt_cache") == []


def test_abandoned_work_is_removed_and_live_work_is_not(maker, monkeypatch):
    """By its lock; without locks, by its age."""
    root = maker.folder / "rt_cache"

    def leave():
        for name in ("set.tmp-1", "set.tmp-2", "other.tmp-3"):
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / "train.npy").write_bytes(b"x")
        (root / "set").mkdir(exist_ok=True)
        (root / "set" / "cache.json.tmp-4").write_bytes(b"x")
        (root / "set.tmp-5").write_bytes(b"not even a folder")

    leave()
    handle = os.open(root / "set.tmp-2", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    maker()
    assert sorted(os.listdir(root)) == ["set", "set.tmp-2"]
    os.close(handle)  # as when its process is killed
    assert maker.built == 1 and content(maker()) == b"abcde"
    assert os.listdir(root) == ["set"]
    assert sorted(os.listdir(root / "set")) == ["cache.json", "train.npy", "vocab.txt"]
    monkeypatch.setattr(cache, "fcntl", None)
    leave()
    long_ago = time.time() - 2 * cache.ABANDONED
    for path in (root / "set.tmp-1" / "train.npy", root / "set.tmp-1", root / "set.tmp-2"):
        os.utime(path, (long_ago, long_ago))
    maker()
    assert sorted(os.listdir(root)) == ["other.tmp-3", "set", "set.tmp-2", "set.tmp-5"]


def test_killed_encodings_leave_nothing_after_the_next(maker):
    root = maker.folder / "rt_cache"
    for _ in range(3):
        child = os.fork()
        if child == 0:
            maker(fail=EndsTheProcess())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(os.listdir(root)) == 1  # each removes what the one before it left
    assert content(maker()) == b"abcde"
    assert os.listdir(root) == ["set"]


class EndsTheProcess(Exception):
    """Does so where it would be raised: nothing is tidied up."""

    def __bool__(self):
        os._exit(9)


def test_the_same_pid_on_two_machines(maker, monkeypatch):
    """Two containers that share a folder: neither writes into the other's work, nor through a
    link in its place."""
    root = maker.folder / "rt_cache"
    root.mkdir()
    (maker.folder.parent / "mine").mkdir()
    names = iter(["taken", "linked", "free", "free too"])
    monkeypatch.setattr(cache.secrets, "token_hex", lambda n: next(names))
    monkeypatch.setattr(cache.os, "getpid", lambda: 1)
    monkeypatch.setattr(cache.platform, "node", lambda: "box")
    (root / "set.tmp-box-1-taken").mkdir()
    handle = os.open(root / "set.tmp-box-1-taken", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # the other's, live
    (root / "set.tmp-box-1-linked").symlink_to(maker.folder.parent / "mine")
    for _ in range(2):
        with pytest.raises(UserError, match="tmp-box-1-(taken|linked): File exists"):
            maker()
    assert content(maker()) == b"abcde"
    os.close(handle)
    assert os.listdir(maker.folder.parent / "mine") == []


@pytest.mark.parametrize("stale", [False, True])
def test_many_at_once(maker, stale):
    """All get the whole data, whoever is first."""
    if stale:
        maker({"v": 0})
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = int(content(maker()) != b"abcde")
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0] * 8
    assert os.listdir(maker.folder / "rt_cache") == ["set"]


def test_folder_marked_read_only_is_left_alone(maker, tmp_path):
    """Also by root, whom the mark does not stop."""
    maker.folder.chmod(0o555)
    try:
        found = maker()
        assert maker().folder == found.folder
    finally:
        maker.folder.chmod(0o755)
    assert sorted(os.listdir(maker.folder)) == ["a", "b"]
    assert found.folder.resolve() == tmp_path / "cwd" / "data" / "set" / "rt_cache" / "set"
    assert maker.built == 1


def test_nowhere_to_write(maker, tmp_path):
    maker.folder.chmod(0o555)
    (tmp_path / "cwd").chmod(0o555)
    try:
        with pytest.raises(UserError, match="neither .* nor .* can be written"):
            maker()
    finally:
        maker.folder.chmod(0o755)
        (tmp_path / "cwd").chmod(0o755)


def test_array_file(tmp_path):
    rows = np.arange(24, dtype=np.int64).reshape(4, 2, 3)
    with ArrayFile(tmp_path / "x.npy", np.uint8, (2, 3)) as out:
        out.append(rows[:1])
        out.append(rows[1:1])
        out.append(rows[1:])
    read = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert read.dtype == np.uint8
    assert (read == rows).all() and read.shape == rows.shape
    assert np.load(tmp_path / "x.npy", mmap_mode="r").shape == rows.shape
    with ArrayFile(tmp_path / "y.npy", np.uint32) as out:
        for wrong in ([-1], [2 ** 32], [0.5], [[1, 2]]):
            with pytest.raises(ValueError, match="do not fit"):
                out.append(wrong)
        out.append(np.array([2 ** 32 - 1]))
    assert np.load(tmp_path / "y.npy").tolist() == [2 ** 32 - 1]


@pytest.mark.parametrize("n, dtype", [(2, "u1"), (256, "u1"), (257, "u2"), (65_536, "u2"),
                                      (65_537, "u4"), (267_735, "u4")])
def test_smallest_type(n, dtype):
    assert smallest_type(n) == np.dtype(dtype)
