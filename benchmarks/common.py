"""What the benchmarks share: sizes, our training and decoding on random tokens, a process of its
own per measurement, tables."""

import dataclasses
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from rt_scratch import ModelConfig, TrainConfig, cut, decode, new_state, train_step
from rt_scratch.graph import recorded
from rt_scratch.parallel import SINGLE
from rt_scratch.run.options import plan_run
from rt_scratch.workers import start_workers

ROOT = Path(__file__).resolve().parent.parent
SIZES = {  # name: (configuration, batch). GEGLU of hidden width 4 C, half of the heads local, bytes
    "1.1M": (dict(width=128, n_layers=4, heads=4, window=64, seq_len=512), 8),
    "4.2M": (dict(width=256, n_layers=4, heads=4, window=128, seq_len=1024), 4),
    "24.7M": (dict(width=512, n_layers=6, heads=8, window=128, seq_len=4096), 1),
}
PORT_WORK = dict(  # what the port computes: topk heads, no relative positions
    routing="topk", local_max_distance=0, routing_max_distance=0, timing_signal=True)
RECIPE = TrainConfig(optimizer="adamw", lr=1e-3, schedule="constant", clip=0.0, precision="float32")
N_DECODED = 64  # tokens that `decoding` has room for


def size_model(name: str, **changes) -> tuple[ModelConfig, int]:
    """(ModelConfig, batch) of a size; K = T / W, relative positions in every head."""
    size, batch = SIZES[name]
    size = dict(size)
    heads, window = size.pop("heads"), size["window"]
    fields = dict(
        size, ffn_width=4 * size["width"], n_local_heads=heads // 2, n_routing_heads=heads // 2,
        block=window, n_clusters=max(1, size["seq_len"] // window), local_max_distance=window,
        routing_max_distance=window)
    return ModelConfig(**fields | changes).validate(), batch


def training(cfg, batch, train=RECIPE, xp=np, dtype=None):
    """A function that takes the next training step on the same random windows and returns Step."""
    train = dataclasses.replace(train, batch=batch, accumulate=1)
    step_once = recorded(train_step, cfg, train, xp)
    workers = start_workers(step_once, new_state(cfg, train, xp), cfg, train, xp, SINGLE)
    state, step_once = workers.__enter__()
    grads = xp.empty_like(state.flat)
    parts = cut(random_tokens(cfg, batch, cfg.seq_len), None, cfg, train, xp)

    def one(_, workers=workers):  # they live as long as this function
        nonlocal state
        state, result = step_once(state, grads, parts, cfg, train, dtype)
        return result

    return one


def decoding(cfg, context, xp=np, texts=1):
    """A function that takes the i-th token after random prompts and returns the next logits."""
    state = new_state(cfg, RECIPE, xp)
    ids = xp.asarray(random_tokens(cfg, texts, context + N_DECODED))
    params, centroids = state.params, state.centroids
    _, memory = decode.prefill(params, centroids, cfg, ids[:, :context], context + N_DECODED)
    return lambda i: decode.step(params, centroids, cfg, memory, ids[:, context + i])


def random_tokens(cfg, *shape):
    return np.random.default_rng(0).integers(0, cfg.vocab_size, shape)


def in_own_process(file, argument, **environment):
    """The JSON that `python FILE --measure ARGUMENT` prints; RuntimeError with its last complaint.

    A fresh process has its own peak of memory, and nothing of the measurement before in its caches.
    """
    done = subprocess.run(
        [sys.executable, file, "--measure", json.dumps(argument)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes():
    """The largest resident sets so far of this process and its workers, added up.

    What they share is counted in each.
    """
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            status = Path(f"/proc/{pid}/status").read_text()
            kilobytes += int(status.partition("VmHWM:")[2].split()[0])
    return kilobytes * 1024


def machine():
    """Today, the processor, versions."""
    cpu, path = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if path.exists():
        names = [line.split(": ")[1] for line in path.read_text().splitlines()
                 if line.startswith("model name")]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return f"{time.strftime('%Y-%m-%d')}; {cpu}; Python {platform.python_version()}, NumPy " \
        f"{np.__version__}"


def planned(flags):
    """(ModelConfig, TrainConfig) that train.py would take from these flags; needs no data."""
    sys.path.insert(0, str(ROOT))
    import train

    plan = plan_run(train.parse([str(flag) for flag in (*flags, "--dry-run")]))
    return plan.model, plan.train


def exponent(points, at_least=0):
    """b of the line log y = a + b log x through the points with x >= at_least; nan below two."""
    points = [point for point in points if point[0] >= at_least]
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0]) if len(points) > 1 else math.nan


def table(header, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"
