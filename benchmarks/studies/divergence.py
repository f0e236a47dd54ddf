"""Jensen-Shannon divergence between heads, the paper's table 6, by benchmarks/heads.py.

In nats; ln 2 = 0.6931 means no key in common. The paper finds local and routing heads near ln 2,
which says that routing attends to what local heads do not. Here the mean over queries and windows
of the validation split, for each layer, with mean and standard deviation over the layers.
"""

import numpy as np
from heads import PAIRS, by_pair, report

from studies import trained

COLUMNS = ("pair", "run", "heads", "mean", "spread", "layers")


def run(study):
    """divergence.csv, divergence.md: of given runs, or of a causal and a topk run."""
    log = study.log("divergence", COLUMNS)
    folders = study.folders or [trained(study, f"{study.dataset}-{kind}-{study.steps}", [
        study.text, *study.flags(), "--routing", kind, "--steps", study.steps,
        "--eval-every", 0, "--eval-windows", 16]) for kind in ("causal", "topk")]
    text = [f"# Jensen-Shannon divergence between heads\n\n{study.head}\n{__doc__}"]
    for folder in folders:
        if not any(r["run"] == folder.name for r in log.rows):
            for pair, means in by_pair(folder, n_windows=2 if study.quick else 8).items():
                values = list(means.values())
                row = {"run": folder.name, "heads": pair, "mean": float(np.mean(values)),
                       "spread": float(np.std(values)),
                       "layers": " ".join(f"{i}:{v:.4f}" for i, v in means.items())}
                log.row(f"{folder.name}/{pair}", lambda row=row: row)
    for name in dict.fromkeys(r["run"] for r in log.rows):
        found = {r["heads"]: {int(i): float(v) for i, v in
                              (x.split(":") for x in r["layers"].split())}
                 for r in log.rows if r["run"] == name}
        text.append(f"## {name}\n\n{report({p: found[p] for p in PAIRS if p in found})}")
    study.report("divergence", "\n".join(text))
