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
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from sizes import SIZES
from sizes import model as size_model

THREADS = 2
SAME_WORK = dict(routing="topk", local_max_distance=0, routing_max_distance=0, timing_signal=True)
CONTENDERS = {  # name: (kind, what changes in the configuration)
    "ours": ("ours", SAME_WORK),
    "port": ("port", {}),
    "twin eager": ("twin", SAME_WORK),
    "twin compiled": ("compiled", SAME_WORK),
    "ours, causal + Shaw": ("ours", {}),
}
CONTEXTS = (512, 4000)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
FIT_FROM = 4096  # shorter windows are dominated by what every step costs


# ------------------------------------------------------------------- in the measuring processes

def step_ours(size, changes, n_steps):
    from rt_scratch.model import init_centroids, init_parameters
    from rt_scratch.optim import adamw_init, adamw_update
    from rt_scratch.step import gradients, move_centroids

    cfg, batch = size_model(size, **changes)
    start_ours()
    flat, table = init_parameters(cfg, np, "float32", 0)
    centroids, grads = init_centroids(cfg, np, "float32", 0), np.empty_like(flat)
    state = adamw_init(flat, table)
    ids = np.random.default_rng(0).integers(0, 256, (batch, cfg.seq_len))
    parts = [(part, None) for part in np.array_split(ids, min(batch, THREADS))]

    def one(i):
        nonlocal centroids
        result = gradients(flat, grads, table, centroids, cfg, parts, 0, i, together=len(parts))
        adamw_update(flat, grads, state, table, 1e-3, i)
        centroids = move_centroids(centroids, result.memberships, cfg)

    return timed(one, n_steps) | {"parameters": flat.size, "tokens": ids.size}


