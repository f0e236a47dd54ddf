"""The authors' checkpoint and vocabulary -> a run folder.

    python -m rt_scratch.released --download                     both files, then the same as
    python -m rt_scratch.released CHECKPOINT --vocab FILE [--out RUN]

CHECKPOINT is a folder, the path of a checkpoint without .index, or the zip. Only this conversion
needs TensorFlow (extra `released`); what it writes is an ordinary run folder: sample.py, train.py
--evaluate, --evaluate-causally and --resume work on it.

The released code (google-research, routing_transformer) differs from ours in three places that the
conversion settles: every head's output goes through one (D, D) matrix shared by the heads before
the output projection, which folds into that projection; routing heads have key columns that are
never used when keys are queries, which are dropped; and names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig, to_json
from rt_scratch.console import Parser, a_path, script
from rt_scratch.data import open_codec
from rt_scratch.data.download import Source, fetch, with_size
from rt_scratch.data.files import digest_of
from rt_scratch.data.released_subwords import RELEASED, read_vocabulary
from rt_scratch.errors import UserError
from rt_scratch.kmeans import Centroids
from rt_scratch.optim import OPTIMIZERS, LossScale, learning_rate
from rt_scratch.parameters import parameter_table, views
from rt_scratch.presets import PRESETS
from rt_scratch.run.checkpoint import Progress, save_state
from rt_scratch.run.folder import RunFolder
from rt_scratch.step import State
from rt_scratch.tf_checkpoint import opened

ADDRESS = "https://storage.googleapis.com/rt-checkpoint/"
CHECKPOINT = Source("checkpoint.zip", (f"{ADDRESS}checkpoint.zip",), None, None)
VOCABULARY = Source("vocab.pg19_length8k.32768.subwords",
                    (f"{ADDRESS}vocab.pg19_length8k.32768.subwords",), None, None)
DOWNLOADS = Path("data") / "released"


# ------------------------------------------------------------------------------- the parameters

def convert(variables: Mapping, config: ModelConfig):
    """(params, state): the parameter tree and the centroids of each routing layer.

    variables: arrays, or anything with a shape that np.asarray reads, by released name, such as
    'decoder_layer_0/self_attention/self_attention/q/kernel', without the model's outer scope and
    ':0'. The tree's leaves are views of one flat buffer, in the order of `parameter_table`; their
    dtype is that of the variables. A model trained with ema off has no averages: they start as
    those of a new model do. UserError names every variable that is missing, unused, misshapen.
    """
    flat, table, state = _convert(variables, config)
    return views(flat, table), state


def _convert(variables, config):
    """(flat buffer, its table, centroids)."""
    table = parameter_table(config)
    averages = any("/ema_" in name for name in variables)
    _check_names(variables, released_shapes(config, averages))
    flat = np.empty(table[-1].stop, next(iter(variables.values())).dtype)

    def read(name):
        value = np.asarray(variables[name])
        if not np.isfinite(value).all():
            raise UserError(f"the released variable {name} has values that are not finite")
        return value

    for leaf in table:
        if leaf.name.endswith("attention.w_o"):
            scope = _attention_scope(int(leaf.name.split(".")[1]))
            value = fold(read(f"{scope}/attention_nd/dense/kernel"),
                         read(f"{scope}/output_transform/kernel"))
        else:
            value = read(released_name(leaf.name, config))
        if leaf.name.endswith("attention.w_k"):  # without the columns of heads that share q and k
            value = value[:, value.shape[1] - leaf.shape[1] :]
        flat[leaf.start : leaf.stop] = value.reshape(-1)

    state = {}
    for i in range(config.n_layers):
        if config.routing_heads(i):
            means, count, total = (f"{_cluster_scope(i)}/{name}" for name in _CENTROIDS)
            mu = read(means)
            state[i] = Centroids(mu, read(count), read(total)) if averages else Centroids(
                mu, np.ones(mu.shape[:2], mu.dtype), mu.copy())
    return flat, table, state


def released_shapes(config: ModelConfig, averages: bool = True) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every released variable of a model; averages: was it trained with ema?"""
    shapes = {}
    c, d = config.width, config.head_width
    for leaf in parameter_table(config):
        shape = (c, c) if leaf.name.endswith("attention.w_k") else leaf.shape
        shapes[released_name(leaf.name, config)] = shape
    for i in range(config.n_layers):
        shapes[f"{_attention_scope(i)}/attention_nd/dense/kernel"] = (d, d)
        shapes[f"{_attention_scope(i)}/k/kernel"] = (c, c)  # also where every key is a query
        if routed := config.routing_heads(i):
            means, count, total = (f"{_cluster_scope(i)}/{name}" for name in _CENTROIDS)
            shapes[means] = (routed, config.n_clusters, d)
            if averages:
                shapes |= {count: shapes[means][:2], total: shapes[means]}
    return shapes


