"""Train a Routing Transformer.

    python train.py                          the bytes of Python's standard library, in minutes
    python train.py FILE.txt                 any text file
    python train.py enwik8 --preset small    a dataset of the paper, see --help
    python train.py --resume                 continue the newest run exactly where it stopped
    python train.py enwik8 --out RUN --evaluate test
"""

import argparse
import dataclasses
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rt_scratch import data, decode, run
from rt_scratch.backend import array_module, select_device, select_precision, to_host
from rt_scratch.checkpoint import newest_run
from rt_scratch.config import ModelConfig, TrainConfig, from_json
from rt_scratch.console import Parser, say, script
from rt_scratch.data.batches import count_windows, eval_windows, random_windows, shuffled_images
from rt_scratch.errors import UserError
from rt_scratch.model import loss, views
from rt_scratch.optim import OPTIMIZERS, clip_by_global_norm, global_norm, learning_rate
from rt_scratch.presets import preset
from rt_scratch.step import gradients, move_centroids
from rt_scratch.threads import keep_freed_memory, n_threads, set_blas_threads

CAUSAL_WINDOWS = 64  # windows that --evaluate-causally scores unless told


def main(argv=None):
    args = parse(argv)
    xp, device = select_device(args.device)
    folder, path, saved = saved_run(args) if args.resume or args.evaluate else new_run(args)
    config, dataset, model, train = prepare(args, saved)
    precision, dtype = select_precision(train.precision, xp)
    train = dataclasses.replace(train, precision=precision)
    try:
        state = run.new_state(model, train, xp)
    except (MemoryError, ValueError) as error:  # ValueError: more than any array can have
        raise UserError(f"the parameters do not fit in memory ({error}); choose a smaller model, "
                        "say --width or --vocab-size") from error
    if saved:
        state = run.restore(path, saved, state, config, xp)
    threads = set_threads(xp, train)
    describe(device, threads, dataset, model, train, state)
    if args.dry_run:
        return
    if args.evaluate:
        limit = args.eval_windows
        if limit is None:
            limit = CAUSAL_WINDOWS if args.evaluate_causally else 0
        print(evaluate(state, dataset, model, train, args.evaluate, xp, args.stride, limit)[1])
        if args.evaluate_causally:
            print(evaluate_causally(state, dataset, model, args.evaluate, xp, limit)[1])
        return
    run.open_folder(folder, config, dataset.codec_file)
    run.trim_log(folder, state.step)
    try:
        with warnings.catch_warnings():  # a run that diverges is stopped below, by its loss
            warnings.simplefilter("ignore", RuntimeWarning)
            fit(state, dataset, model, train, config, folder, xp, dtype, args.stop_after)
    except MemoryError as error:
        raise UserError(
            f"out of memory at --batch {train.batch} x {model.seq_len} tokens, precision "
            f"{train.precision} ({error}); {run.kept(folder)}; try --recompute, a "
            "smaller --batch with --accumulate, or on a GPU --precision bf16") from error


