"""Prompts and samples, and runs that go on with other settings."""

import json
import sys

import numpy as np
import pytest
from helpers.models import setup

import sample
import train
from faults.runs import SMALL, step_of
from rt_scratch import decode
from rt_scratch.config import ModelConfig
from rt_scratch.data.codecs import open_codec
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint
from rt_scratch.run.samples import Text

BYTES = open_codec("bytes")


@pytest.fixture
def full_run(text, tmp_path):
    out = tmp_path / "full"
    train.main([str(text), "--out", str(out), *SMALL, "--attention", "full", "--steps", "30",
                "--lr", "0.02"])
    return out


def printed(capsys, run, *argv):
    capsys.readouterr()
    sample.main([str(run), "--device", "cpu", *argv])
    return capsys.readouterr().out


# ------------------------------------------------------------------------------ full attention

def test_the_latest_window_conditions(full_run, capsys):
    """However many tokens are asked for: other prompts, other texts; what is too old is no matter.
    """
    def after(prompt):
        out = printed(capsys, full_run, "--prompt", prompt, "--tokens", "60")
        assert out.startswith(prompt)
        return out[len(prompt):]

    assert after("A" * 8) != after("z" * 8)
    assert after("A" * 40) != after("z" * 40)
    assert after("AAAA" + "line 12: the quick") == after("zz" + "line 12: the quick")


def test_a_long_text_slides():
    """Each token is drawn from the latest T - 1, as one pass over them says."""
    cfg = ModelConfig(seq_len=8, vocab_size=50, n_layers=2, width=16, ffn_width=8,
                      attention="full", timing_signal=True, n_local_heads=1,
                      n_routing_heads=1).validate()
    m = setup(cfg, noise=1.0)
    for n in (0, 3, 7, 8, 20):
        text = np.random.default_rng(n).integers(0, 50, (8, n))
        again = np.random.default_rng(1)
        for chosen in decode.generate(m.params, m.centroids, cfg, 30, prompt=text,
                                      rng=np.random.default_rng(1)):
            latest = text[:, max(0, text.shape[1] - 7):]
            padded = np.concatenate([latest, np.zeros((8, 1), int)], axis=1)
            expected = decode.choose(m.logits(padded)[:, -1], again)
            np.testing.assert_array_equal(chosen, expected)
            text = np.concatenate([text, chosen[:, None]], axis=1)
        assert text.shape[1] == n + 30


# -------------------------------------------------------------------------------------- sampling

def test_a_sample_depends_on_the_seed_and_its_number_alone(run, capsys):
    flags = ["--prompt", "line", "--tokens", "30", "--seed", "5", "--num"]
    samples = [printed(capsys, run, *flags, n).split("\n--- next sample\n") for n in "137"]
    for some in samples:
        assert [text.rstrip("\n") for text in some] == [
            text.rstrip("\n") for text in samples[-1][: len(some)]]
    assert len(set(samples[-1])) == 7


@pytest.mark.parametrize("temperature", ["1e-308", "5e-324", "1e-30"])
def test_next_to_no_temperature_takes_the_best(run, capsys, temperature):
    flags = ["--tokens", "30", "--temperature"]
    assert printed(capsys, run, *flags, temperature) == printed(capsys, run, *flags, "0")


def test_a_prompt_that_ends_inside_a_character():
    text = Text(BYTES, prompt=np.frombuffer(b"caf\xc3", np.uint8))
    assert text.text == "caf"
    assert text.add(np.array([0xa9])) == "\N{LATIN SMALL LETTER E WITH ACUTE}"


def test_a_stop_text_in_the_prompt_stops_nothing():
    text = Text(BYTES, "ab", prompt=np.frombuffer(b"xaba", np.uint8))
    assert text.add(np.frombuffer(b"c", np.uint8)) == "c" and not text.stopped
    assert text.add(np.frombuffer(b"cabb", np.uint8)) == "cab" and text.stopped
    assert text.text == "xabaccab" and text.add(np.frombuffer(b"more", np.uint8)) == ""


