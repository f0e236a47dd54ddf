"""Where O(T^1.5) overtakes torch's fused O(T^2): one attention layer, and the whole model.

Forward + backward of a layer with its projections, and a training step of the model, at equal work:
no relative positions on any side, W = K = sqrt(T) (powers of two, K W = T), local blocks of W. The
routing contenders have half of their heads local, as in the model; `local` and `full` have one kind
alone. Windows are batched to at least 8,192 tokens. Every measurement is a process of its own that
may take 8 GiB of memory; contenders take turns. float32 throughout.
"""

import functools
import importlib.util
import math
import os
import statistics
import sys
import time

import numpy as np
from common import (
    PORT_WORK,
    exponent,
    peak_bytes,
    size_model,
    table,
    training,
)
from race import start_ours, start_torch, timed

from rt_scratch import init_centroids, init_parameters, model, views
from studies import pyplot

CONTENDERS = {  # name: (whose, what changes in the configuration)
    "ours, causal": ("ours", {"routing": "causal"}),
    "ours, causal, shifted keys": ("ours", {"routing": "causal", "shift_keys": True}),
    "ours, topk": ("ours", {}),
    "ours, local": ("ours", {"attention": "local"}),
    "ours, full": ("ours", {"attention": "full"}),
    "torch, fused full": ("twin", {"attention": "full"}),
    "port": ("port", {}),
}
RIVAL = "torch, fused full"
SIZES = {128: "1.1M", 512: "24.7M"}  # of common.py, by width
LENGTHS = (256, 1024, 4096, 16384, 65536)
FIT_FROM = 4096
TOKENS = 8192        # at least so many in a measurement
GIB = 8              # of memory that a process may hold
NOT_TRIED = "not tried: "  # begins the note of a row that a later run may measure after all
COLUMNS = ("measurement", "level", "width", "contender", "T", "batch", "round",
           "us_per_token", "extra_mib", "peak_mib", "load", "note")


