"""Byte-level subwords (BPE, Sennrich et al. 2016), trained and applied by the `tokenizers` library.

Every byte is one character (Latin-1) for the library, so any bytes survive a round trip: CRLF,
broken UTF-8, everything. Merges stay inside the pieces of `PIECES`: a line break, a word with the
space before it, digits, signs. Bytes above 127 count as letters, because in UTF-8 they are parts
of letters. Id 0 is the boundary between documents and stands for no text; the library's ids
follow from 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from rt_scratch.data.cache import smallest_type
from rt_scratch.errors import UserError

BOUNDARY = 0
PIECES = (r"[\r\n]+"
          r"| ?[A-Za-z\u0080-\u00ff]+(?:'[a-z]+)?"
          r"| ?[0-9]+"
          r"| ?[^ \t\r\n\f\vA-Za-z0-9\u0080-\u00ff]+"
          r"|[ \t\f\v]+(?![^ \t\r\n\f\v])"  # leaves the last space to the next word
          r"|[ \t\f\v]+")
MIN_VOCAB = 1 + 256  # boundary and bytes


def train(texts: Iterable[bytes], vocab_size: int, path: Path) -> None:
    """Write a tokenizer of at most `vocab_size` ids, trained on the texts, to the file `path`.

    Little text gives fewer ids: pairs seen once are not merged.
    """
    if vocab_size < MIN_VOCAB:
        raise UserError(f"--vocab-size {vocab_size}: subwords need at least {MIN_VOCAB}")
    if vocab_size >= 2 ** 31:
        raise UserError(f"--vocab-size {vocab_size}: must be below 2^31")
    lib = _library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Split(lib.Regex(PIECES), "isolated")
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, show_progress=False,
        initial_alphabet=[chr(b) for b in range(256)])
    tokenizer.train_from_iterator((t.decode("latin-1") for t in texts), trainer)
    path.write_text(tokenizer.to_str(), encoding="utf-8")


def encode_all(path: Path, texts: Iterable[list[bytes]]) -> Iterator[list[np.ndarray]]:
    """Ids of each text, for lists of texts at a time, on all cores."""
    tokenizer = _open(path)
    dtype = smallest_type(tokenizer.get_vocab_size() + 1)
    for some in texts:
        encoded = tokenizer.encode_batch_fast([t.decode("latin-1") for t in some],
                                              add_special_tokens=False)
        yield [(np.array(e.ids, np.int64) + 1).astype(dtype) for e in encoded]


def subword_codec(path: str | Path):
    """(encode, decode) of a tokenizer file.

    decode(encode(text)) = text for any bytes, and decode(a + b) = decode(a) + decode(b). Ids that
    the tokenizer does not have (little training text, a larger V) decode to nothing.
    """
    path = Path(path)
    tokenizer = _open(path)
    vocab = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    shown = {i + 1: piece.encode("latin-1") for piece, i in vocab.items()}

    def encode(text: bytes) -> np.ndarray:
        ids = tokenizer.encode(text.decode("latin-1"), add_special_tokens=False).ids
        return np.array([i + 1 for i in ids], smallest_type(len(vocab) + 1))

    def decode(tokens) -> bytes:
        return b"".join([shown.get(t, b"") for t in np.asarray(tokens).tolist()])

    return encode, decode


def _open(path):
    lib = _library()
    try:
        return lib.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises no narrower type
        raise UserError(f"{path}: not a tokenizer file ({e})") from e


def _library():
    try:
        import tokenizers
    except ImportError as e:
        raise UserError("subwords need the tokenizers library: pip install tokenizers, or "
                        "pip install 'rt_scratch[data]'") from e
    return tokenizers
