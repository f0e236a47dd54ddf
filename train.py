"""Train a Routing Transformer.

    python train.py                          the bytes of Python's standard library, in minutes
    python train.py FILE.txt                 any text file
    python train.py enwik8 --preset small    a dataset of the paper, see --help
    python train.py --resume                 continue the newest run exactly where it stopped
    python train.py enwik8 --out RUN --evaluate test
"""

import argparse
import warnings
from pathlib import Path

import numpy as np

from rt_scratch.console import Parser, StopRequest, script
from rt_scratch.data import DATASETS
from rt_scratch.data.batches import training_batch
from rt_scratch.device import select_device, select_precision
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint, costs, log
from rt_scratch.run.evaluate import CAUSAL_WINDOWS, evaluate, evaluate_causally, mode
from rt_scratch.run.folder import open_folder
from rt_scratch.run.options import add_fields, plan_run
from rt_scratch.run.pictures import plot_loss
from rt_scratch.run.samples import show_sample
from rt_scratch.step import cut, new_state, train_step


def main(argv=None):
    args = parse(argv)
    xp, device = select_device(args.device)
    plan = plan_run(args)
    model, train = plan.model, plan.train
    _, dtype = select_precision(train.precision, xp)  # of the network; None: of the parameters
    try:
        state = new_state(model, train, xp, drawn=not plan.saved)
        progress = checkpoint.Progress()
    except (MemoryError, ValueError) as error:  # ValueError: more than any array can have
        raise UserError(f"the parameters do not fit in memory ({error}); choose a smaller model, "
                        "say --width or --vocab-size") from error
    if plan.saved:
        state, progress = checkpoint.restore(plan.checkpoint, plan.saved, state, model, xp)
    describe(device, plan)
    if args.dry_run:
        return
    if args.evaluate:
        score_split(args, state, plan)
        return
    open_folder(plan.folder, plan.config, plan.dataset.codec.file)
    log.trim_log(plan.folder, state.step)
    try:
        with warnings.catch_warnings():  # a run that diverges is stopped below, by its loss
            warnings.simplefilter("ignore", RuntimeWarning)
            fit(plan, state, progress, args.stop_after or train.steps, xp, dtype)
    except MemoryError as error:
        raise UserError(
            f"out of memory at --batch {train.batch} x {model.seq_len} tokens, precision "
            f"{train.precision} ({error}); {checkpoint.kept(plan.folder)}; try --recompute, a "
            "smaller --batch with --accumulate, or on a GPU --precision bf16") from error


def fit(plan, state, progress, last, xp, dtype):
    """The training loop, to step `last` or the end of the schedule."""
    folder, dataset, model, train, config = plan[:5]
    windows, first, last = train.batch * train.accumulate, state.step, min(last, train.steps)
    grads, best, clock = xp.empty_like(state.flat), progress.best, log.Clock(progress.seconds)

    with StopRequest() as stop, log.Progress(first, train.steps) as bar:
        while state.step < last:
            ids, labels = training_batch(dataset, model.seq_len, windows, train.seed, state.step)
            state, result = train_step(
                state, grads, cut(ids, labels, train, xp), model, train, dtype)
            done = state.step
            scoring = done == last or (train.eval_every and done % train.eval_every == 0)
            logging = scoring or done % train.log_every == 0
            if logging or done == 1 or state.scale.value < 1e-3:
                check_finite(result, state, folder)  # here the host waits for a GPU
            bar.update()
            if logging:
                row = log.step_row(result, done, dataset, clock,
                                   windows * model.seq_len * (done - first))
                log.append_log(folder, row)
                stop.asked |= not bar.show(row, clock.here())
            if scoring:
                with clock.aside():
                    valid = evaluate(state, dataset, model, "valid", train.batch,
                                     limit=train.eval_windows)
                    if not np.isfinite(valid.nats):
                        raise UserError(f"the validation loss is not finite after step {done}; "
                                        f"{checkpoint.kept(folder)}; lower --lr, or set --clip 1")
                    row |= {"split": "valid", "nats": valid.nats, "score": valid.value}
                    log.append_log(folder, row)
                    if valid.nats < best:
                        best = valid.nats
                        save(folder / "best.npz", state, best, clock, config)
            if scoring or stop.asked:
                save(folder / "last.npz", state, best, clock, config)
            if scoring:
                with clock.aside():
                    sample = show_sample(state, dataset, model, train.seed, folder)
                text = f"step {done}  {valid.line}\n{log.cluster_line(row)}{sample}"
                stop.asked |= not bar.say(text)
            if stop.asked:
                raise UserError(f"interrupted and saved after step {done}; continue with: python "
                                f"train.py --resume --out {folder}")
    plot_loss(folder)
    print(f"done: {folder}  (sample from it: python sample.py {folder})")


