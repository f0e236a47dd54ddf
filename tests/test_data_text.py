"""stdlib and own text files: splits, units, scores, and what the user may get wrong."""

import bz2
import codecs
import gzip
import lzma
import math
import os

import numpy as np
import pytest

from rt_scratch.data import DATASETS, load, open_codec, outline, score, text
from rt_scratch.data import stdlib as stdlib_module
from rt_scratch.data.batches import random_windows
from rt_scratch.errors import UserError


def make_library(root, n=80):
    for i in range(n):
        folder = root / f"pack{i % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"mod{i}.py").write_bytes(b"x = %d\n" % i)
    for skipped in ("site-packages", "test", "pack0/tests", "__pycache__"):
        (root / skipped).mkdir(parents=True)
        (root / skipped / "not_me.py").write_bytes(b"SKIPPED")
    (root / "pack1" / "readme.txt").write_bytes(b"SKIPPED")
    (root / "_sysconfigdata_x.py").write_bytes(b"SKIPPED")


def test_stdlib_of_this_python():
    data = load("stdlib")
    sizes = {split: len(tokens) for split, tokens in data.splits.items()}
    total = sum(sizes.values())
    assert total > 3_000_000
    assert 0.01 < sizes["valid"] / total < 0.12
    assert 0.01 < sizes["test"] / total < 0.12
    assert b"def " in data.codec.decode(data.splits["valid"])
    assert (data.unit, data.vocab_size, data.pad_id, data.kind) == ("bits/byte", 256, -1, "text")
    assert f"{total - sizes['valid'] - sizes['test']:,}" in data.protocol
    assert load("stdlib").protocol == data.protocol  # the same text every time


def test_stdlib_holds_out_whole_files(tmp_path):
    make_library(tmp_path)
    data = stdlib_module.load(root=tmp_path)
    lines = {split: data.codec.decode(tokens).replace(b"\n\n", b"\n").split(b"\n")
             for split, tokens in data.splits.items()}
    seen = sorted(line for part in lines.values() for line in part if line)
    assert seen == sorted(b"x = %d" % i for i in range(80))  # each file once, whole, in one split
    for split, part in lines.items():
        want = [p for p in stdlib_module.source_files(tmp_path)
                if stdlib_module.split_of(p) == split]
        assert [line for line in part if line] == [
            b"x = " + p.split("mod")[1].removesuffix(".py").encode() for p in want]
        joined = data.codec.decode(data.splits[split])
        assert joined.count(b"\n\n") == len(want) - 1  # a newline between two files


def test_stdlib_split_never_changes():
    """Pinned: another hash would move held-out files into training."""
    shares = [stdlib_module.split_of(f"m{i}.py") for i in range(4000)]
    assert {path: stdlib_module.split_of(path) for path in PINNED_SPLITS} == PINNED_SPLITS
    assert 150 < shares.count("valid") < 250
    assert 150 < shares.count("test") < 250


PINNED_SPLITS = {
    "argparse.py": "train",
    "_sitebuiltins.py": "valid",
    "asyncio/mixins.py": "test",
    "asyncio/tasks.py": "train",
    "asyncio/base_subprocess.py": "valid",
}


def test_python_without_sources(tmp_path):
    make_library(tmp_path, n=3)
    with pytest.raises(UserError, match="zipped or embedded"):
        stdlib_module.load(root=tmp_path)
    with pytest.raises(UserError, match="zipped or embedded"):
        stdlib_module.load(root=tmp_path / "python311.zip")


def test_text_file(tmp_path):
    content = bytes(np.random.default_rng(0).integers(0, 256, 1234, np.uint8))
    path = tmp_path / "my.txt"
    path.write_bytes(content)
    data = load(str(path))
    assert b"".join(data.splits[s].tobytes() for s in ("train", "valid", "test")) == content
    assert [len(data.splits[s]) for s in ("train", "valid", "test")] == [1110, 63, 61]
    assert data.name == "my.txt"
    assert data.codec.decode(data.codec.encode(content)) == content


