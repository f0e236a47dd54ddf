"""The race on the CPU: this project against routing-transformer 1.6.1 and torch, side by side.

    pip install -e '.[bench]'
    python benchmarks/race.py --out benchmarks/results/race-cpu            everything, about 25 min
    python benchmarks/race.py --out race --sizes 1.1M --only steps         one size, steps alone

Every measurement is a process of its own; the contenders take turns (A B C A B C), so that a busy
machine slows all of them. Medians over all rounds, ratios of medians. Writes race.md and race.json.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from common import (
    PORT_WORK,
    SIZES,
    decoding,
    exponent,
    in_own_process,
    machine,
    peak_bytes,
    size_model,
    table,
    training,
)

from rt_scratch import select_device, threads
from rt_scratch.console import Parser, number, script
from rt_scratch.run.costs import flops_per_token, n_parameters

THREADS = 2
SHIFTED = {"shift_keys": True}  # the default run's heads
CONTENDERS = {  # name: (kind, what changes in the configuration)
    "ours, causal, shifted keys + Shaw": ("ours", SHIFTED),
    "ours, causal + Shaw": ("ours", {}),
    "ours, topk": ("ours", PORT_WORK),
    "port": ("port", PORT_WORK),
    "twin eager": ("twin", PORT_WORK),
    "twin compiled": ("compiled", PORT_WORK),
}
CONTEXTS = (512, 4000)
TEXTS = (2, 4, 8)  # decoded at once
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
FIT_FROM = 4096  # shorter windows are dominated by what every step costs


# ------------------------------------------------------------------- in the measuring processes

def step_ours(size, changes, n_steps):
    cfg, batch = size_model(size, **changes)
    start_ours()
    return timed(training(cfg, batch), n_steps) | {"parameters": n_parameters(cfg)}


def step_torch(kind, size, changes, n_steps):
    start_torch()
    import rivals

    cfg, batch = size_model(size, **changes)
    one, n = rivals.port_training(cfg, batch) if kind == "port" else \
        rivals.twin_training(cfg, batch, compiled="default" if kind == "compiled" else None)
    return timed(one, n_steps) | {"parameters": n}


def generate_ours(size, changes, context, texts=1):
    cfg, _ = size_model(size, seq_len=4096, n_clusters=4096 // SIZES[size][0]["window"], **changes)
    start_ours()
    return timed(decoding(cfg, context, texts=texts), 50)


def generate_port(size, changes, context):
    start_torch()
    import rivals
    import torch

    net = rivals.port(size_model(size, seq_len=4096, **changes)[0])
    prompt = torch.randint(0, 256, (1, context))
    return timed(lambda _: net.generate(prompt, 1), 3)


def length_ours(size, changes, t):
    w = round(math.sqrt(t))
    cfg, _ = size_model(size, seq_len=t, window=w, block=w, n_clusters=w, **changes)
    start_ours()
    return timed(training(cfg, 1), 3)


def sgemm(*_):
    """GFLOP/s of matrix products of 1024 x 1024 on every thread at once."""
    start_ours()
    a = np.ones((1024, 1024), "float32")

    def work(_):
        out = np.empty_like(a)
        for _ in range(10):
            np.matmul(a, a, out=out)

    best = min(timed(lambda _: threads.parallel(work, range(THREADS)), 3)["seconds"])
    return {"seconds": [best], "gflops": 2e-9 * THREADS * 10 * 1024**3 / best, "peak_mib": 0}


def start_ours(n_threads=THREADS):
    if hasattr(os, "sched_setaffinity"):  # our pool takes a thread for every core it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n_threads])
    select_device("cpu")


def start_torch(n_threads=THREADS):
    import torch

    torch.set_num_threads(n_threads)
    torch.manual_seed(0)


def timed(function, n, warm_up=2, clock=time.perf_counter, enough=math.inf):
    """Seconds of n calls after the warm-up, and the peak memory of the process.

    Once they took `enough` seconds together, no further call is made.
    """
    seconds = []
    for i in range(warm_up + n):
        start = clock()
        function(i)
        seconds.append(clock() - start)
        if sum(seconds[warm_up:]) > enough:
            break
    return {"seconds": seconds[warm_up:], "peak_mib": peak_bytes() / 2**20}


WORK = {"step ours": step_ours, "generate ours": generate_ours, "generate port": generate_port,
        "length ours": length_ours, "sgemm": sgemm}


def work(name, *arguments):
    if name in WORK:
        return WORK[name](*arguments)
    return step_torch(name.removeprefix("step "), *arguments)


# ------------------------------------------------------------------------ in the calling process

def measure(*job):
    """One measurement in a process of its own; None and a line if it fails."""
    try:
        result = in_own_process(__file__, job, OMP_NUM_THREADS=str(THREADS))
    except RuntimeError as error:
        print(f"{job[0]} {job[1]}: failed: {error}", file=sys.stderr)
        return None
    print(f"{job[0]} {job[1]} {job[3]}: {statistics.median(result['seconds']):.4f} s",
          file=sys.stderr)
    return result


def rounds(n_rounds, jobs):
    """Run the jobs {name: arguments} in turns; {name: merged result}."""
    merged = {}
    for _ in range(n_rounds):
        for name, job in jobs.items():
            result = measure(*job)
            if result is None:
                continue
            into = merged.setdefault(name, result | {"seconds": []})
            into["seconds"] += result["seconds"]
            for most in {"peak_mib", "gflops"} & set(result):
                into[most] = max(into[most], result[most])
    return merged


def race_steps(sizes, n_rounds, n_steps, record):
    rows = []
    for size in sizes:
        jobs = {name: (f"step {kind}", size, changes, n_steps)
                for name, (kind, changes) in CONTENDERS.items()} | {"sgemm": ("sgemm", "", {}, 0)}
        results = record[f"steps {size}"] = rounds(n_rounds, jobs)
        rate = results["sgemm"]["gflops"] if "sgemm" in results else math.nan
        base = statistics.median(results["port"]["seconds"]) if "port" in results else math.nan
        for name, (kind, changes) in CONTENDERS.items():
            if name not in results:
                rows.append([size, name, "failed", "", "", "", "", ""])
                continue
            cfg, batch = size_model(size, **changes)
            r, tokens = results[name], batch * cfg.seq_len
            seconds = statistics.median(r["seconds"])
            share = f"{flops_per_token(cfg) * tokens / seconds / rate / 1e9:.0%}" \
                if kind == "ours" and math.isfinite(rate) else ""
            rows.append([size, name, f"{r['parameters']:,}", f"{seconds * 1e3:.0f}",
                         f"{tokens / seconds:,.0f}", f"{base / seconds:.2f}",
                         f"{r['peak_mib']:.0f}", share])
        rows.append([size, f"sgemm: {rate:.0f} GFLOP/s", "", "", "", "", "", "100%"])
    return "## Training steps\n\nForward, backward, AdamW. Tokens/s relative to the port in the " \
        "column `x port`; the port, `ours, topk` and the twins have topk routing and no relative " \
        "positions. Share of the machine's sgemm rate, measured in the same run.\n\n" + \
        table(["size", "contender", "parameters", "ms/step", "tokens/s", "x port", "peak MiB",
               "of sgemm"], rows)


def race_generation(size, n_rounds, record):
    rows = []
    for context in CONTEXTS:
        jobs = {"ours, causal, shifted keys": ("generate ours", size, SHIFTED, context),
                "ours, causal": ("generate ours", size, {}, context),
                "ours, topk": ("generate ours", size, {"routing": "topk"}, context),
                "port": ("generate port", size, {}, context)} | {
            f"ours, causal, {n} texts at once": ("generate ours", size, {}, context, n)
            for n in TEXTS}
        results = record[f"generate {context}"] = rounds(n_rounds, jobs)
        base = statistics.median(results["port"]["seconds"]) if "port" in results else math.nan
        for name, result in results.items():
            texts, seconds = (*jobs[name][4:], 1)[0], statistics.median(result["seconds"])
            rows.append([context, name, f"{seconds * 1e3:.2f}", f"{texts / seconds:.0f}",
                         f"{base * texts / seconds:.0f}"])
    return f"## Generation, {size}\n\nOne token for each text after a context of so many; one " \
        "text where nothing else is said.\n\n" + table(
            ["context", "contender", "ms/step", "tokens/s", "x port"], rows)


def race_length(size, n_rounds, record):
    rows, points = [], []
    for t in LENGTHS:
        r = record[f"length {t}"] = rounds(n_rounds, {"": ("length ours", size, {}, t)}).get("")
        if r is None:
            rows.append([t, round(math.sqrt(t)), "failed", "", ""])
            continue
        seconds = statistics.median(r["seconds"])
        points.append((t, seconds))
        rows.append([t, round(math.sqrt(t)), f"{seconds:.3f}", f"{seconds / t * 1e6:.1f}",
                     f"{r['peak_mib']:.0f}"])
    slope = exponent(points, FIT_FROM)
    return f"## Cost against length, {size}\n\nTraining steps of one window, W = K = sqrt(T), " \
        f"mode causal. Fitted exponent from T = {FIT_FROM} on: {slope:.2f} (the paper's bound " \
        "is 1.5; the matrices' share grows like 1).\n\n" + table(
            ["T", "W = K", "seconds", "us/token", "peak MiB"], rows)


def machine_and_rivals():
    """The first line of a report; exits with what to do where the rivals are missing."""
    try:
        import routing_transformer  # noqa: F401
        import torch
    except ImportError:
        sys.exit("error: torch and routing-transformer are needed: pip install -e '.[bench]'")
    return f"{machine()}, torch {torch.__version__}, routing-transformer 1.6.1; {THREADS} " \
        "threads each\n"


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for race.md and race.json")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", choices=("steps", "generation", "length"))
    parser.add_argument("--rounds", type=number(int, 1), default=2)
    parser.add_argument("--steps", type=number(int, 1), default=6, help="timed steps per process")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(work(*json.loads(args.measure))))
        return
    if args.out is None:
        parser.error("--out FOLDER is needed")
    record, report = {}, ["# Race on the CPU\n", machine_and_rivals()]
    args.out.mkdir(parents=True, exist_ok=True)
    sections = {"steps": lambda: race_steps(args.sizes, args.rounds, args.steps, record),
                "generation": lambda: race_generation(args.sizes[0], args.rounds, record),
                "length": lambda: race_length(args.sizes[0], args.rounds, record)}
    for name, section in sections.items():
        if args.only in (None, name):
            report.append(section())
            (args.out / "race.md").write_text("\n".join(report))
            (args.out / "race.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(report))


if __name__ == "__main__":
    script(main)