def fit(state, dataset, model, train, config, folder, xp, dtype, stop_after):
    """The training loop. The network computes in `dtype` (None: that of the parameters)."""
    flat, table, centroids, optimizer, first, best, seconds, scale = state
    grads = xp.empty_like(flat)
    update = OPTIMIZERS[train.optimizer][1]
    last = min(train.steps, stop_after or train.steps)
    tokens_per_step = train.batch * train.accumulate * model.seq_len
    started = time.time() - seconds

    def now(done):
        return run.State(flat, table, centroids, optimizer, done, best, time.time() - started,
                         scale)

    # Ctrl-C is looked at between steps, when everything is whole; a second one stops at once. An
    # output that nobody reads any more (`| head`) counts as Ctrl-C.
    interrupted = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(signal.signal(
        signal.SIGINT, signal.default_int_handler)))

    bar = tqdm(total=train.steps, initial=first, unit="step", disable=not sys.stderr.isatty())
    try:
        for step in range(first, last):
            parts = batch_parts(dataset, model, train, step, xp)
            lr = learning_rate(step, train.schedule, train.lr, train.warmup, train.steps)

            result = gradients(flat, grads, table, centroids, model, parts, train.seed, step,
                               train.recompute, dtype, scale.value,
                               train.parts if xp is np else 1)
            norm = clip_by_global_norm(grads, train.clip) if train.clip else global_norm(grads)
            done = step + 1
            scoring = done == last or (train.eval_every and done % train.eval_every == 0)
            logging = scoring or done % train.log_every == 0
            fits = train.precision != "fp16" or overflow_free(norm)
            if logging or done == 1 if fits else scale.value < 1e-3:  # the one wait for a GPU
                check_finite(result.nats, norm, done, folder)
            if fits:
                update(flat, grads, optimizer, table, lr, step, weight_decay=train.weight_decay)
                centroids = move_centroids(centroids, result.memberships, model)
            if train.precision == "fp16":
                scale = scale.after(fits)

            bar.update()
            if logging:
                row = log_row(result, norm, lr, dataset, done, started,
                              tokens_per_step * (done - first), seconds)
                run.append_log(folder, row)
                if not show(bar, row, train.steps, first, row["seconds"] - seconds):
                    interrupted.append(True)
            if scoring:
                nats, text = evaluate(now(done), dataset, model, train, "valid", xp,
                                      limit=train.eval_windows)
                row |= {"split": "valid", "step": done, "nats": nats,
                        "score": data.score(nats, 1, dataset, "valid")}
                if not np.isfinite(nats):
                    raise UserError(f"the validation loss is not finite after step {done}; "
                                    f"{run.kept(folder)}; lower --lr, or set --clip 1")
                run.append_log(folder, row)
                if nats < best:
                    best = nats
                    run.save(folder / "best.npz", now(done), config)
            if scoring or interrupted:
                run.save(folder / "last.npz", now(done), config)
            if scoring:
                text = f"step {done}  {text}\n" + cluster_line(row) + sample(
                    now(done), dataset, model, train, done, folder)
                with bar.external_write_mode():
                    if not say(text):
                        interrupted.append(True)
            if interrupted:
                raise UserError(f"interrupted and saved after step {done}; continue with: python "
                                f"train.py --resume --out {folder}")
    finally:
        bar.close()
        signal.signal(signal.SIGINT, before)
    run.plot_loss(folder)
    print(f"done: {folder}  (sample from it: python sample.py {folder})")


def batch_parts(dataset, model, train, step, xp):
    """The windows of a step, in `accumulate` (on a CPU times `parts`) parts of whole windows."""
    n = train.batch * train.accumulate
    labels = None
    if model.kind == "image":
        ids, index = shuffled_images(dataset.splits["train"], n, train.seed, step)
        labels = dataset.labels["train"][index] if model.n_classes else None
    else:
        ids = random_windows(dataset.splits["train"], model.seq_len, n, train.seed, step)
    parts = train.accumulate * (train.parts if xp is np else 1)
    cuts = np.array_split(np.arange(n), min(n, parts))
    return [(xp.asarray(ids[c]), None if labels is None else xp.asarray(labels[c])) for c in cuts]


def evaluate(state, dataset, model, train, split, xp, stride=0, limit=0):
    """(nats per token, one line with the score and its protocol) of a split."""
    tokens = dataset.splits[split]
    if count_windows(tokens, model.seq_len, stride) == 0:
        raise UserError(f"the {split} split is empty: give more text")
    params = views(state.flat, state.table)
    nats, n = 0.0, 0.0
    for ids, weights, index in eval_windows(tokens, model.seq_len, train.batch, stride, limit):
        labels = xp.asarray(dataset.labels[split][index]) if model.n_classes else None
        (part, _), _, _ = loss(params, state.centroids, model, xp.asarray(ids),
                               xp.asarray(weights.astype(train.dtype)), labels,
                               recompute=True)
        nats += float(part)
        n += float(weights.sum())
    total = count_windows(tokens, model.seq_len, stride)
    seen = f"{limit} of {total} windows, evenly spread" if 0 < limit < total else "whole split"
    leak = "; TOPK ROUTING LEAKS THE FUTURE into this score" \
        if model.routing == "topk" and model.heads_route() else ""
    value = data.score(nats, n, dataset, split)
    return nats / n, (f"{split} {value:.4f} {dataset.unit}  ({seen}, {n:.0f} tokens, context "
                      f"{model.seq_len}, stride {stride or model.seq_len}, {mode(model)}{leak})")


