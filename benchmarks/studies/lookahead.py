"""What looking ahead is worth: `topk` models scored in one pass and token by token.

In one pass a cluster takes the W best tokens of the whole window, so that a token's members depend
on tokens after it. Token by token, each is predicted by decoding from what came before. The same
windows of validation text both times; the difference is their mean, its standard error that over
windows (tokens of a window are not independent). W K / T is how many tokens the clusters can hold.
"""

import math

import numpy as np
from common import table

from rt_scratch import logits
from rt_scratch.data.batches import eval_windows
from rt_scratch.run.evaluate import incremental_nats, token_nats
from studies import RUN_COLUMNS, loaded, pyplot, score, trained, write_csv

COLUMNS = (*RUN_COLUMNS, "K", "W", "T", "capacity", "windows", "one_pass", "token_by_token",
           "ahead", "error")
CAPACITIES = (1 / 4, 1 / 2, 1, 2, 4)  # W K / T
BUCKETS = 16                          # of positions, in the table


def positions(study, folder):
    """Bits of every position of whole windows, (n, T) twice: in one pass, token by token."""
    run, dataset = loaded(folder)
    model, params, centroids = run.model, run.state.params, run.state.centroids
    whole, alone = [], []
    for ids, weights, _ in eval_windows(dataset.splits["valid"], model.seq_len, study.limit, 0,
                                        study.limit):
        ids = ids[weights.all(1)].astype(np.int64)
        if ids.shape[1] < model.seq_len or not len(ids):
            continue
        whole += [token_nats(logits(params, centroids, model, ids[i : i + 1]), ids[i : i + 1])
                  for i in range(len(ids))]
        alone.append(incremental_nats(params, centroids, model, ids))
    return tuple(np.concatenate(nats) / math.log(2) for nats in (whole, alone))


def difference(whole, alone):
    """(mean of alone - whole, its standard error over the windows)."""
    by_window = (alone - whole).mean(1)
    error = by_window.std(ddof=1) / math.sqrt(len(by_window)) if len(by_window) > 1 else math.nan
    return float(by_window.mean()), float(error)


def gap(study, folder):
    """`difference` of a run, in bits per token."""
    return difference(*positions(study, folder))


def run(study):
    """lookahead.csv, a csv of every position per run, lookahead.md and lookahead.png."""
    log = study.log("lookahead", COLUMNS)
    for folder in study.folders:
        log.row(folder.name, lambda folder=folder: scored(study, folder.name, folder))
    window = 32 if study.quick else 64
    for capacity in () if study.folders else CAPACITIES:
        clusters = max(1, round(capacity * study.seq_len / window))
        name = f"{study.dataset}-topk-K{clusters}-{study.steps}"
        log.row(name, lambda name=name, clusters=clusters: scored(study, name, trained(
            study, name, [study.text, *study.flags(), "--routing", "topk", "--n-clusters",
                          clusters, "--steps", study.steps, "--eval-every", 0,
                          "--eval-windows", 16])))
    rows = [r for r in log.rows if r["ahead"] != ""]
    curves = {r["run"]: np.loadtxt(study.out / "lookahead" / f"{r['run']}.csv", delimiter=",",
                                   skiprows=1, ndmin=2) for r in rows}
    text = [f"# What looking ahead is worth\n\n{study.head}\n{__doc__}", table(
        ["run", "W", "K", "W K / T", "steps", "windows", "one pass", "token by token",
         "looking ahead"],
        [[r["run"], r["W"], r["K"], f"{r['capacity']:g}", f"{r['steps']:,}", r["windows"],
          f"{r['one_pass']:.4f}", f"{r['token_by_token']:.4f}",
          f"{r['ahead']:+.4f} ± {r['error']:.4f}"] for r in rows])]
    text += ["Token by token minus one pass, by position (mean of a span of positions):\n"]
    spans = {run: np.array_split(curve[:, 1], BUCKETS) for run, curve in curves.items()}
    text.append(table(["run", *(f"{i + 1}/{BUCKETS}" for i in range(BUCKETS))],
                      [[run, *(f"{span.mean():+.3f}" for span in own)]
                       for run, own in spans.items()]))
    study.report("lookahead", "\n".join(text))
    draw(rows, curves, study.out / "lookahead.png")


def scored(study, name, folder):
    """The row of a run; every position goes into a csv of its own."""
    run, _ = loaded(folder)
    model = run.model
    whole, alone = positions(study, folder)
    ahead, error = difference(whole, alone)
    (study.out / "lookahead").mkdir(parents=True, exist_ok=True)
    apart = alone - whole
    write_csv(study.out / "lookahead" / f"{name}.csv", ("position", "ahead", "error"), [
        {"position": t, "ahead": float(apart[:, t].mean()),
         "error": float(apart[:, t].std() / math.sqrt(len(apart)))} for t in range(model.seq_len)])
    return {"dataset": study.dataset, "kind": model.routing, "steps": run.state.step,
            "seed": run.train.seed, "K": model.n_clusters, "W": model.window, "T": model.seq_len,
            "capacity": model.n_clusters * model.window / model.seq_len, "windows": len(whole),
            "one_pass": float(whole.mean()), "token_by_token": float(alone.mean()),
            "ahead": ahead, "error": error} | score(study, folder)


def draw(rows, curves, path):
    """The difference against the position, each point the mean of a 32nd of the window."""
    if not (plt := pyplot(path)):
        return
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for r in rows:
        at, ahead = (np.array([part.mean() for part in np.array_split(x, 32)])
                     for x in curves[r["run"]][:, :2].T)
        axis.plot(at, ahead, ".-", label=f"W K / T = {r['capacity']:g}, {r['steps']:,} steps")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="position in the window",
             ylabel="bits: token by token - one pass")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
