"""The learning race: this project and routing-transformer 1.6.1 for the same minutes on one text.

    pip install -e '.[bench]'
    python benchmarks/learning.py --out benchmarks/results/learning     standard library, 5 min each
    python benchmarks/learning.py --out OUT --data FILE --size 4.2M --minutes 15

Same sizes, same bytes, same batches, AdamW with the same settings and learning rate, warmed up and
lowered over the minutes, gradients clipped at norm 1. The contenders are two processes that train
in turns of a few seconds; only training is on the clock. Scored on the same windows of the
validation split, from the second token of each on. At the end a few hundred positions are scored
twice: inside their whole window, and given their prefix alone, as a reader would have to predict
them. Where the two differ, the future leaked into the score.

It wants a quiet machine: torch's threads spin while they wait, which costs it much time where other
programs want the cores. OMP_WAIT_POLICY=PASSIVE makes them sleep, which slows it down where none
does (883 instead of 611 ms per step when this was tried).
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import RECIPE, ROOT, SIZES, size_model, table
from race import machine_and_rivals, start_ours, start_torch

from rt_scratch import UserError, cut, data, decode, logits, new_state, train_step
from rt_scratch.console import Parser, number, script
from rt_scratch.data.batches import eval_windows, random_windows
from rt_scratch.parallel import SINGLE
from rt_scratch.run.evaluate import token_nats
from rt_scratch.workers import start_workers

OURS = {"ours": {"shift_keys": True}, "causal": {}, "topk": {"routing": "topk"}}
NAMES = {"ours": "ours, causal, shifted keys", "causal": "ours, causal", "topk": "ours, topk",
         "port": "port"}
WINDOWS = 32          # of validation text per score
CLIP = 1.0            # largest norm of the gradient
POSITIONS = 40        # in each of the first 8 of them, scored by their prefix


# ------------------------------------------------------------------------- the two contenders

class Ours:
    def __init__(self, size, changes):
        start_ours()
        self.cfg, self.batch = size_model(size, **changes)
        self.recipe = dataclasses.replace(RECIPE, batch=self.batch)
        self.workers = start_workers(train_step, new_state(self.cfg, self.recipe, np), self.cfg,
                                     self.recipe, np, SINGLE)
        self.state, self.step_once = self.workers.__enter__()
        self.grads = np.empty_like(self.state.flat)

    def train(self, ids, lr):
        train = dataclasses.replace(self.recipe, lr=lr, clip=CLIP)
        self.state, _ = self.step_once(
            self.state, self.grads, cut(ids, None, self.cfg, train, np), self.cfg, train)

    def logits(self, ids):
        """(B, T - 1, V): of token t + 1 given tokens up to t, in one pass over the window."""
        return logits(self.state.params, self.state.centroids, self.cfg, ids)[:, 1:]

    def next_logits(self, prefix):
        """(B, V): of the token after the prefix."""
        return decode.prefill(self.state.params, self.state.centroids, self.cfg, prefix,
                              self.cfg.seq_len)[0]


class Port:
    def __init__(self, size):
        start_torch()
        import rivals
        import torch

        self.torch, (self.cfg, self.batch) = torch, size_model(size)
        self.net = rivals.port(self.cfg)
        self.optimizer = torch.optim.AdamW(  # as ours: torch's defaults are 0.999 and 0.01
            self.net.parameters(), betas=(0.9, 0.99), weight_decay=0.0)

    def train(self, ids, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.net.train()
        self.net(self.torch.from_numpy(ids), return_loss=True).backward()
        self.torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logits(self, ids):
        return self.forward(ids)[:, :-1]

    def next_logits(self, prefix):
        return self.forward(prefix)[:, -1]

    def forward(self, ids):
        self.net.eval()
        with self.torch.no_grad():
            return self.net(self.torch.from_numpy(ids))[0].numpy()


def bits(logits, targets):
    """Bits of each target: -log2 softmax(logits)[target]."""
    return token_nats(logits, targets) / math.log(2)


def contender(name, size, text, minutes, lr):
    """Serve the parent: a line "train S" trains S seconds more, "prefix" scores by prefixes."""
    me = Port(size) if name == "port" else Ours(size, OURS[name])
    splits, t = data.load(text or "stdlib").splits, me.cfg.seq_len
    windows = np.concatenate([ids[w.all(1)] for ids, w, _ in eval_windows(
        splits["valid"], t, 8, 0, WINDOWS) if ids.shape[1] == t]).astype(np.int64)
    seconds, steps = 0.0, 0

    def score():
        groups = np.array_split(windows, -(-len(windows) // 4))
        return float(np.mean([bits(me.logits(ids), ids[:, 1:]).mean() for ids in groups]))

    print(json.dumps({"seconds": 0.0, "steps": 0, "bits": score()}), flush=True)
    for line in sys.stdin:
        what, *more = line.split()
        if what == "train":
            until = seconds + float(more[0])
            while seconds < until:
                start = time.perf_counter()
                done = seconds / (60 * minutes)
                rate = lr * min((steps + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * done))
                ids = random_windows(splits["train"], t, me.batch, 0, steps)
                me.train(ids.astype(np.int64), rate)
                seconds, steps = seconds + time.perf_counter() - start, steps + 1
            answer = {"seconds": seconds, "steps": steps, "bits": score()}
        else:
            ids = windows[:8]
            at = np.linspace(t // 4, t - 1, POSITIONS).astype(int)
            whole = bits(me.logits(ids), ids[:, 1:])[:, at - 1]
            alone = np.stack([bits(me.next_logits(ids[:, :p]), ids[:, p]) for p in at], axis=1)
            answer = {"positions": whole.size, "whole": float(whole.mean()),
                      "alone": float(alone.mean()),
                      "error": float((alone - whole).std() / math.sqrt(whole.size))}
        print(json.dumps(answer), flush=True)


# ------------------------------------------------------------------------ in the calling process

def ask(process, line):
    if line:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit("error: a contender stopped; its message is above")
    return json.loads(answer)


def race(names, arguments, minutes, turns):
    """{name: [{seconds, steps, bits}]}, {name: scores by prefix}."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    runs = {name: subprocess.Popen(
        [sys.executable, __file__, "--contend", json.dumps([name, *arguments])], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) for name in names}
    curves = {name: [ask(run, None)] for name, run in runs.items()}
    for turn in range(turns):
        for name, run in runs.items():
            curves[name].append(ask(run, f"train {60 * minutes / turns}"))
            print(f"{turn + 1}/{turns} {name}: {curves[name][-1]}", file=sys.stderr)
    prefixes = {name: ask(run, "prefix") for name, run in runs.items()}
    for run in runs.values():
        run.stdin.close()
        run.wait()
    return curves, prefixes


