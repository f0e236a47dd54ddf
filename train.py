"""Train a Routing Transformer.

    python train.py                          the bytes of Python's standard library, in minutes
    python train.py FILE.txt                 any text file, several, or a folder of them
    python train.py enwik8 --preset small    a dataset of the paper, see --help
    python train.py --resume                 continue the newest run exactly where it stopped
    python train.py enwik8 --out RUN --evaluate test
    mpiexec -n 4 python train.py             the same run, shared by four processes
"""

try:
    import contextlib
    import math
    from shlex import quote

    from rt_scratch.console import Parser, StopRequest, a_path, a_text, harmless, say, script
    from rt_scratch.data import DATASETS
    from rt_scratch.data.batches import training_batch
    from rt_scratch.device import select_device, select_precision
    from rt_scratch.errors import UserError
    from rt_scratch.graph import recorded
    from rt_scratch.parallel import checksum, software, start
    from rt_scratch.run import checkpoint, costs, log
    from rt_scratch.run.evaluate import CAUSAL_WINDOWS, caveat, evaluate, evaluate_causally
    from rt_scratch.run.folder import RunFolder
    from rt_scratch.run.initial import initial_state
    from rt_scratch.run.options import add_fields, check_flags, plan_run
    from rt_scratch.run.pictures import plot_loss
    from rt_scratch.run.samples import show_sample, wanted
    from rt_scratch.step import cut, train_step
    from rt_scratch.workers import start_workers
except (KeyboardInterrupt, ModuleNotFoundError) as error:  # it takes a second
    raise SystemExit(f"error: {error}: pip install -e ." if str(error) else "interrupted") from None


def main(argv=None):
    with start() as world:  # one process, or as many as mpiexec made
        work(parse(argv), world)


def work(args, world):
    xp, device = select_device(args.device, world)
    plan = world.in_turn(lambda: plan_run(args))
    model, train = plan.model, plan.train
    plan = plan._replace(precision=select_precision(train.precision, xp))
    step_once = recorded(train_step, model, train, xp, world)
    say(costs.describe(device, plan))
    if args.dry_run:
        return
    costs.check_memory(model, train, plan.precision, xp, not args.evaluate, world.size)
    state, progress = initial_state(plan, xp, for_training=args.resume)
    world.check_same(lambda: software(xp) | plan.config["model"] | plan.config["train"]
                     | {"data": plan.dataset.protocol, "state": checksum(state.arrays)})
    world = world.on(xp)
    if args.evaluate:
        return score_split(args, state, plan, world)
    last = min(args.stop_after or train.steps, train.steps)
    try:
        with start_workers(step_once, state, model, train, xp, world) as (state, step_once), \
                RunFolder(plan.folder, plan.config, plan.dataset.codec.file, not world.rank) as run:
            fit(plan, run, state, progress, last, xp, world, step_once)
    except MemoryError as error:
        raise UserError(
            f"out of memory at --batch {train.batch} x {model.seq_len} tokens, precision "
            f"{train.precision} ({error}); {checkpoint.kept(plan.folder)}; try --recompute, a "
            "smaller --batch with --accumulate, a smaller --window or --block, or on a GPU "
            "--precision bf16") from error


def fit(plan, run, state, progress, last, xp, world, step_once):
    """The training loop, to step `last`; of several processes the first writes the run folder."""
    folder, dataset, model, train = plan[:4]
    windows, first = train.batch * train.accumulate, state.step
    grads, clock = xp.empty_like(state.flat), log.Clock(progress.seconds)

    def due(step):
        return step == last or (train.eval_every and step % train.eval_every == 0)

    with StopRequest() as stop, log.ProgressBar(first, train.steps) as bar:
        log.trim_log(run, first, progress.scored)
        if progress.scored < first and due(first):  # what an interrupted run had still to do
            row = log.logged_row(folder, first)
            progress = score(plan, run, state, progress, row, clock, bar, stop, world)
        stopping = world.any(stop.asked) and first  # there is nothing to save before a step
        while state.step < last and not stopping:
            ids, labels = training_batch(dataset, model.seq_len, windows, train.seed, state.step,
                                         progress.drawn)
            state, result = step_once(state, grads, cut(ids, labels, model, train, xp, world),
                                      model, train, plan.precision.dtype, world)
            progress = progress._replace(drawn=progress.drawn + windows)
            done = state.step
            logging = due(done) or done % train.log_every == 0
            if logging or done == 1 or not state.scale.can_fall:
                checkpoint.check_finite(result, state, folder)  # here the host waits for a GPU
            bar.update()
            if logging:
                row = log.step_row(result, done, dataset, clock,
                                   windows * model.seq_len * (done - first))
                log.record(run, row, result.memberships)
                stop.asked |= not bar.show(row, clock.here())
            stopping = world.any(stop.asked)
            if stopping or due(done):
                world.check_same(lambda state=state: {
                    f"state after step {state.step}": checksum(state.arrays)})
                checkpoint.save_into(run, "last.npz", state, progress, clock.total())
            if due(done) and not stopping:
                progress = score(plan, run, state, progress, row, clock, bar, stop, world)
                stopping = world.any(stop.asked)
        if stopping:
            world.barrier()  # nobody speaks of it before it is saved
            raise UserError(f"interrupted and saved after step {state.step}; continue with: python "
                            f"train.py --resume --out {quote(str(folder))}")
    say(caveat(progress.valid, model), end="")
    if run.writes:
        with harmless(folder / "loss.png"):
            plot_loss(folder)
    say(f"done: {folder}  (sample from it: python sample.py {quote(str(folder))})")


