"""Damaged data: every file that the data layer reads, broken in every way we could think of.

A damaged source is refused in one line, or read right, or trained on under another protocol line
where any bytes would do (a book, a table of pixels). A damaged cache is made again. Nothing ends
in a traceback, waits for ever, or is silently something else. By hand, longer:

    pytest tests/faults/test_data_faults.py --flips 5000 --kills 100 -rP
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_data_download import CONTENT, Handler, Server, source
from test_data_sets import BOOK, make_pg19, make_wikitext, npz_batch, png_members, tar_of, zipped

from rt_scratch.data import cifar10, download, enwik8, imagenet64, load, open_codec, pg19
from rt_scratch.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SECONDS = 20  # no load of these small files takes as long
rng = np.random.default_rng(0)
TEXT = bytes(rng.integers(0, 256, 3000, np.uint8))
CIFAR = {name: rng.integers(0, 10, (10, 3073), np.uint8).tobytes()
         for name in [*cifar10.TRAIN, cifar10.TEST]}
IMAGES, LABELS = rng.integers(0, 256, (9, 12288), np.uint8), rng.integers(1, 1001, 9)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Stand-ins of a few kilobytes for the official files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enwik8, "SIZES", {"train": 2500, "valid": 300, "test": 200})
        patch.setattr(enwik8, "SHA256", hashlib.sha256(TEXT).hexdigest())
        patch.setattr(cifar10, "RECORDS", 10)
        patch.setattr(imagenet64, "HOLD_OUT", 3)
        patch.setattr(os, "fsync", lambda handle: None)  # the power stays on
        yield


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tokens(packed):
    return {f"{packed}wiki.{split}.tokens": text for split, text in (
        ("train", b" the cat and the <unk> \n" * 20), ("valid", b" the cat \n"),
        ("test", b" and the \n"))}


NPZ = {"train_data_batch_1.npz": npz_batch(IMAGES, LABELS),
       "val_data.npz": npz_batch(IMAGES[:4], LABELS[:4])}
SOURCES = {  # kind of file: (dataset, what writes such files into a folder)
    "enwik8": ("enwik8", lambda at: write(at, {"enwik8": TEXT})),
    "enwik8.zip": ("enwik8", lambda at: zipped(at / "enwik8.zip", enwik8=TEXT)),
    "wiki.*.tokens": ("wikitext103", lambda at: write(at, tokens(""))),
    "wikitext zip": ("wikitext103", lambda at: zipped(at / "wikitext-103-v1.zip", **tokens("w/"))),
    "books": ("pg19", make_pg19),
    "cifar .bin": ("cifar10", lambda at: write(at, CIFAR)),
    "cifar tar.gz": ("cifar10", lambda at: tar_of(at / "cifar-10-binary.tar.gz", CIFAR)),
    "npz": ("imagenet64", lambda at: write(at, NPZ)),
    "npz zips": ("imagenet64", lambda at: [
        zipped(at / f"Imagenet64_{part}_npz.zip", **{name: content})
        for part, (name, content) in zip(("train_part1", "val"), NPZ.items(), strict=True)]),
    "PNG": ("imagenet64", lambda at: [
        write(at, png_members(images, name))
        for images, name in ((IMAGES, "train_64x64"), (IMAGES[:3], "valid_64x64"))]),
    "PNG tar": ("imagenet64", lambda at: [
        tar_of(at / f"{name}.tar", png_members(images, name), "w")
        for images, name in ((IMAGES, "train_64x64"), (IMAGES[:3], "valid_64x64"))]),
}
CACHES = ["enwik8", "wiki.*.tokens", "books", "cifar .bin", "npz", "PNG"]
CODECS = {"vocab.txt": "words", "tokenizer.json": "subwords"}
N_KINDS = len(SOURCES) + len(CACHES) + len(CODECS) + 2


def damage(content: bytes, rnd: random.Random) -> bytes:
    """`content` with one thing wrong, now and then with several."""
    out = bytearray(content)
    for _ in range(rnd.choice((1, 1, 1, 2, 20))):
        at, n = rnd.randrange(len(out) + 1), rnd.choice((1, 4, 64, 512, 5000))
        how = rnd.randrange(9)
        if how <= 2 and at < len(out):      # a bit, the most frequent and the hardest to see
            out[at] ^= 1 << rnd.randrange(8)
        elif how == 3:                      # a byte of another value
            out[at : at + 1] = bytes([rnd.choice((0, 1, 0x7F, 0x80, 0xFF, rnd.randrange(256)))])
        elif how == 4:                      # cut short, perhaps to nothing
            del out[at if rnd.random() < 0.9 else 0 :]
        elif how == 5:                      # a piece that never reached the disk
            out[at : at + n] = bytes(len(out[at : at + n]))
        elif how == 6:                      # a piece twice, or missing
            out[at:at] = out[at : at + n]
        elif how == 7:
            del out[at : at + n]
        else:                               # a piece of something else
            out[at : at + n] = rnd.randbytes(n)
    return bytes(out)


@contextlib.contextmanager
def in_time():
    """TimeoutError, also out of library code, for what does not come to an end."""
    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def use(name, folder):
    """A dataset, or the one line that it was refused with."""
    try:
        with in_time():
            return load(name, folder, 300 if name == "pg19" else 0)
    except UserError as e:
        assert str(e) and "\n" not in str(e) and len(str(e)) < 1500
        return str(e)


def content(data):
    arrays = {**data.splits, **{f"labels {k}": v for k, v in (data.labels or {}).items()}}
    return {name: (array.shape, array.tobytes()) for name, array in arrays.items()}


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and "rt_cache" not in p.parts)


def flips(request, kind):
    """One random generator per damaged file: --flips of them, over all kinds, at least 20 each."""
    n = max(20, -(-request.config.getoption("--flips") // N_KINDS))
    return [random.Random(f"{kind} {i}") for i in range(n)]


@pytest.mark.parametrize("kind", SOURCES)
def test_damaged_sources(kind, tmp_path, request):
    name, make = SOURCES[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    whole = use(name, folder)
    want, protocol, ends = content(whole), whole.protocol, Counter()
    for rnd in flips(request, kind):
        path = rnd.choice(files_of(folder))
        before = path.read_bytes()
        broken = damage(before, rnd)
        path.write_bytes(broken)
        shutil.rmtree(folder / "rt_cache", ignore_errors=True)
        data = use(name, folder)
        if isinstance(data, str):
            ends["refused"] += 1
        elif content(data) == want:
            ends["harmless"] += 1
        else:
            ends["said in the protocol line"] += 1
            assert data.protocol != protocol, f"SILENT: {path.name} {sorted(content(data))}"
        path.write_bytes(before)
    print(f"{kind}: {sum(ends.values())} damaged files: {dict(ends)}")
    if kind in ("enwik8", "enwik8.zip", "cifar tar.gz"):  # those with a checksum of the whole
        assert not ends["said in the protocol line"]
    assert ends["refused"] or kind in ("wiki.*.tokens", "books", "cifar .bin")


@pytest.mark.parametrize("kind", CACHES)
def test_damaged_caches(kind, tmp_path, request, capsys):
    name, make = SOURCES[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    whole = use(name, folder)
    want, again = content(whole), 0
    for rnd in flips(request, f"cache of {kind}"):
        path = rnd.choice([p for p in (folder / "rt_cache").rglob("*") if p.is_file()])
        broken = damage(path.read_bytes(), rnd)
        if rnd.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(broken)
        capsys.readouterr()
        data = use(name, folder)
        said = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line]
        assert not isinstance(data, str), data
        assert content(data) == want and data.protocol == whole.protocol, path.name
        assert len(said) <= 1
        again += len(said)
    print(f"cache of {kind}: {len(flips(request, kind))} damaged files: made again {again} times")
    assert again


@pytest.mark.parametrize("file", CODECS)
def test_damaged_codecs(file, tmp_path, request):
    """Of a run folder: they open and show text, or say why not."""
    make_pg19(tmp_path) if file == "tokenizer.json" else make_wikitext(tmp_path)
    data = use({"words": "wikitext103", "subwords": "pg19"}[CODECS[file]], tmp_path)
    shown, ends = data.codec.file.read_bytes(), Counter()
    ids = np.arange(min(data.vocab_size, 3000))
    for rnd in flips(request, file):
        (tmp_path / file).write_bytes(damage(shown, rnd))
        try:
            with in_time():
                codec = open_codec(CODECS[file], tmp_path / file)
                codec.decode(codec.encode(b"the cat \xff\x00 \n" + BOOK.encode()))
                codec.decode(ids)
                ends["opened"] += 1
        except UserError as e:
            assert str(e) and "\n" not in str(e)
            ends["refused"] += 1
    print(f"{file}: {sum(ends.values())} damaged files: {dict(ends)}")
    assert ends["refused"]


def test_damaged_downloads(tmp_path, request, monkeypatch):
    """Whatever part lies there, the right file comes out."""
    monkeypatch.setattr(download, "WAIT", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.behaviour, server.requests = {"/file": CONTENT}, [], []
        server.ranges, server.url = True, f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        jobs = flips(request, "part")
        for rnd in jobs:
            part = damage(CONTENT[: rnd.randrange(len(CONTENT) + 1)], rnd)
            (tmp_path / "file.part").write_bytes(part)
            with in_time():
                path = download.fetch(source(server), tmp_path, quiet=True)
            assert path.read_bytes() == CONTENT
            path.unlink()
        server.shutdown()
    print(f"parts of downloads: {len(jobs)} damaged files, all fetched right")


def test_damaged_lists_of_books(request, monkeypatch):
    monkeypatch.setattr(pg19, "MAX_PAGES", 3)
    books = [{"name": f"test/{i}.txt", "size": "100", "md5Hash": "rL0Y20zC+Fzt72VPzMSk2A=="}
             for i in range(5)]
    ends, jobs = Counter(), flips(request, "list")
    for rnd in jobs:
        pages = [damage(json.dumps({"items": books, **more}).encode(), rnd)
                 for more in ({"nextPageToken": "more"}, {})]
        monkeypatch.setattr(pg19, "get", lambda url, pages=pages: pages[
            bool(urllib.parse.parse_qs(url).get("pageToken"))])
        try:
            with in_time():
                for book in pg19._listing("test"):
                    assert book.name.startswith("test/") and len(book.digest) == 36
            ends["read"] += 1
        except UserError as e:
            assert "\n" not in str(e)
            ends["refused"] += 1
    print(f"lists of books: {len(jobs)} damaged: {dict(ends)}")
    assert ends["refused"]


# ------------------------------------------------------------------------------ as a user sees it

COMMANDS = {  # what to do in an empty folder: (shell command, what one line on stderr must say)
    "pipe": ("mkfifo p && $PY train.py p", "a pipe or a device"),
    "substitution": ("$PY train.py <(yes)", "a pipe or a device"),
    "gzip": ("yes text | head -c 9999 | gzip > a.txt && $PY train.py a.txt", "gunzip -k"),
    "pattern": ("echo x > a.txt && $PY train.py '*.txt'", "give the folder"),
    "folder": ("mkdir f && echo x > f/a.txt && $PY train.py f", "3 or more"),
    "raw": ("touch wiki.train.raw && $PY train.py wikitext103 --data-dir .", "the raw edition"),
    "zip for a folder": ("touch x.zip && $PY train.py enwik8 --data-dir x.zip",
                         "`python -m rt_scratch.data enwik8 --download --data-dir .`"),
    "cut short": ("head -c 999 /dev/zero > enwik8 && $PY train.py enwik8 --data-dir .",
                  "999 bytes of text; enwik8 has 100,000,000"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_line(name, tmp_path):
    command, line = COMMANDS[name]
    command = command.replace("$PY train.py", f"{sys.executable} {ROOT / 'train.py'}")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path / "cwd", text=True,
                          capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    said = [t for t in done.stderr.splitlines() if "encoding into" not in t and "%|" not in t]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert said[0].startswith("error: ") and line in said[0]


def test_kills(tmp_path, request):
    """Encodings killed at any moment, two at a time: what is there in the end is whole."""
    text = b"".join(b"%d words, of which %d are numbers\r\n" % (i, i * i % 977)
                    for i in range(10_000))
    make_pg19(tmp_path / "data", train={i: text[i * 99 :] for i in range(2)})
    command = [sys.executable, "-m", "rt_scratch.data", "pg19", "--data-dir",
               str(tmp_path / "data"), "--vocab-size", "400"]
    rnd = random.Random(0)
    n = -(-request.config.getoption("--kills") // 2)
    root = tmp_path / "data" / "rt_cache"
    most, unfinished, start = 0, 0, time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    seconds = time.monotonic() - start
    shutil.rmtree(root / "pg19-400")
    for _ in range(n):
        pair = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL) for _ in range(2)]
        time.sleep(rnd.uniform(0.1, 2) * seconds)
        for process in pair:
            unfinished += process.poll() is None
            process.kill()
            process.wait()
        left = os.listdir(root) if root.exists() else []
        most = max(most, len(left))
        if "pg19-400" in left:
            if rnd.random() < 0.3:  # as one that a newer version does not use
                (root / "pg19-400" / "cache.json").write_text("{}")
            else:
                shutil.rmtree(root / "pg19-400")
    data = load("pg19", tmp_path / "data", 400)
    assert os.listdir(root) == ["pg19-400"]
    assert data.codec.decode(data.splits["train"]) == text + text[99:]
    assert most <= 3  # two of the last pair, and a whole one: those before are removed
    print(f"{2 * n} encodings, {unfinished} of them killed on their way")