def report(curves, prefixes, head):
    names, n = list(curves), len(next(iter(curves.values())))
    rows = [[f"{curves[names[0]][i]['seconds']:.0f}"]
            + [x for name in names for x in (f"{curves[name][i]['steps']:,}",
                                             f"{curves[name][i]['bits']:.4f}")]
            for i in sorted({*range(0, n, max(1, (n - 1) // 10)), n - 1})]
    header = ["seconds"] + [x for name in names for x in (f"{NAMES[name]}: steps", "bits/byte")]
    scored = [[NAMES[name], p["positions"], f"{p['whole']:.4f}", f"{p['alone']:.4f}",
               f"{p['alone'] - p['whole']:+.4f} ± {p['error']:.4f}"]
              for name, p in prefixes.items()]
    return "\n".join([
        "# Learning race\n", head, table(header, rows),
        "![bits per byte against minutes of training](learning.png)\n",
        "## What each score owes to the future\n\nThe same positions, scored inside their whole "
        "window and given their prefix alone (± standard error).\n",
        table(["contender", "positions", "whole window, bits", "prefix alone, bits",
               "difference"], scored)])


def plot(curves, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, curve in curves.items():
        axes.plot([p["seconds"] / 60 for p in curve[1:]], [p["bits"] for p in curve[1:]], ".-",
                  label=NAMES[name])
    axes.set(xlabel="minutes of training", ylabel="validation, bits/byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, help="folder for learning.md, .csv and .png")
    parser.add_argument("--data", help="a text file (default: the standard library's source)")
    parser.add_argument("--size", choices=SIZES, default="1.1M")
    parser.add_argument("--minutes", type=number(float, 0), default=5)
    parser.add_argument("--turns", type=number(int, 1), default=20, help="turns that each takes")
    parser.add_argument("--lr", type=number(float, 0), default=2e-3)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=["ours", "port"])
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend:
        contender(*json.loads(args.contend))
        return
    if args.out is None:
        parser.error("--out FOLDER is needed")
    args.out.mkdir(parents=True, exist_ok=True)
    head = machine_and_rivals()
    text, length = data.load(args.data or "stdlib"), size_model(args.size)[0].seq_len
    if (n_windows := min(WINDOWS, len(text.splits["valid"]) // length)) < 1:
        raise UserError(f"--data {args.data}: its validation split, 5 % of it, is shorter than a "
                        f"window of {length} bytes; give a longer text")
    head += (f"\n{args.size} parameters, {args.minutes:g} minutes of training each in "
             f"{args.turns} turns, learning rate {args.lr:g}. {text.protocol}; scores on "
             f"{n_windows} windows of {length} bytes of its validation split.\n")
    curves, prefixes = race(args.names, [args.size, args.data, args.minutes, args.lr],
                            args.minutes, args.turns)
    (args.out / "learning.md").write_text(report(curves, prefixes, head))
    with (args.out / "learning.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["contender", "seconds", "steps", "bits_per_byte"])
        writer.writerows([NAMES[name], round(p["seconds"], 2), p["steps"], p["bits"]]
                         for name, curve in curves.items() for p in curve)
    plot(curves, args.out / "learning.png")
    print((args.out / "learning.md").read_text())


if __name__ == "__main__":
    script(main)