def evaluate_causally(state, dataset, model, split, xp, limit):
    """(nats per token, line) by incremental decoding: each token given what came before, no more.

    For `causal` routing this is the ordinary score; for `topk`, whose teacher-forced score lets
    later tokens choose the members, the difference is what looking ahead is worth.
    """
    tokens, params = dataset.splits[split], views(state.flat, state.table)
    total = count_windows(tokens, model.seq_len)
    limit = min(limit or total, total)
    nats, n = 0.0, 0.0
    for ids, weights, index in eval_windows(tokens, model.seq_len, CAUSAL_WINDOWS, 0, limit):
        labels = xp.asarray(dataset.labels[split][index]) if model.n_classes else None
        ids = xp.asarray(ids)
        scores, cache = decode.prefill(
            params, state.centroids, model, ids[:, :0], model.seq_len, labels)
        for t in range(ids.shape[1]):
            z = to_host(scores).astype("float64")
            z -= z.max(-1, keepdims=True)
            hit = np.take_along_axis(z, to_host(ids[:, t : t + 1]).astype(np.int64), axis=1)[:, 0]
            nats += float((weights[:, t] * (np.log(np.exp(z).sum(-1)) - hit)).sum())
            if t + 1 < ids.shape[1]:
                scores = decode.step(params, state.centroids, model, cache, ids[:, t])
        n += float(weights.sum())
    value = data.score(nats, n, dataset, split)
    return nats / n, (f"{split} {value:.4f} {dataset.unit}  by incremental decoding, nothing seen "
                      f"ahead  ({limit} of {total} windows, evenly spread, {n:.0f} tokens, context "
                      f"{model.seq_len}, {mode(model)})")


def mode(model):
    """How the model attends, for the line with its score."""
    if model.heads_route():
        return f"routing {model.routing}"
    return "full attention" if model.attention == "full" else "local heads only"


def sample(state, dataset, model, train, step, folder, n_tokens=160, n_images=4):
    """What the model draws now: a few lines of text, or a PNG in the run folder."""
    rng = np.random.default_rng([train.seed, step])
    network = views(state.flat, state.table), state.centroids, model
    if model.kind == "image":
        try:
            run.pillow()
        except UserError as error:
            return f"no picture: {error}"
        labels = None
        if model.n_classes:
            labels = array_module(state.flat).asarray(np.arange(n_images) % model.n_classes)
        drawn = decode.generate(*network, model.seq_len, rng=rng, batch=n_images, labels=labels)
        pixels = np.stack(list(drawn), axis=1).reshape(n_images, model.image_size, -1, 3)
        path = folder / f"sample-{step}.png"
        run.save_images(pixels.astype(np.uint8), path)
        return f"sample: {path}"
    tokens = decode.generate(*network, n_tokens, rng=rng, temperature=0.8)
    ids = np.array([int(t[0]) for t in tokens])
    return "--- sample\n" + dataset.decode(ids).decode("utf-8", "replace") + "\n---"


# ------------------------------------------------------------------------------------- the log

def log_row(result, norm, lr, dataset, done, started, tokens, seconds):
    nats, elapsed = float(result.nats), time.time() - started
    return {"step": done, "split": "train", "nats": nats,
            "score": data.score(nats, 1, dataset, "train"), "unit": dataset.unit,
            "tokens_per_s": round(tokens / max(elapsed - seconds, 1e-9)),
            "seconds": round(elapsed, 1), "lr": lr, "grad_norm": float(norm),
            **run.health(result.memberships)}


def show(bar, row, steps, first, seconds):
    """The log line of a step, `seconds` after step `first`; False where nobody reads it."""
    text = (f"{row['score']:.4f} {row['unit']}  lr {row['lr']:.2e}  |g| {row['grad_norm']:.2f}  "
            f"{row['tokens_per_s']} tok/s")
    if bar.disable:
        left = seconds / (row["step"] - first) * (steps - row["step"])
        return say(f"{row['step']}/{steps}  {text}  ETA {left:.0f} s")
    bar.set_postfix_str(text)
    return True


def cluster_line(row):
    if "dead" not in row:
        return ""
    return (f"clusters: {row['uncovered']:.1%} of tokens in none, {row['several']:.1%} in several; "
            f"smallest {row['smallest']:.1%}, largest {row['largest']:.1%} of a head's tokens; "
            f"{row['dead']} without any\n")


def overflow_free(norm) -> bool:
    """False if a gradient left the range of fp16. Only fp16 waits for this in every step."""
    return bool(np.isfinite(float(norm)))


def check_finite(nats, norm, step, folder):
    """UserError unless the loss and the gradient of this step (1, 2, ...) are numbers."""
    if not np.isfinite(float(nats)) or not np.isfinite(float(norm)):
        what = "loss" if not np.isfinite(float(nats)) else "gradient"
        raise UserError(f"the {what} is not finite at step {step}; "
                        f"{run.kept(folder)}; lower --lr, or set --clip 1")