@pytest.mark.parametrize("content, message", [
    (b"", "0 bytes"), (b"too short", "9 bytes"), (None, "no such file")])
def test_bad_text_file(tmp_path, content, message):
    path = tmp_path / "my.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(str(path))


def write_folder(root, n=40):
    for i in range(n):
        (root / f"part{i % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"part{i % 3}" / f"{i}.txt").write_bytes(b"%03d" % i * (5 + i))
    (root / ".git").mkdir(parents=True)
    (root / ".git" / "hidden").write_bytes(b"HIDDEN")
    (root / "empty.txt").write_bytes(b"")


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_holds_out_whole_files(tmp_path, in_memory, monkeypatch):
    if not in_memory:
        monkeypatch.setattr(text, "IN_MEMORY", 1000)
        monkeypatch.setattr("rt_scratch.data.files.CHUNK", 10)
    write_folder(tmp_path / "mine")
    for _ in range(2):
        data = load(str(tmp_path / "mine"))
        files = {split: tokens.tobytes().split(b"\n") for split, tokens in data.splits.items()}
        assert {split: len(part) for split, part in files.items()} == {
            "train": 36, "valid": 2, "test": 2}
        assert sorted(sum(files.values(), [])) == [b"%03d" % i * (5 + i) for i in range(40)]
        assert all(isinstance(t, np.memmap) != in_memory for t in data.splits.values())
        assert (data.name, data.unit) == ("mine", "bits/byte")
        assert "whole held-out files of a folder" in data.protocol
    held = files["valid"] + files["test"]
    assert load(str(tmp_path / "mine") + "/").protocol == data.protocol
    (tmp_path / "mine" / "part0" / "0.txt").write_bytes(b"other")
    assert load(str(tmp_path / "mine")).protocol != data.protocol
    again = load(str(tmp_path / "mine")).splits
    if b"000" * 5 not in held:
        assert again["valid"].tobytes().split(b"\n") + again["test"].tobytes().split(b"\n") == held


@pytest.mark.parametrize("n", [0, 1, 2])
def test_folder_of_next_to_no_files(tmp_path, n):
    write_folder(tmp_path / "mine", n)
    with pytest.raises(UserError, match=f"mine: {n} files of text"):
        load(str(tmp_path / "mine"))


def test_folder_with_runs_in_it(tmp_path):
    """Of a training on this very folder: it can be resumed."""
    write_folder(tmp_path / "mine")
    before = load(str(tmp_path / "mine")).protocol
    run = tmp_path / "mine" / "runs" / "mine"
    (run / "deeper").mkdir(parents=True)
    for name in ("last.npz", "log.csv", "deeper/notes.txt"):
        (run / name).write_bytes(b"PK\x03\x04")
    assert load(str(tmp_path / "mine")).protocol == before


def test_folder_that_cannot_be_read(tmp_path, monkeypatch):
    write_folder(tmp_path / "mine")
    scandir, closed = os.scandir, str(tmp_path / "mine" / "part0")

    def scan(path):
        if os.fspath(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(UserError, match="part0: cannot be read"):
        load(str(tmp_path / "mine"))


def test_folder_with_a_pipe_in_it(tmp_path):
    write_folder(tmp_path / "mine")
    before = load(str(tmp_path / "mine")).protocol
    os.mkfifo(tmp_path / "mine" / "pipe")
    (tmp_path / "mine" / "loop").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "gone").symlink_to(tmp_path / "nothing")
    assert load(str(tmp_path / "mine")).protocol == before


def test_several_files_hold_out_whole_files(tmp_path, monkeypatch):
    """As a folder does, whatever their order; a file that is given twice counts once."""
    write_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    folder, parts = load("mine"), [f"mine/part{i}" for i in range(3)]
    files = [str(path) for part in parts for path in (tmp_path / part).iterdir()]
    for given in (files, files[::-1], parts, ["mine/part1", *files]):
        data = load(given)
        for split, tokens in folder.splits.items():
            np.testing.assert_array_equal(data.splits[split], tokens)
        assert data.protocol == folder.protocol.replace("of a folder", "of several texts")
        assert data.name == "mine" and data.protocol == load(tuple(given)).protocol
    assert load(files[1:]).protocol != data.protocol
    (tmp_path / "link").symlink_to("mine")
    assert load(["mine", "link/part0/0.txt"]).protocol.count(" 36 files") == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".hidden").write_bytes(b"named, so it counts" * 9)
    data = load(["mine", "other/.hidden"])
    assert sum("named" in str(t.tobytes()) for t in data.splits.values()) == 1
    assert data.name == tmp_path.name


