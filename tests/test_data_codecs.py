"""Codecs by name: what a run folder keeps is enough to read its text again."""

import json
import shutil
import sys

import numpy as np
import pytest

import rt_scratch.data
from rt_scratch.data import DATASETS, codecs, load, open_codec, outline, present, saved_codec
from rt_scratch.data.table import Row
from rt_scratch.errors import UserError

MINE = '''
import numpy as np
from rt_scratch.data.codecs import CODECS, open_codec
from rt_scratch.data.dataset import Dataset


def alphabet(file):
    letters = file.read_bytes()
    return (lambda text: np.array([letters.index(b) for b in text], np.uint8),
            lambda ids: bytes(letters[i] for i in ids))


CODECS["mine"] = alphabet


def load(folder):
    codec = open_codec("mine", folder / "letters")
    ids = codec.encode((folder / "text").read_bytes())
    splits = {"train": ids[:-8], "valid": ids[-8:-4], "test": ids[-4:]}
    return Dataset("mine", "text", 4, "ppl/token", splits, "letters of DNA", codec=codec)
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A dataset with its own alphabet: one file and one row, and nothing else."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(MINE)
    monkeypatch.setattr(rt_scratch.data, "__path__",
                        [*rt_scratch.data.__path__, str(tmp_path / "code")])
    monkeypatch.setitem(DATASETS, "mine", Row("letters of DNA", 4))
    (tmp_path / "letters").write_bytes(b"TGCA")
    (tmp_path / "text").write_bytes(b"GATTACA" * 4)
    yield tmp_path
    forget()


def forget():
    """As in a process that has only started: the module is not imported."""
    sys.modules.pop("rt_scratch.data.mine", None)
    vars(rt_scratch.data).pop("mine", None)
    codecs.CODECS.pop("mine", None)


def run_folder(codec, folder):
    """(config, folder) of a run, as a sampling process finds them."""
    folder.mkdir()
    if codec.file:
        shutil.copyfile(codec.file, folder / codec.file.name)
    return json.loads(json.dumps(codec.to_config())), folder


def test_a_dataset_with_its_own_alphabet_is_one_file_and_one_row(mine):
    data = load("mine", mine)
    assert data.splits["train"].tolist()[:7] == [1, 3, 0, 0, 3, 2, 3]
    assert data.codec.decode(data.codec.encode(b"GATTACA")) == b"GATTACA"
    assert outline("mine").vocab_size == data.vocab_size == 4
    assert present("mine", mine) and not present("mine", mine / "none")
    config, folder = run_folder(data.codec, mine / "run")
    assert config == {"codec": "mine", "codec_file": "letters"}
    (mine / "letters").unlink()
    forget()
    codec = saved_codec(config, folder)
    assert codec.decode(np.array([1, 3, 0, 0, 3, 2, 3])) == b"GATTACA"
    assert codec.encode(b"TAG").tolist() == [0, 3, 1]
    assert codec.to_config() == config


def test_its_codec_goes_with_its_row(mine, monkeypatch):
    config, folder = run_folder(load("mine", mine).codec, mine / "run")
    forget()
    monkeypatch.delitem(DATASETS, "mine")
    with pytest.raises(UserError, match="mine: no such codec; there are bytes, words, subwords"):
        saved_codec(config, folder)


def test_nothing_to_download_says_what_to_do(mine):
    for name in ("mine", "stdlib"):
        with pytest.raises(UserError, match=f"{name}: nothing to download; leave out --download"):
            rt_scratch.data.fetch(name, mine)


def write_words(folder):
    (folder / "vocab.txt").write_bytes(b"<eos>\n<unk>\nthe\ncat")
    return open_codec("words", folder / "vocab.txt")


def write_subwords(folder):
    pytest.importorskip("tokenizers")
    codecs.train_subwords([b"the cat and the hat"], 300, folder / "tokenizer.json")
    return open_codec("subwords", folder / "tokenizer.json")


@pytest.mark.parametrize("make", [lambda folder: open_codec("bytes"), write_words, write_subwords])
def test_run_folders_old_and_new(tmp_path, make):
    codec = make(tmp_path)
    config, folder = run_folder(codec, tmp_path / "run")
    for saved in (config, {"codec": config["codec_file"]}):  # the latter before codecs had names
        again = saved_codec(saved, folder)
        assert again.to_config() == config
        assert again.encode(b"the cat").tolist() == codec.encode(b"the cat").tolist()
        assert again.decode(codec.encode(b"the cat")).strip() == b"the cat"


@pytest.mark.parametrize("config, message", [
    ({"codec": "morse", "codec_file": None}, "morse: no such codec; there are bytes, words"),
    ({"codec": "enwik8", "codec_file": None}, "enwik8: no such codec"),
    ({"codec": "words", "codec_file": "gone.txt"}, "gone.txt: missing; a run folder needs it"),
    ({"codec": "words", "codec_file": None}, "not a list of words"),
    ({"codec": "words", "codec_file": "../secret"}, "run/secret: missing"),
    ({"codec": ["words"], "codec_file": 3}, "no such codec"),
    ({"codec": "alphabet.bin"}, "alphabet.bin: no such codec"),
    ({"codec": 7}, "7: missing")])
def test_configs_that_name_no_codec(tmp_path, config, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "secret").write_bytes(b"<eos>\n<unk>")
    with pytest.raises(UserError, match=message) as e:
        saved_codec(config, tmp_path / "run")
    assert "\n" not in str(e.value)
