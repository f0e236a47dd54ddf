"""Steps per second of every kind of head at one shape: the paper's table 7.

Training steps by the default recipe on random tokens, each measurement a process of its own, the
kinds in turns. Ratios are of medians over the turns.
"""

import os
import statistics
import time

from common import planned, table, training
from race import start_ours, timed

from rt_scratch.heads import KINDS

COLUMNS = ("measurement", "dataset", "kind", "round", "steps_per_s", "peak_mib", "load")
BASE = "local"
SHIFTED = ", shifted keys"


def contenders():
    """The kinds of head, without and, where they may see far, with shifted keys."""
    return [*KINDS, *(name + SHIFTED for name in KINDS if KINDS[name].far)]


def kind_flags(kind):
    """Flags of train.py for a model whose heads that can route are of this kind."""
    name = kind.removesuffix(SHIFTED)
    return ["--routing" if KINDS[name].routes else "--attention", name,
            *(["--shift-keys"] if name != kind else [])]


def measure(flags, n_steps, n_threads, cpu_time):
    """In a process of its own."""
    start_ours(n_threads)
    cfg, recipe = planned(flags)
    return timed(training(cfg, recipe.batch * recipe.accumulate, recipe), n_steps,
                 clock=time.process_time if cpu_time else time.perf_counter)


def rates(study):
    """{kind: median steps per second} of the study's text model, measured where the csv lacks it.
    """
    log = study.log("throughput", COLUMNS)
    own = []
    for turn in range(study.rounds):
        for kind in contenders():
            name = f"{study.dataset}/{kind}/{turn}"
            own.append(log.row(name, lambda kind=kind, turn=turn: one(study, kind, turn)))
    return {kind: statistics.median(r["steps_per_s"] for r in own if r["kind"] == kind)
            for kind in contenders()}


def one(study, kind, turn):
    flags = [str(f) for f in (*study.flags(), *kind_flags(kind))]
    load = round(os.getloadavg()[0], 1)
    found = study.apart("throughput", flags, 2 if study.quick else 8, study.threads,
                        study.cpu_time)
    return {"dataset": study.dataset, "kind": kind, "round": turn, "peak_mib": found["peak_mib"],
            "steps_per_s": 1 / statistics.median(found["seconds"]), "load": load}


def run(study):
    """throughput.csv and throughput.md, which holds every shape that was measured."""
    rates(study)
    rows = study.log("throughput", COLUMNS).rows
    text = [f"# Throughput\n\n{study.head}\n{__doc__}"]
    for dataset in dict.fromkeys(r["dataset"] for r in rows):
        of = {kind: [r for r in rows if (r["dataset"], r["kind"]) == (dataset, kind)]
              for kind in contenders()}
        speed = {kind: statistics.median(r["steps_per_s"] for r in own)
                 for kind, own in of.items() if own}
        loads = [r["load"] for r in rows if r["dataset"] == dataset]
        text.append(f"## {dataset}\n\nLoad of the machine {min(loads)} to {max(loads)}.\n")
        text.append(table(
            ["heads", "steps/s", f"x {BASE}", "turns", "peak MiB"],
            [[kind, f"{s:.2f}", f"{s / speed[BASE]:.2f}", len(of[kind]),
              f"{max(r['peak_mib'] for r in of[kind]):,.0f}"] for kind, s in speed.items()]))
    study.report("throughput", "\n".join(text))