@pytest.mark.parametrize("given, message", [
    (["a.txt", "b.txt"], "a.txt b.txt: 2 files of text; .* 3 or more"),
    (["a.txt", "a.txt", "b.txt", "./a.txt", "empty"], "2 files of text"),
    (["a.txt", "enwik8"], "enwik8: a dataset, which is trained on alone"),
    (["a.txt", "b.txt", "no.txt"], "^no.txt: no such file"),
    (["a.txt", "b.txt", "pipe"], "^pipe: a pipe or a device"),
    (["a.txt", "b.txt", "c.gz"], "c.gz: packed with gzip"),
    (["a.txt", "[bc].txt"], r"\[bc\].txt: no such file; to train on several files, name them"),
])
def test_several_that_cannot_be(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.txt", b"a" * 300), ("b.txt", b"b" * 300), ("empty", b""),
                          ("c.gz", gzip.compress(b"c" * 300))):
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=message) as e:
        load(given)
    assert "\n" not in str(e.value)


PACKED = {
    "gunzip -k": gzip.compress, "bunzip2 -k": bz2.compress, "unxz -k": lzma.compress,
    "unzstd": lambda t: b"\x28\xb5\x2f\xfd" + t, "unzip": lambda t: b"PK\x03\x04" + t,
    "iconv -f UTF-16": lambda t: t.decode().encode("utf-16"),
    "iconv -f UTF-16 -t": lambda t: codecs.BOM_UTF16_BE + t.decode().encode("utf-16-be"),
    "iconv -f UTF-32": lambda t: t.decode().encode("utf-32")}


@pytest.mark.parametrize("command", PACKED)
@pytest.mark.parametrize("in_folder", [False, True])
def test_what_is_no_text_yet(tmp_path, command, in_folder):
    """Each by its first bytes, whatever it is called; alone or in a folder."""
    write_folder(tmp_path / "my books")
    path = tmp_path / "my books" / "it's.txt"
    path.write_bytes(PACKED[command](b"what is in it " * 50))
    with pytest.raises(UserError, match=f"it's.txt: .*{command}.* '.*it'") as e:
        load(str(path.parent if in_folder else path))
    assert "\n" not in str(e.value)


def test_text_that_only_looks_packed(tmp_path):
    for content in (b"BZh what a name " * 10, b"PK is short for " * 10, b"\xfe" * 500,
                    b"\xef\xbb\xbfa mark of UTF-8 " * 10):
        (tmp_path / "a.txt").write_bytes(content)
        assert load(str(tmp_path / "a.txt")).splits["train"].tobytes() == content[
            : len(content) * 9 // 10]


@pytest.mark.parametrize("make, message", [
    (lambda path: os.mkfifo(path), "a pipe or a device"),
    (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device"),
    (lambda path: path.symlink_to("/dev/null"), "a pipe or a device"),
    (lambda path: path.symlink_to(path), "no such file")])
def test_no_ordinary_file(tmp_path, make, message):
    make(tmp_path / "a.txt")
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "a.txt"))


def test_pattern(tmp_path):
    with pytest.raises(UserError, match="give the folder that holds them"):
        load(str(tmp_path / "*.txt"))
    (tmp_path / "*.txt").write_bytes(b"x" * 200)  # an odd name, but a name
    assert load(str(tmp_path / "*.txt")).name == "*.txt"


