"""From flags to a run: flags of the configuration, and what they and a saved run ask for."""

from __future__ import annotations

import argparse
import dataclasses
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

from rt_scratch import data
from rt_scratch.config import ModelConfig, TrainConfig, choices, flag
from rt_scratch.console import say
from rt_scratch.device import Precision
from rt_scratch.errors import UserError
from rt_scratch.optim import learning_rate
from rt_scratch.presets import preset
from rt_scratch.run.checkpoint import Saved, best_checkpoint, check_matches, read_state
from rt_scratch.run.folder import default_folder, describe, newest_run
from rt_scratch.run.initial import check_shapes

OF_THE_DATA = {"kind", "pad_id"}  # of ModelConfig: no flags, the dataset says
USED_TO_EVALUATE = {"batch", "precision", "eval_windows"}  # of TrainConfig


class Plan(NamedTuple):
    """A run as it was asked for, new or saved."""

    folder: Path
    dataset: data.Dataset
    model: ModelConfig
    train: TrainConfig
    config: dict                 # of config.json
    saved: Saved | None          # the checkpoint of a saved run
    source: Saved | None = None  # of another one, whose model and parameters a new run starts with
    precision: Precision | None = None  # of the network, once the device is known


def add_fields(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of ModelConfig and TrainConfig that the data do not set; None where it
    is not given.
    """
    for cls, title in ((ModelConfig, "model"), (TrainConfig, "training")):
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            if f.name not in OF_THE_DATA:
                group.add_argument(f"--{flag(f.name)}", **_settings(f))


def check_flags(args) -> None:
    """UserError on flags of train.py that do not go together."""
    for name in ("stop_after", "stride"):
        if getattr(args, name) < 0:
            raise UserError(f"--{flag(name)} {getattr(args, name)}: must not be "
                            "negative")
    saved = args.resume or args.evaluate
    for f in dataclasses.fields(TrainConfig):
        if (args.evaluate and f.name not in USED_TO_EVALUATE
                and getattr(args, f.name) is not None):
            raise UserError(f"--{flag(f.name)}: not used with --evaluate")
    for name, wrong, why in (
            ("stride", not args.evaluate, "needs --evaluate"),
            ("stride", args.evaluate_causally, "not used with --evaluate-causally"),
            ("evaluate_causally", not args.evaluate, "needs --evaluate"),
            ("checkpoint", not (args.evaluate or args.init_from),
             "needs --evaluate or --init-from"),
            ("resume", args.evaluate, "not used with --evaluate"),
            ("init_from", saved, "not used with --resume or --evaluate"),
            ("preset", args.init_from, "not used with --init-from, which takes the run's model"),
            ("stop_after", args.evaluate, "not used with --evaluate"),
            ("download", saved, "not used with --resume or --evaluate"),
            ("preset", saved, "not used with --resume or --evaluate")):
        if getattr(args, name) and wrong:
            raise UserError(f"--{flag(name)}: {why}")


def _settings(f):
    shown = f.default if f.default != () else "none" if f.name == "full_layers" else "all"
    settings = {"default": None, "help": f"{f.metadata['help']} (default: {shown})"}
    if names := choices(f):
        return settings | {"choices": names}
    if isinstance(f.default, bool):
        return settings | {"action": argparse.BooleanOptionalAction}
    if isinstance(f.default, tuple):
        return settings | {"type": layer_list, "metavar": "I,J,..."}
    return settings | {"type": type(f.default), "metavar": type(f.default).__name__.upper()}


def layer_list(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(int(x) for x in text.split(",") if x)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: layers are whole numbers, such as 0,2 or -1"
                                         ) from None


def plan_run(args) -> Plan:
    """What train.py's flags ask for: a new run, or with --resume or --evaluate a saved one."""
    given = {f.name: getattr(args, f.name) for cls in (ModelConfig, TrainConfig)
             for f in dataclasses.fields(cls) if getattr(args, f.name, None) is not None}
    plan = _saved(args, given) if args.resume or args.evaluate else _new(args, given)
    plan.model.validate()
    plan.train.validate()
    _check_fits(plan.model, plan.dataset, trained=plan.dataset.splits and not args.evaluate)
    return plan


def _new(args, given):
    name, location = args.dataset or "stdlib", args.data_dir
    shown = _shown(name)
    folder = args.out or default_folder(name)
    if not args.dry_run and best_checkpoint(folder).exists():
        raise UserError(f"--out {folder}: holds a run already; add --resume to continue it, or "
                        "choose another folder")
    if args.download:
        data.fetch(shown, location)
    source, codec, seq_len = None, None, 0
    values = preset(shown, args.preset or "small")
    if args.init_from:
        source = read_state(_checkpoint(args.init_from, args.checkpoint))
        codec, seq_len = data.given_codec(source.config, args.init_from), source.model.seq_len
        values |= {f.name: getattr(source.model, f.name) for f in dataclasses.fields(ModelConfig)}
    values |= given
    vocab_size = values.pop("vocab_size", 0)
    known = not args.dry_run or data.present(name, location)
    dataset = (data.load(name, location, vocab_size, codec, seq_len) if known
               else data.outline(name, vocab_size))
    if source and source.model.kind != dataset.kind:
        what = {"text": "text", "image": "images"}
        raise UserError(f"--init-from {args.init_from}: a model of {what[source.model.kind]}, and "
                        f"{shown} is {what[dataset.kind]}")
    values |= {"kind": dataset.kind, "vocab_size": dataset.vocab_size, "pad_id": dataset.pad_id}
    if dataset.kind == "image":
        values.setdefault("image_size", dataset.image_shape[0])
        values.setdefault("seq_len", 3 * values["image_size"] ** 2)
    model, train = (cls(**_only(cls, values)) for cls in (ModelConfig, TrainConfig))
    config = _config(name, location, dataset, model, train)
    if source:
        check_shapes(source, model.validate())
        if known and source.config.get("codec_sha256", config["codec_sha256"]) != \
                config["codec_sha256"]:
            raise UserError(f"--init-from {args.init_from}: its codec is not that of {shown}: its "
                            "tokens stand for other text")
        config["init_from"] = f"{source.path.resolve()}, step {source.step}"
    return Plan(folder, dataset, model, train, config, None, source)


def _checkpoint(folder, name):
    return folder / f"{name}.npz" if name else best_checkpoint(folder)


def _saved(args, given):
    folder = args.out or (default_folder(args.dataset) if args.dataset
                          else newest_run(Path("runs")))
    path = _checkpoint(folder, args.checkpoint or (None if args.evaluate else "last"))
    if not args.checkpoint and not path.is_file():
        path = best_checkpoint(folder)
    saved = read_state(path)
    before = saved.config
    name = before["dataset"]
    name = tuple(name) if isinstance(name, list) else name
    if args.dataset and args.dataset != name:
        if args.dataset in data.DATASETS or name in data.DATASETS:
            raise UserError(f"the run was trained on {_shown(name)}, not on "
                            f"{_shown(args.dataset)}")
        name = args.dataset  # own text that was moved or renamed
    location = args.data_dir or before.get("data_dir")
    model, train = (dataclasses.replace(old, **_only(type(old), given))
                    for old in (saved.model, saved.train))
    train.validate()
    check_matches(saved.model, model, str(path))
    for field in ("dtype",) if args.evaluate else ("dtype", "optimizer"):
        old, new = getattr(saved.train, field), getattr(train, field)
        if old != new:
            raise UserError(f"{path} has another configuration: {field} {old} there, {new} here")
    dataset = data.load(name, location, model.vocab_size, data.given_codec(before, folder),
                        model.seq_len)
    config = _config(name, location, dataset, model, train)
    config |= {key: before[key] for key in ("released", "init_from") if key in before}
    if before.get("codec_sha256") not in (None, config["codec_sha256"]):
        raise UserError(f"{dataset.codec.file} is not the codec that {path} was made with "
                        "(checksum): its tokens stand for other text")
    if before["data"] not in (None, dataset.protocol):  # None: converted, trained elsewhere
        changed = f"trained on other data: {before['data']}"
        if args.resume:
            raise UserError(f"the run was {changed}; now there is: {dataset.protocol}")
        say(f"note: what is scored now may be in part what was trained on; {changed}")
    if args.resume:
        saved = _resumed(args, saved, train, folder / "best.npz")
    return Plan(folder, dataset, model, train, config, saved)


def _resumed(args, saved, train, best):
    """The checkpoint to go on from, and a line on what goes on otherwise than before."""
    for name, last in (("steps", train.steps), ("stop-after", args.stop_after or train.steps)):
        if last < saved.step:
            raise UserError(f"--{name} {last}: the run has done {saved.step} steps already")
    before, now = (learning_rate(saved.step, t.schedule, t.lr, t.warmup, t.steps)
                   for t in (saved.train, train))
    if before != now:
        say(f"note: the schedule has changed: the learning rate goes on at {now:.2e}, not at "
            f"{before:.2e}")
    if saved.train.eval_windows != train.eval_windows:
        say(f"note: scores on {saved.train.eval_windows} windows do not compare with those on "
            f"{train.eval_windows} (0: all): the best checkpoint is chosen anew")
        saved = saved._replace(progress=saved.progress._replace(best=math.inf))
    if saved.progress.best < math.inf and not zipfile.is_zipfile(best):
        say(f"note: {best} is missing or damaged: the best checkpoint is chosen anew")
        saved = saved._replace(progress=saved.progress._replace(
            best=math.inf, scored=min(saved.progress.scored, saved.step - 1)))
    return saved


def _shown(name):
    """The name of a dataset or a file, or the names of several files."""
    return name if isinstance(name, str) else " ".join(name)


def _config(name, location, dataset, model, train):
    if name not in data.DATASETS:
        paths = [str(Path(path).resolve()) for path in
                 ([name] if isinstance(name, str) else name)]  # a run is resumed from anywhere
        name = paths[0] if len(paths) == 1 else paths
    return describe(name, location and str(Path(location).resolve()), dataset, model, train)


def _check_fits(model, dataset, trained):
    if model.n_classes and model.n_classes != dataset.n_classes:
        raise UserError(f"--n-classes {model.n_classes}: {dataset.name} has {dataset.n_classes} "
                        "classes")
    if trained and model.kind == "text" and len(dataset.splits["train"]) < model.seq_len:
        raise UserError(f"the training text has {len(dataset.splits['train'])} tokens, fewer than "
                        f"--seq-len {model.seq_len}: give a longer text or a smaller --seq-len")


def _only(cls, values):
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in values.items() if k in names}
