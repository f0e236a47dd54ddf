"""One real step of every released preset on the CPU: how long, and how much memory at its peak.

    python benchmarks/memory.py --out benchmarks/results/memory.md           about ten minutes
    python benchmarks/memory.py --presets pg19/released --recompute on

Each step is a process of its own: forward, backward, optimizer and k-means on random tokens, batch
1, float32, so that no dataset is needed. The peak is the process's largest resident set. A preset
that would not fit the memory that is free without --recompute is only run with it.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

from common import ROOT, in_own_process, machine, peak_bytes, planned, table, training

from rt_scratch import select_device
from rt_scratch.console import Parser, script
from rt_scratch.run.costs import n_parameters, step_bytes

PRESETS = ("cifar10/released", "enwik8/released", "wikitext103/released", "imagenet64/released",
           "pg19/released")
COLUMNS = ("preset", "parameters", "T", "V", "recompute", "seconds", "estimate, GiB", "peak, GiB")


def plan(name, recompute):
    """(ModelConfig, TrainConfig) of DATASET/PRESET at batch 1."""
    dataset, preset = name.split("/")
    return planned([dataset, "--preset", preset, "--batch", 1, "--data-dir", ROOT / "no data",
                    "--recompute" if recompute else "--no-recompute"])


def one_step(name, recompute):
    """In the measuring process: the seconds of a step and the peak of the process."""
    select_device("cpu")
    cfg, recipe = plan(name, recompute)
    step = training(cfg, 1, recipe)
    start = time.perf_counter()
    nats = float(step(0).nats)
    return {"seconds": time.perf_counter() - start, "peak": peak_bytes(), "nats": nats}


def measure(name, recompute):
    """A row of the table, from a process of its own."""
    cfg, recipe = plan(name, recompute)
    estimate = step_bytes(cfg, recipe)
    row = [name, f"{n_parameters(cfg):,}", f"{cfg.seq_len:,}", f"{cfg.vocab_size:,}",
           "yes" if recompute else "no"]
    if estimate > available():
        return row + ["not run", f"{estimate / 2**30:.1f}", "does not fit here"]
    try:
        result = in_own_process(__file__, [name, recompute])
        if not math.isfinite(result["nats"]):
            raise RuntimeError("the loss is not finite")
    except RuntimeError as error:
        return row + ["failed", f"{estimate / 2**30:.1f}", error]
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
    parser = Parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=PRESETS, metavar="DATASET/PRESET")
    parser.add_argument("--recompute", choices=("on", "off", "both"), default="both")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(one_step(*json.loads(args.measure))))
        return
    head = (f"# One step of each released preset\n\n{machine()}; {available() / 2**30:.0f} GiB "
            "free. Batch 1, float32, forward + backward + optimizer + k-means; peak resident "
            "memory of the process. The estimate is what `train.py --dry-run` prints.\n\n")
    rows = []
    for name in args.presets:
        for recompute in {"on": [True], "off": [False], "both": [False, True]}[args.recompute]:
            rows.append(measure(name, recompute))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(head + table(COLUMNS, rows))
    print(head + table(COLUMNS, rows))


if __name__ == "__main__":
    script(main)
