"""The subwords of the released PG-19 model: tensor2tensor's subword encoder, read and applied.

A vocabulary file has one subword a line, in quotes; the number of its line, from 0, is its id. Two
ids are not text: 0 is padding, 1 ends a sequence. A line of text becomes ids in four steps:

1. Cut it into runs of letters and digits (Unicode categories L and N) and runs of anything else. A
   run of one space inside the line is dropped: two neighbouring runs of letters imply it.
2. Escape each run: a backslash becomes `\\\\`, an underscore `\\u`, a character that no subword has
   `\\N;` with its code point N, and an underscore marks the end.
3. Take subwords from the left, each time the longest of the vocabulary.
4. Put the ids of all runs one after another.

The released pipeline strips each line and encodes it by itself: line breaks are not tokens, and
decoding joins lines as it joins runs, with a space only between letters or digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from rt_scratch.data.cache import smallest_type
from rt_scratch.errors import UserError

RELEASED = "tensor2tensor"          # their row in codecs.py
PADDING, END = 0, 1
RESERVED = ["<pad>", "<EOS>"]       # what the file calls them, in some versions with an underscore
ESCAPES = "\\_u;0123456789"         # needed to spell what the vocabulary lacks
UNDEFINED = "\u3013"                # an escape that is no character decodes to this
REMEMBERED = 1 << 20                # runs whose ids are kept: more than a library of books has
_RUNS = re.compile(r"[^\W_]+|[\W_]+")  # `\w` is categories L and N and the underscore
_ESCAPED = re.compile(r"\\u|\\\\|\\([0-9]+);")


class Subwords:
    """A vocabulary: `encode` bytes to ids, `decode` ids to bytes."""

    def __init__(self, subwords: list[str]):
        self.subwords = subwords
        self.dtype = smallest_type(len(subwords))
        self._ids = _Ids(subwords)

    def __len__(self) -> int:
        return len(self.subwords)

    def encode_line(self, line: str) -> list[int]:
        """Ids of one line as it stands, without its line break."""
        runs = _RUNS.findall(line)
        if " " in (inner := runs[1:-1]):
            runs[1:-1] = [run for run in inner if run != " "]
        ids, known = [], self._ids
        for run in runs:
            ids += known[run]
        return ids

    def encode(self, text: bytes) -> np.ndarray:
        """Ids (n,) of a text: each line stripped, encoded by itself. Not UTF-8 counts as U+FFFD."""
        lines = text.decode("utf-8", "replace").split("\n")
        return np.array([i for line in lines for i in self.encode_line(line.strip())], self.dtype)

    def decode(self, ids) -> bytes:
        """Text of ids (n,) that follow each other; 0, 1 and ids out of range are no text.

        Nor is an escape that the last id leaves unfinished.
        """
        n = len(self.subwords)
        escaped = "".join([self.subwords[i] for i in np.asarray(ids).tolist() if END < i < n])
        runs = [_ESCAPED.sub(_unescape, run) for run in _whole(escaped).split("_") if run]
        pieces, before = [], False
        for run in runs:
            if before and run[0].isalnum():
                pieces.append(" ")
            pieces.append(run)
            before = run[0].isalnum()
        return "".join(pieces).encode("utf-8", "replace")

    def sequences(self, lines: Iterable[str], length: int) -> Iterator[tuple[list[int], int]]:
        """Lines packed into sequences of at most `length` ids, each ended by id 1 (released code),
        and the words between white space of the lines in each.

        A line goes into the sequence while the ids with it are fewer than `length`, else it opens
        the next; a line that is longer than a sequence is cut, where the released code drops what
        is too much, and its words are counted in its last piece.
        """
        now: list[int] = []
        words = 0
        for line in lines:
            ids = self.encode_line(line.strip())
            if len(now) + len(ids) >= length:
                if now:
                    yield [*now, END], words
                while len(ids) >= length:
                    yield [*ids[: length - 1], END], 0
                    ids = ids[length - 1 :]
                now, words = [], 0
            now += ids
            words += len(line.split())
        if now:
            yield [*now, END], words


def released_codec(file: Path):
    """(encode, decode, True, 1): see Codec. Text shows runs that are cut as far as they go."""
    subwords = read_vocabulary(file)
    return subwords.encode, subwords.decode, True, END


def read_vocabulary(path: str | Path) -> Subwords:
    """The vocabulary in a file; UserError if the file is missing or no such vocabulary."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; --vocab names the vocabulary file, "
                        "one subword a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a vocabulary of subwords (not UTF-8 at byte "
                        f"{error.start})") from error
    lines = text.split("\n")
    subwords = [_unquoted(line.strip()) for line in lines[: len(lines) - (lines[-1] == "")]]
    if [s.rstrip("_") for s in subwords[:2]] != RESERVED:
        raise UserError(f"{path}: not a vocabulary of subwords: it should begin with the lines "
                        "'<pad>_' and '<EOS>_'")
    return Subwords(subwords)


class _Ids(dict):
    """run -> its ids; a run that is new is cut into subwords and remembered."""

    def __init__(self, subwords):
        super().__init__()
        self.number = {s: i for i, s in enumerate(subwords) if s}
        self.alphabet = {*"".join(subwords), *ESCAPES} - {"\n"}
        self.longest = max(map(len, subwords))

    def __missing__(self, run):
        if len(self) >= REMEMBERED:
            self.clear()
        spelt = run.replace("\\", "\\\\").replace("_", "\\u")
        spelt = "".join([c if c in self.alphabet else f"\\{ord(c)};" for c in spelt]) + "_"
        ids, start = [], 0
        while start < len(spelt):
            end = min(len(spelt), start + self.longest)
            while spelt[start:end] not in self.number:
                end -= 1
                if end == start:  # a whole vocabulary has every character of its own
                    raise UserError(f"the vocabulary cannot spell {spelt[start]!r}, so it is not "
                                    "whole: fetch it again")
            ids.append(self.number[spelt[start:end]])
            start = end
        self[run] = ids
        return ids


def _unquoted(line):
    """A subword as the file has it: in quotes of either kind, or bare."""
    if len(line) > 1 and line[0] == line[-1] and line[0] in "'\"":
        return line[1:-1]
    return line


def _whole(escaped):
    """Without a last escape that is not finished: an odd backslash, digits without semicolon."""
    before = escaped.rstrip("0123456789")
    if (len(before) - len(before.rstrip("\\"))) % 2:
        return before[:-1]
    return escaped


def _unescape(match):
    if match[1] is None:
        return "_" if match[0] == "\\u" else "\\"
    try:
        return chr(int(match[1]))
    except (ValueError, OverflowError):
        return UNDEFINED