def score(plan, run, state, progress, row, clock, bar, stop, world):
    """Score the validation split after a saved step, and show a sample -> Progress."""
    folder, dataset, model, train = plan[:4]
    valid, drawing = None, wanted(state.step, progress.scored, model, train)
    with clock.aside(), stop.at_once() if world.size == 1 else contextlib.nullcontext():
        valid = evaluate(state, dataset, model, "valid", train.batch, limit=train.eval_windows,
                         world=world, precision=plan.precision)
    if valid is None:  # interrupted; --resume comes back here
        return progress
    if not math.isfinite(valid.nats):
        (folder / "last.npz").unlink(missing_ok=True)  # --resume goes on from the best then
        raise UserError(f"the validation loss is not finite after step {state.step}; "
                        f"{checkpoint.kept(folder)}; lower --lr, or set --clip 1")
    row = row | {"step": state.step, "split": "valid", "nats": valid.nats, "score": valid.value,
                 "unit": dataset.unit}
    better = valid.nats < progress.best
    progress = progress._replace(scored=state.step, valid=valid.nats,
                                 best=min(valid.nats, progress.best))
    log.record(run, row)
    for name in ("best.npz", "last.npz") if better else ("last.npz",):
        checkpoint.save_into(run, name, state, progress, clock.total())
    if run.writes:
        sample = ""
        if drawing and not stop.asked:
            with harmless("the sample"), clock.aside(), stop.at_once():
                sample = show_sample(state, dataset, model, train.seed, folder)
        text = f"step {state.step}  {valid.line}\n{log.cluster_line(row)}{sample}"
        stop.asked |= not bar.say(text)
    return progress


def score_split(args, state, plan, world):
    """--evaluate: print the score of a split, and with --evaluate-causally that of decoding."""
    default = CAUSAL_WINDOWS if args.evaluate_causally else 0
    limit = default if args.eval_windows is None else args.eval_windows
    say(f"checkpoint: {plan.saved.path}, step {state.step}")
    result = evaluate(state, plan.dataset, plan.model, args.evaluate, plan.train.batch, args.stride,
                      limit, world, plan.precision)
    say(caveat(result.nats, plan.model) + result.line)
    if args.evaluate_causally:
        say(evaluate_causally(state, plan.dataset, plan.model, args.evaluate, limit, world,
                              plan.precision).line)


def parse(argv=None):
    """Flags; those of the model and of training come from the dataclasses in config.py."""
    parser = Parser(__doc__, prog="train.py")
    add = parser.add_argument
    add("dataset", nargs="*", type=a_text,
        help=f"{', '.join(DATASETS)}, or text: a file, or several and folders of them, of which "
             "whole files are held out (default: stdlib)")
    add("--preset", help="small (default), released, paper: see presets.py")
    add("--data-dir", type=a_text, help="folder with the dataset's official files")
    add("--download", action="store_true", help="get the dataset first")
    add("--out", type=a_path, help="run folder (default: runs/DATASET)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU, if any")
    add("--resume", action="store_true", help="continue a run exactly")
    add("--init-from", type=a_path, metavar="RUN", help="start with model, parameters and "
        "centroids of this run; --n-clusters may differ: centroids are then drawn by k-means")
    add("--stop-after", type=int, default=0, metavar="STEP",
        help="stop and save after this step of the schedule")
    add("--evaluate", choices=("train", "valid", "test"), metavar="SPLIT",
        help="score a finished run on train, valid or test, and stop; the whole split unless "
             "--eval-windows is given")
    add("--checkpoint", choices=("last", "best"), help="to score or start from (default: best)")
    add("--evaluate-causally", action="store_true",
        help=f"with --evaluate: also score by incremental decoding, on --eval-windows (default "
             f"{CAUSAL_WINDOWS}) windows")
    add("--stride", type=int, default=0, help="with --evaluate: tokens between windows (0: T)")
    add("--dry-run", action="store_true", help="describe the run and stop; needs no files")
    add_fields(parser)
    args = parser.parse_intermixed_args(argv)  # files may follow flags
    args.dataset = args.dataset[0] if len(args.dataset) == 1 else tuple(args.dataset)
    check_flags(args)
    return args


if __name__ == "__main__":
    script(main)
