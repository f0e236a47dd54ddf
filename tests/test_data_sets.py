"""The five datasets, on small stand-ins in the layout of the official files."""

import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from rt_scratch.data import cifar10, enwik8, imagenet64, load, open_codec, pg19, score
from rt_scratch.data import wikitext103 as wikitext
from rt_scratch.data.__main__ import main
from rt_scratch.data.batches import eval_windows
from rt_scratch.data.codecs import train_subwords
from rt_scratch.data.dataset import words_scored
from rt_scratch.data.files import ordinary
from rt_scratch.data.images import interleave
from rt_scratch.errors import UserError
from rt_scratch.run.pictures import read_picture


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing may be written in the folder the tests are started from."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def no_leftovers(folder):
    return not [p for p in folder.rglob("*") if ".tmp-" in p.name or p.name.endswith(".part")]


# ------------------------------------------------------------------------------------- enwik8

@pytest.fixture
def wiki_bytes(monkeypatch):
    text = bytes(np.random.default_rng(0).integers(0, 256, 3000, np.uint8))
    monkeypatch.setattr(enwik8, "SIZES", {"train": 2500, "valid": 300, "test": 200})
    monkeypatch.setattr(enwik8, "SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr("rt_scratch.data.files.CHUNK", 700)  # pieces that straddle the splits
    return text


def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_enwik8_is_cut_at_the_official_places(tmp_path, wiki_bytes, packed):
    if packed:
        zipped(tmp_path / "enwik8.zip", enwik8=wiki_bytes)
    else:
        (tmp_path / "enwik8").write_bytes(wiki_bytes)
    data = load("enwik8", tmp_path)
    assert data.splits["train"].tobytes() == wiki_bytes[:2500]
    assert data.splits["valid"].tobytes() == wiki_bytes[2500:2800]
    assert data.splits["test"].tobytes() == wiki_bytes[2800:]
    assert all(isinstance(s, np.memmap) and s.dtype == np.uint8 for s in data.splits.values())
    assert data.unit == "bits/byte"
    assert no_leftovers(tmp_path)


def test_enwik8_official_numbers():
    assert enwik8.SIZES == {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t + b"x", lambda t: b""])
def test_enwik8_of_another_size(tmp_path, wiki_bytes, change):
    (tmp_path / "enwik8").write_bytes(change(wiki_bytes))
    with pytest.raises(UserError, match="enwik8 has 3,000"):
        load("enwik8", tmp_path)
    assert no_leftovers(tmp_path)


