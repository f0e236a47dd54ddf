"""The GPU engine measured: one table per question, written to OUT as each is done.

    python benchmarks/gpu_bench.py --out results/gpu            on a GPU, about 6 minutes
    python benchmarks/gpu_bench.py --out /tmp/dry --dry         tiny sizes on the CPU: does it run?

Training steps per size and precision; with torch installed also the port (float32, TF32, bf16
autocast) and the torch twin (bf16 autocast, at 24.7M compiled too). Time per token by length of
the window, beside torch's fused full attention. Time per kernel and its bandwidth; the longest
window that trains; generation.
"""

import dataclasses
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from common import RECIPE, decoding, size_model, table, training
from studies.crossover import CONTENDERS, configuration

from rt_scratch import ModelConfig, UserError, select_device
from rt_scratch.console import Parser, number, script
from rt_scratch.device import select_precision
from rt_scratch.presets import preset
from rt_scratch.run.costs import flops_per_token, n_parameters


class Bench:
    """What all measurements share: the module, the clock, the sizes, the results so far."""

    def __init__(self, xp, out, dry):
        self.xp, self.out, self.dry, self.report, self.before = xp, out, dry, [], 0
        out.mkdir(parents=True, exist_ok=True)

    def wait(self):
        if self.xp is not np:
            self.xp.cuda.Device().synchronize()

    def seconds(self, function, n=8, warm_up=3):
        """Median seconds of a call, waiting for the GPU after each."""
        if self.dry:
            n = warm_up = 1
        times = []
        for i in range(warm_up + n):
            self.wait()
            start = time.perf_counter()
            function(i)
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[warm_up:])

    def free(self):
        """Give unused memory back, torch's too; `peak` counts from here."""
        gc.collect()
        if self.xp is not np:
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()
            self.xp.get_default_memory_pool().free_all_blocks()
            self.before = self.xp.cuda.runtime.memGetInfo()[0]

    def peak(self):
        """MiB asked of the GPU since `free`."""
        return (self.before - self.xp.cuda.runtime.memGetInfo()[0]) / 2**20 if self.before else 0

    def write(self, title, header, rows):
        text = f"## {title}\n\n" + table(header, rows)
        print(text, flush=True)
        self.report.append(text)
        (self.out / "gpu.md").write_text("\n".join(self.report))


def sizes(dry):
    """(name, ModelConfig, batch): the enwik8 released model and smaller ones."""
    if dry:
        return [("tiny", size_model("1.1M", seq_len=128, width=32, ffn_width=64)[0], 2)]
    fields = {k: v for k, v in preset("enwik8", "released").items()
              if k in ModelConfig.__dataclass_fields__}
    released = ModelConfig(**fields | {"vocab_size": 256}).validate()
    small, _ = size_model("4.2M")
    return [("enwik8 released, T 8192", released, 1), ("24.7M", *size_model("24.7M")),
            ("4.2M", small, 16),
            ("4.2M, shifted keys", dataclasses.replace(small, shift_keys=True), 16)]


def trainer(bench, cfg, batch, precision, recompute=False, graph=True):
    """A function that takes one training step."""
    precision, dtype = select_precision(precision, bench.xp)
    recipe = dataclasses.replace(RECIPE, clip=1.0, precision=precision, recompute=recompute,
                                 cuda_graph=graph)
    return training(cfg, batch, recipe, bench.xp, dtype)


def matrix_rate(bench, precision):
    """FLOP/s of a product of 8192 x 8192."""
    n = 256 if bench.dry else 8192
    if bench.xp is np:
        a = np.ones((n, n), "float32")
        return 2 * n**3 / bench.seconds(lambda _: a @ a)
    from rt_scratch.kernels.gemm import matmul

    _, dtype = select_precision(precision, bench.xp)
    a = bench.xp.random.standard_normal((n, n)).astype(dtype or "float32")  # zeros run faster
    out = bench.xp.empty_like(a)
    return 2 * n**3 / bench.seconds(lambda _: matmul(a, a, out=out))