def _check_names(variables, shapes):
    """UserError with all names that have no counterpart, or with all wrong shapes."""
    missing = [name for name in shapes if name not in variables]
    unused = [name for name in variables if name not in shapes]
    if missing or unused:
        raise UserError("the released variables and the model do not match" + "".join(
            f"; {what} {', '.join(names)}" for what, names in (
                ("the variables lack", missing), ("the model has no place for", unused)) if names))
    wrong = [f"{name} {tuple(variables[name].shape)}, needed {shape}"
             for name, shape in shapes.items() if _plain(variables[name].shape) != _plain(shape)]
    if wrong:
        raise UserError("released variables have other shapes than the configuration needs: "
                        + "; ".join(wrong))


def _plain(shape):
    """A shape without axes of length 1; position tables have more of them in the released code."""
    return tuple(n for n in shape if n != 1)


def fold(shared, w_o):
    """w_o with the (D, D) matrix in front of every head's rows: block_h <- shared block_h."""
    d = shared.shape[0]
    return np.matmul(shared, w_o.reshape(-1, d, w_o.shape[1])).reshape(w_o.shape)


_ATTENTION = {
    "w_q": "q/kernel", "w_k": "k/kernel", "w_v": "v/kernel", "w_o": "output_transform/kernel",
    "local_rel_k": "attention_nd/local_nd/relative_positions_keys/embeddings",
    "local_rel_v": "attention_nd/local_nd/relative_positions_values/embeddings",
    "routing_rel_k":
        "attention_nd/cluster_attention/cluster_attention/relative_positions_keys/embeddings",
    "routing_rel_v":
        "attention_nd/cluster_attention/cluster_attention/relative_positions_values/embeddings",
}
_FFN = {
    "w_gate": "weight1/kernel", "w_value": "weight2/kernel", "w_in": "conv1/kernel",
    "b_in": "conv1/bias", "b_out": "conv2/bias",
}
_TEXT = {
    "embed.table": "embeddings/embedding", "embed.w": "emb_dense/kernel",
    "embed.b": "emb_dense/bias", "output.w_embed": "final_dense_1/kernel",
    "output.b_embed": "final_dense_1/bias", "output.w": "final_dense_2/kernel",
    "output.b": "final_dense_2/bias",
}
_IMAGE = {
    "embed.table": "rgb_target_emb_channel", "embed.rows": "pos_emb_0",
    "embed.columns": "pos_emb_1", "output.w": "final_dense/kernel",
    "output.b": "final_dense/bias",
}


def released_name(name: str, config: ModelConfig) -> str:
    """The released variable of one of our leaves; UserError for what the released code lacks."""
    norm = "layer_prepostprocess" if config.norm == "pre" else "layer_postprocess"
    last = name.rpartition(".")[2]
    if name.startswith("norm."):
        return f"{norm}/layer_norm/{_norm_leaf(last)}"
    if not name.startswith("layers."):
        table = _TEXT if config.kind == "text" else _IMAGE
        if name not in table:
            raise UserError(f"{name} has no counterpart in the released code")
        return table[name]
    _, layer, part, leaf = name.split(".")
    scope = f"decoder_layer_{layer}/self_attention"
    if part == "attention":
        return f"{scope}/self_attention/{_ATTENTION[leaf]}"
    if part == "ffn":
        out = "weight3/kernel" if config.ffn == "geglu" else "conv2/kernel"
        return f"{scope}/ffn/{_FFN.get(leaf, out)}"
    which = "" if part == "norm_attention" else "_1"
    return f"{scope}/{norm}{which}/layer_norm/{_norm_leaf(leaf)}"


def _norm_leaf(name):
    return "layer_norm_scale" if name == "gain" else "layer_norm_bias"


def _attention_scope(layer: int) -> str:
    return f"decoder_layer_{layer}/self_attention/self_attention"


def _cluster_scope(layer: int) -> str:
    return f"{_attention_scope(layer)}/attention_nd/cluster_attention/cluster_attention"


_CENTROIDS = ("means", "ema_count", "ema_means")  # as in Centroids: mu, count, total


# ---------------------------------------------------------------------------- the configuration

class Found(NamedTuple):
    """The model's own variables among those of a checkpoint."""

    scope: str                  # what stands before their released names
    variables: dict[str, Any]   # by released name
    left_out: list[str]         # optimizer slots, counters and averaged losses, by full name


