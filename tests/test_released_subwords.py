"""The subword codec against what the original code wrote (golden/T_subwords), and its packing."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch.data.released_subwords import read_vocabulary
from rt_scratch.errors import UserError

FILE = Path(__file__).parent / "golden" / "T_subwords.subwords"
GOLDEN = json.loads(FILE.with_suffix(".json").read_text("utf-8"))
SUBWORDS = read_vocabulary(FILE)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=range(len(GOLDEN["cases"])))
def test_as_the_original(case):
    assert SUBWORDS.encode_line(case["text"]) == case["ids"]
    assert SUBWORDS.decode(case["ids"]).decode() == case["decoded"]


def test_size():
    assert len(SUBWORDS) == GOLDEN["vocab_size"]
    assert SUBWORDS.subwords[:5] == GOLDEN["first"]


def test_the_longest_subword_is_taken():
    """A run that is a subword is that subword, however long."""
    whole = [(i, SUBWORDS.decode([i]).decode()) for i, subword in enumerate(SUBWORDS.subwords)
             if i > 1 and subword.endswith("_")]
    tried = [(i, text) for i, text in whole if text and len({c.isalnum() for c in text}) == 1]
    assert len(tried) > 500 and max(len(text) for _, text in tried) > 60
    assert [SUBWORDS.encode_line(text) for _, text in tried] == [[i] for i, _ in tried]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_one_line_round_trip(text):
    assert SUBWORDS.decode(SUBWORDS.encode_line(text)).decode() == text


def test_lines_are_stripped_and_joined():
    """No id stands for a line break: words get a space, after a sign there is none."""
    ids = SUBWORDS.encode(b"  one two \r\n\r\nthree.\n\tFour\n")
    assert ids.tolist() == sum(map(SUBWORDS.encode_line, ["one two", "three.", "Four"]), [])
    assert SUBWORDS.decode(ids) == b"one two three.Four"


def test_what_is_no_text():
    ids = [0, *SUBWORDS.encode_line("cat"), 1, 0, len(SUBWORDS), *SUBWORDS.encode_line("dog")]
    assert SUBWORDS.decode(np.array(ids)) == b"cat dog"
    assert SUBWORDS.decode([]) == b""


@given(st.lists(st.text("ab .", max_size=12), max_size=12), st.integers(2, 9))
def test_packing(lines, length):
    """Nothing is lost, no sequence is too long, and none could have taken one more line."""
    pairs = list(SUBWORDS.sequences(lines, length))
    sequences = [ids for ids, _ in pairs]
    assert sum(words for _, words in pairs) == len(" ".join(lines).split())
    encoded = [SUBWORDS.encode_line(line.strip()) for line in lines]
    assert all(s[-1] == 1 and 1 not in s[:-1] and len(s) <= length for s in sequences)
    assert sum([s[:-1] for s in sequences], []) == sum(encoded, [])
    if all(len(ids) < length for ids in encoded):
        assert sequences == by_hand(encoded, length)


def by_hand(encoded, length):
    """The rule itself, line by line: fewer than `length` ids, then id 1."""
    sequences, now = [], []
    for ids in encoded:
        if len(now) + len(ids) < length:
            now = now + ids
        else:
            sequences.append([*now, 1])
            now = ids
    return [s for s in [*sequences, [*now, 1]] if s != [1]]


@pytest.mark.parametrize("quote", ["'", '"', ""])
def test_quotes(tmp_path, quote):
    path = tmp_path / "vocabulary"
    pieces = ["<pad>", "<EOS>", "cat_", *"\\_u;0123456789act"]
    path.write_text("\n".join(f"{quote}{p}{quote}" for p in pieces))
    subwords = read_vocabulary(path)
    assert subwords.encode(b"cat").tolist() == [2]
    assert len(subwords) == len(pieces)


@pytest.mark.parametrize("content, message", [
    (None, "No such file"),
    (b"\xff\xfe", "not UTF-8"),
    (b"", "should begin"),
    (b"'a'\n'b'\n", "should begin"),
    (b"'<pad>_'\n'<EOS>_'\n'a'\n", "cannot spell '_'")])
def test_not_a_vocabulary(tmp_path, content, message):
    path = tmp_path / "vocabulary"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_vocabulary(path).encode(b"a")