def describe(device, threads, dataset, model, train, state):
    """What is about to happen, before it does."""
    n, tokens = state.flat.size, train.batch * train.accumulate * model.seq_len
    print(f"device: {device}, {threads}")
    heads = f"{model.n_local_heads} local + {model.n_routing_heads} {model.routing} routing heads"
    if not model.heads_route():
        heads = f"{model.n_heads} heads, {mode(model)}"
    routed = sum(model.heads(i)[0] > 0 for i in range(model.n_layers))
    where = f", routing in {routed} of them" if 0 < routed < model.n_layers else ""
    print(f"model: {n:,} parameters, {model.n_layers} layers of {heads}{where}")
    print(f"step: {tokens:,} tokens, about {flops(model, state.table) * tokens / 1e9:,.0f} GFLOP, "
          f"about {memory(model, train, n) / 2**20:,.0f} MiB")
    print(f"data: {dataset.protocol}", flush=True)


def flops(model, table):
    """Floating-point operations per trained token: 6 per matrix entry, attention in its windows."""
    matrices = sum(leaf.stop - leaf.start for leaf in table
                   if len(leaf.shape) == 2 and "_rel_" not in leaf.name
                   and (leaf.name != "embed.table" or model.tie_embedding))
    seen = 0
    for i in range(model.n_layers):
        routed, local = model.heads(i)
        keys = model.window * (1 if model.routing == "topk" else 2)
        reach = model.seq_len if model.attention == "full" else (model.lookback + 1) * model.block
        seen += routed * keys + local * reach
    return 6 * matrices + 14 * seen * model.head_width  # 2 products forward, 5 backward


def memory(model, train, n_parameters):
    """Rough bytes of a step: parameters, gradients, optimizer state, activations."""
    size = np.dtype(train.dtype).itemsize
    copies = 2 + 2 * (train.optimizer == "adamw") + min(train.parts, train.batch) - 1
    per_token = model.n_layers * (10 * model.width + 3 * model.ffn_width)
    live = train.batch * model.seq_len
    if train.recompute:
        per_token = per_token // model.n_layers + model.n_layers * model.width
    return size * (n_parameters * copies + per_token * live)


# --------------------------------------------------------------------------------- command line

def parse(argv):
    """Flags; those of the model and of training come from the dataclasses in config.py."""
    parser = Parser(
        prog="train.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default=None,
                        help=f"{', '.join(data.DATASETS)}, or a text file (default: stdlib)")
    parser.add_argument("--preset", help="small (default), released, paper: see presets.py")
    parser.add_argument("--data-dir", help="folder with the dataset's official files")
    parser.add_argument("--download", action="store_true", help="get the dataset first")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/DATASET)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto takes a GPU if there is one (default)")
    parser.add_argument("--resume", action="store_true", help="continue a run exactly")
    parser.add_argument("--stop-after", type=int, default=0, metavar="STEP",
                        help="stop and save after this step of the schedule")
    parser.add_argument("--evaluate", choices=("train", "valid", "test"), metavar="SPLIT",
                        help="score a finished run on train, valid or test, and stop; the whole "
                             "split unless --eval-windows is given")
    parser.add_argument("--evaluate-causally", action="store_true",
                        help="with --evaluate: also score by incremental decoding, on "
                             f"--eval-windows (default {CAUSAL_WINDOWS}) windows")
    parser.add_argument("--stride", type=int, default=0,
                        help="with --evaluate: tokens between windows (default: no overlap)")
    parser.add_argument("--dry-run", action="store_true",
                        help="describe the run and stop; needs no files")
    for cls, title in ((ModelConfig, "model"), (TrainConfig, "training")):
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            group.add_argument("--" + f.name.replace("_", "-"), **flag(f))
    args = parser.parse_args(argv)
    for name in ("stop_after", "stride"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be "
                            "negative")
    for name, wrong, why in (
            ("stride", not args.evaluate, "needs --evaluate"),
            ("stride", args.evaluate_causally, "not used with --evaluate-causally"),
            ("evaluate_causally", not args.evaluate, "needs --evaluate"),
            ("stop_after", args.evaluate, "not used with --evaluate"),
            ("download", args.resume or args.evaluate, "not used with --resume or --evaluate"),
            ("preset", args.resume or args.evaluate, "not used with --resume or --evaluate")):
        if getattr(args, name) and wrong:
            raise UserError(f"--{name.replace('_', '-')}: {why}")
    return args


def flag(f):
    shown = f.default if f.default != () else "all"
    settings = {"default": None, "help": f"{f.metadata['help']} (default: {shown})"}
    if f.metadata["choices"]:
        return settings | {"choices": f.metadata["choices"]}
    if isinstance(f.default, bool):
        return settings | {"action": argparse.BooleanOptionalAction}
    if isinstance(f.default, tuple):
        return settings | {"type": layer_list, "metavar": "I,J,..."}
    return settings | {"type": type(f.default), "metavar": type(f.default).__name__.upper()}