def own_variables(variables: Mapping) -> Found:
    """Separate the model's variables from what training left beside them, whatever their scope.

    The scope is what stands before 'embeddings/embedding'. Left out are slots (a variable below
    the name of another, such as .../kernel/Adafactor, or one with Adafactor in its name) and single
    numbers (global_step, averaged losses). All other variables stay, so that `convert` names those
    that it does not know.
    """
    tail = "embeddings/embedding"
    scopes = [name.removesuffix(tail) for name in variables
              if name == tail or name.endswith(f"/{tail}")]
    if len(scopes) != 1:
        raise UserError(
            f"{len(scopes)} variables end in {tail}, one is needed; the checkpoint is of another "
            f"model: {', '.join(sorted(variables)[:5]) or 'no variables'}, ...")
    scope, own, left_out = scopes[0], {}, []
    for name, variable in variables.items():
        inside = name.removeprefix(scope)
        if _is_slot(name, variables) or (not variable.shape and "decoder_layer_" not in inside):
            left_out.append(name)
        else:
            own[inside] = variable
    return Found(scope, own, left_out)


def _is_slot(name, variables):
    *above, _ = name.split("/")
    return "Adafactor" in name or any("/".join(above[i:]) in variables for i in range(len(above)))


_NUMBERS = {int: "one whole number", float: "one number", bool: "true or false"}
_HPARAMS = {  # what the shapes do not tell: our field -> the released hyperparameter
    "share_qk": "share_qk", "timing_signal": "add_timing_signal",
    "window": "sparsity_cluster_attention_window", "centroid_decay": "decay", "commitment": "beta",
    "embed_dropout": "dropout", "attention_dropout": "attention_dropout",
    "ffn_dropout": "relu_dropout", "residual_dropout": "layer_prepostprocess_dropout",
    "target_dropout": "target_dropout",
}


def model_config(variables: Mapping, hparams: Mapping | None = None):
    """(ModelConfig, notes): the configuration of released variables, and the source of each part.

    variables: by released name, shapes are all that is looked at. hparams: the released
    hyperparameters, where they are known; what both of them say must agree. What neither says is
    taken from the released recipe for PG-19. notes: lines to show.
    """
    shaped = _from_shapes(variables)
    stated = _from_hparams(hparams, shaped) if hparams is not None else {}
    recipe = {"share_qk": True, "timing_signal": False} | {
        name: PRESETS["pg19"]["released"].get(name, getattr(ModelConfig(), name))
        for name in ("seq_len", "block", "lookback", "window", "centroid_decay", "commitment",
                     "embed_dropout", "attention_dropout", "ffn_dropout", "residual_dropout",
                     "target_dropout")}
    assumed = {name: value for name, value in recipe.items() if name not in stated}
    fixed = {"kind": "text", "routing": "topk", "pad_id": 0,
             "init_gain": PRESETS["pg19"]["released"]["init_gain"]}
    config = ModelConfig(**fixed, **shaped, **stated, **assumed)
    routed = [i for i in range(config.n_layers) if config.routing_heads(i)]
    shown = {"embed_width": config.token_width, "routing_layers": routed}
    notes = [f"{where}: " + ", ".join(f"{name} {shown.get(name, value)}"
                                      for name, value in fields.items())
             for where, fields in (
                 ("from the shapes", shaped), ("from the hyperparameters", stated),
                 ("told by neither, so as the released recipe for PG-19", assumed)) if fields]
    return config.validate(), notes