def configuration(level, width, contender, t, n_tokens=TOKENS):
    """(ModelConfig, batch) of a measurement."""
    w = 2 ** math.ceil(math.log2(t) / 2)
    changes = PORT_WORK | CONTENDERS[contender][1] | dict(
        seq_len=t, window=w, block=w, n_clusters=t // w)
    if level == "layer":
        changes |= dict(n_layers=1, init_out_scale=1.0, vocab_size=2)
    return size_model(SIZES[width], **changes)[0], max(1, n_tokens // t)


def measure(level, width, contender, t, n_tokens, n_threads, seconds, cpu_time):
    """In a process of its own: median seconds of a pass, and memory beyond what it began with."""
    limit_memory()
    cfg, batch = configuration(level, width, contender, t, n_tokens)
    whose = CONTENDERS[contender][0]
    if whose == "ours":
        start_ours(n_threads)
    else:
        start_torch(n_threads)
        import rivals
    before = peak_bytes()
    x = np.random.default_rng(0).normal(size=(batch, t, width)).astype("float32")
    if level == "layer":
        function = {"ours": layer, "twin": lambda *a: rivals.twin_layer(*a),
                    "port": lambda *a: rivals.port_layer(*a)}[whose](cfg, x)
    elif whose == "ours":
        function = training(cfg, batch)
    else:
        function, _ = (rivals.twin_training if whose == "twin" else rivals.port_training)(
            cfg, batch)
    found = timed(function, 5, 1, time.process_time if cpu_time else time.perf_counter, seconds)
    return {"us_per_token": statistics.median(found["seconds"]) / (batch * t) * 1e6,
            "extra_mib": found["peak_mib"] - before / 2**20, "peak_mib": found["peak_mib"]}


def limit_memory():
    """Asking for more than GIB is an error in this process, where the system knows such limits."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (GIB * 2**30,) * 2)
    except (ImportError, OSError, ValueError):
        pass


def layer(cfg, x):
    """A function that runs our attention layer on x forward and backward."""
    flat, leaves = init_parameters(cfg, np, "float32", 0)
    p, g = (views(array, leaves)["layers"][0]["attention"] for array in (flat, 0 * flat))
    mu = model.mu_of(init_centroids(cfg, np, "float32", 0), 0)
    dy = np.ones_like(x)

    def one(_):
        _, cache, _ = model.attention(x, p, cfg, 0, mu)
        model.attention_backward(dy, cfg.commitment, cache, g)

    return one


# ------------------------------------------------------------------------ in the calling process

def run(study):
    """Every measurement that the csv lacks, then crossover.md and crossover.png."""
    log = study.log("crossover", COLUMNS)
    log.rows = [r for r in log.rows if not r["note"].startswith(NOT_TRIED)]
    lengths = (64, 128) if study.quick else LENGTHS
    contenders = [c for c, (whose, _) in CONTENDERS.items() if whose == "ours" or has_torch()]
    n_tokens, seconds = (256, 0.05) if study.quick else (TOKENS, 4)
    for width in (128,) if study.quick else SIZES:
        for level in ("layer", "model"):
            for t in lengths:
                for turn in range(study.rounds):
                    for contender in contenders:
                        job = (level, width, contender, t)
                        log.row("/".join(map(str, (*job, turn))), lambda job=job, turn=turn: one(
                            study, log, *job, n_tokens, seconds, turn))
                write(study, log.rows)
    write(study, log.rows)


@functools.cache
def has_torch():
    """Whether torch and the port can be imported; a line where not."""
    if all(importlib.util.find_spec(name) for name in ("torch", "routing_transformer")):
        return True
    print("torch and routing-transformer are missing (pip install -e '.[bench]'): measured "
          "without them", file=sys.stderr)
    return False


def one(study, log, level, width, contender, t, n_tokens, seconds, turn):
    """The row of one measurement; a note says why there is no number."""
    row = dict(level=level, width=width, contender=contender, T=t,
               batch=max(1, n_tokens // t), round=turn, load=round(os.getloadavg()[0], 1))
    before = [r for r in log.rows if (r["level"], r["width"], r["contender"]) ==
              (level, width, contender) and r["T"] <= t]
    if any(r["us_per_token"] == "" for r in before):
        return row | {"note": NOT_TRIED + "no number at this length or a shorter one"}
    if before:
        last = max(before, key=lambda r: r["T"])
        growth = (t / last["T"]) ** (1.0 if contender.endswith("full") else 0.6)
        expected = 2e-6 * last["us_per_token"] * growth * row["batch"] * t
        if expected > study.patience:
            return row | {"note": f"{NOT_TRIED}two passes would take {expected:.0f} s"}
    try:
        found = study.apart("crossover", level, width, contender, t, n_tokens, study.threads,
                            seconds, study.cpu_time)
    except RuntimeError as error:
        note = f"out of memory ({GIB} GiB)" if any(
            word in str(error) for word in ("MemoryError", "allocate")) else str(error)
        found = {"note": note}
    print(level, width, t, contender, found)
    return row | found


def curves(rows, level, width):
    """{contender: [(T, median us per token over the rounds, most MiB)]}, by T."""
    found = {}
    for contender in CONTENDERS:
        own = [r for r in rows if (r["level"], r["width"], r["contender"]) ==
               (level, width, contender) and r["us_per_token"] != ""]
        by_t = sorted({r["T"] for r in own})
        if own:
            found[contender] = [(
                t, statistics.median(r["us_per_token"] for r in own if r["T"] == t),
                max(r["extra_mib"] for r in own if r["T"] == t)) for t in by_t]
    return found


def crossing(ours, theirs):
    """T where our cost per token first falls below theirs and stays there; None if it does not.

    Both [(T, cost, ...)]; straight lines between the measured points in log-log.
    """
    both = sorted({p[0] for p in ours} & {p[0] for p in theirs})
    a, b = ({p[0]: math.log(p[1]) for p in points} for points in (ours, theirs))
    gaps = [a[t] - b[t] for t in both]
    if not gaps or gaps[-1] >= 0:
        return None
    i = max((i for i, gap in enumerate(gaps) if gap >= 0), default=None)
    if i is None:
        return both[0]
    share = gaps[i] / (gaps[i] - gaps[i + 1])
    return math.exp(math.log(both[i]) + share * (math.log(both[i + 1]) - math.log(both[i])))


def meeting(found, contender):
    """Where a contender overtakes the rival; None for the rival itself, and without it."""
    if contender == RIVAL or RIVAL not in found:
        return None
    return crossing(found[contender], found[RIVAL])


def write(study, rows):
    """crossover.md and crossover.png of what there is so far."""
    text = [f"# Crossover\n\n{study.head}\n{__doc__}"]
    panels = []
    for level in ("layer", "model"):
        for width in SIZES:
            found = curves(rows, level, width)
            if not found:
                continue
            panels.append((level, width, found))
            lengths = sorted({t for points in found.values() for t, *_ in points})
            notes = {(r["contender"], r["T"]): r["note"] for r in rows
                     if (r["level"], r["width"]) == (level, width) and r["note"]}
            lengths = sorted({*lengths, *(t for _, t in notes)})
            body, memory = [], []
            for contender, points in found.items():
                cost = {t: us for t, us, _ in points}
                most = {t: mib for t, _, mib in points}
                slope = exponent([(t, us * t) for t, us, _ in points], FIT_FROM)
                meets = meeting(found, contender)
                body.append([contender, *(f"{cost[t]:.2f}" if t in cost else "-" for t in lengths),
                             "-" if math.isnan(slope) else f"{slope:.2f}",
                             "-" if meets is None else f"{meets:,.0f}"])
                memory.append([contender,
                               *(f"{most[t]:,.0f}" if t in most else "-" for t in lengths)])
            names = [f"T {t:,}" for t in lengths]
            text += [
                f"## {'One attention layer' if level == 'layer' else 'The whole model'}, "
                f"C {width}\n\nMicroseconds per token; exponent of the time of a window from "
                f"T = {FIT_FROM:,} on; T from which it is faster than {RIVAL}.\n",
                table(["contender", *names, "exponent", "faster from T"], body),
                "Memory beyond what the process began with, MiB:\n",
                table(["contender", *names], memory)]
            text += [f"{c}, T {t:,}: {note}.\n" for (c, t), note in sorted(notes.items())]
    study.report("crossover", "\n".join(text))
    if panels:
        draw(panels, study.out / "crossover.png")


def draw(panels, path):
    """Cost per token against T, log-log, a panel per level and width; crossings are marked."""
    if not (plt := pyplot(path)):
        return
    n = min(2, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // n), n, squeeze=False, layout="constrained",
                                figsize=(5.4 * n, 4.8 * -(-len(panels) // n)))
    for axis in axes.flat[len(panels):]:
        axis.remove()
    colours = dict(zip(CONTENDERS, plt.get_cmap("tab10").colors, strict=False))
    for axis, (level, width, found) in zip(axes.flat, panels, strict=False):
        for contender, points in found.items():
            t, us, _ = zip(*points, strict=True)
            meets = meeting(found, contender)
            label = contender
            if meets:
                label += f": faster from {meets:,.0f}" + " or less" * (meets == t[0])
            axis.loglog(t, us, "o-" if contender.startswith("ours") else "s--",
                        color=colours[contender], label=label, markersize=4)
            if meets and meets > t[0]:
                at = np.exp(np.interp(np.log(meets), np.log(t), np.log(us)))
                axis.plot(meets, at, "*", color=colours[contender], markersize=13,
                          markeredgecolor="black", zorder=3)
        title = "one attention layer" if level == "layer" else "training step, whole model"
        lengths = sorted({t for points in found.values() for t, *_ in points})
        axis.set(title=f"{title}, C = {width}", xlabel="T, tokens of a window", xticks=lengths,
                 xticklabels=[f"{t:,}" for t in lengths],
                 ylabel="forward + backward, microseconds per token")
        axis.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.13))
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
