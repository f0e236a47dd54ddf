"""log.csv of a run, the line that a step prints, cluster health, and the clock."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rt_scratch.console import harmless, say
from rt_scratch.data import Dataset, score
from rt_scratch.dispatch import to_host
from rt_scratch.run.folder import RunFolder, whole
from rt_scratch.step import Step

COLUMNS = ("step", "split", "nats", "score", "unit", "tokens_per_s", "seconds", "lr", "grad_norm",
           "uncovered", "several", "smallest", "largest", "dead")
HEAD_COLUMNS = ("step", "layer", "head", "largest", "dead")


class Clock:
    """Seconds of a run that may continue an earlier one, and its speed without the scoring."""

    def __init__(self, seconds: float = 0.0):
        self._before, self._started, self._aside = seconds, time.monotonic(), 0.0

    def here(self) -> float:
        """Seconds since this process began to train."""
        return time.monotonic() - self._started

    def total(self) -> float:
        """Seconds of the whole run."""
        return self._before + self.here()

    @contextlib.contextmanager
    def aside(self):
        """Time that is no training: scoring, sampling, saving."""
        started = time.monotonic()
        yield
        self._aside += time.monotonic() - started

    def rate(self, tokens: int) -> float:
        """Tokens per second of training in this process."""
        return tokens / max(self.here() - self._aside, 1e-9)


class ProgressBar:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, first: int, steps: int):
        self._bar = tqdm(total=steps, initial=first, unit="step", disable=None)
        self._first, self._steps = first, steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def update(self) -> None:
        """One more step."""
        self._bar.update()

    def show(self, row: dict, seconds: float) -> bool:
        """Show the log row of a step, `seconds` after the first; False where nobody reads it."""
        text = (f"{row['score']:.4f} {row['unit']}  lr {row['lr']:.2e}  "
                f"|g| {row['grad_norm']:.2f}  {row['tokens_per_s']} tok/s")
        if self._bar.disable:
            left = seconds / (row["step"] - self._first) * (self._steps - row["step"])
            return say(f"{row['step']}/{self._steps}  {text}  ETA {left:.0f} s")
        self._bar.set_postfix_str(text)
        return True

    def say(self, text: str) -> bool:
        """Print above the bar; False where nobody reads it."""
        with self._bar.external_write_mode():
            return say(text)


def step_row(result: Step, step: int, dataset: Dataset, clock: Clock, tokens: int) -> dict:
    """The log row of a training step; `tokens` were trained on in this process so far."""
    nats = float(result.nats)
    return {"step": step, "split": "train", "nats": nats,
            "score": score(nats, 1, dataset, "train"), "unit": dataset.unit,
            "tokens_per_s": round(clock.rate(tokens)), "seconds": round(clock.total(), 1),
            "lr": result.lr, "grad_norm": float(result.norm), **health(result.memberships)}


def record(run: RunFolder, row: dict, memberships=None) -> None:
    """Add a row to log.csv, and for a step its clusters to clusters.csv, if `run` is written."""
    if run.writes:
        append_log(run.path, row)
        append_clusters(run.path, row["step"], memberships or {})


def append_log(folder: Path, row: dict) -> None:
    """Add a line to log.csv, after a header if new. A log that cannot be written stops nothing."""
    _append(folder / "log.csv", [row], COLUMNS)


def append_clusters(folder: Path, step: int, memberships) -> None:
    """Add lines to clusters.csv: each routing head's largest share of tokens, and dead centroids.

    A run that goes on from an older checkpoint writes later steps again; `read_clusters` takes the
    last line of each.
    """
    rows = []
    for layer, membership in memberships.items():
        counts = to_host(membership.counts)                          # (H, K)
        share = counts.max(-1) / np.maximum(counts.sum(-1), 1)
        rows += [dict(zip(HEAD_COLUMNS, (step, layer, head, f"{share[head]:.4f}", dead),
                          strict=True)) for head, dead in enumerate((counts == 0).sum(-1))]
    if rows:
        _append(folder / "clusters.csv", rows, HEAD_COLUMNS)


def _append(path, rows, columns):
    with harmless(path):
        text = _csv(rows, header=not path.exists(), columns=columns)
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(text)


def read_clusters(folder: Path) -> dict[tuple[int, int], dict[int, tuple[float, int]]]:
    """{(layer, head): {step: (largest share, dead centroids)}} of clusters.csv; {} without one."""
    path, found = folder / "clusters.csv", {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # the header, and lines that were cut off
            step, layer, head, largest, dead = line.split(",")
            found.setdefault((int(layer), int(head)), {})[int(step)] = float(largest), int(dead)
    return found


def read_log(folder: Path) -> list[dict]:
    """The whole lines of log.csv; none where there is no log."""
    path = folder / "log.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if len(line) < 1000 and "\0" not in line]
    return [row for row in csv.DictReader(lines) if _whole(row)]


def trim_log(run: RunFolder, step: int, scored: int) -> None:
    """Drop any line that was cut off, and those that a resumed run writes again: training after
    `step`, scores after step `scored`."""
    path = run.path / "log.csv"
    if not run.writes:
        return
    with harmless(path):
        rows = [row for row in read_log(run.path)
                if int(row["step"]) <= (scored if row["split"] == "valid" else step)]
        with whole(path) as file:
            file.write(_csv(rows, header=True, columns=COLUMNS).encode())


def logged_row(folder: Path, step: int) -> dict:
    """The row of a training step, as `step_row` gave it; {} where the log lacks it."""
    with harmless(folder / "log.csv"):
        for row in read_log(folder):
            if row["split"] == "train" and int(row["step"]) == step:
                return {name: text if name in ("split", "unit") else
                        int(text) if text.isdecimal() else float(text)
                        for name, text in row.items() if text}
    return {}


def _csv(rows, header, columns):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _whole(row):
    try:
        for name in COLUMNS[5:]:
            float(row[name] or 0)  # empty without routing
        return (set(row) == set(COLUMNS) and None not in row.values()
                and row["split"] in ("train", "valid") and 0 <= int(row["step"]) < 2 ** 53
                and float(row["nats"]) >= 0 and float(row["score"]) >= 0)
    except (TypeError, ValueError, KeyError):
        return False


def health(memberships) -> dict[str, float]:
    """Cluster health over all routing heads: shares of tokens, and centroids that won none."""
    if not memberships:
        return {}
    counts = np.concatenate([to_host(m.counts) for m in memberships.values()])  # (heads, K)
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return {
        "uncovered": float(np.mean([float(m.uncovered) for m in memberships.values()])),
        "several": float(np.mean([float(m.several) for m in memberships.values()])),
        "smallest": float(share.min()), "largest": float(share.max()),
        "dead": int((counts == 0).sum()),
    }


def cluster_line(row: dict) -> str:
    """The cluster health of a log row in words; nothing for a model without routing heads."""
    if "dead" not in row:
        return ""
    return (f"clusters: {row['uncovered']:.1%} of tokens see nothing, {row['several']:.1%} are in "
            f"several; smallest {row['smallest']:.1%}, largest {row['largest']:.1%} of a head's "
            f"tokens; {row['dead']} without any\n")
