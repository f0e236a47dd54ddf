"""Signals and damage at random, as many as --kills and --flips say."""

import os
import random
import re
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest

import sample
import train
from faults.runs import SMALL, end, logged, start, step_of
from faults.watched import Watched
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint
from rt_scratch.run.log import read_log

STEPS = 24
FLAGS = [*SMALL, "--steps", str(STEPS), "--eval-every", "7", "--eval-windows", "12"]
EXACT = ("step", "split", "nats", "score", "lr", "grad_norm")
POLITE = ["SIGTERM", "SIGINT", "SIGHUP"]
TWICE = "SIGINT SIGINT"  # the second ends it at once: the step is lost, and nothing else


def test_killed_at_any_time(text, tmp_path, request, capsys):
    """After any signals the finished run has every array, log line and score of an unbroken one;
    after a polite one not a step is lost."""
    kills = request.config.getoption("--kills")
    random_ = random.Random(kills)
    whole, out, ended, hit, runs = tmp_path / "whole", tmp_path / "run", Counter(), Counter(), 1
    train.main([str(text), "--out", str(whole), *FLAGS])
    expected = [{c: row[c] for c in EXACT} for row in read_log(whole)]
    first, again = [text, "--out", out, *FLAGS], ["--resume", "--out", out, "--device", "cpu"]
    with Watched(tmp_path / "watched") as watched:
        seconds = timed(watched, "train.py", text, "--out", tmp_path / "timed", *FLAGS)
        while hit.total() < kills:
            saved = (out / "last.npz").exists()
            if saved and checkpoint.load(out / "last.npz")[1]["scored"] == STEPS:
                check(whole, out, expected)
                shutil.rmtree(out)
                saved, runs = False, runs + 1
            name = random_.choice(["SIGKILL", "SIGKILL", TWICE, *POLITE])
            doing, ending = killed(watched, name, seconds * random_.uniform(0, 0.5),
                                   "train.py", *(again if saved else first))
            if doing == "leaving":
                continue
            hit[doing] += 1
            ended[name, ending.code] += 1
            if any("interrupted and saved after step" in line for line in ending.err):
                assert ending.code == 2 and len(ending.err) == 1
            elif name != "SIGKILL":  # before the first step, or after the last; or twice
                assert ending in ((130, ending.out, ["interrupted"]), (0, ending.out, []))
            done = re.findall(rf"^(\d+)/{STEPS}  ", ending.out, re.M)
            if name in POLITE and done:
                assert step_of(out) == int(done[-1])
    for _ in range(2):  # to the end; once more, to find nothing left to do
        train.main([str(a) for a in (again if (out / "last.npz").exists() else first)])
    check(whole, out, expected)
    assert not [name for name in os.listdir(out) if name.endswith(".tmp") or name == "lock"]
    tell(capsys, kills, f"{hit.total()} signals to train.py, {runs} runs to their end: "
                        f"{dict(ended)}; while it was {dict(hit.most_common())}")


def test_killed_while_it_samples(run, tmp_path, request, capsys):
    """Nothing in the run folder changes, and the next sample is what it would have been."""
    kills, random_ = -(-request.config.getoption("--kills") // 10), random.Random(1)
    command = ["sample.py", run, "--tokens", "200", "--device", "cpu"]
    files, hit, ended = contents(run), Counter(), Counter()
    with Watched(tmp_path / "watched") as watched:
        watched.start(*command)
        right = watched.end().out
        seconds = timed(watched, *command)
        while hit.total() < kills:
            name = random_.choice(["SIGKILL", *POLITE])
            doing, ending = killed(watched, name, seconds * random_.uniform(0, 1), *command)
            if doing == "leaving":
                continue
            hit[doing] += 1
            ended[name, ending.code] += 1
            assert name == "SIGKILL" or ending.code == 0 or ending[::2] == (130, ["interrupted"])
            assert right.startswith(ending.out) and contents(run) == files
        watched.start(*command)
        assert watched.end().out == right
    tell(capsys, kills, f"{hit.total()} signals to sample.py: {dict(ended)}; while it was "
                        f"{dict(hit.most_common())}")


def test_killed_as_it_starts(text, run, tmp_path, request):
    """One line, or none, from a process of its own, whose imports take most of the time."""
    kills, random_ = -(-request.config.getoption("--kills") // 20), random.Random(1)
    commands = [["train.py", text, "--out", tmp_path / "out", *SMALL],
                ["train.py", "--resume", "--out", run, "--device", "cpu"],
                ["sample.py", run, "--tokens", "9", "--device", "cpu"]]
    began = time.monotonic()
    assert end(start(*commands[2])).code == 0
    seconds, files = time.monotonic() - began, contents(run)
    for i in range(kills):
        process, name = start(*commands[i % 3]), random_.choice(POLITE)
        time.sleep(random_.uniform(0, 1) * seconds)
        process.send_signal(getattr(signal, name))
        ending = end(process)
        assert len(ending.err) <= 2 and ending.code in (
            0, 1, 2, 130, -getattr(signal, name)), ending
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    changed = {name for name, content in contents(run).items() if files.get(name) != content}
    assert changed <= {"config.json", "log.csv", "loss.png", "lock"}  # a lock that nobody holds
    assert step_of(run) == 6 and len(logged(run)) == 6


def timed(watched, *command):
    """Seconds of a script."""
    began = time.monotonic()
    watched.start(*command)
    assert watched.end().code == 0
    return time.monotonic() - began


def killed(watched, name, seconds, *command):
    """(what a script was doing when the signal came, how it ended)."""
    watched.start(*command)
    while not watched.doing():
        time.sleep(0.001)
    time.sleep(seconds)
    first, *more = name.split()
    doing = watched.signal(first)
    for again in more:
        time.sleep(0.002)
        watched.signal(again)
    return doing, watched.end()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tell(capsys, kills, text):
    if kills > 10:
        with capsys.disabled():
            print(f"\n{text}")


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
