"""A run as one HTML page that needs nothing else: no network, no server, no library.

    python -m rt_scratch.report runs/stdlib                      -> runs/stdlib/report.html
    python -m rt_scratch.report runs/stdlib --prompt "def f(x):"
    python -m rt_scratch.report runs/cifar10 --window 7 --layers 0,3 --out page.html

It shows configuration and protocol, the curves of log.csv, cluster health, samples, and a window of
the validation split in which every token shows what it attends to. The data of the page are one
JSON text inside report.html, the template beside this file, whose script draws them.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import re
from pathlib import Path

import numpy as np

from rt_scratch import data
from rt_scratch.config import ModelConfig, flag
from rt_scratch.console import Parser, a_path, a_text, say, script
from rt_scratch.errors import UserError
from rt_scratch.run import costs, log
from rt_scratch.run.attention_maps import attention_maps, strongest
from rt_scratch.run.checkpoint import best_checkpoint, load_model
from rt_scratch.run.evaluate import mode
from rt_scratch.run.folder import run_codec, whole
from rt_scratch.run.options import layer_list
from rt_scratch.run.pictures import read_picture
from rt_scratch.run.samples import read_samples

TEMPLATE = Path(__file__).with_suffix(".html")
LIMIT = 5_000_000     # bytes of a page
FEWEST, MOST = 8, 256  # weights that the page keeps of a row, see `plan`
POINTS = 400          # of a curve
SAMPLES = 12          # texts or pictures
UNIT = 65535          # weights are kept as whole numbers of 1 / UNIT
SHOWN = 64            # clusters whose shares are listed one by one


def main(argv=None):
    """Run the command; UserError for everything the user can fix."""
    args = parse(argv)
    loaded = load_model(args.run, np)
    page = describe(args.run, loaded) | curves(args.run) | {
        "samples": samples(args.run, loaded)}
    ids, label, source, labels = chosen_window(args, loaded)
    page["window"] = window = {"source": source, "labels": labels, "kind": loaded.model.kind,
                               "size": loaded.model.image_size}
    if loaded.model.kind == "image":
        window["values"] = ids[0].tolist()
    room = LIMIT - len(html(page)) - 20_000 - 600 * loaded.model.n_layers * loaded.model.n_heads
    window |= explored(loaded, ids, label, args.layers, room)
    text = html(page)
    if len(text) >= LIMIT:
        raise UserError(f"the page would take {len(text):,} bytes; show fewer --layers, or a "
                        "shorter text with --prompt")
    path = args.out or args.run / "report.html"
    with whole(path) as file:
        file.write(text)
    say(f"{path}: {len(text) / 1e6:.1f} MB, open it in any browser")


def html(page: dict) -> bytes:
    """The template with its data: JSON without `<`, so that no text in it can end the script."""
    text = json.dumps(finite(page), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("RUN_DATA", text).encode()


def finite(value):
    """The value with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------ what ran, and how

def describe(folder: Path, loaded) -> dict:
    """Title, a few facts, and every field of the configuration with its meaning."""
    model, train, config = loaded.model, loaded.train, loaded.config
    valid = [row for row in log.read_log(folder) if row["split"] == "valid"]
    spread = f"{train.eval_windows} windows, evenly spread" if train.eval_windows else "all of it"
    facts = [("data", config.get("data") or f"{config['dataset']}; trained elsewhere"),
             ("model", f"{costs.n_parameters(model):,} parameters, {model.n_layers} layers, "
                       f"{mode(model)}"),
             ("checkpoint", f"{best_checkpoint(folder).name}, step {loaded.state.step:,} of "
                            f"{train.steps:,}")]
    if valid:
        best = min(valid, key=lambda row: float(row["nats"]))
        facts += [("best validation score", f"{float(best['score']):.4f} {best['unit']} at step "
                                            f"{int(best['step']):,}"),
                  ("protocol", f"validation split, {spread}; each token given those before it in "
                               f"a window of {model.seq_len:,}, in one pass"),
                  ("training time", f"{loaded.progress.seconds / 60:.0f} minutes to the "
                                    "checkpoint")]
    if "topk" in model.kinds():
        facts.append(("warning", "topk routing leaks the future: which tokens a cluster takes "
                                 "depends on tokens that come later, and scores profit from it"))
    tables = [{"title": title, "rows": [
        (flag(f.name), str(getattr(part, f.name)), f.metadata["help"].replace("%%", "%"))
        for f in dataclasses.fields(part)]} for title, part in (("Model", model),
                                                                ("Training", train))]
    return {"title": folder.resolve().name, "facts": facts, "tables": tables}