def _from_shapes(variables):
    """The fields of ModelConfig that the shapes determine."""
    layers = {int(m[1]) for name in variables if (m := re.match(r"decoder_layer_(\d+)/", name))}
    n_layers = len(layers)
    if not layers or layers != set(range(n_layers)):
        raise UserError("a checkpoint of another model: its layers are "
                        f"{', '.join(map(str, sorted(layers))) or 'none'}, not 0, 1, ...")

    def shape(tail, rank, needed=True):
        """Of the first variable with this name, in any layer."""
        for name in [tail, *(f"decoder_layer_{i}/self_attention/{tail}" for i in range(n_layers))]:
            if name in variables:
                if len(variables[name].shape) != rank or 0 in variables[name].shape:
                    raise UserError(f"{name} has shape {tuple(variables[name].shape)}, which is "
                                    f"not of {rank} axes: a checkpoint of another model")
                return tuple(variables[name].shape)
        if needed:
            raise UserError(f"a checkpoint of another model: it has no variable {tail}")
        return None

    vocab_size, embed_width = shape("embeddings/embedding", 2)
    width = shape("emb_dense/kernel", 2)[1]
    head_width = shape("self_attention/attention_nd/dense/kernel", 2)[0]
    routed = {i: variables[name].shape for i in range(n_layers)
              if (name := f"{_cluster_scope(i)}/means") in variables}
    n_routing, n_clusters = (shape(_cluster_scope(min(routed)) + "/means", 3)[:2] if routed
                             else (0, ModelConfig().n_clusters))
    n_local = width // head_width - n_routing
    if width % head_width or n_local < 0:
        raise UserError(f"{n_routing} routing heads of width {head_width} do not fit the width "
                        f"{width}: a checkpoint of another model")
    reach = {}
    for kind, scope in (("local", "local_nd"), ("routing", "cluster_attention/cluster_attention")):
        table = shape(f"self_attention/attention_nd/{scope}/relative_positions_keys/embeddings", 2,
                      needed=False)
        reach[f"{kind}_max_distance"] = (table[0] - 1) // 2 if table else 0
    geglu = shape("ffn/weight1/kernel", 2, needed=False)
    return {
        "vocab_size": vocab_size, "n_layers": n_layers, "width": width,
        "embed_width": 0 if embed_width == width else embed_width,
        "ffn": "geglu" if geglu else "relu",
        "ffn_width": (geglu or shape("ffn/conv1/kernel", 2))[1],
        "norm": "pre" if any("/layer_prepostprocess/" in name for name in variables) else "post",
        "n_local_heads": n_local, "n_routing_heads": n_routing,
        "routing_layers": () if len(routed) in (0, n_layers) else tuple(sorted(routed)),
        "n_clusters": n_clusters, **reach,
    }


def _from_hparams(hparams, shaped):
    """The fields that only hyperparameters tell; UserError where they contradict the shapes."""
    def number(name, kind):
        value = hparams[name]
        if isinstance(value, list) and len(value) == 1:  # blocks of text have one axis
            value = value[0]
        if not isinstance(value, int | float) or not math.isfinite(value) or kind(value) != value:
            raise UserError(f"hyperparameter {name} is {value!r}, where {_NUMBERS[kind]} is needed")
        return kind(value)

    _check_hparams(hparams, shaped)
    defaults = ModelConfig()
    fields = {ours: number(theirs, type(getattr(defaults, ours)))
              for ours, theirs in _HPARAMS.items() if theirs in hparams}
    lengths = [number(name, int) for name in ("max_target_length", "max_length") if name in hparams]
    if any(lengths):
        fields["seq_len"] = min(n for n in lengths if n)
    if "query_shape" in hparams:
        block = fields["block"] = number("query_shape", int)
        if "memory_flange" in hparams:
            flange = number("memory_flange", int)
            if block < 1 or flange % block:
                raise UserError(f"hyperparameters query_shape {block} and memory_flange {flange}: "
                                "the second must be a multiple of the first")
            fields["lookback"] = flange // block
    return fields


def _check_hparams(hparams, shaped):
    """UserError with all that the hyperparameters ask for and this model is not."""
    routed = shaped["n_routing_heads"]
    first = min(shaped["routing_layers"], default=0)
    expected = {
        "hidden_size": shaped["width"], "embedding_dims": shaped["embed_width"] or shaped["width"],
        "filter_size": shaped["ffn_width"], "num_decoder_layers": shaped["n_layers"],
        "ffn_layer": shaped["ffn"] if shaped["ffn"] == "geglu" else hparams.get("ffn_layer"),
        "max_relative_position": shaped["local_max_distance"] or shaped["routing_max_distance"]
        or hparams.get("max_relative_position"),
    }
    if routed:
        expected |= {
            "local_num_heads": shaped["n_local_heads"], "sparsity_cluster_num_heads": routed,
            "sparsity_cluster_size": shaped["n_clusters"], "sparsity_skip_first": first}
    expected |= {  # what the released code can do and this project does not
        "norm_epsilon": 1e-6, "hash_items": False, "sparsity_strided_num_heads": 0,
        "sparsity_cluster_strided_num_heads": 0, "num_encoder_layers": 0}
    wrong = [f"{name} {hparams[name]}, not {value}" for name, value in expected.items()
             if name in hparams and hparams[name] != value]
    norms = tuple(str(hparams.get(f"layer_{when}process_sequence", known)).replace("d", "")
                  for when, known in (("pre", "none"), ("post", "an")))
    wanted = ("n", "a") if shaped["norm"] == "pre" else ("none", "an")
    if any(f"layer_{when}process_sequence" in hparams for when in ("pre", "post")) \
            and (norms[0] or "none", norms[1]) != wanted:
        wrong.append(f"LayerNorm {norms[0]} before and {norms[1]} after each sublayer, "
                     f"not {wanted[0]} and {wanted[1]}")
    if wrong:
        raise UserError("the hyperparameters are of another model than the checkpoint, or of one "
                        f"that rt_scratch lacks: {'; '.join(wrong)}")


