"""Codecs: text to token ids and back, in one table by name.

The name of a codec and its file are all that is needed to open it again, so a run folder keeps
both and `sample.py` shows exactly what training shows. A dataset with an alphabet of its own adds
its function to the table from its own module, under its own name:

    CODECS["mine"] = alphabet       # alphabet(file) -> (encode, decode), see Codec
    data = Dataset(..., codec=open_codec("mine", file))
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rt_scratch.data.cache import smallest_type
from rt_scratch.data.released_subwords import RELEASED, released_codec
from rt_scratch.errors import UserError

EOS, UNK = b"<eos>", b"<unk>"  # the words that stand for a newline and for all unknown words
BOUNDARY = 0
PIECES = (r"[\r\n]+"
          r"| ?[A-Za-z\u0080-\u00ff]+(?:'[a-z]+)?"
          r"| ?[0-9]+"
          r"| ?[^ \t\r\n\f\vA-Za-z0-9\u0080-\u00ff]+"
          r"|[ \t\f\v]+(?![^ \t\r\n\f\v])"  # leaves the last space to the next word
          r"|[ \t\f\v]+")
MIN_VOCAB = 1 + 256  # boundary and bytes


class Codec(NamedTuple):
    """An open codec. decode(a + b) begins with decode(a), so text can be shown as it grows."""

    name: str                              # its row in CODECS
    file: Path | None                      # its alphabet; None where it needs none
    encode: Callable[[bytes], np.ndarray]  # text to ids (n,)
    decode: Callable[[np.ndarray], bytes]  # ids (n,) to text
    joins: bool = False                    # False: it is decode(a) + decode(b)
    end: int = -1                          # the id after which there is no more text; -1: none

    def to_config(self) -> dict[str, str | None]:
        """What config.json says of a codec; its file is copied into the run folder."""
        return {"codec": self.name, "codec_file": self.file and self.file.name}


def open_codec(name: str, file: Path | None = None) -> Codec:
    """The codec `name`, with the alphabet in `file`; UserError if it cannot be opened."""
    if name not in CODECS:
        raise UserError(f"{name}: no such codec; there are {', '.join(CODECS)}")
    if file is not None and not file.is_file():
        raise UserError(f"{file}: missing; a run folder needs it to read and write text")
    return Codec(name, file, *CODECS[name](file))


def byte_codec(file: None = None):
    """(encode, decode) of bytes: one id per byte, uint8."""
    return (lambda text: np.frombuffer(text, np.uint8),
            lambda tokens: np.asarray(tokens).astype(np.uint8).tobytes())


def word_codec(file: Path):
    """(encode, decode) of the words in a vocab.txt, one a line, in the order of their ids.

    encode splits at white space, maps unknown words to <unk> and each newline to <eos>. decode
    writes a space after each word, so that encode(decode(ids)) gives the ids again.
    """
    words = file.read_bytes().split(b"\n") if file else []
    ids = {word: i for i, word in enumerate(words)}
    if EOS not in ids or UNK not in ids:
        raise UserError(f"{file}: not a list of words with {EOS.decode()} and {UNK.decode()}")
    shown = [b"\n" if word == EOS else word + b" " for word in words]

    def encode(text: bytes) -> np.ndarray:
        tokens = []
        for i, line in enumerate(text.split(b"\n")):
            tokens += [ids[EOS]] * (i > 0) + [ids.get(w, ids[UNK]) for w in line.split()]
        return np.array(tokens, smallest_type(len(words)))

    def decode(tokens) -> bytes:
        tokens = np.asarray(tokens)
        if tokens.size and tokens.max() >= len(shown):
            raise UserError(f"{file}: has {len(shown):,} words, none for id {tokens.max():,}; it "
                            "was cut short, or belongs to other data")
        return b"".join([shown[t] for t in tokens.tolist()])

    return encode, decode


def subword_codec(file: Path):
    """(encode, decode) of a tokenizer file: decode(encode(text)) = text for any bytes.

    Ids that the tokenizer does not have (little training text, a larger V) decode to nothing.
    """
    tokenizer = _open_tokenizer(file)
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    dtype = smallest_type(len(vocab) + 1)

    def encode(text: bytes) -> np.ndarray:
        ids = tokenizer.encode(text.decode("latin-1"), add_special_tokens=False).ids
        return np.array([i + 1 for i in ids], dtype)

    def decode(tokens) -> bytes:
        return b"".join([shown.get(t, b"") for t in np.asarray(tokens).tolist()])

    every_byte = bytes(range(256))
    try:
        shown = {i + 1: piece.encode("latin-1") for piece, i in vocab.items()}
        if decode(encode(every_byte)) == every_byte and max(shown) == len(vocab):
            return encode, decode
    except Exception:  # the library raises no narrower type
        pass
    raise UserError(f"{file}: a tokenizer of another kind: it does not keep every byte of a text")


CODECS = {"bytes": byte_codec, "words": word_codec, "subwords": subword_codec,
          RELEASED: released_codec}


def train_subwords(texts: Iterable[bytes], vocab_size: int, path: Path) -> None:
    """Write a tokenizer of at most `vocab_size` ids, trained on the texts, to the file `path`.

    It is byte-level BPE (Sennrich et al. 2016) of the `tokenizers` library. For the library every
    byte is one character (Latin-1), so any bytes survive a round trip: CRLF, broken UTF-8,
    everything. Merges stay inside the pieces of `PIECES`: a line break, a word with the space
    before it, digits, punctuation. Bytes above 127 count as letters, because in UTF-8 they are
    parts of letters. Id 0 is the boundary between documents and stands for no text; the library's
    ids follow from 1. Little text gives fewer ids: pairs seen once are not merged.
    """
    if not MIN_VOCAB <= vocab_size < 2 ** 31:
        raise UserError(f"--vocab-size {vocab_size}: must be at least {MIN_VOCAB} and below 2^31")
    lib = _library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Split(lib.Regex(PIECES), "isolated")
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, show_progress=sys.stderr.isatty(),
        initial_alphabet=[chr(b) for b in range(256)])
    tokenizer.train_from_iterator((t.decode("latin-1") for t in texts), trainer)
    path.write_text(tokenizer.to_str(), encoding="utf-8")


def encode_subwords(path: Path, texts: Iterable[list[bytes]]) -> Iterator[list[np.ndarray]]:
    """Ids of each text, for lists of texts at a time, on all cores."""
    tokenizer = _open_tokenizer(path)
    dtype = smallest_type(tokenizer.get_vocab_size() + 1)
    for some in texts:
        encoded = tokenizer.encode_batch_fast([t.decode("latin-1") for t in some],
                                              add_special_tokens=False)
        yield [(np.array(e.ids, np.int64) + 1).astype(dtype) for e in encoded]


def _open_tokenizer(path):
    lib = _library()
    try:
        return lib.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises no narrower type
        raise UserError(f"{path}: not a tokenizer file ({' '.join(str(e).split())})") from e


def _library():
    try:
        import tokenizers
    except ImportError as e:
        raise UserError("subwords need the tokenizers library: pip install tokenizers, or "
                        "pip install 'rt_scratch[data]'") from e
    return tokenizers
