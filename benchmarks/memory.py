"""One real step of every released preset on the CPU: how long, and how much memory at its peak.

    python benchmarks/memory.py --out benchmarks/results/memory.md           about ten minutes
    python benchmarks/memory.py --presets pg19/released --recompute on

Each step is a process of its own: forward, backward, optimizer and k-means on random tokens, batch
1, float32, so that no dataset is needed. The peak is the process's largest resident set. A preset
that would not fit the memory that is free without --recompute is only run with it.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("cifar10/released", "enwik8/released", "wikitext103/released", "imagenet64/released",
           "pg19/released")
COLUMNS = ("preset", "parameters", "T", "V", "recompute", "seconds", "estimate, GiB", "peak, GiB")


def plan(name, recompute):
    """(ModelConfig, TrainConfig, parameter table) of DATASET/PRESET at batch 1."""
    import train
    from rt_scratch.model import parameter_table

    dataset, preset = name.split("/")
    flags = [dataset, "--preset", preset, "--batch", "1", "--dry-run", "--data-dir",
             str(ROOT / "no data"), "--recompute" if recompute else "--no-recompute"]
    model, recipe = train.prepare(train.parse(flags))[2:]
    return model, recipe, parameter_table(model)


def one_step(name, recompute):
    """In the measuring process: the seconds of a step and the peak of the process."""
    import train
    from rt_scratch import run
    from rt_scratch.backend import select_device
    from rt_scratch.optim import OPTIMIZERS
    from rt_scratch.step import gradients, move_centroids

    model, recipe, _ = plan(name, recompute)
    xp, _ = select_device("cpu")
    train.set_threads(xp, recipe)
    state = run.new_state(model, recipe, np)
    grads = np.empty_like(state.flat)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, model.seq_len))
    start = time.perf_counter()
    result = gradients(state.flat, grads, state.table, state.centroids, model, [(ids, None)], 0, 0,
                       recipe.recompute)
    OPTIMIZERS[recipe.optimizer][1](state.flat, grads, state.optimizer, state.table, recipe.lr, 0,
                                    weight_decay=recipe.weight_decay)
    move_centroids(state.centroids, result.memberships, model)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak, "nats": float(result.nats)}


def measure(name, recompute):
    """A row of the table, from a process of its own."""
    import train

    model, recipe, table = plan(name, recompute)
    estimate = train.memory(model, recipe, table[-1].stop)
    row = [name, f"{table[-1].stop:,}", f"{model.seq_len:,}", f"{model.vocab_size:,}",
           "yes" if recompute else "no"]
    if estimate > available():
        return row + ["not run", f"{estimate / 2**30:.1f}", "does not fit here"]
    done = subprocess.run([sys.executable, __file__, "--measure", json.dumps([name, recompute])],
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return row + ["failed", f"{estimate / 2**30:.1f}", last]
    result = json.loads(done.stdout.splitlines()[-1])
    if not np.isfinite(result["nats"]):
        return row + ["failed", f"{estimate / 2**30:.1f}", "the loss is not finite"]
    return row + [f"{result['seconds']:.0f}", f"{estimate / 2**30:.1f}",
                  f"{result['peak'] / 2**30:.1f}"]


def available():
    """Bytes of memory that are free for a process; all of it where that is not known."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return float("inf")
    sizes = dict(line.split(":") for line in path.read_text().splitlines())
    return int(sizes["MemAvailable"].split()[0]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS, metavar="DATASET/PRESET")
    parser.add_argument("--recompute", choices=("on", "off", "both"), default="both")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(one_step(*json.loads(args.measure))))
        return
    head = (f"# One step of each released preset\n\n{time.strftime('%Y-%m-%d')}, "
            f"{os.cpu_count()} cores, {available() / 2**30:.0f} GiB free, Python "
            f"{platform.python_version()}, NumPy {np.__version__}. Batch 1, float32, "
            "forward + backward + optimizer + k-means; peak resident memory of the process. The "
            "estimate is what `train.py --dry-run` prints.\n")
    lines = [head, "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name in args.presets:
        for recompute in {"on": [True], "off": [False], "both": [False, True]}[args.recompute]:
            lines.append("| " + " | ".join(measure(name, recompute)) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