def steps(bench):
    precisions = ("float32",) if bench.xp is np else ("float32", "tf32", "bf16", "fp16")
    rates = {p: matrix_rate(bench, p) for p in precisions}
    bench.write("Matrix product of 8192 x 8192", ["precision", "TFLOP/s"],
                [[p, f"{r / 1e12:.1f}"] for p, r in rates.items()])
    for name, cfg, batch in sizes(bench.dry):
        rows = []
        one_by_one = [] if bench.xp is np else [("bf16", False)]
        for p, graph in [*((p, True) for p in precisions), *one_by_one]:
            one = None  # its arrays must not count for the next
            bench.free()
            who = "ours" if graph and p != "fp16" else "ours, kernel by kernel"  # see graph.py
            try:
                one = trainer(bench, cfg, batch, p, graph=graph)
                seconds = bench.seconds(one)
            except Exception as error:  # the other precisions are worth having
                rows.append([who, p, "", repr(error)[:200], "", "", ""])
                continue
            tokens = batch * cfg.seq_len
            share = flops_per_token(cfg) * tokens / seconds / rates[p]
            rows.append([who, p, f"{n_parameters(cfg):,}", f"{seconds * 1e3:.1f}",
                         f"{tokens / seconds:,.0f}", f"{share:.0%}", f"{bench.peak():.0f}"])
        one = None
        bench.free()
        try:
            rows += rival_rows(bench, cfg, batch, compiled=name == "24.7M" and not bench.dry)
        except Exception as error:
            rows.append(["rivals", "", "", repr(error)[:200], "", "", ""])
        bench.write(f"Training steps, {name}",
                    ["contender", "precision", "parameters", "ms/step", "tokens/s",
                     "of the matrix rate", "peak MiB"], rows)


def rival_rows(bench, cfg, batch, compiled):
    """Rows of the port and of the torch twin, the latter also as torch.compile makes it, which
    takes a minute; none where torch is missing."""
    if not has_torch(bench):
        return []
    import rivals

    rows, tokens = [], batch * cfg.seq_len

    def run(contender, precision, start, **options):
        try:
            seconds, n, mib = rival(bench, cfg, batch, precision, start, **options)
            rows.append([contender, precision, f"{n:,}", f"{seconds * 1e3:.1f}",
                         f"{tokens / seconds:,.0f}", "", f"{mib:.0f}"])
        except RuntimeError as error:
            rows.append([contender, precision, "", str(error).splitlines()[0], "", "", ""])

    for precision in ("float32", "bf16") if bench.dry else ("float32", "tf32", "bf16"):
        run("port", precision, rivals.port_training)
    run("twin eager", "bf16", rivals.twin_training)
    if compiled:
        run("twin compiled", "bf16", rivals.twin_training, compiled="default")
        run("twin compiled, CUDA graphs", "bf16", rivals.twin_training, compiled="reduce-overhead")
    return rows


def has_torch(bench):
    try:
        import rivals  # noqa: F401
        import torch
    except ImportError:
        return False
    return bench.xp is np or torch.cuda.is_available()


def rival(bench, cfg, batch, precision, start, n=8, warm_up=3, **options):
    """(seconds per step, parameters, MiB) of a rival in torch."""
    import torch

    on_gpu = bench.xp is not np
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        one, parameters = start(cfg, batch, autocast=precision == "bf16", **options)
        seconds = bench.seconds(one, n, warm_up)
        return seconds, parameters, torch.cuda.max_memory_reserved() / 2**20 if on_gpu else 0
    finally:
        torch.set_default_device("cpu")


