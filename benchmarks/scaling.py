"""Threads against processes, strong and weak scaling, and what more machines would give.

    pip install -e '.[mpi]' && python benchmarks/scaling.py --out benchmarks/results/scaling.md

Every measurement is a run of its own under mpiexec; the settings take turns, round after round, so
that a machine that others use too treats them alike. A step is the median of its run, a cell the
fastest run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import common
import numpy as np

from rt_scratch import ModelConfig, cut, new_state, select_device, threads, train_step
from rt_scratch.console import Parser, number, script
from rt_scratch.parallel import start
from rt_scratch.run.costs import n_parameters
from rt_scratch.workers import start_workers

SETTINGS = (  # name, processes of mpiexec, cores of each, share of the batch, with workers?
    ("half the batch", 1, 1, 0.5, False), ("one core", 1, 1, 1, False),
    ("two threads", 1, 2, 1, False), ("a worker", 1, 2, 1, True),
    ("mpiexec -n 2", 2, 1, 1, False))
SIZES = {"0.9M": (None, 2, 8), "1.1M": ("1.1M", 8, 6), "4.2M": ("4.2M", 4, 4),
         "24.7M": ("24.7M", 2, 1)}  # size in common.py, batch, steps
RELEASED = {  # parameters and seconds per window of results/memory.md
    "enwik8, 165M": (165_219_584, 68), "pg19, 583M": (582_691_458, 200)}
FORMULA = "exchange = 2 (n - 1) / n x 4 bytes x parameters / bandwidth"


def measure(size, batch, steps, n_threads, forked):
    """In each process; what process 0 found: seconds of a step and of its parts, peak memory."""
    world = start()
    threads.limit(n_threads)
    select_device("cpu", world)
    cfg = ModelConfig().validate() if size is None else common.size_model(size)[0]
    train = replace(common.RECIPE, batch=batch, parts=2)
    state, step_once = new_state(cfg, train, np), train_step
    if forked:
        workers = start_workers(train_step, state, cfg, train, np, world)
        state, step_once = workers.__enter__()
    grads, inside = np.empty_like(state.flat), []
    parts = cut(common.random_tokens(cfg, batch, cfg.seq_len), None, cfg, train, np, world)
    exchange = world.sum

    def timed(array):
        begun = time.perf_counter()
        exchange(array)
        if array is grads:
            inside.append(time.perf_counter() - begun)

    world.sum, seconds = timed, []
    for _ in range(steps + 1):
        world.barrier()
        begun = time.perf_counter()
        state, _ = step_once(state, grads, parts, cfg, train, None, world)
        seconds.append(time.perf_counter() - begun)
    alone = []
    for _ in range(5):
        world.barrier()
        begun = time.perf_counter()
        exchange(grads)
        alone.append(time.perf_counter() - begun)
    if world.rank == 0:
        print(json.dumps({
            "step": float(np.median(seconds[1:])), "inside": float(np.median(inside[1:])),
            "alone": min(alone), "peak": common.peak_bytes(), "parameters": n_parameters(cfg)}))


def run(n, *argument):
    """What `measure` says in n processes."""
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else "mpiexec"
    done = subprocess.run(
        [mpiexec, "-n", str(n), sys.executable, __file__, "--measure", json.dumps(argument)],
        env=os.environ | {"PYTHONPATH": str(common.ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"exit {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(sizes, rounds):
    """{(size, setting): the fastest of its runs}"""
    found = defaultdict(list)
    for _ in range(rounds):
        for name in sizes:
            size, batch, steps = SIZES[name]
            for setting, n, n_threads, share, forked in SETTINGS:
                result = run(n, size, int(batch * share), steps, n_threads, forked)
                found[name, setting].append(result)
                print(name, setting, result, file=sys.stderr, flush=True)
    return {key: min(runs, key=lambda result: result["step"]) for key, runs in found.items()}


def report(sizes, found, note):
    """The text of results/scaling.md."""
    rows, scaling = [], []
    for name in sizes:
        half, one, *both = (found[name, setting[0]] for setting in SETTINGS)
        for (setting, n, *_), result in zip(SETTINGS[2:], both, strict=True):
            several = n > 1
            rows.append([name, f"{result['parameters']:,}", setting, f"{result['step'] * 1e3:.0f}",
                         f"{result['alone'] * 1e3:.1f}" if several else "-",
                         f"{result['inside'] * 1e3:.1f}" if several else "-",
                         f"{result['peak'] / 2**20:.0f}"])
        scaling.append([
            name, SIZES[name][1], f"{one['step'] * 1e3:.0f}",
            *(f"{one['step'] / result['step']:.2f}" for result in both),
            f"{half['step'] * 1e3:.0f}", f"{half['step'] / both[-1]['step']:.0%}"])
    computed = []
    for name, (parameters, seconds) in RELEASED.items():
        for gigabits in (10, 100):
            for n in (2, 4, 8, 16, 32, 64):
                exchange = 2 * (n - 1) / n * 4 * parameters / (gigabits * 1e9 / 8)
                computed.append([
                    name, gigabits, n, f"{exchange:.2f}", f"{seconds / (seconds + exchange):.1%}",
                    f"{n * seconds / (seconds + exchange):.1f}"])
    return "\n".join([
        "# Threads, processes, machines\n",
        f"{common.machine()}. {note} `python benchmarks/scaling.py`; float32, AdamW, random "
        "tokens.\n",
        "## Threads or processes on two cores\n",
        "All rows of a model compute the same batch. A worker is what train.py uses: a forked "
        "process that shares memory (rt_scratch/workers.py). Exchange alone: summing the gradient "
        "when both processes are ready; in the step: including the wait for the slower one. "
        "Memory: of one process under mpiexec; of the process and its worker together.\n",
        common.table(["model", "parameters", "two cores by", "step, ms", "exchange alone, ms",
                      "in the step, ms", "peak, MiB"], rows),
        "## Strong and weak scaling\n",
        "Strong: on the same batch, how many times as fast as one core. Weak: one core with half "
        "the batch against mpiexec -n 2 with the whole batch, the share of the speed per process "
        "that is kept.\n",
        common.table(["model", "windows per step", "one core, ms",
                      *(f"{setting[0]}, strong" for setting in SETTINGS[2:]),
                      "one core with half the batch, ms", "mpiexec -n 2, weak"], scaling),
        "## Many machines: computed, not measured\n",
        f"Each of n machines computes one window per step, in the seconds that results/memory.md "
        f"measured on two cores (enwik8 {RELEASED['enwik8, 165M'][1]}, pg19 "
        f"{RELEASED['pg19, 583M'][1]}); then the gradient is exchanged, by a ring that uses "
        f"the whole bandwidth:\n\n    {FORMULA}\n    kept = step / (step + exchange)\n\n"
        "For a faster machine put its own seconds into the formula.\n",
        common.table(["model", "Gbit/s", "machines", "exchange, s", "kept", "times as fast"],
                     computed)])


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=number(int, 1), default=3)
    parser.add_argument("--note", default="", help="a sentence on the state of the machine")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(*args.measure)
        return
    text = report(args.sizes, measured(args.sizes, args.rounds), args.note)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    script(main)
