"""Draw who sees whom in a trained model: one local head and one routing head.

    python benchmarks/attention_map.py RUN OUT.png [--layer I] [--tokens N]

Row: a query; column: a key. In the routing head a query sees members of its own cluster, one colour
per cluster, wherever in the text they are. Drawn from the memberships that the model itself
chooses on the first tokens of the dataset's validation split.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from rt_scratch import UserError, data
from rt_scratch.console import script
from rt_scratch.model import forward
from rt_scratch.run.checkpoint import load_model

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--data-dir")
    args = parser.parse_args()
    run = load_model(args.run, np)
    cfg, location = run.model, args.data_dir or run.config["data_dir"]
    dataset = data.load(run.config["dataset"], location, cfg.vocab_size)
    ids = np.asarray(dataset.splits["valid"][: args.tokens])[None]
    report = forward(run.state.params, run.state.centroids, cfg, ids)[2]
    if cfg.routing != "causal" or args.layer not in report.routes:
        raise UserError(f"--layer {args.layer}: has no causal routing heads; name a layer that has")
    winner = report.routes[args.layer].winner[0, 0]  # (T,) of the first routing head

    i, j = np.mgrid[: args.tokens, : args.tokens]
    local = (j <= i) & (j >= (i // cfg.block - cfg.lookback) * cfg.block)
    same = winner[:, None] == winner[None]
    rank = np.array([(winner[:t] == winner[t]).sum() for t in range(args.tokens)])
    routed = same & (j <= i) & (rank[:, None] - rank[None] < cfg.window)

    colours = plt.get_cmap("tab10")
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.8), layout="constrained", sharey=True)
    for axis, seen, cluster, title in (
            (axes[0], local, np.full(args.tokens, 7), "local head: the last blocks"),
            (axes[1], routed, winner % 10, "routing head: members of one's cluster")):
        picture = np.ones((args.tokens, args.tokens, 3))
        picture[seen] = colours(np.broadcast_to(cluster[:, None], seen.shape)[seen])[:, :3]
        axis.imshow(picture, interpolation="nearest")
        axis.set(title=title, xlabel="key (position in the text)")
    axes[0].set(ylabel="query (position in the text)")
    figure.savefig(args.out, dpi=130)
    print(args.out)


if __name__ == "__main__":
    script(main)