def layer_list(text):
    """Numbers with commas between them."""
    return tuple(int(x) for x in text.split(",") if x)


def new_run(args):
    """(run folder, None, None); UserError if there is a run in it."""
    folder = args.out or default_folder("stdlib" if args.dataset is None else args.dataset)
    if not args.dry_run and run.best_checkpoint(folder).exists():
        raise UserError(f"--out {folder}: holds a run already; add --resume to continue it, or "
                        "choose another folder")
    return folder, None, None


def saved_run(args):
    """(run folder, checkpoint, what it holds) of the run to continue or to score."""
    folder = args.out or (default_folder(args.dataset) if args.dataset else newest_run("runs"))
    path = folder / "last.npz"
    if args.evaluate or not path.is_file():
        path = run.best_checkpoint(folder)
    return folder, path, run.load(path)


def prepare(args, saved=None):
    """(config, dataset, ModelConfig, TrainConfig) of what the flags and a saved run ask for."""
    given = {f.name: getattr(args, f.name) for cls in (ModelConfig, TrainConfig)
             for f in dataclasses.fields(cls) if getattr(args, f.name) is not None}
    if saved:
        before = saved[1]["config"]
        name = before["dataset"]
        if args.dataset not in (None, name):
            if args.dataset in data.DATASETS or name in data.DATASETS:
                raise UserError(f"the run was trained on {name}, not on {args.dataset}")
            name = args.dataset  # own text that was moved or renamed
        place = args.data_dir or before["data_dir"]
        model = dataclasses.replace(
            from_json(ModelConfig, before["model"]), **only(ModelConfig, given))
        train = dataclasses.replace(
            from_json(TrainConfig, before["train"]), **only(TrainConfig, given))
        dataset = data.load(name, place, model.vocab_size)
        if dataset.protocol != before["data"]:
            changed = f"trained on other data: {before['data']}"
            if args.resume:
                raise UserError(f"the run was {changed}; now there is: {dataset.protocol}")
            print(f"note: what is scored now may be in part what was trained on; {changed}")
    else:
        name, place = "stdlib" if args.dataset is None else args.dataset, args.data_dir
        if args.download:
            data.fetch(name, place)
        fields = preset(name, args.preset or "small") | given
        vocab_size = fields.pop("vocab_size", 0)
        if args.dry_run and not data.present(name, place):
            dataset = data.outline(name, vocab_size)
        else:
            dataset = data.load(name, place, vocab_size)
        for fixed in ("kind", "pad_id"):
            if given.get(fixed, getattr(dataset, fixed)) != getattr(dataset, fixed):
                raise UserError(f"--{fixed.replace('_', '-')} {given[fixed]}: {name} has "
                                f"{getattr(dataset, fixed)}")
        fields |= {"kind": dataset.kind, "vocab_size": dataset.vocab_size,
                   "pad_id": dataset.pad_id}
        if dataset.kind == "image":
            fields.setdefault("image_size", dataset.image_shape[0])
            fields.setdefault("seq_len", 3 * fields["image_size"] ** 2)
        model = ModelConfig(**only(ModelConfig, fields))
        train = TrainConfig(**only(TrainConfig, fields))
    model.validate()
    train.validate()
    if dataset.splits:
        check_fits(model, dataset)
    if name not in data.DATASETS:
        name = str(Path(name).resolve())  # a run is resumed from anywhere
    place = place and str(Path(place).resolve())
    return run.describe(name, place, dataset, model, train), dataset, model, train


def check_fits(model, dataset):
    """UserError if this model cannot be trained on this data."""
    if model.n_classes and model.n_classes != dataset.n_classes:
        raise UserError(f"--n-classes {model.n_classes}: {dataset.name} has {dataset.n_classes} "
                        "classes")
    if model.kind == "text" and len(dataset.splits["train"]) < model.seq_len:
        raise UserError(f"the training text has {len(dataset.splits['train'])} tokens, fewer than "
                        f"--seq-len {model.seq_len}: give a longer text or a smaller --seq-len")


def default_folder(dataset):
    return Path("runs") / Path(dataset).stem


def only(cls, values):
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in values.items() if k in names}


def set_threads(xp, train):
    if xp is not np:
        return "one stream"
    keep_freed_memory()
    if set_blas_threads(1):  # the work is cut into pieces above BLAS
        return f"{n_threads()} threads, 1 BLAS thread each"
    return "BLAS threads as NumPy chooses"


if __name__ == "__main__":
    script(main)
