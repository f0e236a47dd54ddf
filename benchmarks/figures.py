"""Draw every figure of the documents, from real runs.

    python benchmarks/figures.py [RUN] [--out docs/figures]

centroids.png   queries and centroids of one head at steps 0, 100 and 1000 of a run made here, in a
                minute: heads of width 3, whose normalised queries lie on a circle
attention.png   who attends to whom in a local and a routing head of RUN (a run of train.py on text)
skew.png        what `skew` does to two small arrays
cost.png        seconds per step against T, from the committed table of benchmarks/race.py
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

from rt_scratch import data
from rt_scratch.attention import skew
from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.console import Parser, script
from rt_scratch.data.batches import random_windows
from rt_scratch.layers import shift_right
from rt_scratch.run.attention_maps import attention_maps
from rt_scratch.run.checkpoint import load_model
from rt_scratch.step import cut, new_state, train_step

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
COLOURS = plt.get_cmap("tab10").colors
SHAPES = "osD^v<>P"


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="leave out to skip attention.png")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.run:
        draw_attention(args.run, args.out / "attention.png")
    draw_skew(args.out / "skew.png")
    draw_cost(args.out / "cost.png")
    draw_centroids(args.out / "centroids.png")


# -------------------------------------------------------------------------------------- centroids

def draw_centroids(path):
    """Heads of width 3: a normalised query has mean 0 and length sqrt(3), so it is on a circle."""
    model = ModelConfig(n_layers=2, width=48, ffn_width=144, n_local_heads=8, n_routing_heads=8,
                        seq_len=256, n_clusters=6, window=32).validate()
    train = TrainConfig(batch=4, parts=1, steps=1000, optimizer="adamw", lr=3e-3,
                        schedule="cosine", warmup=50, eval_every=0).validate()
    split = data.load("stdlib").splits
    state = new_state(model, train, np)
    grads, bits = np.empty_like(state.flat), []
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.9), layout="constrained")
    for axis, until in zip(axes, (0, 100, 1000), strict=True):
        while state.step < until:
            ids = random_windows(split["train"], model.seq_len, train.batch, 0, state.step)
            state, result = train_step(state, grads, cut(ids, None, model, train, np), model, train)
            bits.append(float(result.nats) / np.log(2))
        draw_circle(axis, state, model, split["valid"][:model.seq_len])
        loss = f": {np.mean(bits[-20:]):.2f} bits per byte" if bits else ""
        axis.set_title(f"step {until}{loss}", fontsize=10)
    figure.suptitle(
        "Normalised queries (small) and centroids (large, numbered) of one routing head; width 3, "
        "so all queries lie on a circle (their radii are scattered to tell them apart)", fontsize=8)
    save(figure, path)


def draw_circle(axis, state, model, ids, head=0):
    """Head `head` of the first layer: the plane through 0 that is orthogonal to (1, 1, 1)."""
    plane = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])  # two unit vectors in it
    found = next(attention_maps(state.params, state.centroids, model, ids[None]))[0]
    q, mu = found.queries[head] @ plane.T, state.centroids[0].mu[head]
    winner = found.routed.route.winner[0, head]
    spread = 1 + 0.06 * np.random.default_rng(0).normal(size=(len(q), 1))  # to tell them apart
    for c, mean in enumerate(mu @ plane.T):
        own = q[winner == c] * spread[winner == c]
        axis.scatter(*own.T, s=9, color=COLOURS[c], marker=SHAPES[c], linewidths=0, alpha=0.6)
        axis.plot(*zip((0, 0), mean, strict=True), color=COLOURS[c], linewidth=1)
        axis.scatter(*mean, s=150, color="white", edgecolors=COLOURS[c], linewidths=2, zorder=3)
        axis.annotate(str(c), mean, ha="center", va="center", fontsize=8, zorder=4)
    axis.set(aspect="equal", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[])


# ---------------------------------------------------------------------------------- attention map

def draw_attention(folder, path, start=203, n_tokens=56):
    """Every query and key of a short text, `n_tokens` of the validation split from `start` on."""
    state, _, config, model, _ = load_model(folder, np)
    text = data.load(config["dataset"], None, model.vocab_size)
    ids = np.asarray(text.splits["valid"][start : start + n_tokens]).astype(np.int64)[None]
    layer = model.n_layers // 2
    maps = list(attention_maps(state.params, state.centroids, model, ids))[layer]
    routing = next(m for m in maps if m.routed)
    routed = routing.columns(0, n_tokens)
    local = next(m for m in maps if not m.routed).columns(0, n_tokens)
    winner = routing.routed.route.winner[0, 0]
    labels = [chr(i) if 32 < i < 127 else {10: "\u23ce", 32: "\u2423"}.get(i, "\u00b7")
              for i in shift_right(ids)[0]]  # position t reads token t - 1
    grey, tints = (0.25, 0.25, 0.25), np.array(COLOURS)
    figure, axes = plt.subplots(1, 2, figsize=(13, 7.6), layout="constrained")
    for axis, weights, tint, title in (
            (axes[0], local[0], np.tile(grey, (n_tokens, 1)),
             f"Local head: its block of {model.block} and the one before"),
            (axes[1], routed[0], tints[winner],
             f"Routing head: the last {model.window} of its cluster")):
        strength = np.sqrt(weights / weights.max())
        strength = np.where(weights > 0, np.maximum(strength, 0.12), 0)[..., None]
        axis.imshow(np.clip(1 - strength + strength * tint[:, None], 0, 1), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        for ticks in (axis.set_xticks, axis.set_yticks):
            ticks(range(n_tokens), labels, fontsize=7, family="monospace")
        axis.set(xlabel="key", ylabel="query")
    for i, c in enumerate(winner):  # the cluster of each row as a number, for those who see no hue
        axes[1].text(n_tokens, i, str(c), fontsize=6, va="center", color=COLOURS[c])
    handles = [matplotlib.patches.Patch(color=COLOURS[c], label=f"cluster {c}")
               for c in sorted(set(winner.tolist()))]
    handles.append(matplotlib.patches.Patch(color=grey, label="local"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9,
                  title="Colour: cluster of the query, whose number stands beside the row. Darker: "
                        "more weight (square root). Palest: seen, with hardly any weight.")
    save(figure, path)


# --------------------------------------------------------------------------------------------- skew

def draw_skew(path):
    """`skew` on arrays whose entries are their own distances."""
    cases = ((3, 3, 3, 0, "S = N = P = 3"),
             (2, 4, 4, 2, "S = 2, N = P = 4: queries are the last 2 positions"),
             (2, 3, 4, 0, "S = 2, N = 3, P = 4: queries are the first 2 positions"))
    figure, axes = plt.subplots(len(cases), 2, figsize=(7.2, 5.4), layout="constrained")
    for (left, right), (s, n, p, first, title) in zip(axes, cases, strict=True):
        distance = np.arange(p) + 1 - s - first
        by_distance = np.broadcast_to(distance, (s, p)).astype(float)
        by_key = skew(by_distance, n)
        true = np.arange(n)[None] - np.arange(s)[:, None] - first
        meant = (true >= distance[0]) & (true <= distance[-1])
        assert (by_key[meant] == true[meant]).all()
        draw_cells(left, by_distance, [f"{d:+d}" if d else "0" for d in distance], "distance")
        draw_cells(right, np.where(meant, by_key, np.nan), [str(j) for j in range(n)],
                   "position of the key")
        left.set_title(title, fontsize=9, loc="left")
    figure.suptitle("skew: row i moves left by S - 1 - i. Numbers are distances; empty: no such "
                    "pair, masked", fontsize=9)
    save(figure, path)


def draw_cells(axis, cells, labels, name):
    axis.imshow(cells, cmap="coolwarm", vmin=-4, vmax=4)
    for (i, j), value in np.ndenumerate(cells):
        if not np.isnan(value):
            axis.annotate(f"{value:+.0f}" if value else "0", (j, i), ha="center", va="center")
    axis.set_xticks(range(cells.shape[1]), labels)
    axis.set_yticks(range(cells.shape[0]), [f"q{i}" for i in range(cells.shape[0])])
    axis.set_xlabel(name, fontsize=8)


# --------------------------------------------------------------------------------------------- cost

def draw_cost(path):
    """Median seconds of one forward and backward pass, W = K = sqrt(T), as race.py measured."""
    rows = json.loads((ROOT / "benchmarks/results/race-cpu/race.json").read_text())
    measured = {int(name.split()[1]): float(np.median(row["seconds"]))
                for name, row in rows.items() if name.startswith("length ")}
    tokens = np.array(sorted(measured))
    seconds = np.array([measured[t] for t in tokens])
    figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
    axis.loglog(tokens, seconds, "o-", color="black", label="measured: causal, W = K = \u221aT")
    for power, dash in ((1, ":"), (1.5, "--"), (2, "-.")):
        line = seconds[2] * (tokens[2:] / tokens[2]) ** power
        axis.loglog(tokens[2:], line, dash, color="grey", label=f"T^{power:g}")
    axis.set(xlabel="T, tokens", ylabel="seconds of a training step of one window",
             xticks=tokens, xticklabels=[f"{t:,}" for t in tokens])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    save(figure, path)


def save(figure, path):
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    script(main)