def step_port(size, _, n_steps):
    import torch

    start_torch()
    net, cfg, batch = port(size)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    ids = torch.randint(0, 256, (batch, cfg.seq_len + 1))

    def one(_):
        loss = net(ids, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    n = sum(p.numel() for p in net.parameters())
    return timed(one, n_steps) | {"parameters": n, "tokens": batch * cfg.seq_len}


def step_twin(size, changes, n_steps, compiled=False):
    import torch
    import torch_twin

    from rt_scratch.model import init_centroids, init_parameters, views

    start_torch()
    cfg, batch = size_model(size, **changes)
    flat, table = init_parameters(cfg, np, "float32", 0)
    params = torch_twin.tree(views(flat, table))
    mu = {i: torch.tensor(c.mu) for i, c in init_centroids(cfg, np, "float32", 0).items()}
    leaves = list(torch_twin.leaves(params))
    optimizer = torch.optim.AdamW(leaves, 1e-3)
    ids = torch.randint(0, 256, (batch, cfg.seq_len))
    loss = torch.compile(torch_twin.loss) if compiled else torch_twin.loss

    def one(_):
        loss(params, mu, cfg, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(one, n_steps) | {"parameters": flat.size, "tokens": ids.numel()}


def generate_ours(size, changes, context):
    from rt_scratch import decode
    from rt_scratch.model import init_centroids, init_parameters, views

    clusters = 4096 // size_model(size)[0].window
    cfg, _ = size_model(size, seq_len=4096, n_clusters=clusters, **changes)
    start_ours()
    flat, table = init_parameters(cfg, np, "float32", 0)
    params, centroids = views(flat, table), init_centroids(cfg, np, "float32", 0)
    prompt = np.random.default_rng(0).integers(0, 256, (1, context))
    _, cache = decode.prefill(params, centroids, cfg, prompt, context + 64)
    return timed(lambda i: decode.step(params, centroids, cfg, cache, prompt[:, i]), 50)


def generate_port(size, _, context):
    import torch

    start_torch()
    net, _, _ = port(size, seq_len=4096)
    prompt = torch.randint(0, 256, (1, context))
    return timed(lambda _: net.generate(prompt, 1), 3)


def length_ours(size, changes, t):
    from rt_scratch.model import init_centroids, init_parameters
    from rt_scratch.step import gradients

    w = round(math.sqrt(t))
    cfg, _ = size_model(size, seq_len=t, window=w, block=w, n_clusters=w, **changes)
    start_ours()
    flat, table = init_parameters(cfg, np, "float32", 0)
    grads, centroids = np.empty_like(flat), init_centroids(cfg, np, "float32", 0)
    ids = np.random.default_rng(0).integers(0, 256, (1, t))
    return timed(lambda i: gradients(flat, grads, table, centroids, cfg, [(ids, None)], 0, i), 3)


def port(size, **changes):
    from routing_transformer import RoutingTransformerLM
    from routing_transformer.autoregressive_wrapper import AutoregressiveWrapper

    cfg, batch = size_model(size, **changes)
    net = RoutingTransformerLM(
        num_tokens=256, dim=cfg.width, depth=cfg.n_layers, max_seq_len=cfg.seq_len,
        heads=cfg.n_heads, dim_head=cfg.head_width, window_size=cfg.window, causal=True,
        n_local_attn_heads=cfg.n_local_heads, ff_glu=True, shared_qk=True)
    return AutoregressiveWrapper(net), cfg, batch


def start_ours():
    from rt_scratch import threads
    from rt_scratch.backend import select_device

    if hasattr(os, "sched_setaffinity"):  # our pool takes a thread for every core it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    select_device("cpu")
    threads.set_blas_threads(1)
    threads.keep_freed_memory()


def start_torch():
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


def timed(function, n, warm_up=2):
    """Seconds of n calls after the warm-up, and the peak memory of the process."""
    seconds = []
    for i in range(warm_up + n):
        start = time.perf_counter()
        function(i)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds[warm_up:], "peak_mib": peak}


def sgemm(*_):
    """GFLOP/s of matrix products of 1024 x 1024 on every thread at once."""
    from rt_scratch import threads

    start_ours()
    a = np.ones((1024, 1024), "float32")

    def work(_):
        out = np.empty_like(a)
        for _ in range(10):
            np.matmul(a, a, out=out)

    best = min(timed(lambda _: threads.parallel(work, range(THREADS)), 3)["seconds"])
    return {"seconds": [best], "gflops": 2e-9 * THREADS * 10 * 1024**3 / best, "peak_mib": 0}


WORK = {"step ours": step_ours, "step port": step_port, "step twin": step_twin,
        "step compiled": lambda *args: step_twin(*args, compiled=True),
        "generate ours": generate_ours, "generate port": generate_port,
        "length ours": length_ours, "sgemm": sgemm}


# ------------------------------------------------------------------------ in the calling process

def measure(work, size, changes, n):
    """One measurement in a fresh process; None and a line if it fails."""
    argument = json.dumps([work, size, changes, n])
    here = Path(__file__).resolve()
    done = subprocess.run([sys.executable, here, "--measure", argument], capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(here.parent.parent),
                                                       "OMP_NUM_THREADS": str(THREADS)})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        print(f"{work} {size}: failed: {last}", file=sys.stderr)
        return None
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{work} {size} {n}: {statistics.median(result['seconds']):.4f} s", file=sys.stderr)
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
            into["peak_mib"] = max(into["peak_mib"], result["peak_mib"])
            into["gflops"] = max(into.get("gflops", 0), result.get("gflops", 0))
    return merged