# ----------------------------------------------------------------------------------------- curves

def curves(folder: Path) -> dict:
    """What log.csv and clusters.csv say about training, thinned to POINTS points a curve."""
    rows = log.read_log(folder)
    train, valid = ([r for r in rows if r["split"] == s] for s in ("train", "valid"))
    found = {"unit": rows[0]["unit"] if rows else "", "width": len(train) // 20 + 1,
             "steps": [int(r["step"]) for r in thinned(train)],
             "valid_steps": [int(r["step"]) for r in valid]}
    for name in ("nats", "score", "lr", "grad_norm", "uncovered", "several", "largest", "dead"):
        every = [float(r[name] or "nan") for r in train]
        found[name] = thinned(every)
        if name in ("nats", "score"):
            found[f"smooth_{name}"] = thinned(smooth(every, found["width"]))
            found[f"valid_{name}"] = [float(r[name]) for r in valid]
    last = max(found["steps"], default=0)
    found["heads"] = []
    for (layer, head), table in sorted(log.read_clusters(folder).items()):
        steps = thinned([step for step in sorted(table) if step <= last])
        found["heads"].append({"layer": layer, "head": head, "steps": steps,
                               "largest": [table[s][0] for s in steps],
                               "dead": [table[s][1] for s in steps]})
    return {"log": found}


