"""train.py from the command line: a run, an exact resume, scores, and what happens on bad input."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.models import SMALL

import train
from rt_scratch import step
from rt_scratch.config import TrainConfig
from rt_scratch.device import Precision, select_device, select_precision
from rt_scratch.errors import UserError
from rt_scratch.optim import OPTIMIZERS
from rt_scratch.run import checkpoint
from rt_scratch.run.samples import read_samples, wanted

ROOT = Path(__file__).parent.parent

TINY = ("--device cpu --seq-len 16 --n-layers 2 --width 16 --ffn-width 8 --window 4 --block 4 "
        "--n-clusters 3 --local-max-distance 3 --routing-max-distance 3 --batch 2 --warmup 2 "
        "--routing causal --no-shift-keys "
        "--optimizer adamw --lr 3e-3 --schedule cosine --init-out-scale 1 "
        "--eval-windows 3 --log-every 1 --steps 6 --eval-every 3").split()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"line {i}: the quick brown fox, number {i * i % 97}\n" for i in range(120)]
    path.write_text("".join(lines))
    return path


def run(text, out, *flags):
    train.main([str(text), "--out", str(out), *TINY, *flags])


def rows(out):
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fails(*argv):
    """What a failing run prints on its one line; nothing else but exit code 2."""
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, argv)],
                            capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


# ---------------------------------------------------------------------------------------- a run

def test_a_run(text, tmp_path, capsys):
    out = tmp_path / "run"
    run(text, out)
    assert {"config.json", "log.csv", "last.npz", "best.npz"} <= set(os.listdir(out))
    log = rows(out)
    assert [r["step"] for r in log if r["split"] == "valid"] == ["3", "6"]
    first = next(r for r in log if r["split"] == "train")
    assert float(first["score"]) == pytest.approx(float(first["nats"]) / np.log(2))
    assert 6 < float(first["score"]) < 11 and first["unit"] == "bits/byte"
    for column in ("uncovered", "several", "smallest", "largest", "dead", "lr", "grad_norm"):
        assert first[column] != ""
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["width"] == 16 and config["train"]["steps"] == 6
    printed = capsys.readouterr().out
    for word in ("parameters", "routing heads", "MiB", "bits/byte", "clusters:", "--- sample"):
        assert word in printed


def test_it_learns(text, tmp_path):
    out = tmp_path / "run"
    run(text, out, "--steps", "150", "--lr", "0.01", "--eval-every", "0", "--batch", "4")
    log = [float(r["score"]) for r in rows(out) if r["split"] == "train"]
    assert log[0] > 7 and np.mean(log[-5:]) < 3


OPTIONS = {
    "adamw": [],
    "muon": ["--optimizer", "muon"],
    "adafactor": ["--optimizer", "adafactor", "--schedule", "rsqrt", "--weight-decay", "0.01"],
    "dropout": ["--residual-dropout", "0.2", "--attention-dropout", "0.2", "--accumulate", "2"],
    "topk": ["--routing", "topk", "--recompute", "--parts", "1"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_resume_is_exact(text, tmp_path, name):
    """Stopped after step 4 and resumed: every array of the checkpoint has the same bits."""
    run(text, tmp_path / "whole", *OPTIONS[name])
    run(text, tmp_path / "cut", *OPTIONS[name], "--stop-after", "4")
    train.main(["--resume", "--out", str(tmp_path / "cut"), "--device", "cpu"])
    (a, meta), (b, _) = (checkpoint.load(tmp_path / n / "last.npz") for n in ("whole", "cut"))
    assert meta["step"] == 6 and set(a) == set(b)
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], key)
    exact = ("step", "split", "nats", "lr", "grad_norm")
    logs = [{(r["step"], r["split"]): [r[c] for c in exact] for r in rows(tmp_path / n)}
            for n in ("whole", "cut")]
    assert all(logs[1][k] == v for k, v in logs[0].items())  # the cut run also scored step 4


def test_accumulation_is_a_large_batch(text, tmp_path):
    """The same windows, centroids included, as 4 x 1 or 2 x 2."""
    run(text, tmp_path / "a", "--batch", "4")
    run(text, tmp_path / "b", "--batch", "2", "--accumulate", "2")
    a, b = (checkpoint.load(tmp_path / n / "last.npz")[0] for n in "ab")
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=2e-3, atol=2e-5, err_msg=key)


def test_interrupt_saves(text, tmp_path):
    """Ctrl-C: saved between two steps, exit code 2, and the resumed run ends as an unbroken one."""
    out = tmp_path / "run"
    flags = [str(text), *TINY, "--steps", "100000", "--eval-every", "0"]  # not over before it
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, "--out", out],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "log.csv").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "interrupted and saved after step" in message
    assert "Traceback" not in message
    step = checkpoint.load(out / "last.npz")[1]["step"]
    assert step > 0
    until = ["--stop-after", str(step + 5)]
    train.main(["--resume", "--out", str(out), "--device", "cpu", *until])
    train.main([*flags, *until, "--out", str(tmp_path / "whole")])
    a, b = (checkpoint.load(p / "last.npz")[0] for p in (out, tmp_path / "whole"))
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


# ---------------------------------------------------------------------------------------- scores

def test_evaluate(text, tmp_path, capsys):
    out = tmp_path / "run"
    run(text, out)
    capsys.readouterr()
    flags = ["--out", str(out), "--device", "cpu"]
    before = sorted(os.listdir(out))
    train.main(["--evaluate", "test", *flags])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("test ") and "whole split" in line and "stride 16" in line
    assert sorted(os.listdir(out)) == before
    train.main(["--evaluate", "test", "--stride", "4", *flags])
    strided = capsys.readouterr().out.strip().splitlines()[-1]
    assert "stride 4" in strided
    tokens = [part for part in (line, strided) for part in [part.split("split, ")[1].split()[0]]]
    assert tokens[0] == tokens[1]  # every token is scored once, whatever the stride
    with pytest.raises(UserError, match="trained on"):
        train.main(["enwik8", "--evaluate", "test", *flags])


@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_score_without_looking_ahead(text, tmp_path, capsys, routing):
    """causal: decoding gives the teacher-forced score; topk: it does not, and the line says so."""
    out = tmp_path / "run"
    run(text, out, "--routing", routing, "--steps", "40", "--lr", "0.01", "--eval-every", "0")
    capsys.readouterr()
    train.main(["--evaluate", "valid", "--evaluate-causally", "--eval-windows", "8",
                "--out", str(out), "--device", "cpu"])
    forced, causal = capsys.readouterr().out.strip().splitlines()[-2:]
    scores = [float(line.split()[1]) for line in (forced, causal)]
    assert ("LEAKS" in forced) == (routing == "topk") and "by incremental decoding" in causal
    assert (abs(scores[0] - scores[1]) < 2e-4) == (routing == "causal")


def test_scores_are_those_of_the_precision(text, tmp_path, capsys, monkeypatch):
    """Validation and --evaluate compute as training does, and say so; by token, as decoding does.

    NumPy takes float16 for a GPU's here. In float32, which --precision float32 gives on request,
    the score is another.
    """
    run(text, tmp_path, "--steps", "2", "--eval-every", "0")
    exact = capsys.readouterr().out
    evaluate = ["--out", str(tmp_path), "--device", "cpu", "--evaluate", "valid", "--eval-windows",
                "3"]
    monkeypatch.setattr(train, "select_precision", lambda *_: Precision("fp16", "float16"))
    real, found = train.evaluate, []

    def kept(*args, **options):
        score = real(*args, **options)
        found.append((args[0].step, score.nats))
        return score

    monkeypatch.setattr(train, "evaluate", kept)
    train.main([*evaluate, "--evaluate-causally"])
    half, by_token = capsys.readouterr().out.splitlines()[-2:]
    run(text, tmp_path / "half", "--steps", "2", "--eval-every", "0")
    trained = capsys.readouterr().out
    assert half.endswith(", fp16)") and by_token.endswith(", float32)")
    assert next(x for x in trained.splitlines() if "  valid " in x).endswith(", fp16)")
    exact = next(x for x in exact.splitlines() if "  valid " in x).partition("  ")[2]
    assert exact.endswith("routing causal)")
    monkeypatch.setattr(train, "select_precision", select_precision)
    train.main([*evaluate, "--precision", "float32"])
    assert capsys.readouterr().out.splitlines()[-1] == exact
    (_, rounded), (_, _), (_, whole) = found
    assert 0 < abs(rounded - whole) < 0.01


def test_memory_is_counted_in_the_precision(text, tmp_path, monkeypatch):
    half = Precision("fp16", "float16")
    monkeypatch.setattr(train, "select_precision", lambda *_: half)
    monkeypatch.setattr(train.costs, "step_bytes", lambda *asked: 2**80 * (asked[2] is half))
    with pytest.raises(UserError, match="a step .* does not fit in memory"):
        run(text, tmp_path / "run")


@pytest.mark.parametrize("every, drawn", [("0", [6]), ("2", [2, 4, 6]), ("3", [4, 6])])
def test_pictures_are_drawn_at_the_end_or_when_asked(every, drawn):
    """They take longer than what they illustrate; text is drawn after every evaluation."""
    cfg = dataclasses.replace(SMALL, kind="image", image_size=3, seq_len=27, vocab_size=256)
    steps, scored = [2, 4, 6], [0, 2, 4]
    for model, every_time in ((cfg, False), (SMALL, every == "0")):
        recipe = TrainConfig(steps=6, sample_every=int(every))
        got = [s for s, before in zip(steps, scored, strict=True)
               if wanted(s, before, model, recipe)]
        assert got == (steps if every_time else drawn)


def test_a_run_draws_its_samples(text, tmp_path):
    """One after each evaluation by default, with --sample-every fewer, and always the last."""
    for name, flags, steps in (("all", [], [2, 4, 6]), ("some", ["--sample-every", "4"], [4, 6])):
        run(text, tmp_path / name, "--eval-every", "2", *flags)
        assert list(read_samples(tmp_path / name)) == steps


def test_the_rate_is_that_of_training(text, tmp_path, monkeypatch):
    """Tokens per second leave the scoring out: a slow evaluation does not change them."""
    real = train.evaluate

    def slow(*args, **options):
        time.sleep(1.0)
        return real(*args, **options)

    monkeypatch.setattr(train, "evaluate", slow)
    run(text, tmp_path / "run", "--eval-every", "2")
    log = [r for r in rows(tmp_path / "run") if r["split"] == "train"]
    assert float(log[-1]["seconds"]) > 2
    assert float(log[-1]["tokens_per_s"]) > 6 * 32 / (float(log[-1]["seconds"]) - 1.5)


def test_dry_run_writes_nothing(text, tmp_path, capsys):
    out = tmp_path / "run"
    run(text, out, "--dry-run")
    assert not out.exists()
    assert "parameters" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- bad input

def test_bad_flags(text, tmp_path):
    out = ["--out", tmp_path / "run", "--device", "cpu"]
    for flags, word in (
            (["--width", "130"], "multiple of the 4 heads"),
            (["--routing-layers", "9"], "layers are 0 to 3"),
            (["--wdith", "3"], "unrecognized arguments"),
            (["--seq-len", "99999"], "fewer than"),
            (["--data-dir", tmp_path], "not used with a text file"),
            (["--preset", "huge"], "--preset huge"),
            (["--lr", "inf"], "--lr inf: must be a finite number"),
            (["--seed", "99999999999"], "--seed 99999999999: must be below"),
            (["--width", "1073741824"], "do not fit in memory"),
            (["--stop-after", "-1"], "must not be negative"),
            (["--stride", "4"], "--stride: needs --evaluate"),
            (["--kind", "image"], "unrecognized arguments: --kind"),
            (["--routing-layers", "a"], "layers are whole numbers"),
            (["--accumulate", "1000000000"], "does not fit in memory"),
            (["--resume", "--evaluate", "test"], "--resume: not used with --evaluate"),
            (["--evaluate", "test", "--lr", "0.1"], "--lr: not used with --evaluate"),
            (["--evaluate", "test", "--no-recompute"], "--recompute: not used with --evaluate"),
            (["--init-from", ""], "--init-from: is empty"),
            ([""], "dataset: is empty"),
            (["--device", "cuda"], "no usable GPU")):
        if flags == ["--device", "cuda"]:
            if select_device("auto")[0] is not np:
                continue
        assert word in fails(text, *out, *flags)
    assert not (tmp_path / "run").exists()  # nothing half-written


def test_bad_files(text, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    flags = ["--device", "cpu", "--out", tmp_path / "run"]
    assert "empty" in fails(tmp_path / "empty.txt", *flags)
    assert "missing.txt" in fails(tmp_path / "missing.txt", *flags)
    assert "no checkpoint" in fails("--resume", *flags)
    assert not (tmp_path / "run").exists()


def test_where_a_run_cannot_be_written(text, tmp_path):
    """Said before the first step, not after the last."""
    assert "--out: is empty" in fails(text, *TINY, "--out", "")
    for out in (text, text / "below"):
        assert "a file is in the way" in fails(text, *TINY, "--out", out)
    out = tmp_path / "run"
    run(text, out, "--steps", "3")
    (out / "last.npz").unlink()
    (out / "last.npz").mkdir()
    assert "last.npz is a folder" in fails("--resume", "--steps", "6", "--out", out)
    assert rows(out)[-1]["step"] == "3"


@pytest.mark.parametrize("left", [None, 0, 1000])
def test_a_lost_best_checkpoint_is_made_again(text, tmp_path, capsys, left):
    """Also where no step is left to train."""
    out = tmp_path / "run"
    run(text, out, "--steps", "3")
    best = out / "best.npz"
    content, scores = best.read_bytes(), rows(out)
    best.unlink()
    if left is not None:
        best.write_bytes(content[:left])
        assert "copy last.npz or a backup over it" in fails(
            "--evaluate", "valid", "--out", out, "--device", "cpu")
    train.main(["--resume", "--out", str(out), "--device", "cpu"])
    assert "best.npz is missing or damaged" in capsys.readouterr().out
    assert checkpoint.read_state(best).step == 3
    assert [r["score"] for r in rows(out)] == [r["score"] for r in scores]
    train.main(["--resume", "--out", str(out), "--device", "cpu"])
    assert "note" not in capsys.readouterr().out


def test_a_missing_package_is_said():
    for script in ("train.py", "sample.py"):
        code = f"import sys, runpy; sys.modules['tqdm'] = None; runpy.run_path({script!r})"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                cwd=ROOT)
        assert result.returncode == 1, result.stderr
        assert result.stderr.startswith("error: ") and "pip install -e ." in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_bad_resumes(text, tmp_path):
    out = tmp_path / "run"
    run(text, out, "--steps", "2", "--eval-every", "0")
    flags = ["--out", out, "--device", "cpu"]
    assert "holds a run already" in fails(text, *flags)
    assert "width 16 there, 32 here" in fails("--resume", "--width", "32", *flags)
    assert "another" in fails("--resume", "--optimizer", "adafactor", *flags)
    assert "--download: not used" in fails("--resume", "--download", *flags)
    text.write_text(text.read_text() + "one more line\n")
    assert "was trained on other data" in fails("--resume", *flags)
    assert "--stride: not used" in fails("--evaluate", "test", "--stride", "4",
                                         "--evaluate-causally", *flags)
    data = (out / "last.npz").read_bytes()
    (out / "last.npz").write_bytes(data[: len(data) // 2])
    assert "damaged" in fails("--resume", *flags)


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch):
    """The update is not made; the last good checkpoint stays."""
    out = tmp_path / "run"
    real = step.gradients

    def broken(state, grads, *rest):
        result = real(state, grads, *rest)
        if state.step == 4:
            grads[0] = np.nan
        return result

    monkeypatch.setattr(step, "gradients", broken)
    with pytest.raises(UserError, match="gradient is not finite at step 5"):
        run(text, out, "--eval-every", "2")
    arrays, meta = checkpoint.load(out / "last.npz")
    assert meta["step"] == 4 and np.isfinite(arrays["params"]).all()


@pytest.mark.parametrize("entry", [7, 200 * 16])
def test_parameters_that_are_not_finite_are_not_saved(text, tmp_path, monkeypatch, entry):
    """An update that blows up between two log lines: neither last.npz nor best.npz takes it.

    The embedding of byte 0 is part of every text, that of byte 200 is not in this one.
    """
    out = tmp_path / "run"
    run(text, out, "--stop-after", "3")
    saved = [(out / name).read_bytes() for name in ("last.npz", "best.npz")]

    def blow_up(flat, *rest, **options):
        flat[entry] = np.nan

    monkeypatch.setitem(OPTIMIZERS, "adamw", OPTIMIZERS["adamw"]._replace(update=blow_up))
    with pytest.raises(UserError, match=r"the parameters .* not finite .*last.npz, is kept"):
        train.main(["--resume", "--out", str(out), "--device", "cpu", "--stop-after", "4"])
    assert saved == [(out / name).read_bytes() for name in ("last.npz", "best.npz")]
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        run(text, tmp_path / "other", "--stop-after", "1")


def test_a_log_with_a_cut_line(text, tmp_path):
    """A power cut in the middle of a line, or no log at all, does not stop a resume."""
    out = tmp_path / "run"
    run(text, out, "--stop-after", "3")
    log = (out / "log.csv").read_text()
    flags = ["--resume", "--out", str(out), "--device", "cpu", "--stop-after"]
    (out / "log.csv").write_text(log + "4,train,1.2")
    train.main([*flags, "4"])
    assert [r["step"] for r in rows(out)][:4] == ["1", "2", "3", "3"] and rows(out)[-1]["dead"]
    (out / "log.csv").unlink()
    train.main([*flags, "5"])
    assert {r["step"] for r in rows(out)} == {"5"}


def test_text_that_was_moved(text, tmp_path, capsys):
    """The same bytes elsewhere are the same data; other bytes are said aloud."""
    out = tmp_path / "run"
    run(text, out, "--stop-after", "3")
    (tmp_path / "elsewhere").mkdir()
    text = text.rename(tmp_path / "elsewhere" / "renamed.txt")
    train.main([str(text), "--resume", "--out", str(out), "--device", "cpu"])
    text.write_text(text.read_text().replace("fox", "cat"))
    capsys.readouterr()
    train.main([str(text), "--evaluate", "test", "--out", str(out), "--device", "cpu"])
    assert "may be in part what was trained on" in capsys.readouterr().out


def test_several_texts(tmp_path, capsys, monkeypatch):
    """Named in any order, before and after flags; resumed from anywhere, and by name."""
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path / "texts")
    files = [f"{i}.txt" for i in range(4)]
    for i, name in enumerate(files):
        Path(name).write_text(f"text {i}, its line\n" * 20)
    train.main([*files[2:], *TINY, "--stop-after", "2", *files[:2]])
    out = Path("runs/texts").resolve()
    config = json.loads((out / "config.json").read_text())
    assert config["dataset"] == [str(tmp_path / "texts" / files[i]) for i in (2, 3, 0, 1)]
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "--out", str(out), "--device", "cpu", "--stop-after", "3"])
    (tmp_path / "texts" / "runs").rename(tmp_path / "runs")
    (tmp_path / "texts").rename(tmp_path / "moved")
    capsys.readouterr()
    moved = [f"moved/{name}" for name in files]
    train.main(["--resume", "--out", "runs/texts", "--device", "cpu", *moved, "--stop-after", "4"])
    train.main(["moved", "--evaluate", "test", "--out", "runs/texts", "--device", "cpu"])
    assert "whole held-out files of a folder" in capsys.readouterr().out
    for wrong in (moved[:3], [*moved, "enwik8"], ["enwik8"]):
        with pytest.raises(UserError, match="trained on|enwik8") as error:
            train.main(["--resume", "--out", "runs/texts", *wrong, "--device", "cpu"])
        assert "\n" not in str(error.value) and "(" not in str(error.value).split(";")[0]
    with pytest.raises(UserError, match=r"moved/0.txt moved/1.txt moved/2.txt: not a dataset"):
        train.main([*moved[:3], "--download", "--out", "x"])


def test_output_that_nobody_reads(text, tmp_path):
    """`train.py | head` ends in one line, with the run saved."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), str(text), "--out", str(out), *TINY,
               "--steps", "5000", "--eval-every", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("2/5000"):
            break
    process.stdout.close()
    message = process.stderr.read()
    assert process.wait() == 2
    assert message.startswith("error: interrupted and saved after step") and len(
        message.splitlines()) == 1
    assert checkpoint.load(out / "last.npz")[1]["step"] > 2


def test_resume_from_anywhere(text, tmp_path, monkeypatch):
    """The run remembers where its text is; config.json follows the flags of the resumed run; a
    folder whose last.npz was lost goes on from best.npz."""
    monkeypatch.chdir(tmp_path)
    run(text.name, tmp_path / "run", "--stop-after", "3")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "run" / "last.npz").unlink()
    train.main(["--resume", "--out", str(tmp_path / "run"), "--device", "cpu", "--steps", "7"])
    assert rows(tmp_path / "run")[-1]["step"] == "7"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 7


def test_a_terminal_that_is_not_utf8(text, tmp_path):
    """Samples hold any byte; a terminal that cannot show them must not end the run."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(text), "--out", str(tmp_path / "run"), *TINY],
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr


def test_a_full_disk_stops_the_run(text, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left"):
        run(text, out)
    assert not (out / "last.npz").exists()
