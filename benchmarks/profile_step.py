"""Where the time of a training step on the CPU goes, per function.

    python benchmarks/profile_step.py --out benchmarks/results/profile-cpu.md
    python benchmarks/profile_step.py --sizes 1.1M --routing causal

Every function of the model is wrapped in a clock. Seconds are a function's own, without those of
the functions it calls. Parts of a batch run on threads here, not in forked processes, which have
clocks of their own. A thread's work counts 1 / threads, so that the column adds up to the step.
Bytes are those of the arrays a function is given and returns, each counted once: what has to move,
whatever the function does in between.
"""

import contextlib
import functools
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import common
import numpy as np

from rt_scratch import (
    attention,
    dropout,
    heads,
    kmeans,
    layers,
    model,
    multiprobe,
    optim,
    routing,
    select_device,
    step,
    threads,
)
from rt_scratch.console import Parser, number, script

MODULES = (layers, attention, dropout, kmeans, routing, multiprobe, heads, model, optim, step)
here, records, lock = threading.local(), defaultdict(lambda: np.zeros(3)), threading.Lock()


def clocked(function):
    """The function, adding its own seconds, bytes and calls to `records`."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        stack = here.__dict__.setdefault("stack", [])
        stack.append(0.0)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent = time.perf_counter() - start
        inner = stack.pop()
        if stack:
            stack[-1] += spent
        seen = {}
        collect((args, result), seen)
        weight = 1 / threads.n_threads() if threads.busy() else 1
        with lock:
            records[function.__name__] += (weight * (spent - inner), sum(seen.values()), 1)
        return result
    return call


def uncounted(function):
    """`parallel`, its seconds belonging to nobody: a thread that waits for the others."""
    @functools.wraps(function)
    def call(work, items):
        start = time.perf_counter()
        result = function(work, items)
        if len(items) > 1:  # a single item is worked on right here, and counts where it belongs
            here.stack[-1] += time.perf_counter() - start
        return result
    return call


def collect(tree, seen):
    """Sizes of the arrays in a tree of tuples, lists and dictionaries, each once."""
    if isinstance(tree, np.ndarray):
        seen[tree.__array_interface__["data"][0], tree.shape] = tree.nbytes
    elif isinstance(tree, dict):
        collect(tuple(tree.values()), seen)
    elif isinstance(tree, tuple | list):
        for branch in tree:
            collect(branch, seen)


def wrap_everything():
    """Replace the functions by clocked ones wherever a module, or a row of its tables, names them.

    Before anything else: `heads.head_groups` remembers rows.
    """
    owners = {m.__name__ for m in MODULES}
    clocks = {f: clocked(f) for m in MODULES for f in vars(m).values()
              if callable(f) and not isinstance(f, type) and f.__module__ in owners}

    def replaced(value):
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(replaced, value))
        return clocks.get(value, value) if callable(value) else value

    for m in MODULES:
        for name, value in list(vars(m).items()):
            if isinstance(value, dict) and name.isupper():
                value.update({key: replaced(row) for key, row in value.items()})
            else:
                setattr(m, name, replaced(value))
    common.train_step = step.train_step
    step.parallel = uncounted(step.parallel)
    common.start_workers = lambda step_once, state, *_: contextlib.nullcontext((state, step_once))


def profile(size, n_steps, changes):
    """(Seconds per step, {function: (seconds, bytes, calls) per step})."""
    cfg, batch = common.size_model(size, **changes)
    one = common.training(cfg, batch, replace(common.RECIPE, parts=threads.n_threads()))
    for _ in range(2):
        one(0)
    records.clear()
    start = time.perf_counter()
    for i in range(n_steps):
        one(i)
    seconds = (time.perf_counter() - start) / n_steps
    return seconds, {name: r / n_steps for name, r in records.items()}


def report(size, seconds, functions, least=0.005):
    rows, small = [], 0.0
    for name, (own, size_in_bytes, calls) in sorted(functions.items(), key=lambda f: -f[1][0]):
        if own < least * seconds:
            small += own
            continue
        rows.append([name, f"{calls:.0f}", f"{own * 1e3:.1f}", f"{own / seconds:.1%}",
                     f"{size_in_bytes / 2**20:.0f}", f"{size_in_bytes / own / 1e9:.1f}"])
    waiting = seconds - sum(r[0] for r in functions.values())
    for name, rest in (("all others", small), ("waiting for the slower thread", waiting)):
        rows.append([name, "", f"{rest * 1e3:.1f}", f"{rest / seconds:.1%}", "", ""])
    return f"## {size}: {seconds * 1e3:.0f} ms per step\n\n" + common.table(
        ["function", "calls", "ms", "share", "MiB", "GB/s"], rows)


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=common.SIZES, default=list(common.SIZES))
    parser.add_argument("--routing", choices=("topk", "causal"), default="topk",
                        help="topk without relative positions, as in the race, or causal with them")
    parser.add_argument("--steps", type=number(int, 1), default=6)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    args = parser.parse_args()
    changes = common.PORT_WORK if args.routing == "topk" else {}
    wrap_everything()
    select_device("cpu")
    text = "\n".join([f"# Profile of a training step on {threads.n_threads()} threads, routing "
                      f"{args.routing}\n\n{common.machine()}. Own time of each function; see "
                      "benchmarks/profile_step.py.\n"]
                     + [report(size, *profile(size, args.steps, changes)) for size in args.sizes])
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    script(main)