def test_enwik8_with_one_wrong_byte(tmp_path, wiki_bytes):
    (tmp_path / "enwik8").write_bytes(wiki_bytes[:100] + b"?" + wiki_bytes[101:])
    with pytest.raises(UserError, match="sha256"):
        load("enwik8", tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_zip(tmp_path, wiki_bytes, keep):
    whole = zipped(tmp_path / "enwik8.zip", enwik8=wiki_bytes).read_bytes()
    (tmp_path / "enwik8.zip").write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(UserError, match="enwik8.zip: damaged or cut short"):
        load("enwik8", tmp_path)


def test_zip_with_damaged_content(tmp_path, wiki_bytes):
    path = tmp_path / "enwik8.zip"
    whole = bytearray(zipped(path, enwik8=wiki_bytes).read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="damaged|sha256"):
        load("enwik8", tmp_path)


def test_zip_with_something_else(tmp_path, wiki_bytes):
    zipped(tmp_path / "enwik8.zip", other=b"x")
    with pytest.raises(UserError, match="--download"):
        load("enwik8", tmp_path)


def test_paths_in_archives_do_not_matter(tmp_path, wiki_bytes):
    """A member that claims a path outside is read like any other; nothing is written there."""
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    zipped(folder / "enwik8.zip", **{"../../enwik8": wiki_bytes, "../evil": b"x"})
    assert load("enwik8", folder).splits["test"].tobytes() == wiki_bytes[2800:]
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {
        "enwik8.zip", "cache.json", "train.npy", "valid.npy", "test.npy"}


NEEDED = {  # file, where it comes from, its size
    "enwik8": ("enwik8", "http://mattmahoney.net/dc/enwik8.zip", "36.4 MB"),
    "wikitext103": ("wiki.train.tokens", "https://wikitext.smerity.com/wikitext-103-v1.zip",
                    "190.2 MB"),
    "pg19": ("ID.txt", "https://storage.googleapis.com/deepmind-gutenberg/", "11,739.7 MB"),
    "cifar10": ("cifar-10-binary.tar.gz",
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "170.1 MB"),
    "imagenet64": ("ImageNet 64x64", "https://image-net.org/download.php", "14.1 GB")}


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("folder", ["no such", "an empty one", "a file.zip", None])
def test_data_that_are_not_there(tmp_path, name, folder):
    """Which file, whence, how large, and the command to get it, whole."""
    (tmp_path / "an empty one").mkdir()
    zipped(tmp_path / "a file.zip", x=b"x")
    arguments = [name] + (["--data-dir", str(tmp_path / folder)] if folder else [])
    with pytest.raises(UserError) as e:
        main(arguments)
    said = str(e.value)
    assert said.startswith(f"{tmp_path / folder if folder else f'data/{name}'}: ")
    assert all(part in said for part in NEEDED[name]) and "\n" not in said
    assert "--data-dir" in said
    if name != "imagenet64":
        place = {"a file.zip": tmp_path, None: None}.get(folder, folder and tmp_path / folder)
        at = f" --data-dir {shlex.quote(str(place))}" if place else ""
        assert f"`python -m rt_scratch.data {name} --download{at}` fetches it" in said


@pytest.mark.parametrize("name, file, sentence", [
    ("wikitext103", "wiki.train.raw", "this is the raw edition"),
    ("wikitext103", "wikitext-103-raw-v1.zip", "this is the raw edition"),
    ("wikitext103", "wikitext-103-raw/wiki.train.raw", "this is the raw edition"),
    ("cifar10", "cifar-10-python.tar.gz", "made of pickles, which are never read"),
    ("cifar10", "cifar-10-batches-py/data_batch_1", "made of pickles, which are never read"),
    ("cifar10", "data_batch_1.mat", "for Matlab"),
    ("imagenet64", "train_data_batch_1", "made of pickles, which are never read"),
    ("imagenet64", "Imagenet64_val.zip", "made of pickles, which are never read")])
def test_another_edition(tmp_path, name, file, sentence):
    """Also where it is named itself."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    for at in (tmp_path, tmp_path / file):
        if at == tmp_path or at.parent == tmp_path:
            with pytest.raises(UserError, match=sentence) as e:
                load(name, at)
            assert NEEDED[name][1] in str(e.value)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_one_file_of_three(tmp_path, split):
    make_wikitext(tmp_path)
    (tmp_path / f"wiki.{split}.tokens").unlink()
    with pytest.raises(UserError, match=f": no wiki.{split}.tokens here; wikitext-103-v1.zip"):
        load("wikitext103", tmp_path)


def test_the_protocol_tells_the_tokens(tmp_path, cifar_files, imagenet):
    """Other tokens or labels of the same number are other data."""
    pytest.importorskip("tokenizers")

    def changes(name, folder, change, **more):
        before = load(name, folder, **more).protocol
        assert re.search(r"sha256 [0-9a-f]{12}$", before)
        change(folder)
        after = load(name, folder, **more).protocol
        return before[:-12] == after[:-12] and before[-12:] != after[-12:]

    for name in ("c", "i", "w", "p"):
        (tmp_path / name).mkdir()
    write_cifar(tmp_path / "c", cifar_files)
    cifar_files["data_batch_3.bin"][7, 0] ^= 1  # one label
    assert changes("cifar10", tmp_path / "c", lambda folder: write_cifar(folder, cifar_files))
    for name, (images, labels) in imagenet.items():
        (tmp_path / "i" / name).write_bytes(npz_batch(images, labels))
    swapped = npz_batch(imagenet["val_data.npz"][0][:7], imagenet["val_data.npz"][1][:7])
    assert changes("imagenet64", tmp_path / "i",
                   lambda folder: (folder / "train_data_batch_1.npz").write_bytes(swapped))
    make_pg19(tmp_path / "p")
    book = tmp_path / "p" / "train" / "10.txt"
    assert changes("pg19", tmp_path / "p", vocab_size=257, change=lambda folder: book.write_bytes(
        book.read_bytes().swapcase()))
    make_wikitext(tmp_path / "w")
    old, new = "tokens sha256 ", load("wikitext103", tmp_path / "w").protocol
    make_wikitext(tmp_path / "w", valid=b" \n cat the \n")
    assert old in new and new[-12:] != load("wikitext103", tmp_path / "w").protocol[-12:]


def test_command_line(tmp_path, wiki_bytes, capsys):
    zipped(tmp_path / "enwik8.zip", enwik8=wiki_bytes)
    main(["enwik8", "--data-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "bits per byte on enwik8" in out
    assert "train  2,500 tokens" in out
    for wrong in (["enwik8", "--data-dir", str(tmp_path), "--vocab-size", "99"],
                  ["stdlib", "--download"], ["no_such", "--download"],
                  ["enwik8", "--no-such-flag"]):
        with pytest.raises(UserError):
            main(wrong)


# ----------------------------------------------------------------------------------- WikiText

TRAIN = b" \n = A title = \n \n the cat and the <unk> \n b b a a the , \n"
VALID = b" \n the dog \n"
TEST = " a caf\u00e9 \u00a0 the\n\n\n".encode()


def make_wikitext(folder, train=TRAIN, valid=VALID, test=TEST):
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"wiki.{split}.tokens").write_bytes(text)


def test_wikitext_tokens(tmp_path):
    make_wikitext(tmp_path)
    data = load("wikitext103", tmp_path)
    words = data.codec.file.read_bytes().split(b"\n")
    #          5 lines, 3 the, 2 each of these by byte order, then those seen once by byte order
    assert words == b"<eos> the = a b , <unk> A and cat title".split()
    eos, the, unk = 0, 1, 6
    assert data.splits["valid"].tolist() == [eos, the, unk, eos]
    assert data.splits["test"].tolist() == [3, unk, unk, the, eos, eos, eos]
    assert data.splits["train"].tolist()[:6] == [eos, 2, 7, 10, 2, eos]
    n_words = {split: len(text.split()) + text.count(b"\n")
               for split, text in (("train", TRAIN), ("valid", VALID))}
    assert {s: len(data.splits[s]) for s in n_words} == n_words
    assert data.vocab_size == 11
    assert data.unit == "ppl/token"
    assert "not a WikiText-103 file" in data.protocol
    assert data.splits["train"].dtype == np.uint8  # the smallest type


def test_wikitext_codec(tmp_path):
    make_wikitext(tmp_path)
    data = load("wikitext103", tmp_path)
    for split in data.splits.values():
        assert data.codec.encode(data.codec.decode(split)).tolist() == split.tolist()
    a, b = data.splits["train"][:7], data.splits["train"][7:]
    assert data.codec.decode(a) + data.codec.decode(b) == data.codec.decode(data.splits["train"])
    assert data.codec.encode(b"the cat").tolist() == [1, 9]
    assert data.codec.encode(b"").tolist() == []
    assert data.codec.encode(b"\xff\n").tolist() == [6, 0]
    assert data.codec.decode(data.codec.encode(b"the cat\n")) == b"the cat \n"
    _, _, encode, decode, *_ = open_codec("words", data.codec.file)
    assert encode(TRAIN).tolist() == data.splits["train"].tolist()
    assert decode([1, 0]) == b"the \n"


def test_wikitext_in_its_zip_and_its_folders(tmp_path):
    want = None
    members = {f"wikitext-103/wiki.{s}.tokens": t
               for s, t in (("train", TRAIN), ("valid", VALID), ("test", TEST))}
    (tmp_path / "z").mkdir()
    zipped(tmp_path / "z" / "wikitext-103-v1.zip", **members)
    make_wikitext(tmp_path / "f" / "wikitext-2")
    make_wikitext(tmp_path / "p")
    for folder in "zfp":
        got = {s: t.tolist() for s, t in load("wikitext103", tmp_path / folder).splits.items()}
        assert want in (None, got)
        want = got
    # a folder with valid and test of one edition must not be filled up with the other's train
    make_wikitext(tmp_path / "f" / "wikitext-103", valid=b"cat\n")
    (tmp_path / "f" / "wikitext-103" / "wiki.train.tokens").unlink()
    assert load("wikitext103", tmp_path / "f").splits["valid"].tolist() == want["valid"]


@pytest.mark.parametrize("packed", [True, False])
def test_wikitext_is_not_put_together_from_two_locations(tmp_path, packed):
    """A cut download beside the whole zip or folder: that alone counts."""
    if packed:
        zipped(tmp_path / "wikitext-103-v1.zip", **{
            f"wikitext-103/wiki.{s}.tokens": t
            for s, t in (("train", TRAIN), ("valid", VALID), ("test", TEST))})
    else:
        make_wikitext(tmp_path / "wikitext-103")
    (tmp_path / "wiki.train.tokens").write_bytes(TRAIN[:20])
    assert len(load("wikitext103", tmp_path).splits["train"]) == 20


def test_wikitext_names_the_official_files(tmp_path, monkeypatch):
    monkeypatch.setitem(wikitext.OFFICIAL, hashlib.sha1(VALID).hexdigest(), "the real valid")
    make_wikitext(tmp_path)
    protocol = load("wikitext103", tmp_path).protocol
    assert "valid 4 tokens (the real valid)" in protocol
    assert f"train 20 tokens (not a WikiText-103 file, sha1 {hashlib.sha1(TRAIN).hexdigest()[:12]}"\
        in protocol


def test_wikitext_many_words_take_wider_integers(tmp_path):
    train = b"".join(b"w%d " % i for i in range(70_000)) + b"\n"
    make_wikitext(tmp_path, train=train)
    data = load("wikitext103", tmp_path)
    assert data.splits["train"].dtype == np.uint32
    assert data.codec.decode(data.splits["train"]) == train
    make_wikitext(tmp_path, train=train[:5000])
    assert load("wikitext103", tmp_path).splits["train"].dtype == np.uint16


def test_archives_are_read_no_further_than_expected(tmp_path, monkeypatch, wiki_bytes):
    (tmp_path / "w").mkdir()
    zipped(tmp_path / "w" / "wikitext-103-v1.zip", **{
        f"wiki.{s}.tokens": b"the cat\n" * 100 for s in ("train", "valid", "test")})
    assert len(load("wikitext103", tmp_path / "w").splits["train"]) == 300
    shutil.rmtree(tmp_path / "w" / "rt_cache")
    monkeypatch.setattr(wikitext, "MAX_FILE", 799)
    with pytest.raises(UserError, match="unpacks to 800 bytes, more than the 799"):
        load("wikitext103", tmp_path / "w")
    make_wikitext(tmp_path / "l", train=b"x" * 1000)
    monkeypatch.setattr(wikitext, "MAX_LINE", 900)
    with pytest.raises(UserError, match="a line of more than 900 bytes"):
        load("wikitext103", tmp_path / "l")
    zipped(tmp_path / "enwik8.zip", enwik8=wiki_bytes + bytes(10 ** 7))
    read = []
    monkeypatch.setattr(enwik8, "chunks", lambda f: (read.append(c) or c for c in iter(
        lambda: f.read(700), b"")))
    with pytest.raises(UserError, match="3,500 bytes or more of text; enwik8 has 3,000"):
        load("enwik8", tmp_path)
    assert len(read) == 5


def test_a_zip_that_points_before_its_start(tmp_path, wiki_bytes):
    path = zipped(tmp_path / "enwik8.zip", enwik8=wiki_bytes)
    whole = bytearray(path.read_bytes())
    at = whole.rindex(b"PK\x05\x06") + 16  # where the list of members is said to begin
    struct.pack_into("<I", whole, at, struct.unpack_from("<I", whole, at)[0] + 100)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="enwik8.zip: damaged or cut short"):
        load("enwik8", tmp_path)


def test_a_member_that_is_listed_twice(tmp_path, wiki_bytes):
    with pytest.warns(UserWarning, match="Duplicate"), \
            zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as z:
        z.writestr("enwik8", wiki_bytes)
        z.writestr("enwik8", b"something else")
    with pytest.raises(UserError, match="enwik8.zip: holds enwik8 twice"):
        load("enwik8", tmp_path)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_wikitext_with_an_empty_split(tmp_path, split):
    make_wikitext(tmp_path, **{split: b""})
    with pytest.raises(UserError, match=f"wiki.{split}.tokens is empty"):
        load("wikitext103", tmp_path)
    assert no_leftovers(tmp_path)


def test_wikitext_vocabulary_that_is_none(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"some\nother\nwords")
    with pytest.raises(UserError, match="not a list of words"):
        open_codec("words", tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="not a list of words"):
        open_codec("words")


def test_wikitext_vocabulary_cut_short(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"<eos>\n<unk>\nthe")
    codec = open_codec("words", tmp_path / "vocab.txt")
    assert codec.decode([2, 0]) == b"the \n"
    with pytest.raises(UserError, match="has 3 words, none for id 3"):
        codec.decode([2, 3])


# -------------------------------------------------------------------------------------- PG-19

BOOK = ("It was the best of times, it was the worst of times, it was the age of wisdom; don\u2019t "
        "you know? \u201cYes,\u201d said M\u00e9lanie. 1859, 1,859.\r\n\r\n   CHAPTER  II\r\n")
AWKWARD = b"\xff\xfe\x00 caf\xc3\xa9 \xc3\x28 <book> \x85\xa0\t\r\n\n\r *** "


def make_pg19(folder, **more):
    for name, books in {"train": {9: BOOK.encode() * 3, 10: b"Another book\r\n" * 9, 7: AWKWARD},
                        "validation": {3: BOOK.encode()}, "test": {5: BOOK.encode(), 11: AWKWARD},
                        **more}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, text in books.items():
            (folder / name / f"{number}.txt").write_bytes(text)


def test_pg19_round_trip_and_words(tmp_path):
    pytest.importorskip("tokenizers")
    make_pg19(tmp_path)
    data = load("pg19", tmp_path, vocab_size=300)
    train = data.splits["train"]
    assert train.dtype == np.uint16
    assert train[0] == 0 and (train == 0).sum() == 3  # a boundary before each book, in no other
    starts = np.flatnonzero(train == 0)
    assert [data.codec.decode(part) for part in np.split(train, starts[1:])] == [
        AWKWARD, BOOK.encode() * 3, b"Another book\r\n" * 9]  # order of numbers, every byte
    assert data.codec.decode(data.splits["test"]) == BOOK.encode() + AWKWARD
    assert data.unit == "ppl/word"
    assert data.units == {"train": 3 * len(BOOK.split()) + 18 + len(AWKWARD.decode(
        errors="replace").split()), "valid": len(BOOK.split()), "test": len(BOOK.split()) + len(
        AWKWARD.decode(errors="replace").split())}
    assert "train 3 of 28,602 books" in data.protocol
    assert len(data.splits["valid"]) < 0.6 * len(BOOK.encode())  # subwords, not bytes
    assert train.max() < data.vocab_size == 300


def test_pg19_vocabulary_sizes_live_side_by_side(tmp_path):
    pytest.importorskip("tokenizers")
    make_pg19(tmp_path)
    small, large = load("pg19", tmp_path, vocab_size=260), load("pg19", tmp_path)
    assert (small.vocab_size, large.vocab_size) == (260, 98_304)
    assert large.splits["train"].dtype == np.uint32
    assert large.codec.decode([98_303, 70_000]) == b""  # ids that little text left unused
    assert len(large.splits["valid"]) < len(small.splits["valid"])
    assert (load("pg19", tmp_path, vocab_size=260).splits["valid"] == small.splits["valid"]).all()
    with pytest.raises(UserError, match="at least 257"):
        load("pg19", tmp_path, vocab_size=100)


def test_pg19_needs_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    make_pg19(tmp_path)
    with pytest.raises(UserError, match="pip install tokenizers"):
        load("pg19", tmp_path)
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_pg19_with_an_empty_split(tmp_path, name):
    pytest.importorskip("tokenizers")
    make_pg19(tmp_path)
    for path in (tmp_path / name).iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        load("pg19", tmp_path, vocab_size=300)
    for path in (tmp_path / name).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"{name}/"):
        load("pg19", tmp_path, vocab_size=300)


def test_pg19_subwords_are_trained_on_a_bounded_sample_of_train(tmp_path, monkeypatch):
    books = {i: b"%04d" % i * 250 for i in range(50)}
    make_pg19(tmp_path, train=books)
    monkeypatch.setattr(pg19, "SAMPLE_BYTES", 10_000)
    sample = []

    def train(texts, vocab_size, path):
        sample.extend(texts)
        raise UserError("seen enough")

    monkeypatch.setattr(pg19, "train_subwords", train)
    with pytest.raises(UserError, match="seen enough"):
        load("pg19", tmp_path)
    assert len(set(sample)) == len(sample) == 10
    assert set(sample) < set(books.values())
    numbers = sorted(int(text[:4]) for text in sample)
    assert numbers[0] < 25 < numbers[-1] and numbers != list(range(numbers[0], numbers[0] + 10))


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_subwords([BOOK.encode() * 5], 320, path)
    return path


def test_subwords_keep_every_byte(subwords):
    from hypothesis import given
    from hypothesis import strategies as st

    _, _, encode, decode, *_ = open_codec("subwords", subwords)

    @given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode),
                     st.lists(st.sampled_from([b" ", b"\r\n", b"the", b"\n", b"it's", b"\t", b"9",
                                               b"\xc3\xa9", b"\x00", b"..."])).map(b"".join)))
    def holds(text):
        ids = encode(text)
        assert decode(ids) == text
        assert (ids > 0).all()
        assert b"".join(decode([i]) for i in ids) == text

    holds()
    assert decode(encode(bytes(range(256)))) == bytes(range(256))
    assert encode(b"").tolist() == []
    assert len(encode(b" times")) == 1
    assert len(encode(b"\r\n")) == 1


def test_subwords_are_the_same_every_time(subwords, tmp_path):
    train_subwords([BOOK.encode() * 5], 320, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == subwords.read_bytes()


def test_tokenizer_file_that_is_none(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(UserError, match="not a tokenizer file"):
        open_codec("subwords", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="not a tokenizer file"):
        open_codec("subwords")
    with pytest.raises(UserError, match="missing; a run folder"):
        open_codec("subwords", tmp_path / "missing.json")


def test_foreign_tokenizers(tmp_path, subwords):
    """Of whole words, of characters beyond a byte, without some bytes, with text of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    mine = json.loads(subwords.read_text())
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "[UNK]": 1}, "[UNK]"))
    greek, poor, holes = (json.loads(subwords.read_text()) for _ in range(3))
    greek["model"]["vocab"]["\u03b1"] = len(greek["model"]["vocab"])
    poor["model"]["vocab"].pop("\u00ff")
    holes["model"]["vocab"]["a lot"] = 10 ** 9
    lower = mine | {"normalizer": {"type": "Lowercase"}}
    for other in (json.loads(words.to_str()), greek, poor, holes, lower):
        (tmp_path / "tokenizer.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match="of another kind|not a tokenizer file"):
            open_codec("subwords", tmp_path / "tokenizer.json")


def test_words_of_windows(tmp_path):
    """Any windows that make up the split have its words between them, wherever they are cut."""
    pytest.importorskip("tokenizers")
    from hypothesis import given
    from hypothesis import strategies as st

    odd = "non\u00a0breaking  em\u2003space \u3000 wide\u0085next\x1cfile".encode()
    make_pg19(tmp_path, test={5: BOOK.encode() * 2, 6: odd, 7: b"  ", 8: b"end", 9: AWKWARD,
                              10: b"x" * 200, 11: b"begin again"})
    data = load("pg19", tmp_path, vocab_size=300)

    @given(st.lists(st.integers(0, len(data.splits["test"])), max_size=9))
    def holds(cuts):
        cuts = [0, *sorted(cuts), len(data.splits["test"])]
        assert sum(data.words("test", i, j) for i, j in zip(cuts, cuts[1:], strict=False)) == (
            data.units["test"])

    holds()
    for split, tokens in data.splits.items():
        for t, batch, stride in ((7, 3, 0), (64, 2, 0), (32, 4, 5)):
            assert sum(words_scored(data, split, weights, index, stride or t) for _, weights, index
                       in eval_windows(tokens, t, batch, stride)) == data.units[split]
    text = data.codec.decode(data.splits["valid"][1:])
    assert data.words("valid", 0, len(data.splits["valid"])) == len(text.decode().split())
    half = len(data.splits["valid"]) // 2  # a window that starts at a word has that text's words
    while not data.codec.decode(data.splits["valid"][half : half + 1]).startswith(b" "):
        half += 1
    assert data.words("valid", half, len(data.splits["valid"])) == len(
        data.codec.decode(data.splits["valid"][half:]).decode().split())


def test_part_of_a_split_is_scored_by_its_own_words(tmp_path):
    """Short words, then long ones: the same nats per word, whichever half is scored."""
    pytest.importorskip("tokenizers")
    make_pg19(tmp_path, test={1: b"a b c d " * 100, 2: b"abcdefg " * 100})
    data = load("pg19", tmp_path, vocab_size=257)
    for window, words in ((0, 400), (1, 100)):
        batches = eval_windows(data.splits["test"], 801, 1)
        _, weights, index = list(batches)[window]
        n_words = words_scored(data, "test", weights, index, 801)
        assert n_words == words
        assert score(words * math.log(9), 801, data, "test", n_words) == pytest.approx(9)


# ----------------------------------------------------------------------------------- CIFAR-10

@pytest.fixture
def cifar_files(monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS", 20)
    rng = np.random.default_rng(1)
    files = {}
    for name in [*cifar10.TRAIN, cifar10.TEST]:
        records = rng.integers(0, 256, (20, 3073), np.uint8)
        records[:, 0] %= 10
        files[name] = records
    return files


def tar_of(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_cifar(folder, files):
    for name, records in files.items():
        (folder / name).write_bytes(bytes(records))


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10(tmp_path, cifar_files, packed):
    if packed:
        tar_of(tmp_path / "cifar-10-binary.tar.gz", {
            f"cifar-10-batches-bin/{name}": bytes(records)
            for name, records in reversed(cifar_files.items())})  # any order in the archive
    else:
        (tmp_path / "cifar-10-batches-bin").mkdir()
        write_cifar(tmp_path / "cifar-10-batches-bin", cifar_files)
    data = load("cifar10", tmp_path)
    train = np.concatenate([cifar_files[name] for name in cifar10.TRAIN])
    held = np.arange(100) % 10 == 9
    for split, records in (("train", train[~held]), ("valid", train[held]),
                           ("test", cifar_files[cifar10.TEST])):
        images = data.splits[split]
        assert images.shape == (len(records), 3072)
        assert (data.labels[split] == records[:, 0]).all()
        for row, column, colour in ((0, 0, 0), (0, 0, 2), (0, 1, 0), (31, 30, 1), (5, 7, 2)):
            assert (images[:, (row * 32 + column) * 3 + colour]
                    == records[:, 1 + colour * 1024 + row * 32 + column]).all()
    assert data.image_shape == (32, 32, 3)
    assert (data.unit, data.kind, data.n_classes) == ("bits/dim", "image", 10)
    assert "only" not in data.protocol


def test_a_flipped_bit_in_an_archive_is_seen(tmp_path, cifar_files):
    path = tmp_path / "cifar-10-binary.tar.gz"
    tar_of(path, {name: bytes(records) for name, records in cifar_files.items()})
    damaged = bytearray(path.read_bytes())
    for at in (len(damaged) // 3, len(damaged) // 2):
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or cut short"):
            load("cifar10", tmp_path)
        damaged[at] ^= 4


def test_zips_that_python_does_not_read(tmp_path, wiki_bytes):
    path = zipped(tmp_path / "enwik8.zip", enwik8=wiki_bytes)
    whole = path.read_bytes()
    at = whole.rindex(b"PK\x01\x02")
    for offset, value, word in ((10, 9, "damaged"), (8, 1, "encrypted")):
        path.write_bytes(whole[: at + offset] + bytes([value]) + whole[at + offset + 1 :])
        with pytest.raises(UserError, match=word):
            load("enwik8", tmp_path)


def test_cifar10_in_part_says_so(tmp_path, cifar_files):
    write_cifar(tmp_path, {n: cifar_files[n] for n in ("data_batch_2.bin", "test_batch.bin")})
    data = load("cifar10", tmp_path)
    assert len(data.splits["train"]) == 18
    assert "only data_batch_2.bin" in data.protocol


def test_cifar10_bad_files(tmp_path, cifar_files):
    write_cifar(tmp_path, cifar_files)
    good = bytes(cifar_files["data_batch_3.bin"])
    text = (b"some text, " * len(good))[: len(good)]
    for bad, message in ((good[:-1], "images"), (good + b"x", "images"), (b"", "images"),
                         (text, "labels above 9")):
        (tmp_path / "data_batch_3.bin").write_bytes(bad)
        with pytest.raises(UserError, match=f"data_batch_3.bin .*{message}"):
            load("cifar10", tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(UserError, match=": no test_batch.bin here; cifar-10-binary.tar.gz"):
        load("cifar10", tmp_path)
    for name in cifar10.TRAIN:
        (tmp_path / name).unlink()
    write_cifar(tmp_path, {"test_batch.bin": cifar_files["test_batch.bin"]})
    with pytest.raises(UserError, match=": no data_batch_1.bin ... data_batch_5.bin here"):
        load("cifar10", tmp_path)


def test_cifar10_is_official_only_if_its_checksums_are(tmp_path, cifar_files, monkeypatch):
    write_cifar(tmp_path, cifar_files)
    assert "NOT VERIFIED: data_batch_1.bin" in load("cifar10", tmp_path).protocol
    for name, records in cifar_files.items():
        monkeypatch.setitem(cifar10.OFFICIAL, name, hashlib.sha256(bytes(records)).hexdigest())
    assert "verified by the sha256 of the files" in load("cifar10", tmp_path).protocol
    (tmp_path / "test_batch.bin").write_bytes(bytes(cifar_files["data_batch_1.bin"]))
    assert "NOT VERIFIED: test_batch.bin;" in load("cifar10", tmp_path).protocol


class Hostile:
    """Members that a tar of CIFAR-10 should not have, each to be added to a good one."""

    def second(tar, name):
        add(tar, name, b"something else")

    def link_loop(tar, name):
        add(tar, name, kind=tarfile.SYMTYPE, link=name)

    def hard_link_loop(tar, name):
        add(tar, "a", kind=tarfile.LNKTYPE, link="b")
        add(tar, "b", kind=tarfile.LNKTYPE, link="a")

    def device(tar, name):
        add(tar, name, kind=tarfile.CHRTYPE)

    def pipe(tar, name):
        add(tar, name, kind=tarfile.FIFOTYPE)

    def folder(tar, name):
        add(tar, name, kind=tarfile.DIRTYPE)

    def sparse(tar, name):
        add(tar, name, kind=tarfile.GNUTYPE_SPARSE)

    def negative_size(tar, name):
        header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
        header[124:136] = b"\xff" * 10 + struct.pack(">h", -512)  # back to this very header
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        tar.fileobj.write(header)
        tar.offset += len(header)

    def sparse_map(tar, name):
        info = tarfile.TarInfo(name)
        info.pax_headers = {"GNU.sparse.map": "1,2,three", "GNU.sparse.size": "many"}
        tar.addfile(info)

    def sparse_map_1(tar, name):
        info = tarfile.TarInfo(name)
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        tar.addfile(info)

    def bad_pax_number(tar, name):
        info = tarfile.TarInfo("x")
        info.pax_headers = {"size": "-3", "mtime": "yesterday"}
        tar.addfile(info)

    def many_headers(tar, name):
        long = tarfile.TarInfo("././@LongLink")
        long.type, long.size = tarfile.GNUTYPE_LONGNAME, 5
        for _ in range(3000):
            tar.fileobj.write(long.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0"))
            tar.offset += 1024


def add(tar, name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("how", [n for n in vars(Hostile) if not n.startswith("_")])
@pytest.mark.parametrize("first", [True, False])
def test_hostile_tars(tmp_path, cifar_files, how, first):
    """Either the right images or one line; what was found is what is read."""
    write_cifar(tmp_path, cifar_files)
    want = load("cifar10", tmp_path).splits["test"].tobytes()
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t" / "cifar-10-binary.tar.gz", "w:gz") as tar:
        if first:
            getattr(Hostile, how)(tar, "test_batch.bin")
        for name, records in cifar_files.items():
            add(tar, f"cifar-10-batches-bin/{name}", bytes(records))
        if not first:
            getattr(Hostile, how)(tar, "test_batch.bin")
    try:
        assert load("cifar10", tmp_path / "t").splits["test"].tobytes() == want
    except UserError as e:
        assert "\n" not in str(e) and re.search("damaged|twice|--download", str(e))
    assert no_leftovers(tmp_path)


def test_what_counts_as_a_member(tmp_path):
    """Not what is made of holes, nor what it takes a link to find."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "good", b"x")
        info = tarfile.TarInfo("holes")
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(10 ** 15)}
        tar.addfile(info)
        add(tar, "link", kind=tarfile.SYMTYPE, link="good")
        add(tar, "same", kind=tarfile.LNKTYPE, link="good")
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [m.name for m in ordinary(tar)] == ["good"]


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path, imagenet):
    pytest.importorskip("PIL")
    members = png_members(imagenet["val_data.npz"][0], "v")
    for name in ("train_64x64.tar", "valid_64x64.tar"):
        tar_of(tmp_path / name, members, "w")
    whole = bytearray((tmp_path / "train_64x64.tar").read_bytes())
    whole[whole.index(b"v/0000004.png")] ^= 1
    (tmp_path / "train_64x64.tar").write_bytes(whole)
    with pytest.raises(UserError, match="train_64x64.tar: damaged or cut short"):
        load("imagenet64", tmp_path)


def test_a_tar_that_unpacks_to_more_than_it_should(tmp_path, monkeypatch, cifar_files):
    monkeypatch.setattr("rt_scratch.data.files.MAX_TAR", 3 * 10 ** 6)
    tar_of(tmp_path / "cifar-10-binary.tar.gz", {
        **{name: bytes(records) for name, records in cifar_files.items()}})
    assert len(load("cifar10", tmp_path).splits["test"]) == 20
    tar_of(tmp_path / "cifar-10-binary.tar.gz", {
        "zeros": bytes(6 * 10 ** 6), **{n: bytes(r) for n, r in cifar_files.items()}})
    with pytest.raises(UserError, match="more than 3,000,000 bytes"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_cifar10_truncated_tar(tmp_path, cifar_files, keep):
    path = tmp_path / "cifar-10-binary.tar.gz"
    tar_of(path, {n: bytes(r) for n, r in cifar_files.items()})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match="damaged or cut short"):
        load("cifar10", tmp_path)
    path.write_bytes(b"text where an archive is expected")
    with pytest.raises(UserError, match="damaged or cut short"):
        load("cifar10", tmp_path)


# --------------------------------------------------------------------------------- ImageNet 64

def npz_batch(images, labels, **more):
    out = io.BytesIO()
    np.savez(out, data=images, labels=labels, **more)
    return out.getvalue()


@pytest.fixture
def imagenet(monkeypatch):
    monkeypatch.setattr(imagenet64, "HOLD_OUT", 4)
    monkeypatch.setattr(imagenet64, "BATCH", 5)
    rng = np.random.default_rng(2)
    return {name: (rng.integers(0, 256, (n, 12288), np.uint8), rng.integers(1, 1001, n))
            for name, n in (("train_data_batch_1.npz", 7), ("train_data_batch_2.npz", 6),
                            ("train_data_batch_10.npz", 3), ("val_data.npz", 8))}


def check_imagenet(data, train, test, held=None):
    if held is None:
        held = np.arange(len(train)) % 4 == 3
    for split, images in (("train", train[~held]), ("valid", train[held]), ("test", test)):
        pixels = images.reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)
        assert (data.splits[split].reshape(-1, 64, 64, 3) == pixels).all()
    assert data.image_shape == (64, 64, 3)


@pytest.mark.parametrize("packed", [True, False])
def test_imagenet_npz(tmp_path, imagenet, packed):
    files = {name: npz_batch(images, labels.tolist(), mean=np.zeros(12288))
             for name, (images, labels) in imagenet.items()}
    if packed:
        first = {n: c for n, c in files.items() if n.startswith("train")}
        zipped(tmp_path / "Imagenet64_train_part1_npz.zip", **first)
        zipped(tmp_path / "Imagenet64_val_npz.zip", **{"val_data.npz": files["val_data.npz"]})
    else:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
    data = load("imagenet64", tmp_path)
    names = ["train_data_batch_1.npz", "train_data_batch_2.npz", "train_data_batch_10.npz"]
    check_imagenet(data, np.concatenate([imagenet[n][0] for n in names]),
                   imagenet["val_data.npz"][0])
    labels = np.concatenate([imagenet[n][1] for n in names]) - 1
    assert (data.labels["train"] == labels[np.arange(16) % 4 != 3]).all()
    assert (data.labels["test"] == imagenet["val_data.npz"][1] - 1).all()
    assert data.labels["test"].dtype == np.uint16
    assert data.n_classes == 1000
    assert "npz version" in data.protocol
    assert "PART of it: 16 of 1,281,167 and 8 of 50,000" in data.protocol


def test_imagenet_counts_are_asserted(tmp_path, imagenet, monkeypatch):
    for name, (images, labels) in imagenet.items():
        (tmp_path / name).write_bytes(npz_batch(images, labels))
    monkeypatch.setitem(imagenet64.COUNTS, "npz", (16, 8))
    assert "PART" not in load("imagenet64", tmp_path).protocol
    monkeypatch.setitem(imagenet64.COUNTS, "npz", (16, 9))
    assert "PART" in load("imagenet64", tmp_path).protocol


@pytest.mark.parametrize("batch, message", [
    (lambda x, y: npz_batch(x[:, :3072], y), "uint8"),
    (lambda x, y: npz_batch(x.astype(float), y), "float64"),
    (lambda x, y: npz_batch(x, y[:-1]), "uint8"),
    (lambda x, y: npz_batch(x, y + 1000), "1 to 1000"),
    (lambda x, y: npz_batch(x, y.reshape(-1, 1)), r"labels are int64\(8, 1\)"),
    (lambda x, y: npz_batch(x, y[0]), r"labels are int64\(\)"),
    (lambda x, y: npz_batch(x, y.astype(float)), r"labels are float64\(8,\)"),
    (lambda x, y: npz_batch(np.asfortranarray(x), y), "order of columns"),
    (lambda x, y: zip_bytes({"labels.npy": npy_header("(8,)", "<i2") + b"\1\0" * 8,
                             "data.npy": npy_header("(8, 12288)", "|u1") + bytes(8 * 12288 + 1)}),
     "more than its header says"),
    (lambda x, y: zip_bytes({"labels.npy": npy_header("(10 ** 12,)".replace("10 ** 12", str(
        10 ** 12)), "<i8"), "data.npy": b""}), r"labels are int64\(1000000000000,\)"),
    (lambda x, y: zip_bytes({"labels.npy": npy_header("(8,)", "<i8") + bytes(9) * 8}), "more than"),
    (lambda x, y: npz_batch(x, np.array(y.tolist(), object)), "labels are object"),
    (lambda x, y: npz_batch(x, y)[:-500], "damaged"),
    (lambda x, y: b"a text file where images are expected", "damaged"),
    (lambda x, y: zip_bytes({"other.npy": b"x"}), "labels.npy"),
])
def test_imagenet_bad_npz(tmp_path, imagenet, batch, message):
    for name, (images, labels) in imagenet.items():
        content = npz_batch(images, labels) if name != "val_data.npz" else batch(images, labels)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load("imagenet64", tmp_path)
    assert no_leftovers(tmp_path)


def npy_header(shape, dtype):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def zip_bytes(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in members.items():
            z.writestr(name, content)
    return out.getvalue()


def png(pixels, **options):
    from PIL import Image

    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, "PNG", **options)
    return out.getvalue()


def png_members(images, folder):
    pixels = images.reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)
    return {f"{folder}/{i:07d}.png": png(np.ascontiguousarray(p)) for i, p in enumerate(pixels)}


@pytest.mark.parametrize("packed", [True, False])
def test_imagenet_png(tmp_path, imagenet, packed):
    pytest.importorskip("PIL")
    train, test = imagenet["train_data_batch_1.npz"][0], imagenet["val_data.npz"][0]
    for images, name in ((train, "train_64x64"), (test, "valid_64x64")):
        members = png_members(images, name)
        if packed:
            tar_of(tmp_path / f"{name}.tar", {f"{name}/readme.txt": b"x", **members}, "w")
        else:
            (tmp_path / name).mkdir()
            for path, content in members.items():
                (tmp_path / path).write_bytes(content)
            (tmp_path / name / "._0000000.png").write_bytes(b"what macOS keeps beside it")
            os.mkfifo(tmp_path / name / "pipe.png")
    data = load("imagenet64", tmp_path)
    held = np.array([int(hashlib.sha256(b"%07d.png" % i).hexdigest()[:16], 16) % 4 == 0
                     for i in range(7)])
    assert 0 < held.sum() < 7
    check_imagenet(data, train, test, held)
    assert data.labels is None
    assert data.n_classes == 0
    assert "older PNG version" in data.protocol
    (tmp_path / "val_data.npz").write_bytes(npz_batch(*imagenet["val_data.npz"]))
    (tmp_path / "train_data_batch_1.npz").write_bytes(npz_batch(*imagenet["val_data.npz"]))
    with pytest.raises(UserError, match="both versions"):
        load("imagenet64", tmp_path)


@pytest.mark.parametrize("order", [1, -1])
def test_imagenet_png_holds_out_by_name(tmp_path, imagenet, order):
    """The same pictures, in whatever order a tar has them."""
    pytest.importorskip("PIL")
    images = np.concatenate([images for images, _ in imagenet.values()])
    members = list(png_members(images, "./a/train_64x64").items())[::order]
    members.insert(0, ("./a/train_64x64/._0000001.png", b"x"))
    tar_of(tmp_path / "train_64x64.tar", dict(members), "w")
    tar_of(tmp_path / "valid_64x64.tar", dict(members[1:4]), "w")
    data = load("imagenet64", tmp_path)
    held = {i for i in range(len(images))
            if int(hashlib.sha256(b"%07d.png" % i).hexdigest()[:16], 16) % 4 == 0}
    pixels = images.reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1).reshape(len(images), -1)
    assert {row.tobytes() for row in data.splits["valid"]} == {pixels[i].tobytes() for i in held}
    assert len(data.splits["train"]) == len(images) - len(held)
    assert "1 image in 4, by a hash of its file's name" in data.protocol
    assert "NOT VERIFIED: train_64x64.tar, valid_64x64.tar" in data.protocol


def test_imagenet_is_official_only_if_its_checksums_are(tmp_path, imagenet, monkeypatch):
    pytest.importorskip("PIL")
    members = png_members(imagenet["val_data.npz"][0], "v")
    for name in ("train_64x64.tar", "valid_64x64.tar"):
        tar_of(tmp_path / name, members, "w")
        monkeypatch.setitem(imagenet64.OFFICIAL, name,
                            hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert "verified by the sha256 of the archives" in load("imagenet64", tmp_path).protocol


def kinds_of_pictures():
    """name: (file, what a viewer shows (64, 64, 3))"""
    from PIL import Image

    ramp = np.arange(64 * 64, dtype=np.int64).reshape(64, 64)
    grey = (ramp * 16).astype(np.uint16)
    colours = np.stack([ramp % 256, ramp // 16, ramp % 7 * 30], -1).astype(np.uint8)
    alpha = np.where(ramp % 2, 255, 0).astype(np.uint8)
    clear = np.where(ramp[..., None] % 2, colours, 255)
    palette = Image.fromarray((ramp % 3).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    three = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: the camera's right is up
    shown = {0: [255, 255, 255], 1: three[1], 2: three[2]}
    return {
        "16 bit": (png(grey), np.repeat(np.rint(grey / 257)[..., None], 3, -1)),
        "8 bit": (png((ramp % 256).astype(np.uint8)), np.repeat((ramp % 256)[..., None], 3, -1)),
        "1 bit": (png(Image.fromarray(ramp % 2 == 1)),
                  np.repeat((ramp % 2 * 255)[..., None], 3, -1)),
        "transparent": (png(np.dstack([colours, alpha])), clear),
        "grey, transparent": (png(Image.fromarray(np.dstack([colours[..., 0], alpha]), "LA")),
                              np.where(ramp[..., None] % 2, colours[..., :1], 255).repeat(3, -1)),
        "palette": (png(palette), three[ramp % 3]),
        "palette, transparent": (png(palette, transparency=0), np.array(
            [shown[i] for i in (ramp % 3).reshape(-1)]).reshape(64, 64, 3)),
        "turned": (png(colours, exif=exif), np.rot90(colours, -1)),
        "plain": (png(colours), colours)}


def test_kinds_of_png(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(imagenet64, "HOLD_OUT", 2)
    pictures = kinds_of_pictures()
    names = [f"{i}.png" for i in range(100)]
    files = {name: content for name, (content, _) in zip(names, pictures.values(), strict=False)}
    tar_of(tmp_path / "valid_64x64.tar", files, "w")
    tar_of(tmp_path / "train_64x64.tar", files, "w")
    data = load("imagenet64", tmp_path)
    for (name, (_, want)), row in zip(pictures.items(), data.splits["test"], strict=True):
        assert (row.reshape(64, 64, 3) == want).all(), name
    for name, (content, want) in pictures.items():  # one's own, to complete or to explore
        (tmp_path / "own.png").write_bytes(content)
        assert (read_picture(tmp_path / "own.png", 64) == want).all(), name


def test_a_picture_from_a_pipe(tmp_path):
    pytest.importorskip("PIL")
    os.mkfifo(tmp_path / "own.png")
    with pytest.raises(UserError, match="own.png: no such file, or none that can be read twice"):
        read_picture(tmp_path / "own.png", 64)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content))


def test_pictures_that_would_unpack_to_gigabytes(tmp_path):
    pytest.importorskip("PIL")
    good = png(np.zeros((64, 64, 3), np.uint8))
    tar_of(tmp_path / "valid_64x64.tar", {"a.png": good}, "w")
    start, rest, zeros = good[:33], good[33:], b"x\0\0" + zlib.compress(bytes(10 ** 8))
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 10 ** 5, 10 ** 5, 8, 2, 0, 0, 0))
    for bad in (good[:8] + huge + rest, start + chunk(b"iCCP", zeros) + rest,
                start + chunk(b"zTXt", zeros) + rest, good + bytes(2 * 10 ** 6), good[:-20],
                good.replace(b"IEND", b"IENX")):
        tar_of(tmp_path / "train_64x64.tar", {"a.png": bad, "b.png": bad}, "w")
        try:
            data = load("imagenet64", tmp_path)
            assert not any(split.any() for split in data.splits.values())
        except UserError as e:
            assert "\n" not in str(e)


def test_imagenet_bad_png(tmp_path, imagenet):
    pytest.importorskip("PIL")
    good = png_members(imagenet["val_data.npz"][0], "valid_64x64")
    tar_of(tmp_path / "valid_64x64.tar", good, "w")
    small = png(np.zeros((32, 32, 3), np.uint8))
    for bad in (small, b"text", next(iter(good.values()))[:200]):
        tar_of(tmp_path / "train_64x64.tar", {"a.png": bad}, "w")
        with pytest.raises(UserError, match="a.png is no 64 x 64 PNG"):
            load("imagenet64", tmp_path)
    tar_of(tmp_path / "train_64x64.tar", good, "w")
    whole = (tmp_path / "train_64x64.tar").read_bytes()
    (tmp_path / "train_64x64.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or cut short"):
        load("imagenet64", tmp_path)


def test_imagenet_empty_split(tmp_path, imagenet):
    pytest.importorskip("PIL")
    tar_of(tmp_path / "valid_64x64.tar", png_members(imagenet["val_data.npz"][0], "v"), "w")
    tar_of(tmp_path / "train_64x64.tar", {}, "w")
    with pytest.raises(UserError, match="no images"):
        load("imagenet64", tmp_path)


def test_imagenet_png_needs_pillow(tmp_path, imagenet, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for name in ("train_64x64.tar", "valid_64x64.tar"):
        tar_of(tmp_path / name, {"a.png": b"x"}, "w")
    with pytest.raises(UserError, match="pip install pillow"):
        load("imagenet64", tmp_path)


def test_imagenet_download_says_where_to_ask():
    with pytest.raises(UserError, match="image-net.org"):
        main(["imagenet64", "--download"])


def test_interleave():
    planes = np.array([[1, 2, 3, 4, 10, 20, 30, 40, 100, 101, 102, 103]], np.uint8)
    assert interleave(planes).tolist() == [[1, 10, 100, 2, 20, 101, 3, 30, 102, 4, 40, 103]]
