"""The five datasets, on small stand-ins in the layout of the official files."""

import hashlib
import io
import json
import re
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from rt_scratch.data import cifar10, enwik8, imagenet64, load, open_codec, pg19
from rt_scratch.data import wikitext103 as wikitext
from rt_scratch.data.__main__ import main
from rt_scratch.data.codecs import train_subwords
from rt_scratch.data.images import interleave
from rt_scratch.errors import UserError


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


@pytest.mark.parametrize("name", ["enwik8", "wikitext103", "pg19", "cifar10", "imagenet64"])
def test_data_that_are_not_there(tmp_path, name):
    with pytest.raises(UserError, match="--data-dir"):
        main([name])  # data/NAME does not exist
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        main([name, "--data-dir", str(tmp_path)])


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
    with pytest.raises(UserError, match="binary version, not the one for Python"):
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


def check_imagenet(data, train, test):
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
    (lambda x, y: npz_batch(x, np.array(y.tolist(), object)), "(?i)pickle|object"),
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


def zip_bytes(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in members.items():
            z.writestr(name, content)
    return out.getvalue()


def png(pixels):
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
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
    data = load("imagenet64", tmp_path)
    check_imagenet(data, train, test)
    assert data.labels is None
    assert data.n_classes == 0
    assert "older PNG version" in data.protocol
    (tmp_path / "val_data.npz").write_bytes(npz_batch(*imagenet["val_data.npz"]))
    (tmp_path / "train_data_batch_1.npz").write_bytes(npz_batch(*imagenet["val_data.npz"]))
    with pytest.raises(UserError, match="both versions"):
        load("imagenet64", tmp_path)


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