# ------------------------------------------------------------------------------- the run folder

def write_run(checkpoint: Path, vocabulary: Path, folder: Path) -> None:
    """Convert a checkpoint and its vocabulary into the run folder `folder`, whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: exists already; choose another folder")
    subwords = read_vocabulary(vocabulary)
    with opened(checkpoint, folder.absolute().parent) as source:
        found = own_variables(source.variables)
        hparams = _read_hparams(source.hparams) if source.hparams else None
        config, notes = model_config(found.variables, hparams)
        step = next((int(np.asarray(v, np.int64)) for name, v in source.variables.items()
                     if name.split("/")[-1] == "global_step"), 0)
        print(f"{source.path.name}: step {step:,}; {len(found.variables)} variables below "
              f"{found.scope or 'no scope'}", *notes, _left_out(found, source.variables),
              sep="\n  ", flush=True)
        if len(subwords) != config.vocab_size:
            raise UserError(f"{vocabulary} has {len(subwords):,} subwords, the checkpoint "
                            f"{config.vocab_size:,}: it is another model's vocabulary")
        flat, table, centroids = _convert(found.variables, config)
        digests = {path.name: digest_of(path) for path in (vocabulary, *source.files)}
    train = _fine_tuning(step)
    optimizer = OPTIMIZERS[train.optimizer].init(flat, table)
    state = State(flat, table, centroids, optimizer, 0, LossScale(1.0, 0))
    about = {"dataset": "pg19", "data_dir": None, "data": None, "model": to_json(config),
             "train": to_json(train), **open_codec(RELEASED, vocabulary).to_config(),
             "codec_sha256": digests[vocabulary.name],
             "released": {"step": step, "sha256": digests}}
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".released-", dir=parent) as temporary:
        part = Path(temporary) / "run"
        with RunFolder(part, about, vocabulary):
            save_state(part / "last.npz", state, Progress(), about)
        part.replace(folder)
    for name, digest in digests.items():
        print(f"  sha256 {digest}  {name}")
    print(f"done: {folder}, {flat.size:,} parameters  (sample from it: python sample.py {folder})")


def _left_out(found, variables):
    """The line that says what of the checkpoint is not converted."""
    others = [name for name in found.left_out if not _is_slot(name, variables)]
    return ", ".join([f"left out: {len(found.left_out) - len(others)} optimizer slots", *others])


def _fine_tuning(step):
    """Training settings to go on with: the released ones, at the learning rate reached by `step`.

    The optimizer starts anew (its slots are in no run folder), so a short warm-up stands in front.
    """
    released = PRESETS["pg19"]["released"]
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    fields = {name: value for name, value in released.items() if name in names}
    lr = learning_rate(step, "rsqrt", released["lr"], released["warmup"], 0)
    return TrainConfig(**fields | {"lr": lr, "schedule": "constant", "warmup": 100, "steps": 1000,
                                 "recompute": True})


def _read_hparams(path):
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON that can be read ({error}); correct it or move it "
                        "away") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a table of hyperparameters; correct it or move it away")
    return values


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command."""
    parser = Parser(__doc__, prog="python -m rt_scratch.released")
    parser.add_argument("checkpoint", nargs="?", type=a_path,
                        help="folder, path without .index, or zip; with --download the folder "
                             f"that both files go to (default: {DOWNLOADS})")
    parser.add_argument("--vocab", type=a_path, help="vocabulary, one subword a line")
    parser.add_argument("--out", type=a_path, default=Path("runs") / "released",
                        help="run folder to write (default: runs/released)")
    parser.add_argument("--download", action="store_true",
                        help="get the authors' checkpoint and vocabulary first")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; UserError for everything the user can fix."""
    args = parse(arguments)
    checkpoint, vocabulary = args.checkpoint, args.vocab
    if args.download:
        folder = checkpoint or DOWNLOADS
        sources = [with_size(s) for s in ([CHECKPOINT] if vocabulary else [VOCABULARY, CHECKPOINT])]
        for source in sources:
            print(source.origin(), flush=True)
        *fetched, checkpoint = [fetch(source, folder) for source in sources]
        vocabulary = vocabulary or fetched[0]
    if checkpoint is None or vocabulary is None:
        raise UserError("give a CHECKPOINT and --vocab FILE, or --download")
    write_run(checkpoint, vocabulary, args.out)


if __name__ == "__main__":
    script(main)
