"""Small runs to break: their text, their flags, the scripts as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rt_scratch.run import checkpoint
from rt_scratch.run.log import read_log

ROOT = Path(__file__).parent.parent.parent
SMALL = ("--device cpu --seq-len 16 --n-layers 2 --width 16 --ffn-width 8 --window 4 --block 4 "
         "--n-clusters 3 --local-max-distance 3 --routing-max-distance 3 --batch 2 --warmup 2 "
         "--eval-windows 3 --log-every 1 --steps 6 --eval-every 3 --optimizer adamw "
         "--schedule cosine --lr 0.003 --init-out-scale 1").split()


def write_text(path, lines=120):
    path.write_text("".join(f"line {i}: the quick brown fox, number {i * i % 97}\n"
                            for i in range(lines)))
    return path


class Ended(NamedTuple):
    code: int
    out: str
    err: list  # its lines


def start(name, *argv, redirect="", before="", **options):
    """A script in a process of its own, as a shell starts it."""
    arguments = [sys.executable, ROOT / name, *argv]
    line = f'{before} exec "$@" {redirect}'
    return subprocess.Popen(["bash", "-c", line, "bash", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def end(process, timeout=60):
    """Its exit code and what it printed; a traceback or a hang fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert "Traceback" not in err and "Exception ignored" not in err, err
    return Ended(process.returncode, out, err.strip().splitlines())


def environment(**changes):
    return {k: v for k, v in (os.environ | changes).items() if v is not None}


def step_of(folder, name="last.npz"):
    return checkpoint.load(folder / name)[1]["step"]


def logged(folder, split="train"):
    """The steps in log.csv."""
    return [int(row["step"]) for row in read_log(folder) if row["split"] == split]