def save(path, state, best, clock, config):
    checkpoint.save_state(path, state, checkpoint.Progress(best, clock.total()), config)


def check_finite(result, state, folder):
    """UserError unless the loss and the gradient of the last step are numbers.

    A gradient that left the range of fp16 is none as long as the loss scale has room to fall.
    """
    overflow = not result.applied and state.scale.value >= 1e-3
    for what, value in (("loss", result.nats), ("gradient", 0 if overflow else result.norm)):
        if not np.isfinite(float(value)):
            raise UserError(f"the {what} is not finite at step {state.step}; "
                            f"{checkpoint.kept(folder)}; lower --lr, or set --clip 1")


def score_split(args, state, plan):
    """--evaluate: print the score of a split, and with --evaluate-causally that of decoding."""
    limit = args.eval_windows
    if limit is None:
        limit = CAUSAL_WINDOWS if args.evaluate_causally else 0
    print(evaluate(state, plan.dataset, plan.model, args.evaluate, plan.train.batch, args.stride,
                   limit).line)
    if args.evaluate_causally:
        print(evaluate_causally(state, plan.dataset, plan.model, args.evaluate, limit).line)


def describe(device, plan):
    """What is about to happen, before it does."""
    model, train = plan.model, plan.train
    tokens = train.batch * train.accumulate * model.seq_len
    heads = f"{model.n_local_heads} local + {model.n_routing_heads} {model.routing} routing heads"
    routed = sum(model.routing_heads(i) > 0 for i in range(model.n_layers))
    if not routed:
        heads = f"{model.n_heads} heads, {mode(model)}"
    where = f", routing in {routed} of them" if 0 < routed < model.n_layers else ""
    print(f"device: {device}")
    print(f"model: {costs.n_parameters(model):,} parameters, {model.n_layers} layers of "
          f"{heads}{where}")
    print(f"step: {tokens:,} tokens, about {costs.flops_per_token(model) * tokens / 1e9:,.0f} "
          f"GFLOP, about {costs.step_bytes(model, train) / 2**20:,.0f} MiB")
    print(f"data: {plan.dataset.protocol}", flush=True)


def parse(argv=None):
    """Flags; those of the model and of training come from the dataclasses in config.py."""
    parser = Parser(prog="train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", nargs="?", help=f"{', '.join(DATASETS)}, or a text file (default: stdlib)")
    add("--preset", help="small (default), released, paper: see presets.py")
    add("--data-dir", help="folder with the dataset's official files")
    add("--download", action="store_true", help="get the dataset first")
    add("--out", type=Path, help="run folder (default: runs/DATASET)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto takes a GPU if there is one (default)")
    add("--resume", action="store_true", help="continue a run exactly")
    add("--stop-after", type=int, default=0, metavar="STEP",
        help="stop and save after this step of the schedule")
    add("--evaluate", choices=("train", "valid", "test"), metavar="SPLIT",
        help="score a finished run on train, valid or test, and stop; the whole split unless "
             "--eval-windows is given")
    add("--evaluate-causally", action="store_true",
        help=f"with --evaluate: also score by incremental decoding, on --eval-windows (default "
             f"{CAUSAL_WINDOWS}) windows")
    add("--stride", type=int, default=0,
        help="with --evaluate: tokens between windows (default: no overlap)")
    add("--dry-run", action="store_true", help="describe the run and stop; needs no files")
    add_fields(parser)
    args = parser.parse_args(argv)
    for name in ("stop_after", "stride"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be "
                            "negative")
    saved = args.resume or args.evaluate
    for name, wrong, why in (
            ("stride", not args.evaluate, "needs --evaluate"),
            ("stride", args.evaluate_causally, "not used with --evaluate-causally"),
            ("evaluate_causally", not args.evaluate, "needs --evaluate"),
            ("stop_after", args.evaluate, "not used with --evaluate"),
            ("download", saved, "not used with --resume or --evaluate"),
            ("preset", saved, "not used with --resume or --evaluate")):
        if getattr(args, name) and wrong:
            raise UserError(f"--{name.replace('_', '-')}: {why}")
    return args


if __name__ == "__main__":
    script(main)
