"""Where the time of a training step on the CPU goes, per function.

    python benchmarks/profile_step.py --out benchmarks/results/profile-cpu.md
    python benchmarks/profile_step.py --sizes 1.1M --routing causal

Every function of the model is wrapped in a clock. Seconds are a function's own, without those of
the functions it calls. Work of the pool's threads counts 1 / threads, so that the column adds up to
the step. Bytes are those of the arrays a function is given and returns, each counted once: what has
to move, whatever the function does in between.
"""

import argparse
import functools
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from sizes import SIZES
from sizes import model as size_model

from rt_scratch import attention, layers, model, optim, routing, step, threads
from rt_scratch.backend import select_device
from rt_scratch.model import init_centroids, init_parameters

MODULES = (layers, attention, routing, model, step, optim)
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
        weight = 1 / threads_at_work() if threads.busy() else 1
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


def threads_at_work():
    return threads._pool()._max_workers


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
    """Replace the functions by clocked ones wherever a module names them."""
    names = {f for m in MODULES for f in vars(m).values()
             if callable(f) and getattr(f, "__module__", None) in {m.__name__ for m in MODULES}
             and not isinstance(f, type)}
    replaced = {f: clocked(f) for f in names}
    for m in MODULES:
        for name, f in list(vars(m).items()):
            if not isinstance(f, type) and callable(f) and f in replaced:
                setattr(m, name, replaced[f])
    step.parallel = uncounted(step.parallel)


def profile(size, n_steps, changes):
    """(Seconds per step, {function: (seconds, bytes, calls) per step})."""
    cfg, batch = size_model(size, **changes)
    flat, table = init_parameters(cfg, np, "float32", 0)
    centroids, grads = init_centroids(cfg, np, "float32", 0), np.empty_like(flat)
    state = optim.adamw_init(flat, table)
    ids = np.random.default_rng(0).integers(0, 256, (batch, cfg.seq_len))
    parts = [(part, None) for part in np.array_split(ids, min(batch, threads_at_work()))]
    for i in range(2 + n_steps):
        if i == 2:
            records.clear()
            start = time.perf_counter()
        result = step.gradients(flat, grads, table, centroids, cfg, parts, 0, i,
                                together=len(parts))
        optim.adamw_update(flat, grads, state, table, 1e-3, i)
        centroids = step.move_centroids(centroids, result.memberships, cfg)
    seconds = (time.perf_counter() - start) / n_steps
    return seconds, {name: r / n_steps for name, r in records.items()}


def report(size, seconds, functions, least=0.005):
    lines = [f"## {size}: {seconds * 1e3:.0f} ms per step\n",
             "| function | calls | ms | share | MiB | GB/s |", "|---|---|---|---|---|---|"]
    small = 0.0
    for name, (own, size_in_bytes, calls) in sorted(functions.items(), key=lambda f: -f[1][0]):
        if own < least * seconds:
            small += own
            continue
        lines.append(f"| {name} | {calls:.0f} | {own * 1e3:.1f} | {own / seconds:.1%} | "
                     f"{size_in_bytes / 2**20:.0f} | {size_in_bytes / own / 1e9:.1f} |")
    lines.append(f"| all others | | {small * 1e3:.1f} | {small / seconds:.1%} | | |")
    waiting = seconds - sum(r[0] for r in functions.values())
    lines.append(f"| waiting for the slower thread | | {waiting * 1e3:.1f} | "
                 f"{waiting / seconds:.1%} | | |\n")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--routing", choices=("topk", "causal"), default="topk",
                        help="topk without relative positions, as in the race, or causal with them")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    args = parser.parse_args()
    changes = dict(routing="topk", local_max_distance=0, routing_max_distance=0,
                   timing_signal=True) if args.routing == "topk" else {}
    select_device("cpu")
    threads.set_blas_threads(1)
    threads.keep_freed_memory()
    wrap_everything()
    text = "\n".join([f"# Profile of a training step on {threads_at_work()} threads, routing "
                      f"{args.routing}\n\n{time.strftime('%Y-%m-%d')}, Python "
                      f"{sys.version.split()[0]}, NumPy {np.__version__}. Own time of each "
                      "function; see benchmarks/profile_step.py.\n"]
                     + [report(size, *profile(size, args.steps, changes)) for size in args.sizes])
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