def matrix_flops(cfg):
    """Floating-point operations per trained token: 6 per matrix entry, 14 D per key seen."""
    from rt_scratch.model import parameter_table

    entries = sum(leaf.stop - leaf.start for leaf in parameter_table(cfg)
                  if len(leaf.shape) == 2 and "_rel_" not in leaf.name
                  and leaf.name != "embed.table")
    keys = 0
    for i in range(cfg.n_layers):
        routed, local = cfg.heads(i)
        keys += routed * cfg.window * (1 if cfg.routing == "topk" else 2) + local * 2 * cfg.block
    return 6 * entries + 14 * keys * cfg.head_width


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


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
            r = results[name]
            seconds = statistics.median(r["seconds"])
            share = ""
            if kind == "ours":
                cfg, _ = size_model(size, **changes)
                if math.isfinite(rate):
                    share = f"{matrix_flops(cfg) * r['tokens'] / seconds / rate / 1e9:.0%}"
            rows.append([size, name, f"{r['parameters']:,}", f"{seconds * 1e3:.0f}",
                         f"{r['tokens'] / seconds:,.0f}", f"{base / seconds:.2f}",
                         f"{r['peak_mib']:.0f}", share])
        rows.append([size, f"sgemm: {rate:.0f} GFLOP/s", "", "", "", "", "", "100%"])
    return "## Training steps\n\nForward, backward, AdamW. Tokens/s relative to the port in the " \
        "column `x port`; share of the machine's sgemm rate, measured in the same run.\n\n" + \
        table(["size", "contender", "parameters", "ms/step", "tokens/s", "x port", "peak MiB",
               "of sgemm"], rows)


def race_generation(size, n_rounds, record):
    rows = []
    for context in CONTEXTS:
        jobs = {"ours, causal": ("generate ours", size, {}, context),
                "ours, topk": ("generate ours", size, {"routing": "topk"}, context),
                "port": ("generate port", size, {}, context)}
        results = record[f"generate {context}"] = rounds(n_rounds, jobs)
        medians = {name: statistics.median(r["seconds"]) for name, r in results.items()}
        for name, seconds in medians.items():
            ratio = medians.get("port", math.nan) / seconds
            rows.append([context, name, f"{seconds * 1e3:.2f}", f"{1 / seconds:.0f}",
                         f"{ratio:.0f}"])
    return f"## Generation, {size}\n\nOne token after a context of so many, batch 1.\n\n" + table(
        ["context", "contender", "ms/token", "tokens/s", "x port"], rows)


def race_length(size, n_rounds, record):
    rows, points = [], []
    for t in LENGTHS:
        r = rounds(n_rounds, {"": ("length ours", size, {}, t)}).get("")
        record[f"length {t}"] = r
        if r is None:
            rows.append([t, round(math.sqrt(t)), "failed", "", ""])
            continue
        seconds = statistics.median(r["seconds"])
        points.append((t, seconds))
        rows.append([t, round(math.sqrt(t)), f"{seconds:.3f}", f"{seconds / t * 1e6:.1f}",
                     f"{r['peak_mib']:.0f}"])
    long = [(t, seconds) for t, seconds in points if t >= FIT_FROM]
    slope = np.polyfit(*np.log(np.array(long).T), 1)[0] if len(long) > 1 else math.nan
    return f"## Cost against length, {size}\n\nForward and backward of one window, W = K = " \
        f"sqrt(T), mode causal. Fitted exponent from T = {FIT_FROM} on: {slope:.2f} (the " \
        "paper's bound is 1.5; the matrices' share grows like 1).\n\n" + table(
            ["T", "W = K", "seconds", "us/token", "peak MiB"], rows)


def machine():
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text()
                 .splitlines() if line.startswith("model name")]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return f"{time.strftime('%Y-%m-%d')}; {cpu}; {THREADS} threads each; Python " \
        f"{platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}, " \
        "routing-transformer 1.6.1\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for race.md and race.json")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", choices=("steps", "generation", "length"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per process")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        work, size, changes, n = json.loads(args.measure)
        print(json.dumps(WORK[work](size, changes, n)))
        return
    if args.out is None:
        parser.error("--out FOLDER is needed")
    try:
        import routing_transformer  # noqa: F401
        head = machine()
    except ImportError:
        sys.exit("error: torch and routing-transformer are needed: pip install -e '.[bench]'")
    args.out.mkdir(parents=True, exist_ok=True)
    record, report = {}, ["# Race on the CPU\n", head]
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
    main()
