"""The parts of the study (study.py), one module each, and what they share: logs, runs, spreads.

A part has `run(study)`, which measures what its csv lacks and writes its report; what it times in
a process of its own is its `measure`.
"""

import csv
import io
import shutil
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import ROOT, in_own_process

from rt_scratch import UserError, data
from rt_scratch.data import given_codec
from rt_scratch.run.checkpoint import best_checkpoint, load_model
from rt_scratch.run.evaluate import evaluate
from rt_scratch.run.folder import whole

sys.path.append(str(ROOT))


class Study(NamedTuple):
    """What a part is told."""

    out: Path          # folder of csv files, reports and figures
    runs: Path         # folder of run folders
    head: str          # first line of every report: machine, versions
    quick: bool        # tiny sizes: does it run?
    threads: int
    cpu_time: bool     # the clock of timings: the process's CPU time, else wall time
    steps: int         # of every training run
    seeds: int
    rounds: int        # turns that each contender of a timing takes
    patience: float    # seconds that a measurement of the crossover may be expected to take
    windows: int       # of validation text per score; 0: the whole split
    text: str          # stdlib or a text file
    seq_len: int       # T of the text models
    cifar10: Path | None
    folders: list      # finished runs to look at instead of training some

    @property
    def limit(self):
        """Windows that are scored token by token."""
        return self.windows or 64

    @property
    def dataset(self):
        """A name of the text and its T for labels and files."""
        return f"{Path(self.text).name.partition('.')[0]}-{self.seq_len}"

    def apart(self, part, *job):
        """What `measure(*job)` of a part returns in a process of its own."""
        return in_own_process(ROOT / "benchmarks" / "study.py", [part, *job],
                              OMP_NUM_THREADS=str(self.threads))

    def log(self, name, columns):
        return Log(self.out / f"{name}.csv", columns)

    def report(self, name, text):
        """OUT/NAME.md."""
        (self.out / f"{name}.md").write_text(text)
        print(text)

    def flags(self):
        """Of train.py for the text models: the defaults, but causal routing without shifted keys;
        K W = T.
        """
        paper = ["--routing", "causal", "--no-shift-keys", "--seq-len", self.seq_len]
        if self.quick:
            return [*paper, "--window", 32, "--n-clusters", self.seq_len // 32, "--width", 16,
                    "--ffn-width", 16, "--n-layers", 2]
        return [*paper, "--n-clusters", max(1, self.seq_len // 64),
                "--batch", max(1, 1024 // self.seq_len)]


class Log:
    """A csv whose rows are finished pieces, found by their first column and never measured again.

    Every row is on the disk before the next begins.
    """

    def __init__(self, path, columns):
        self.path, self.columns = path, columns
        self.rows = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = csv.DictReader(file)
                self.rows = [{k: _number(v) for k, v in row.items()} for row in rows]
            if tuple(rows.fieldnames or ()) != tuple(columns):
                raise UserError(f"{path}: its columns are not those of this version; move it away")

    def row(self, name, measure):
        """The row of that name; if there is none, what `measure` returns becomes it."""
        key = self.columns[0]
        for row in self.rows:
            if row[key] == name:
                return row
        values = measure()
        row = {c: values.get(c, "") for c in self.columns} | {key: name}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.path, self.columns, self.rows)
        return row


def write_csv(path, columns, rows):
    """Rows, dicts, as a file that is either the old one or whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (row[c] for c in columns)
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in cells])
    with whole(path) as file:
        file.write(text.getvalue().encode())


def pyplot(path):
    """matplotlib's pyplot for a file; None, and a line, where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: pip install matplotlib")
        return None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


# ---------------------------------------------------------------------------------- training runs

RUN_COLUMNS = ("run", "dataset", "kind", "steps", "seed", "score", "unit", "seconds",
               "tokens_per_s")


def trained(study, name, flags):
    """The folder of the finished run of that name, by train.py with these flags.

    An interrupted one goes on where it was. Its log is copied to OUT/logs.
    """
    import train

    folder = study.runs / name
    if best_checkpoint(folder).is_file():
        flags = ["--resume"]
    train.main([str(flag) for flag in (*flags, "--out", folder)])
    (study.out / "logs").mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "log.csv", study.out / "logs" / f"{name}.csv")
    return folder


def loaded(folder):
    """(Loaded, Dataset) of a run folder."""
    run = load_model(folder, np)
    config = run.config
    return run, data.load(config["dataset"], config.get("data_dir"), run.model.vocab_size,
                          given_codec(config, folder), run.model.seq_len)


def score(study, folder):
    """The columns of a run that come from its folder: score of the validation split, speed."""
    run, dataset = loaded(folder)
    found = evaluate(run.state, dataset, run.model, "valid", run.train.batch, limit=study.windows)
    with (folder / "log.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["split"] == "train"][-1]
    return {"score": found.value, "unit": dataset.unit, "seconds": float(last["seconds"]),
            "tokens_per_s": float(last["tokens_per_s"])}


# ---------------------------------------------------------------------------------------- spreads

def mean_spread(values):
    """(mean, largest - smallest)."""
    return statistics.fmean(values), max(values) - min(values)


def differs(a, b):
    """Whether two lists of scores differ: by more than the larger spread of the two, in the mean.

    None where a list has fewer than two seeds, and so no spread.
    """
    if min(len(a), len(b)) < 2:
        return None
    return abs(statistics.fmean(a) - statistics.fmean(b)) > max(mean_spread(a)[1],
                                                                mean_spread(b)[1])


def verdict(a, b):
    """`differs` in words, with the difference of the means."""
    word = {None: "one seed: open", True: "a difference", False: "within the spread"}[differs(a, b)]
    return f"{statistics.fmean(a) - statistics.fmean(b):+.4f} ({word})"
