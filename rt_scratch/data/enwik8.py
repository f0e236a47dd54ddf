"""enwik8: the first 10^8 bytes of an English Wikipedia dump of 2006, as bytes.

The usual splits, by bytes: the first 90 million train, the next 5 valid, the last 5 test. Scores
are bits per byte; papers that print "bits per character" mean the same number.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from rt_scratch.data.cache import ArrayFile, cached
from rt_scratch.data.dataset import Dataset, byte_dataset
from rt_scratch.data.download import Source
from rt_scratch.data.files import chunks, find, missing, opened
from rt_scratch.errors import UserError

SOURCE = Source(
    "enwik8.zip", ("http://mattmahoney.net/dc/enwik8.zip",), 36_445_475,
    "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc")
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"  # of the text
SIZES = {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}


def load(folder: Path) -> Dataset:
    """From `enwik8` or `enwik8.zip`; UserError unless it is exactly the official text."""
    found = find(folder, ["enwik8"], archives=["enwik8.zip"])
    if not found:
        raise missing(folder, "enwik8, alone or in enwik8.zip", SOURCE.origin(), dataset="enwik8")
    location = found["enwik8"]
    recipe = {"sizes": SIZES, "sha256": SHA256}
    data = cached(folder, "enwik8", "enwik8", recipe, [location.path],
                  lambda new: _cut(location, new))
    counts = ", ".join(f"{split} {n:,}" for split, n in SIZES.items())
    protocol = f"bits per byte on enwik8; official splits in bytes: {counts}; sha256 {SHA256[:12]}"
    return byte_dataset("enwik8", data.arrays, protocol)


def _cut(location, new):
    digest, at, expected = hashlib.sha256(), 0, sum(SIZES.values())
    with ExitStack() as stack:
        files = {split: stack.enter_context(ArrayFile(new / f"{split}.npy", np.uint8))
                 for split in SIZES}
        stream = stack.enter_context(opened(location))
        for chunk in chunks(stream):
            digest.update(chunk)
            end = 0
            for split, size in SIZES.items():
                first, end = end, end + size
                part = chunk[max(first - at, 0) : max(end - at, 0)]
                files[split].append(np.frombuffer(part, np.uint8))
            at += len(chunk)
            if at > expected:
                break
    if at != expected:
        more = "or more " if at > expected else ""
        raise UserError(f"{location.path}: {at:,} bytes {more}of text; enwik8 has {expected:,}. To "
                        "use another text, give its unpacked file instead of the name enwik8")
    if digest.hexdigest() != SHA256:
        raise UserError(f"{location.path}: not the official enwik8, its sha256 is "
                        f"{digest.hexdigest()[:12]}..., not {SHA256[:12]}...; fetch it again")
    return {}