@pytest.mark.parametrize("change", [lambda p: os.truncate(p, 4096), lambda p: os.utime(p, (1, 1)),
                                    lambda p: p.unlink(), lambda p: p.write_bytes(b"?" * 500_000)])
def test_text_that_changes_while_it_is_used(tmp_path, change, monkeypatch):
    """A short one was read at once; of a long one, a change is seen before the next look."""
    path = tmp_path / "a.txt"
    for in_memory in (10 ** 9, 1000):
        monkeypatch.setattr(text, "IN_MEMORY", in_memory)
        content = bytes(np.random.default_rng(0).integers(0, 256, 500_000, np.uint8))
        path.write_bytes(content)
        os.utime(path, (5, 5))
        data = load(str(path))
        batch = random_windows(data.splits["train"], 100, 4, 0, 0)
        assert all(bytes(row.astype(np.uint8)) in content for row in batch)
        change(path)
        if in_memory > 1000:
            assert b"".join(t.tobytes() for t in data.splits.values()) == content
        else:
            assert isinstance(data.splits["train"], np.memmap)
            with pytest.raises(UserError, match="a.txt: changed while it was read"):
                random_windows(data.splits["train"], 100, 4, 0, 1)


def test_unreadable_text_file(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "my.txt").write_bytes(b"x" * 1000)
    monkeypatch.setattr("pathlib.Path.read_bytes", forbidden)  # chmod would not stop root
    with pytest.raises(UserError, match=r"my.txt: cannot be read \(Permission denied\)"):
        load(str(tmp_path / "my.txt"))


def test_unknown_name_lists_the_datasets():
    with pytest.raises(UserError, match="enwik9.*stdlib"):
        load("enwik9")


def test_data_dir_with_a_text_file_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="--data-dir"):
        load(str(tmp_path / "a.txt"), data_dir=tmp_path)


def test_vocabulary_must_fit(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    assert load(str(tmp_path / "a.txt"), vocab_size=256).vocab_size == 256
    with pytest.raises(UserError, match="256 token values, not 300"):
        load(str(tmp_path / "a.txt"), vocab_size=300)


def test_table_names_real_modules():
    import importlib

    for name, row in DATASETS.items():
        assert callable(importlib.import_module(f"rt_scratch.data.{name}").load)
        assert row.about


@pytest.mark.parametrize("name, vocab_size, kind, shape", [
    ("stdlib", 256, "text", None), ("enwik8", 256, "text", None),
    ("wikitext103", 267_735, "text", None), ("pg19", 98_304, "text", None),
    ("cifar10", 256, "image", (32, 32, 3)), ("imagenet64", 256, "image", (64, 64, 3))])
def test_outlines(name, vocab_size, kind, shape):
    data = outline(name)
    assert (data.vocab_size, data.kind, data.image_shape) == (vocab_size, kind, shape)
    assert outline(name, 5000).vocab_size == 5000
    assert data.splits == {}


def test_scores(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    data = load(str(tmp_path / "a.txt"))
    assert score(50 * math.log(2) * 3, 50, data, "valid") == pytest.approx(3)
    assert score(900 * math.log(7), 900, data._replace(unit="ppl/token"), "train") == (
        pytest.approx(7))
    assert score(900 * math.log(2), 900, data._replace(unit="bits/dim"), "train") == (
        pytest.approx(1))
    words = data._replace(unit="ppl/word", units={"train": 300})
    assert score(300 * math.log(5), 900, words, "train") == pytest.approx(5)
    assert score(100 * math.log(5), 300, words, "train") == pytest.approx(5)  # a third of it
    assert score(60 * math.log(5), 300, words, "train", n_words=60) == pytest.approx(5)
    assert math.isnan(score(math.nan, 900, words, "train"))
    assert score(1e9, 900, words, "train") == math.inf


def test_codec_of_bytes():
    name, file, encode, decode, *_ = open_codec("bytes")
    assert (name, file) == ("bytes", None)
    everything = bytes(range(256))
    assert encode(everything).tolist() == list(range(256))
    assert decode(encode(everything)) == everything
    assert decode([104, 105]) == b"hi"