def thinned(values: list) -> list:
    """At most POINTS of them, evenly spread from the first on."""
    return values[:: -(-len(values) // POINTS) or 1]


def smooth(values: list[float], width: int) -> list[float]:
    """Means of the `width` values around each, of fewer near the ends."""
    values = np.array(values)
    first = [max(i - width // 2, 0) for i in range(len(values))]
    return [float(np.mean(values[a : i - width // 2 + width])) for i, a in enumerate(first)]


def samples(folder: Path, loaded) -> list[dict]:
    """Texts of samples.txt, or the pictures beside it, evenly spread over the run."""
    if loaded.model.kind == "text":
        found = [{"step": step, "text": text[:4000]}
                 for step, text in sorted(read_samples(folder).items())]
    else:
        paths = {int(m[1]): path for path in folder.glob("sample-*.png")
                 if (m := re.fullmatch(r"sample-(\d+)\.png", path.name))
                 and path.stat().st_size < 100_000}
        found = [{"step": step, "png": encoded(np.frombuffer(path.read_bytes(), np.uint8))}
                 for step, path in sorted(paths.items())]
    spread = np.linspace(0, len(found) - 1, min(SAMPLES, len(found))).round().astype(int)
    return [found[i] for i in spread]


# -------------------------------------------------------------------------------------- a window

def chosen_window(args, loaded):
    """What the page explores: ids (1, T), label (1,) or None, where they are from, what is read.

    The last is what each position reads, nothing or the token before it: one entry more than there
    are positions, for the target of the last position.
    """
    model, config = loaded.model, loaded.config
    own = args.image if model.kind == "image" else args.prompt or args.prompt_file
    for name in ("prompt", "prompt_file") if model.kind == "image" else ("image", "label"):
        if getattr(args, name) is not None:
            raise UserError(f"--{flag(name)}: this run is {model.kind}s".replace("texts", "text"))
    for name in ("label",) if own is None else ("window", "data_dir"):
        if getattr(args, name) is not None:
            raise UserError(f"--{flag(name)}: {'needs' if own is None else 'not used with'} "
                            f"--{'image' if model.kind == 'image' else 'prompt'}")
    codec, label = run_codec(config, args.run, model.vocab_size), args.label or 0
    if own is None:
        ids, label, source = validation_window(args, loaded)
    elif model.kind == "image":
        ids, source = read_picture(own, model.image_size).reshape(-1), f"the picture {own.name}"
    else:
        text = os.fsencode(args.prompt) if args.prompt else args.prompt_file.read_bytes()
        ids = codec.encode(text)
        source = "a text of your own"
        if len(ids) > model.seq_len:
            source += f", its first {model.seq_len:,} of {len(ids):,} tokens"
            ids = ids[: model.seq_len]
    if model.seq_len < 2:
        raise UserError("the model sees one token at a time (T = 1): there is nothing to show")
    if len(ids) < 2:
        raise UserError("the text has fewer than 2 tokens: give a longer --prompt")
    if model.n_classes and not 0 <= label < model.n_classes:
        raise UserError(f"--label {label}: the classes are 0 to {model.n_classes - 1}")
    ids = np.asarray(ids, np.int64)
    labels = ["R", "G", "B"] if model.kind == "image" else ["start", *pieces(codec, ids)]
    return ids[None], np.array([label]) if model.n_classes else None, source, labels


def validation_window(args, loaded):
    """(ids (T,), class or 0, where it is from) of window --window of the validation split."""
    model, config = loaded.model, loaded.config
    try:
        dataset = data.load(config["dataset"], args.data_dir or config.get("data_dir"),
                            model.vocab_size, data.given_codec(config, args.run), model.seq_len)
    except UserError as error:
        own = "--image FILE" if model.kind == "image" else "--prompt TEXT"
        raise UserError(f"the validation split is not here; explore your own with {own}, or name "
                        f"its folder with --data-dir ({error})") from error
    split, number = dataset.splits["valid"], args.window or 0
    if dataset.kind != model.kind or split.ndim == 2 and split.shape[1] != model.seq_len:
        raise UserError(f"{config['dataset']} is not what the run was trained on: other sizes")
    total = len(split) if model.kind == "image" else -(-len(split) // model.seq_len)
    if number >= total:
        raise UserError(f"--window {number}: the validation split has 0 to {total - 1}")
    if model.kind == "image":
        label = int(dataset.labels["valid"][number]) if model.n_classes else 0
        return split[number], label, f"picture {number:,} of the {total:,} of the validation split"
    first = number * model.seq_len
    return (split[first : first + model.seq_len], 0,
            f"window {number:,} of the {total:,} of the validation split")


def pieces(codec, ids) -> list[str]:
    """The text of every token, readable; bytes that are not text as \\x and two digits.

    With a codec that joins tokens, the text of a token depends on those beside it: a few before it
    are decoded with it.
    """
    found = []
    for i in range(len(ids)):
        before = ids[max(0, i - 8) : i] if codec.joins else ids[:0]
        own = codec.decode(ids[i - len(before) : i + 1])[len(codec.decode(before)) :]
        found.append(own.decode("utf-8", "backslashreplace") or f"[{ids[i]}]")
    return found


def explored(loaded, ids, label, wanted, room: int) -> dict:
    """Clusters and attention weights of the window, as many as fit in `room` bytes of page."""
    model, state = loaded.model, loaded.state
    t = ids.shape[1]
    layers, of_kind, n_kept = plan(model, t, wanted, room)
    heads, health = [], []
    for layer, maps in enumerate(attention_maps(state.params, state.centroids, model, ids, label)):
        for found in maps:
            if found.routed is not None:
                health += head_health(layer, found, model.n_clusters)
            if layer in layers:
                heads += packed(layer, found, of_kind, min(n_kept, t))
    return {"layers": layers, "n_layers": model.n_layers, "heads": heads, "health": health,
            "all_heads": model.n_heads * len(layers)}


def plan(model: ModelConfig, t: int, wanted, room: int) -> tuple[list[int], int, int]:
    """(layers, heads of a kind in each, weights of a row) that fit.

    Fewer weights come first, down to FEWEST; then fewer layers, down to three; then fewer heads;
    then fewer layers still. Layers are spread evenly from the first to the last, unless --layers
    says which.
    """
    for i in wanted or ():
        if not -model.n_layers <= i < model.n_layers:
            raise UserError(f"--layers {i}: the layers are 0 to {model.n_layers - 1}")
    layers = sorted({i % model.n_layers for i in wanted or range(model.n_layers)})
    row, entry = 8 * 4 / 3, 4 * 4 / 3  # bytes in base64: n, seen, winner, membership; a weight
    fewest = [len(layers)] if wanted else [min(3, len(layers)), 1]
    for at_least in fewest if t <= UNIT else ():
        for of_kind in (model.n_heads, 4, 2, 1):
            for n in range(len(layers), at_least - 1, -1):
                some = [layers[i] for i in np.linspace(0, len(layers) - 1, n).round().astype(int)]
                heads = sum(min(of_kind, m) for i in some for _, m in model.layer_heads(i))
                kept = int((room / (heads * t) - row) / entry)
                if kept >= min(FEWEST, t):
                    return some, of_kind, min(kept, MOST)
    raise UserError(f"{fewest[-1]} layers of {t:,} tokens do not fit in a page of "
                    f"{LIMIT / 1e6:.0f} MB; give fewer --layers, or a shorter text with --prompt")


def head_health(layer: int, found, n_clusters: int) -> list[dict]:
    """How the tokens of the window fall into the clusters of each routing head."""
    health = []
    for head, winner in enumerate(found.routed.route.winner[0]):
        counts = np.bincount(winner, minlength=n_clusters)
        shares = (counts / len(winner)).round(4)
        row = {"layer": layer, "head": found.group.heads.start + head,
               "dead": int((counts == 0).sum()), "largest": float(shares.max()),
               "shares": shares.tolist() if n_clusters <= SHOWN else None}
        if found.routed.route.members is not None:
            times = np.bincount(found.routed.route.members[0, head].reshape(-1),
                                minlength=len(winner))
            row |= {"uncovered": float((times == 0).mean()), "several": float((times > 1).mean())}
        health.append(row)
    return health


def packed(layer: int, found, of_kind: int, n_kept: int) -> list[dict]:
    """The first heads of a map as arrays of 16 bits in base64, row after row.

    n: entries of a row; positions, weights: of the entries, in units of 1 / UNIT of the row's sum;
    seen: keys with any weight. What n entries leave to 1 is the weight of the other keys, 0 where
    there are none. winner: nearest centroid of the query; apart: its key may have another; members
    (K, W): who is in a topk cluster.
    """
    positions, weights, seen, total = strongest(found, n_kept)
    kept = positions >= 0
    share = np.divide(weights, total[..., None], out=np.zeros(weights.shape),
                      where=total[..., None] > 0)
    units = np.rint(share * UNIT).astype(int) * kept
    n = kept.sum(-1)
    left = np.where((n == seen) & (n > 0), UNIT - units.sum(-1), np.minimum(UNIT - units.sum(-1),
                                                                           0))
    best = units.argmax(-1)[..., None]  # takes what rounding left over, or took too much
    np.put_along_axis(units, best, np.take_along_axis(units, best, -1) + left[..., None], -1)
    heads = []
    for h in range(min(of_kind, len(n))):
        head = {"layer": layer, "head": found.group.heads.start + h,
                "kind": found.name, "n": encoded(n[h]), "positions": encoded(positions[h][kept[h]]),
                "weights": encoded(units[h][kept[h]]), "seen": encoded(seen[h])}
        if found.routed is not None:
            route = found.routed.route
            head["winner"] = encoded(route.winner[0, h])
            head["apart"] = route.key_winner is not route.winner
            if route.members is not None:
                head["members"] = encoded(route.members[0, h])
                head["clusters"] = len(route.members[0, h])
        heads.append(head)
    return heads


def encoded(array) -> str:
    """Base64 of an array, whose numbers take 16 bits unless they are bytes."""
    array = array if array.dtype == np.uint8 else array.astype("<u2")
    return base64.b64encode(array.tobytes()).decode()


# ----------------------------------------------------------------------------------------- flags

def parse(argv=None):
    """The flags of the command."""
    parser = Parser(__doc__, prog="python -m rt_scratch.report")
    add = parser.add_argument
    add("run", type=a_path, help="run folder")
    add("--out", type=a_path, help="page to write (default: report.html in the run folder)")
    add("--window", type=int,
        help="which window or picture of the validation split to explore (default 0)")
    add("--prompt", help="explore this text instead")
    add("--prompt-file", type=a_path, help="explore the text of this file instead")
    add("--image", type=a_path, help="explore this picture instead")
    add("--label", type=int, help="with --image: its class, where the model knows classes")
    add("--layers", type=layer_list, metavar="I,J,...",
        help="layers to explore (default: as many as fit in 5 MB)")
    add("--data-dir", type=a_text, help="folder with the dataset's official files")
    args = parser.parse_args(argv)
    if args.prompt is not None and args.prompt_file:
        raise UserError("--prompt and --prompt-file: give one of them")
    if args.prompt == "":
        raise UserError("--prompt is empty: give a text")
    if args.window is not None and args.window < 0:
        raise UserError(f"--window {args.window}: must not be negative")
    for path in (args.prompt_file, args.image):
        if path and not path.is_file():
            raise UserError(f"{path}: no such file")
    return args


if __name__ == "__main__":
    script(main)
