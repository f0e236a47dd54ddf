"""Signals and damage at random, as many as --kills and --flips say."""

import os
import random
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest

import sample
import train
from faults.runs import SMALL, end, logged, start, step_of
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint
from rt_scratch.run.log import read_log

STEPS = 60
FLAGS = [*SMALL, "--steps", str(STEPS), "--eval-every", "7", "--eval-windows", "12"]
EXACT = ("step", "split", "nats", "score", "lr", "grad_norm")


def test_killed_at_any_time(text, tmp_path, request, capsys):
    """After any signals the finished run has every array, log line and score of an unbroken one;
    after a polite one not a step is lost."""
    kills, random_ = request.config.getoption("--kills"), random.Random(1)
    whole, out, ended, hit = tmp_path / "whole", tmp_path / "run", Counter(), 0
    train.main([str(text), "--out", str(whole), *FLAGS])
    expected = [{c: row[c] for c in EXACT} for row in read_log(whole)]
    began = time.monotonic()
    assert end(start("train.py", "--dry-run", "--device", "cpu")).code == 0
    import_time = time.monotonic() - began  # signals come from shortly before the first step on
    while hit < kills:
        if (out / "last.npz").exists() and checkpoint.load(
                out / "last.npz")[1]["scored"] == STEPS:
            check(whole, out, expected)
            shutil.rmtree(out)
        begin = ["--resume", "--out", out, "--device", "cpu"] if (out / "last.npz").exists() else [
            text, "--out", out, *FLAGS]
        process = start("train.py", *begin)
        name = random_.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
        time.sleep(import_time * random_.uniform(0.6, 2.5))
        if process.poll() is None:
            process.send_signal(getattr(signal, name))
            hit += 1
        code, _, err = end(process)
        saved = [line for line in err if "interrupted and saved after step" in line]
        ended[name, code] += 1
        if saved:
            assert code == 2 and len(err) == 1 and step_of(out) == logged(out)[-1]
        elif name != "SIGKILL":
            assert len(err) <= 1 and code in (0, 1, 130, -signal.SIGTERM, -signal.SIGHUP), err
    for _ in range(2):  # to the end; once more, to find nothing left to do
        begin = ["--resume", "--out", out, "--device", "cpu"] if (out / "last.npz").exists() else [
            text, "--out", out, *FLAGS]
        train.main([str(argument) for argument in begin])
    check(whole, out, expected)
    assert not [name for name in os.listdir(out) if name.endswith(".tmp") or name == "lock"]
    with capsys.disabled():
        if kills > 10:
            print(f"\n{hit} signals: {dict(ended)}")


def check(whole, out, expected):
    for name in ("last.npz", "best.npz"):
        (a, of_a), (b, of_b) = (checkpoint.load(path / name) for path in (whole, out))
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], f"{name} {key}")
        for key in ("step", "best", "scored", "valid", "drawn"):
            assert of_a[key] == of_b[key], (name, key)
    assert [{c: row[c] for c in EXACT} for row in read_log(out)] == expected


def outcome(way, capsys):
    """What a user would see: the output, or the one line."""
    try:
        way()
    except UserError as error:
        capsys.readouterr()
        assert "\n" not in str(error)
        return "refused"
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["last.npz", "best.npz", "vocab.txt", "log.csv"])
def test_damaged_at_any_place(run, request, name, capsys, monkeypatch):
    """A byte flipped, a piece cut out, zeroed or doubled, a file cut short: the file is refused in
    one line, or all is as it was. Damage to the log costs log lines alone."""
    flips, random_ = request.config.getoption("--flips"), random.Random(name)
    monkeypatch.setattr(train, "plot_loss", read_log)  # what it draws from
    if name == "vocab.txt":
        from faults.test_crafted import with_words
        from rt_scratch.data.files import digest_of
        with_words(run, ["<eos>", "<unk>", *(f"word{i}" for i in range(254))])
        with_words(run, (run / name).read_text().split("\n"), digest_of(run / name))
    ways = {"vocab.txt": ["sample"], "best.npz": ["sample", "evaluate"], "last.npz": ["last"],
            "log.csv": ["resume"]}[name]
    ways = [{
        "sample": lambda: sample.main([str(run), "--tokens", "5", "--device", "cpu"]),
        "last": lambda: sample.main([str(run), "--tokens", "5", "--device", "cpu",
                                     "--checkpoint", "last"]),
        "evaluate": lambda: train.main(["--evaluate", "test", "--eval-windows", "2", "--out",
                                        str(run), "--device", "cpu"]),
        "resume": lambda: train.main(["--resume", "--out", str(run), "--device", "cpu"]),
    }[way] for way in ways]
    whole, ended = (run / name).read_bytes(), Counter()
    right = [outcome(way, capsys) for way in ways]
    assert "refused" not in right
    for i in range(flips // 4):
        (run / name).write_bytes(damaged(whole, random_))
        for way, expected in zip(ways, right, strict=True):
            got = outcome(way, capsys)
            ended["refused" if got == "refused" else "as it was"] += 1
            assert got in ("refused", expected), i
        assert name != "log.csv" or "refused" not in ended
    with capsys.disabled():
        if flips > 100:
            print(f"\n{flips // 4} damaged {name}: {dict(ended)}")


def damaged(data, random_):
    data, at = bytearray(data), random_.randrange(len(data))
    size = random_.choice([1, 1, 1, 16, 512])
    how = random_.randrange(6)
    if how <= 1:
        data[at] ^= 1 << random_.randrange(8)
    elif how == 2:
        del data[at : at + size]
    elif how == 3:
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif how == 4:
        data[at:at] = data[at : at + size]
    else:
        del data[at:]
    return bytes(data)
