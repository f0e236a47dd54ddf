"""PG-19: books published before 1919, from Project Gutenberg (Rae et al. 2020).

Each book is a boundary token and its text in subwords, trained here on train (codecs.py); books
follow each other in the order of their numbers. Scores are perplexity per word: exp(total nats /
words), words being those of the original text between white space, so that models with different
subwords compare. (The released code has a fixed factor instead, 1.248 on log-perplexity, which
holds for its own subwords.) The nats of boundary tokens count, but boundary tokens are not words.

A converted run (released.py) brings its own subwords: `load_packed`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import sys
import urllib.parse
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rt_scratch.data.cache import ArrayFile, cached, smallest_type
from rt_scratch.data.codecs import (
    BOUNDARY,
    PIECES,
    Codec,
    encode_subwords,
    open_codec,
    train_subwords,
)
from rt_scratch.data.dataset import Dataset
from rt_scratch.data.download import Source, check_space, fetch, get
from rt_scratch.data.files import digest_of, missing
from rt_scratch.data.released_subwords import PADDING, read_vocabulary
from rt_scratch.errors import UserError

SAMPLE_BYTES = 200_000_000  # of train text that the subwords are trained on
BATCH_BYTES = 8_000_000    # of text encoded at a time
FOLDERS = {"train": "train", "valid": "validation", "test": "test"}
BOOKS = {"train": 28_602, "valid": 50, "test": 100}
METADATA = Source(
    "metadata.csv", ("https://storage.googleapis.com/deepmind-gutenberg/metadata.csv",),
    2_737_447,
    "sha256:fbb2fdb48522927b2e16aa52950f2afeb83c6fa8fed45f0c3dd834e9bc9b43b9")
LISTING = "https://storage.googleapis.com/storage/v1/b/deepmind-gutenberg/o"
ADDRESS = "https://storage.googleapis.com/deepmind-gutenberg/"
ORIGIN = f"28,752 books ID.txt (11,739.7 MB) come from {ADDRESS}"
CONNECTIONS = 8            # books are small: one at a time would mostly wait
MAX_PAGES = 1000           # of the list; there are 31


def load(folder: Path, vocab_size: int) -> Dataset:
    """From train/, validation/ and test/ID.txt; any number of books, the protocol says how many."""
    books = {split: _books(folder / name) for split, name in FOLDERS.items()}
    if not all(books.values()):
        empty = [FOLDERS[split] for split, paths in books.items() if not paths]
        raise missing(folder, f"books ID.txt in {' and '.join(f + '/' for f in empty)}", ORIGIN,
                      dataset="pg19")
    recipe = {"vocab_size": vocab_size, "sample_bytes": SAMPLE_BYTES, "pieces": PIECES}
    data = cached(folder, "pg19", f"pg19-{vocab_size}", recipe,
                  [path for paths in books.values() for path in paths],
                  lambda new: _encode(books, vocab_size, new))
    codec = open_codec("subwords", data.folder / "tokenizer.json")
    words = data.info["words"]
    counts = "; ".join(
        f"{split} {len(books[split]):,} of {BOOKS[split]:,} books, {words[split]:,} words, "
        f"{len(data.arrays[split]):,} tokens" for split in FOLDERS)
    protocol = (f"perplexity per word (exp of total nats / words of the original text between "
                f"white space); {counts}; V {vocab_size:,}, of which {data.info['subwords']:,} "
                f"are used, tokenizer sha256 {digest_of(codec.file)[:12]}; tokens sha256 "
                f"{data.sha256[:12]}")
    return Dataset(
        "pg19", "text", vocab_size, "ppl/word", data.arrays, protocol, units=words, codec=codec,
        words=lambda split, start, stop: count_words(codec, data.arrays[split], start, stop))


def count_words(codec: Codec, tokens: np.ndarray, start: int, stop: int) -> int:
    """Words that begin in tokens start .. stop - 1; over all tokens, the words of their text.

    It is W(stop) - W(start), W(i) being the words of the first i tokens, each counted from the
    last token at or before `start` that begins with white space or is a boundary: what stands
    before that is the same in both.
    """
    def count(stop):
        books = np.split(tokens[first:stop], np.flatnonzero(tokens[first:stop] == BOUNDARY))
        return sum(len(codec.decode(book).decode("utf-8", "replace").split()) for book in books)

    if start >= stop:
        return 0
    first = start
    while first and tokens[first] != BOUNDARY and not codec.decode(tokens[first : first + 1])[
            :1].isspace():
        first -= 1
    return count(stop) - count(start)


def load_packed(folder: Path, codec: Codec, length: int) -> Dataset:
    """The books in the subwords of a released model, prepared as its authors did.

    Lines are packed into sequences of at most T ids, the last one id 1 (released_subwords.py), book
    after book; each is filled up to T = `length` with id 0, which is not scored. Training windows
    are such sequences. A split is encoded when it is first asked for, so that scoring test needs
    the books of test alone; the sha256 of the protocol is that of all books here, which with the
    subwords and T decide the tokens. The authors take the books in the order of their folder, this
    in the order of numbers.
    """
    if not folder.is_dir():
        raise missing(folder, "books ID.txt in test/", ORIGIN, dataset="pg19")
    books = {split: _books(folder / name) for split, name in FOLDERS.items()}
    subwords, digest = read_vocabulary(codec.file), digest_of(codec.file)

    @functools.cache
    def packed(split):
        paths = books[split]
        if not paths:
            raise missing(folder, f"books ID.txt in {FOLDERS[split]}/", ORIGIN, dataset="pg19")
        return cached(folder, "pg19", f"pg19-{digest[:12]}-{length}-{split}",
                      {"vocabulary": digest, "length": length}, paths,
                      lambda new: _pack(paths, subwords, length, new / f"{split}.npy"))

    sources = [path for paths in books.values() for path in paths]
    sums = cached(folder, "pg19", "pg19-books", {}, sources, lambda new: {}).sources
    text = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    here = "; ".join(f"{split} {len(books[split]):,} of {BOOKS[split]:,} books" for split in books)
    protocol = (f"perplexity per word (exp of total nats / words of the original text between "
                f"white space); {here}, sha256 {text[:12]}; {len(subwords):,} subwords of "
                f"{codec.file.name}, sha256 {digest[:12]}, lines packed into sequences of at most "
                f"{length:,}")
    return Dataset(
        "pg19", "text", len(subwords), "ppl/word", _Lazy(lambda s: packed(s).arrays[s]), protocol,
        pad_id=PADDING, units=_Lazy(lambda s: packed(s).info["words"]),
        words=lambda split, start, stop: count_packed_words(
            packed(split).arrays[split], packed(split).arrays["words"], start, stop),
        counted=_Lazy(lambda s: packed(s).info["tokens"]), aligned=True,
        tokens=f"subwords of {codec.file.name}", codec=codec)


def count_packed_words(tokens: np.ndarray, words: np.ndarray, start: int, stop: int) -> int:
    """Words in tokens start .. stop - 1 of packed sequences (T), which hold so many `words` each.

    Decoded lines are joined without the space that a line break was, so words cannot be counted in
    the decoded text. Those of a sequence that is cut are taken in proportion to its tokens.
    """
    length = len(tokens) // len(words)

    def count(stop):
        whole, rest = divmod(stop, length)
        n = int(words[:whole].sum())
        if rest:
            real = np.count_nonzero(tokens[whole * length : (whole + 1) * length] != PADDING)
            n += int(words[whole]) * min(rest, real) // real
        return n

    return count(stop) - count(start)


class _Lazy(Mapping):
    """split -> make(split)."""

    def __init__(self, make):
        self._make = make

    def __getitem__(self, split):
        if split not in FOLDERS:
            raise KeyError(split)
        return self._make(split)

    def __iter__(self):
        return iter(FOLDERS)

    def __len__(self):
        return len(FOLDERS)


def _pack(paths, subwords, length, file):
    words, tokens = 0, 0
    lines = (line for path in tqdm(paths, desc=f"encoding {file.stem}", unit=" books", disable=None)
             for line in path.read_bytes().decode("utf-8", "replace").split("\n"))
    with (ArrayFile(file, subwords.dtype) as out,
          ArrayFile(file.with_name("words.npy"), np.uint32) as counts):
        for ids, n_words in subwords.sequences(lines, length):
            words, tokens = words + n_words, tokens + len(ids)
            out.append(ids + [PADDING] * (length - len(ids)))
            counts.append([n_words])
    if not words:
        raise UserError(f"{paths[0].parent}: the books of {file.stem} are empty")
    return {"words": words, "tokens": tokens}


def download(folder: Path) -> None:
    """All 28,752 books, 11.7 GB, several at a time; those already here are only verified."""
    books = [book for name in FOLDERS.values() for book in _listing(name)]
    total = sum(book.size for book in books)
    here = sum(book.size for book in books if (folder / book.name).is_file())
    print(f"downloading {len(books):,} books, {total / 1e6:,.1f} MB, of which {here / 1e6:,.1f} MB "
          f"are already here, into {folder}", file=sys.stderr)
    for name in FOLDERS.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    check_space(folder, total - here)
    fetch(METADATA, folder)
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            jobs = [pool.submit(fetch, book, folder, quiet=True) for book in books]
            for job, book in zip(jobs, books, strict=True):
                job.result()
                bar.update(book.size)
    finally:
        pool.shutdown(cancel_futures=True)


def _listing(name):
    """Sources of the books of a split, with size and md5, from the bucket's own listing."""
    books, token = [], ""
    for _ in range(MAX_PAGES):
        query = urllib.parse.urlencode({"prefix": f"{name}/", "pageToken": token})
        try:
            page = json.loads(get(f"{LISTING}?{query}"))
            for item in page.get("items", []):
                if re.fullmatch(rf"{name}/\d+\.txt", item["name"]):
                    md5 = base64.b64decode(item["md5Hash"]).hex()
                    if len(md5) != 32:
                        raise ValueError(f"{item['md5Hash']!r} is no md5")
                    books.append(Source(item["name"], (ADDRESS + item["name"],),
                                        int(item["size"]), f"md5:{md5}"))
            token = page.get("nextPageToken", "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{LISTING}: the list of books is not in the form expected "
                            f"({e!r})") from e
        if not token:
            break
    if not books or token:
        raise UserError(f"{LISTING}: lists {'no' if not books else 'no end of'} books in {name}/")
    return books


