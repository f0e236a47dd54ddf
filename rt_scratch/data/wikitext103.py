"""WikiText-103: Wikipedia articles, already cut into words by its authors.

Tokens are the words between spaces and one end-of-line token for every line, empty ones included;
that gives the official counts (217,646 valid, 245,569 test). The vocabulary is that of train, most
frequent first, then in the order of their bytes; `<unk>` is a word like others. WikiText-2 and any
other wiki.{train,valid,test}.tokens are read the same way, and the protocol says which it was.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rt_scratch.data.cache import ArrayFile, cached, smallest_type
from rt_scratch.data.codecs import EOS, UNK, open_codec
from rt_scratch.data.dataset import Dataset
from rt_scratch.data.download import Source
from rt_scratch.data.files import digest_of, find, missing, opened
from rt_scratch.errors import UserError

FILES = {split: f"wiki.{split}.tokens" for split in ("train", "valid", "test")}
LOCATIONS = [  # arguments of `find`: all three files come from one of these
    {},
    {"subfolders": ["wikitext-103"], "itself": False},
    {"archives": ["wikitext-103-v1.zip"], "itself": False},
    {"subfolders": ["wikitext-2"], "itself": False},
    {"archives": ["wikitext-2-v1.zip"], "itself": False},
]
SOURCE = Source(
    "wikitext-103-v1.zip",
    ("https://wikitext.smerity.com/wikitext-103-v1.zip",  # the other address often refuses
     "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip"), 190_229_076,
    "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590")
OFFICIAL = {  # sha1 of the files
    "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211": "WikiText-103 train",
    "c326ac59dc587676d58c422eb8a03e119582f92b": "WikiText-103 valid",
    "8a5befc548865cec54ed4273cf87dbbad60d1e47": "WikiText-103 test",
    "0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422": "WikiText-2 valid",
    "c7b8ce0aa086fb34dab808c5c49224211eb2b172": "WikiText-2 test",
}
RAW = "this is the raw edition; its words are cut in the other one"
RAWS = {pattern: RAW for pattern in ("wiki.*.raw", "wikitext-*-raw*")}
PIECE = 1 << 20  # tokens kept in memory before they are written
MAX_FILE = 10 ** 9  # bytes that a file in an archive may have; train has 541 million
MAX_LINE = 1 << 24  # bytes; an article's longest paragraph has a few thousand


def load(folder: Path) -> Dataset:
    """From the three files or the official zip; UserError on missing files and empty splits."""
    nearest = {}
    for location in LOCATIONS:
        found = find(folder, list(FILES.values()), **location)
        if len(found) == len(FILES):
            break
        nearest = max(nearest, found, key=len)
    else:
        absent = ", ".join(name for name in FILES.values() if name not in nearest)
        raise missing(folder, absent if nearest else f"{absent} (or {SOURCE.name} with them)",
                      SOURCE.origin(), RAWS, dataset="wikitext103")
    recipe = {"line": EOS.decode(), "unknown": UNK.decode(), "order": "frequency, bytes"}
    data = cached(folder, "wikitext103", "wikitext103", recipe,
                  {f.path for f in found.values()}, lambda new: _encode(found, new))
    codec = open_codec("words", data.folder / "vocab.txt")
    counts = "; ".join(
        f"{split} {len(data.arrays[split]):,} tokens "
        f"({OFFICIAL.get(sha1, f'not a WikiText-103 file, sha1 {sha1[:12]}')})"
        for split, sha1 in data.info["sha1"].items())
    protocol = (f"perplexity per word-level token, end-of-line tokens counted; {counts}; "
                f"V {data.info['words']:,} of train, sha256 {digest_of(codec.file)[:12]}; tokens "
                f"sha256 {data.sha256[:12]}")
    return Dataset("wikitext103", "text", data.info["words"], "ppl/token", data.arrays, protocol,
                   codec=codec)


def _encode(found, new):
    counts, sha1 = Counter(), {}
    for line in _lines(found[FILES["train"]], "counting words"):
        counts.update(line.split())
        counts[EOS] += 1
    counts.setdefault(UNK, 0)
    words = sorted(counts, key=lambda w: (-counts[w], w))
    (new / "vocab.txt").write_bytes(b"\n".join(words))
    ids = {word: i for i, word in enumerate(words)}
    for split, name in FILES.items():
        digest = hashlib.sha1()
        with ArrayFile(new / f"{split}.npy", smallest_type(len(words))) as out:
            tokens = []
            for line in _lines(found[name], f"encoding {split}"):
                digest.update(line)
                tokens += [ids.get(w, ids[UNK]) for w in line.split()]
                tokens.append(ids[EOS])
                if len(tokens) > PIECE:
                    out.append(tokens)
                    tokens = []
            out.append(np.array(tokens, int))
        if out.n == 0:
            raise UserError(f"{found[name].path}: {name} is empty")
        sha1[split] = digest.hexdigest()
    return {"words": len(words), "sha1": sha1}


def _lines(location, what):
    """Lines of a file, their newline included."""
    with (opened(location, MAX_FILE) as stream,
          tqdm(unit="B", unit_scale=True, desc=what, disable=None) as bar):
        while line := stream.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise UserError(f"{location.path}: a line of more than {MAX_LINE:,} bytes; this is "
                                "no WikiText")
            bar.update(len(line))
            yield line
