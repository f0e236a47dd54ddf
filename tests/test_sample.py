"""sample.py on runs of untrained models: text and images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sample
from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.data.codecs import CODECS, open_codec
from rt_scratch.data.dataset import byte_dataset
from rt_scratch.errors import UserError
from rt_scratch.run.checkpoint import Progress, save_state
from rt_scratch.run.folder import RunFolder, describe
from rt_scratch.step import new_state

ROOT = Path(__file__).parent.parent


def make_run(folder, cfg, codec=None):
    dataset = byte_dataset("stdlib", {}, "")
    if codec:
        dataset = dataset._replace(codec=codec)
    config = describe("stdlib", None, dataset, cfg.validate(), TrainConfig())
    RunFolder(folder, config, dataset.codec.file).close()
    save_state(folder / "last.npz", new_state(cfg, TrainConfig(), np), Progress(), config)
    return str(folder)


@pytest.fixture
def text_run(tmp_path):
    return make_run(tmp_path / "text", ModelConfig(
        vocab_size=256, seq_len=32, n_layers=1, width=16, ffn_width=8, window=4, block=4))


@pytest.fixture
def image_run(tmp_path):
    return make_run(tmp_path / "image", ModelConfig(
        kind="image", image_size=4, seq_len=48, n_classes=3, n_layers=1, width=16, ffn_width=8,
        window=4, block=4, ffn="relu"))


def printed(capsys, *argv):
    sample.main([*argv, "--device", "cpu"])
    return capsys.readouterr().out


def test_prompt_and_seed(text_run, capsys):
    flags = [text_run, "--prompt", "def häh(", "--tokens", "50"]
    a, b, c = (printed(capsys, *flags, "--seed", s) for s in "001")
    assert a.startswith("def häh(") and len(a) > len("def häh(") + 10
    assert a == b and a != c


def test_bytes_that_are_not_utf8_are_shown(text_run, capsys):
    """An untrained model writes every byte; none may crash the terminal."""
    assert "\N{REPLACEMENT CHARACTER}" in printed(capsys, text_run, "--tokens", "200",
                                                  "--temperature", "1")


def test_the_codec_of_the_dataset(tmp_path, capsys, monkeypatch):
    """A dataset's own alphabet, its file copied into the run, reads the prompt and shows ids."""
    def alphabet(file):
        letters = file.read_text()
        return (lambda text: np.array([letters.index(c) for c in text.decode()]),
                lambda ids: "".join(letters[i] for i in ids).encode())

    monkeypatch.setitem(CODECS, "mine", alphabet)
    (tmp_path / "alphabet.txt").write_text("xyz")
    folder = make_run(tmp_path / "run", ModelConfig(
        vocab_size=3, seq_len=32, n_layers=1, width=16, ffn_width=8, window=4, block=4),
        open_codec("mine", tmp_path / "alphabet.txt"))
    (tmp_path / "alphabet.txt").unlink()
    out = printed(capsys, folder, "--prompt", "zyx", "--tokens", "30")
    assert out.startswith("zyx") and set(out) == {"x", "y", "z", "\n"} and len(out) == 34


def test_several_samples(text_run, capsys):
    out = printed(capsys, text_run, "--num", "3", "--prompt", "ab", "--tokens", "20")
    parts = out.split("--- next sample\n")
    assert len(parts) == 3 and all(p.startswith("ab") for p in parts) and len(set(parts)) == 3


def test_stop_text(text_run, capsys):
    flags = [text_run, "--tokens", "60", "--temperature", "1", "--top-k", "40"]
    whole = printed(capsys, *flags).rstrip("\n")
    stop = whole[20:22]
    assert printed(capsys, *flags, "--stop", stop) == whole[: whole.index(stop) + 2] + "\n"


def test_greedy_ignores_the_seed(text_run, capsys):
    a, b = (printed(capsys, text_run, "--temperature", "0", "--tokens", "30", "--seed", s)
            for s in "01")
    assert a == b


def test_prompt_file(text_run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9 ")  # not UTF-8
    assert printed(capsys, text_run, "--prompt-file", str(tmp_path / "prompt.txt"),
                   "--tokens", "3").startswith("caf\N{REPLACEMENT CHARACTER} ")


def test_a_prompt_longer_than_the_context(text_run, capsys):
    assert printed(capsys, text_run, "--prompt", "x" * 100, "--tokens", "5").startswith("x" * 100)


def test_images(image_run, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "grid.png"
    printed(capsys, image_run, "--num", "5", "--out", str(out))
    assert image.open(out).size == (12, 8)  # 3 x 2 pictures of 4 x 4
    top = np.zeros((4, 4, 3), np.uint8)
    top[:2] = np.arange(24).reshape(2, 4, 3)
    image.fromarray(top).save(tmp_path / "top.png")
    printed(capsys, image_run, "--complete", str(tmp_path / "top.png"), "--label", "2",
            "--out", str(out))
    picture = np.asarray(image.open(out))
    np.testing.assert_array_equal(picture[:2], top[:2])
    assert (picture[2:] != 0).any()


def test_bad_input(text_run, image_run, tmp_path):
    for argv, word in (
            ([image_run], "give --out"),
            ([image_run, "--prompt", "a"], "are for text"),
            ([image_run, "--tokens", "9"], "are for text"),
            ([image_run, "--out", "x.png", "--label", "3"], "classes are 0 to 2"),
            ([image_run, "--out", str(tmp_path / "no" / "x.png")], "cannot write"),
            ([text_run, "--out", "x.png"], "are for images"),
            ([text_run, "--tokens", "0"], "at least 1"),
            ([text_run, "--prompt", "a", "--prompt-file", __file__], "give one"),
            ([text_run, "--prompt-file", "missing.txt"], "no such file"),
            ([text_run, "--temperature", "nan"], "must be a number"),
            ([text_run, "--top-p", "1.5"], "at most 1"),
            ([text_run, "--tokens", "many"], "many: must be a number"),
            ([str(tmp_path / "nothing")], "no checkpoint")):
        with pytest.raises(UserError, match=word) as error:
            sample.main([*argv, "--device", "cpu"])
        assert "\n" not in str(error.value)


def test_from_the_command_line(text_run, tmp_path):
    """Without a run, the newest below runs/; without any, one line and exit code 2."""
    command = [sys.executable, str(ROOT / "sample.py"), "--device", "cpu", "--tokens", "5"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: no run with a checkpoint")
    make_run(tmp_path / "runs" / "a", ModelConfig(n_layers=1, width=16))
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "tokens/s" in result.stderr
