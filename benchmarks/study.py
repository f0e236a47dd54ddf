"""The study: when routing wins, by how much, and what its heads are worth. Parts run alone.

    pip install -e '.[bench]'
    python benchmarks/study.py crossover                 where it overtakes torch's fused attention
    python benchmarks/study.py throughput                steps per second of every kind of head
    python benchmarks/study.py worth --seeds 3           every kind of head, equal steps, equal time
    python benchmarks/study.py worth --text FILE --seq-len 2048
    python benchmarks/study.py ablation                  K, W, routing layers, routing heads
    python benchmarks/study.py images --cifar10 FOLDER   the paper's table 1 in small
    python benchmarks/study.py lookahead                 what topk's view of the future is worth
    python benchmarks/study.py divergence                Jensen-Shannon divergence between heads
    python benchmarks/study.py --quick                   everything, tiny: does it run?

A finished piece is a row of OUT/PART.csv and is not measured again; an interrupted training run
goes on where it was. So a part that was stopped goes on with the same command.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from common import ROOT, machine
from race import THREADS, start_ours
from studies import Study

from rt_scratch import UserError
from rt_scratch.console import Parser, number, script

PARTS = ("crossover", "throughput", "worth", "ablation", "images", "lookahead", "divergence")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--out", type=Path, help="csv files, reports and figures (default: "
                                 "benchmarks/results/study, with --quick RUNS/quick)")
    add("--runs", type=Path, default=Path("runs/study"), help="run folders, which may be large")
    add("--text", default="stdlib", help="stdlib or a text file")
    add("--seq-len", type=number(int, 1),
        help="T of the text models (default 512, with --quick 64)")
    add("--steps", type=number(int, 1), help="of every training run (default 1000, with --quick 4)")
    add("--seeds", type=number(int, 1), help="of the part `worth` (default 3, with --quick 2)")
    add("--rounds", type=number(int, 1), help="turns of every timing (default 3, with --quick 1)")
    add("--patience", type=number(float, 0), default=60, metavar="SECONDS",
        help="of the part `crossover`: what two passes of a window may be expected to take; "
             "longer ones are not tried (default 60)")
    add("--windows", type=number(int, 0),
        help="of validation text per score; 0: the whole split (default 0, with --quick 2)")
    add("--threads", type=number(int, 1), default=THREADS)
    add("--cpu-time", action="store_true",
        help="time by the processor's clock: with --threads 1, on a machine that others use too")
    add("--cifar10", type=Path, metavar="FOLDER", help="with the official binary files")
    add("--run", type=Path, action="append", default=[], metavar="FOLDER",
        help="for lookahead and divergence: a finished run to look at, instead of training some")
    add("--note", default="", help="a sentence on the state of the machine, for the reports")
    add("--quick", action="store_true", help="tiny sizes: does it run?")
    add("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        part, *job = args.measure
        print(json.dumps(importlib.import_module(f"studies.{part}").measure(*job)))
        return
    if unknown := set(args.parts) - set(PARTS):
        raise UserError(f"{sorted(unknown)[0]}: choose from {', '.join(PARTS)}")

    if args.cpu_time and args.threads > 1:
        raise UserError("--cpu-time: adds up the time of all threads; give --threads 1 with it")

    def value(given, usual, quick):
        return given if given is not None else quick if args.quick else usual

    out = value(args.out, ROOT / "benchmarks/results/study", args.runs / "quick")
    out.mkdir(parents=True, exist_ok=True)
    study = Study(
        out, args.runs, " ".join([
            f"{machine()}; {args.threads} thread{'s' * (args.threads > 1)},",
            f"{'CPU' if args.cpu_time else 'wall'} time. {args.note}\n"]), args.quick,
        args.threads, args.cpu_time, value(args.steps, 1000, 4), value(args.seeds, 3, 2),
        value(args.rounds, 3, 1), args.patience, value(args.windows, 0, 2), args.text,
        value(args.seq_len, 512, 64), args.cifar10, args.run)
    start_ours(args.threads)
    for part in args.parts or PARTS:
        if part == "images" and args.cifar10 is None and not args.parts:
            print("images: left out, it needs --cifar10 FOLDER", file=sys.stderr)
            continue
        importlib.import_module(f"studies.{part}").run(study)


if __name__ == "__main__":
    script(main)
