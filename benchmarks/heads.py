"""How differently the heads of a run attend: Jensen-Shannon divergence, the paper's table 6.

    python benchmarks/heads.py RUN [--windows 8] [--split valid]

For two heads of a layer, the divergence of their attention distributions of the same query, in
nats: JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, from 0 (the same) to ln 2 = 0.693 (no key in
common). Mean over queries and windows; queries that a topk head leaves without a cluster count for
none of its pairs. Pairs are local-local, local-routing and routing-routing; the table has each
layer, and mean and standard deviation over the layers.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # for python -m benchmarks.heads

from common import table  # noqa: E402
from studies import loaded  # noqa: E402

from rt_scratch.console import Parser, number, script  # noqa: E402
from rt_scratch.data.batches import eval_windows  # noqa: E402
from rt_scratch.run.attention_maps import CHUNK, attention_maps  # noqa: E402

PAIRS = ("local-local", "local-routing", "routing-routing")


def divergences(maps):
    """{pair of heads (i, j): (T,) nats} of one layer's maps; nan where a row is empty.

    Heads are numbered as in the layer. Keys are taken some at a time: with rows p and q of sum 1,
    JS = ln 2 + sum_j (p ln p + q ln q - (p + q) ln(p + q)) / 2.
    """
    t = maps[0].queries.shape[1]
    chunks = [(first, min(first + CHUNK, t)) for first in range(0, t, CHUNK)]

    def columns(first, last):
        return np.concatenate([m.columns(first, last) for m in maps]).astype("float64")

    total = sum(columns(*c).sum(-1) for c in chunks)[..., None]      # (H, T, 1)
    found = {(i, j): 0.0 for j in range(len(total)) for i in range(j)}
    for c in chunks:
        with np.errstate(invalid="ignore"):
            p = columns(*c) / total
        own = plogp(p)
        for i, j in found:
            found[i, j] = found[i, j] + (own[i] + own[j] - plogp(p[i] + p[j])) / 2
    return {pair: math.log(2) + d for pair, d in found.items()}


def plogp(p):
    """sum p ln p over the last axis, with 0 ln 0 = 0."""
    return (p * np.log(np.where(p > 0, p, 1))).sum(-1)


def by_pair(folder, split="valid", n_windows=8):
    """{kind of pair: {layer: mean nats}} of a run, over whole windows spread over the split."""
    run, dataset = loaded(folder)
    model, found = run.model, {}
    for ids, _, index in eval_windows(dataset.splits[split], model.seq_len, 1, 0, n_windows):
        labels = dataset.labels[split][index] if model.n_classes else None
        for layer, maps in enumerate(attention_maps(run.state.params, run.state.centroids, model,
                                                    ids.astype(np.int64), labels)):
            names = [("local", "routing")[m.group.kind.routes] for m in maps
                     for _ in range(len(m.queries))]
            for (i, j), nats in divergences(maps).items():
                pair = "-".join(sorted((names[i], names[j])))
                found.setdefault(pair, {}).setdefault(layer, []).append(np.nanmean(nats))
    return {pair: {layer: float(np.mean(values)) for layer, values in found[pair].items()}
            for pair in PAIRS if pair in found}


def report(found):
    """The table of `by_pair`."""
    layers = sorted({layer for means in found.values() for layer in means})
    rows = []
    for pair, means in found.items():
        values = list(means.values())
        rows.append([pair, *(f"{means[x]:.3f}" if x in means else "-" for x in layers),
                     f"{np.mean(values):.4f} ± {np.std(values):.4f}"])
    return table(["heads", *(f"layer {x}" for x in layers), "over layers"], rows)


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder of train.py")
    parser.add_argument("--windows", type=number(int, 1), default=8)
    parser.add_argument("--split", choices=("train", "valid", "test"), default="valid")
    args = parser.parse_args()
    print(report(by_pair(args.run, args.split, args.windows)), end="")
    print(f"ln 2 = {math.log(2):.4f}: no key in common")


if __name__ == "__main__":
    script(main)