def _books(folder):
    """Files ID.txt in the order of their numbers."""
    return sorted((p for p in folder.glob("*.txt") if p.stem.isdecimal() and p.is_file()),
                  key=lambda p: (int(p.stem), p.name))


def _encode(books, vocab_size, new):
    path = new / "tokenizer.json"
    train_subwords((p.read_bytes() for p in _sample(books["train"])), vocab_size, path)
    info = {"words": {}, "subwords": len(json.loads(path.read_text("utf-8"))["model"]["vocab"]) + 1}
    for split, paths in books.items():
        words = []
        with ArrayFile(new / f"{split}.npy", smallest_type(vocab_size)) as out:
            for tokens in encode_subwords(path, _texts(paths, words, f"encoding {split}")):
                for book in tokens:
                    out.append([BOUNDARY])
                    out.append(book)
        info["words"][split] = sum(words)
        if not info["words"][split]:
            raise UserError(f"{paths[0].parent}: the books of {split} are empty")
    return info


def _sample(paths):
    """Train books in the order of a hash of their numbers, up to SAMPLE_BYTES."""
    size = 0
    for path in sorted(paths, key=lambda p: hashlib.sha256(p.stem.encode()).digest()):
        if size < SAMPLE_BYTES:
            size += path.stat().st_size
            yield path


def _texts(paths, words, what):
    """Lists of about BATCH_BYTES of books; appends the number of words of each to `words`."""
    some = []
    for path in tqdm(paths, desc=what, unit=" books", disable=None):
        some.append(path.read_bytes())
        words.append(len(some[-1].decode("utf-8", "replace").split()))
        if sum(map(len, some)) > BATCH_BYTES:
            yield some
            some = []
    if some:
        yield some
