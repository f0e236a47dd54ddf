"""Scores of a split, each with the protocol that makes it comparable."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rt_scratch import decode
from rt_scratch.config import ModelConfig
from rt_scratch.data import Dataset, score, tokens_per_word
from rt_scratch.data.batches import count_windows, eval_windows
from rt_scratch.data.dataset import words_scored
from rt_scratch.device import Precision
from rt_scratch.dispatch import array_module, to_host
from rt_scratch.errors import UserError
from rt_scratch.heads import head_groups
from rt_scratch.model import loss
from rt_scratch.parallel import SINGLE, World
from rt_scratch.parameters import compute_copy
from rt_scratch.step import State

CAUSAL_WINDOWS = 64  # windows that incremental scoring takes at a time, and in all by default


class Score(NamedTuple):
    nats: float     # per token
    value: float    # in the dataset's unit
    line: str       # the score with its protocol


def evaluate(state: State, dataset: Dataset, model: ModelConfig, split: str, batch: int,
             stride: int = 0, limit: int = 0, world: World = SINGLE,
             precision: Precision = Precision()) -> Score:  # noqa: B008
    """The score of a split in single passes over its windows (data/batches.py: eval_windows).

    The processes of `world` take turns with the batches, and all return the score of the whole.
    The network computes in `precision`, and the line says so where it is not float32.
    """
    xp, params = array_module(state.flat), compute_copy(state.flat, state.table, precision.dtype)

    def nats_of(ids, weights, labels):
        weights = xp.asarray(weights.astype(state.flat.dtype))
        (nats, _), _, _ = loss(params, state.centroids, model, ids, weights, labels, recompute=True)
        return float(nats)

    own = "" if precision.name == "float32" else f", {precision.name}"
    leak = "; TOPK ROUTING LEAKS THE FUTURE into this score" if "topk" in model.kinds() else ""
    return _score(nats_of, xp, dataset, model, split, batch, stride, limit, world, "",
                  f", stride {stride or model.seq_len}, {mode(model)}{own}{leak}")


def evaluate_causally(state: State, dataset: Dataset, model: ModelConfig, split: str,
                      limit: int = 0, world: World = SINGLE,
                      precision: Precision = Precision()) -> Score:  # noqa: B008
    """The score by incremental decoding: each token given what came before, no more.

    Processes share the work as in `evaluate`. Without topk heads this is the ordinary score; with
    them, whose members later tokens help to choose when a window is read in one pass, the
    difference is what looking ahead is worth. Decoding always computes in the dtype of the
    parameters; the line says so where the run's `precision` has another.
    """
    xp, params = array_module(state.flat), state.params

    def nats_of(ids, weights, labels):
        nats = incremental_nats(params, state.centroids, model, ids, labels)
        return float((weights * nats).sum())

    batch = -(-min(limit or CAUSAL_WINDOWS, CAUSAL_WINDOWS) // world.size)
    own = "" if precision.name == "float32" else \
        f", {precision.name if precision.dtype is None else state.flat.dtype}"
    return _score(nats_of, xp, dataset, model, split, batch, 0, limit, world,
                  "  by incremental decoding, nothing seen ahead", f", {mode(model)}{own}")


def _score(nats_of, xp, dataset, model, split, batch, stride, limit, world, how, settings):
    """The Score whose nats are the sum of nats_of(ids, weights, labels) over batches of windows."""
    total = count_windows(dataset.splits[split], model.seq_len, stride)
    if total == 0:
        raise UserError(f"the {split} split is empty: give more text")
    found = []
    for i, (ids, weights, index) in enumerate(eval_windows(
            dataset.splits[split], model.seq_len, batch, stride, limit, model.pad_id)):
        found.append((0.0, 0.0, 0))
        if i % world.size == world.rank:
            labels = xp.asarray(dataset.labels[split][index]) if model.n_classes else None
            found[i] = (nats_of(xp.asarray(ids), weights, labels), float(weights.sum()),
                        words_scored(dataset, split, weights, index, stride or model.seq_len))
    found = np.array(found)
    world.sum(found)
    nats, n, n_words = map(sum, found.T.tolist())  # in the order of the batches, whoever took them
    value = score(nats, n, dataset, split, int(n_words))
    seen = f"{limit} of {total} windows, evenly spread" if 0 < limit < total else "whole split"
    per_word = f", {tokens_per_word(dataset, split):.3f} per word" if dataset.units else ""
    return Score(nats / n, value, (
        f"{split} {value:.4f} {dataset.unit}{how}  ({seen}, {n:.0f} {dataset.tokens}{per_word}, "
        f"context {model.seq_len}{settings})"))


def incremental_nats(params, centroids, model: ModelConfig, ids, labels=None):
    """-log p(token t | tokens before t) by incremental decoding: ids (B, T) -> (B, T), on the host.
    """
    logits, memory = decode.prefill(params, centroids, model, ids[:, :0], model.seq_len, labels)
    nats = np.empty(ids.shape)
    for t in range(ids.shape[1]):
        nats[:, t] = token_nats(logits, ids[:, t])
        if t + 1 < ids.shape[1]:
            logits = decode.step(params, centroids, model, memory, ids[:, t])
    return nats


def token_nats(logits, ids):
    """-log softmax(logits)[id], in float64 on the host: logits (..., V), ids (...) -> (...)."""
    z = to_host(logits).astype("float64")
    z -= z.max(-1, keepdims=True)
    hit = np.take_along_axis(z, to_host(ids)[..., None].astype(np.int64), axis=-1)[..., 0]
    return np.log(np.exp(z).sum(-1)) - hit


def caveat(nats: float, model: ModelConfig) -> str:
    """A line on a loss per token that guessing would beat, with its newline; "" for others."""
    uniform = math.log(model.vocab_size)
    if nats <= uniform:
        return ""
    return (f"note: {nats:.4g} nats per token are worse than guessing uniformly ({uniform:.4g}): "
            "the model diverged, or has hardly begun to learn\n")


def mode(model: ModelConfig) -> str:
    """How the model attends, for the line with its score."""
    shifted = any(group.shifted for i in range(model.n_layers) for group in head_groups(model, i))
    if any(model.routing_heads(i) for i in range(model.n_layers)):
        parts = [f"routing {model.routing}", *["own keys"] * (not model.share_qk),
                 *[f"{model.n_probes} probes"] * (model.n_probes > 1)]
    else:
        parts = [{"full": "full attention", "local": "local heads only"}.get(
            model.attention, f"{', '.join(sorted(model.kinds()))} heads")]
    return ", ".join([*parts, *["shifted keys"] * shifted])