def test_control_characters_on_a_terminal(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt").write_bytes(b"\x1b[2Jred\x07\r\x9b1m\n\ttab")
    flags = ["--prompt-file", str(tmp_path / "prompt"), "--tokens", "1"]
    assert printed(capsys, run, *flags).startswith("\x1b[2Jred\x07")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert printed(capsys, run, *flags).startswith("\\x1b[2Jred\\x07\\x0d\N{REPLACEMENT CHARACTER}"
                                                   "1m\n\ttab")


def test_raw_writes_the_bytes(run, tmp_path, capfdbinary):
    given = bytes(range(256))
    (tmp_path / "prompt").write_bytes(given)
    sample.main([str(run), "--prompt-file", str(tmp_path / "prompt"), "--tokens", "4", "--raw",
                 "--device", "cpu"])
    out = capfdbinary.readouterr().out
    assert out.startswith(given) and len(out) == 256 + 4 + 1


@pytest.mark.parametrize("argv, word", [
    (["--prompt", "---"], "one that begins with a dash is written --prompt=VALUE"),
    (["--prompt", "-x"], "--prompt=VALUE"),
    (["--checkpoint", "worst"], "invalid choice"),
    (["--tokens", str(10 ** 400)], ""),
])
def test_lines_that_help(run, argv, word):
    with pytest.raises(UserError) as error:
        sample.main([str(run), "--device", "cpu", *argv])
    assert word in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_of_dashes(run, capsys):
    assert printed(capsys, run, "--prompt=---", "--tokens", "3").startswith("---")


@pytest.mark.parametrize("out", ["no/x.png", "x", "x.txt", "taken.png"])
def test_an_impossible_picture_is_found_before_drawing(tmp_path, monkeypatch, out):
    pytest.importorskip("PIL")
    from test_sample import make_run
    folder = make_run(tmp_path / "image", ModelConfig(
        kind="image", image_size=4, seq_len=48, n_layers=1, width=16, ffn_width=8, window=4,
        block=4, ffn="relu"))
    (tmp_path / "taken.png").mkdir()
    monkeypatch.setattr(sample, "draw", None)
    with pytest.raises(UserError, match="cannot write .*give a .png"):
        sample.main([folder, "--out", str(tmp_path / out), "--device", "cpu"])
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_the_checkpoint_is_named_and_chosen(run, capsys):
    arrays, meta = checkpoint.load(run / "best.npz")
    checkpoint.save(run / "best.npz", arrays, meta | {"step": 3})
    for name, step in ((None, 3), ("best", 3), ("last", 6)):
        chosen = ["--checkpoint", name] if name else []
        train.main(["--evaluate", "test", "--out", str(run), "--device", "cpu", *chosen])
        line = f"checkpoint: {run / (name or 'best')}.npz, step {step}\n"
        assert line in capsys.readouterr().out
        sample.main([str(run), "--tokens", "2", "--device", "cpu", *chosen])
        assert f"{run / (name or 'best')}.npz, step {step}\n" in capsys.readouterr().err
    (run / "best.npz").unlink()
    with pytest.raises(UserError, match="no checkpoint at .*best.npz"):
        sample.main([str(run), "--device", "cpu", "--checkpoint", "best"])


# -------------------------------------------------------------------------------- other settings

def resume(run, *flags):
    train.main(["--resume", "--out", str(run), "--device", "cpu", *flags])


def test_more_steps_change_the_learning_rate(run, capsys):
    """Step 7 of 6 would have 3e-4, a tenth of the peak; of 60 it has nearly all of it."""
    resume(run, "--steps", "60", "--stop-after", "7")
    assert ("note: the schedule has changed: the learning rate goes on at 2.97e-03, not at 3.00e-04"
            in capsys.readouterr().out)
    resume(run, "--stop-after", "8")
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--steps", "--stop-after"])
def test_fewer_steps_than_done(run, flag):
    before = (run / "config.json").read_bytes(), step_of(run)
    with pytest.raises(UserError, match=f"{flag} 4: the run has done 6 steps already"):
        resume(run, flag, "4")
    assert before == ((run / "config.json").read_bytes(), step_of(run))


def test_the_best_of_another_protocol(run, capsys):
    """Scores on other windows do not compare: the best starts anew, and is no longer the old one.
    """
    arrays, meta = checkpoint.load(run / "last.npz")
    checkpoint.save(run / "last.npz", arrays, meta | {"best": 0.001})
    resume(run, "--steps", "7")
    assert checkpoint.load(run / "last.npz")[1]["best"] == 0.001
    capsys.readouterr()
    resume(run, "--steps", "8", "--eval-windows", "2")
    assert "the best checkpoint is chosen anew" in capsys.readouterr().out
    assert step_of(run, "best.npz") == 8
    assert json.loads((run / "config.json").read_text())["train"]["eval_windows"] == 2
    resume(run, "--steps", "9")
    assert "chosen anew" not in capsys.readouterr().out


def test_what_was_drawn_is_counted(run, monkeypatch):
    """With another batch an epoch of images goes on where it was: none is skipped or seen twice."""
    real, drawn = train.training_batch, []

    def recorded(dataset, n_tokens, batch, seed, step, before):
        drawn.extend(range(before, before + batch))
        return real(dataset, n_tokens, batch, seed, step, before)

    monkeypatch.setattr(train, "training_batch", recorded)
    resume(run, "--steps", "8", "--batch", "5")
    resume(run, "--steps", "10", "--batch", "1", "--accumulate", "3")
    assert drawn == list(range(12, 12 + 2 * 5 + 2 * 3))