def lengths(bench):
    """The crossover of studies/crossover.py on this machine: microseconds per token by length."""
    cells, memory = {}, {}
    by_t = (64, 128) if bench.dry else (1024, 4096, 16384, 65536)
    n_tokens, width = (256, 128) if bench.dry else (65536, 512)
    contenders = {name: whose for name, (whose, _) in CONTENDERS.items()
                  if name != "ours, full" and (whose == "ours" or has_torch(bench))}
    for t in by_t:
        for name, whose in contenders.items():
            one = None  # its arrays must be free for the next
            bench.free()
            if cells.get((name, t // 4), 0) is None:  # nor a longer window
                cells[name, t] = None
                continue
            cfg, batch = configuration("model", width, name, t, n_tokens)
            try:
                if whose == "ours":
                    one = trainer(bench, cfg, batch, "auto")
                    seconds, mib = bench.seconds(one, n=3, warm_up=2), bench.peak()
                else:
                    import rivals

                    start = rivals.twin_training if whose == "twin" else rivals.port_training
                    seconds, _, mib = rival(bench, cfg, batch, "bf16", start, 3, 2)
                cells[name, t] = seconds / (batch * t) * 1e6
                memory[name, t] = mib
            except Exception as error:  # mostly memory
                print(name, t, repr(error)[:200], flush=True)
                cells[name, t] = None
    names = [f"T {t:,}" for t in by_t]
    for title, found, form in (("Microseconds per token", cells, "{:.3f}"),
                               ("MiB", memory, "{:,.0f}")):
        bench.write(f"{title} of a training step by length of the window, C = {width}, 6 layers, "
                    f"{n_tokens:,} tokens, bf16", ["contender", *names],
                    [[name, *(form.format(found[name, t]) if found.get((name, t)) else "-"
                              for t in by_t)] for name in contenders])


def kernels(bench):
    """Time and bandwidth of our own kernels in a step, by CUDA events around each launch."""
    if bench.xp is np:
        return
    from rt_scratch.kernels import launch

    name, cfg, batch = sizes(False)[0]
    one = trainer(bench, cfg, batch, "bf16", graph=False)
    one(0)
    one(1)
    events, compiled = [], launch.compiled

    def timed(instance):
        def run(grid, block, arguments):
            start, end = bench.xp.cuda.Event(), bench.xp.cuda.Event()
            start.record()
            compiled(instance)(grid, block, arguments)
            end.record()
            size = sum(a.nbytes for a in arguments if getattr(a, "ndim", 0))
            events.append((instance.partition("<")[0], size, start, end))
        return run

    busy = bench.xp.ones((8192, 8192), "float32")
    launch.compiled = timed
    try:
        for _ in range(10):  # so that the host runs ahead, and events time kernels, not Python
            busy @ busy
        one(2)
        bench.wait()
    finally:
        launch.compiled = compiled
    totals = {}
    for kernel, size, start, end in events:
        ms = bench.xp.cuda.get_elapsed_time(start, end)
        calls, time_, bytes_ = totals.get(kernel, (0, 0.0, 0))
        totals[kernel] = calls + 1, time_ + ms, bytes_ + size
    rows = [[k, c, f"{ms:.3f}", f"{b / ms / 1e6:.0f}"]
            for k, (c, ms, b) in sorted(totals.items(), key=lambda item: -item[1][1])]
    bench.write(f"Our kernels in a bf16 step, {name} (no matrix products; each array once)",
                ["kernel", "calls", "ms", "GB/s"], rows)


def longest(bench):
    """The longest window that trains at C = 512, 6 layers, with recomputation."""
    rows, t, last = [], (256 if bench.dry else 16384), (512 if bench.dry else 524288)
    while t <= last:
        cfg, _ = size_model("1.1M" if bench.dry else "24.7M", seq_len=t)
        one = None  # its arrays must be free for the next
        bench.free()
        try:
            one = trainer(bench, cfg, 1, "auto", recompute=True)
            seconds = bench.seconds(one, n=1, warm_up=1)
        except MemoryError:
            rows.append([t, "out of memory", "", ""])
            break
        rows.append([t, f"{seconds:.2f}", f"{t / seconds:,.0f}", f"{bench.peak():.0f}"])
        t *= 2
    bench.write("Length of one window, C = 512, 6 layers, recomputation",
                ["T", "s/step", "tokens/s", "peak MiB"], rows)


def generation(bench):
    rows = []
    for name, cfg, _ in sizes(bench.dry):
        bench.free()
        context = min(4000, cfg.seq_len // 2)
        seconds = bench.seconds(decoding(cfg, context, bench.xp), n=20)
        rows.append([name, cfg.routing, context, f"{seconds * 1e3:.2f}", f"{1 / seconds:.0f}"])
    bench.write("Generation, batch 1", ["size", "routing", "context", "ms/token", "tokens/s"],
                rows)


PARTS = {part.__name__: part for part in (steps, lengths, kernels, generation, longest)}


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} "
                        "(default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.md")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--seconds", type=number(int, 0), default=360,
                        help="start no part after this time")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        sys.exit(f"error: {sorted(unknown)[0]}: choose from {', '.join(PARTS)}")
    try:
        xp, device = select_device("cpu" if args.dry else "cuda")
    except UserError as error:
        sys.exit(f"error: {error}")
    bench, started = Bench(xp, args.out, args.dry), time.time()
    bench.report.append(f"# GPU engine\n\n{time.strftime('%Y-%m-%d')}; {device}\n")
    for name in args.parts or PARTS:
        part = PARTS[name]
        if time.time() - started > args.seconds:
            bench.report.append(f"{name}: left out, no time\n")
            continue
        try:
            part(bench)
        except Exception as error:  # the other tables are worth having
            bench.write(f"{name} failed", ["error"], [[repr(error)[:500]]])
    (args.out / "gpu.md").write_text("\n".join(bench.report))
    (args.out / "command.json").write_text(json.dumps(sys.argv) + "\n")


if __name__ == "__main__":
    script(main)
