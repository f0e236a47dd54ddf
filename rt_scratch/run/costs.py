"""What a step costs: floating-point operations and bytes, from the configuration alone."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.device import Precision
from rt_scratch.errors import UserError
from rt_scratch.heads import KINDS, head_groups
from rt_scratch.optim import OPTIMIZERS
from rt_scratch.parameters import parameter_table
from rt_scratch.run.evaluate import mode

DRAWN = 16  # bytes per token of the windows of a step: int32, their cut and what draws them
LOOKED_UP = ("embed.table", "embed.ngrams", "embed.classes")  # rows are taken from them, no product


def describe(device: str, plan) -> str:
    """What a run is about to do, as text. plan: an options.Plan."""
    model, train = plan.model, plan.train
    tokens = train.batch * train.accumulate * model.seq_len
    routed = sum(model.routing_heads(i) > 0 for i in range(model.n_layers))
    if routed:
        heads = f"{model.n_local_heads} local + {model.n_routing_heads} routing heads"
    else:
        heads = f"{model.n_heads} heads"
    where = f", routing in {routed} of them" if 0 < routed < model.n_layers else ""
    return (f"device: {device}\n"
            f"model: {n_parameters(model):,} parameters, {model.n_layers} "
            f"layer{'s' * (model.n_layers > 1)} of {heads}{where}: {mode(model)}\n"
            f"step: {tokens:,} tokens, about {flops_per_token(model) * tokens / 1e9:,.0f} GFLOP, "
            f"about {step_bytes(model, train, plan.precision) / 2**20:,.0f} MiB\n"
            f"data: {plan.dataset.protocol}")


def n_parameters(model: ModelConfig) -> int:
    """Entries of the flat buffer."""
    return parameter_table(model)[-1].stop


def flops_per_token(model: ModelConfig) -> float:
    """Floating-point operations of matrix products per trained token, forward and backward.

    6 per entry of a matrix (forward 2, gradients of input and weight 2 each), and 14 D per head and
    key that a query meets: two products forward, five backward. A tied token table is the output
    matrix. Not counted: relative positions and the choice of clusters.
    """
    entries = sum(leaf.stop - leaf.start for leaf in parameter_table(model)
                  if len(leaf.shape) == 2 and "_rel_" not in leaf.name
                  and leaf.name not in LOOKED_UP)
    if model.tie_embedding:
        entries += model.vocab_size * model.token_width
    keys = sum(n * KINDS[kind].keys(model)
               for i in range(model.n_layers) for kind, n in model.layer_heads(i))
    return 6 * entries + 14 * keys * model.head_width


def step_bytes(model: ModelConfig, train: TrainConfig, precision: Precision | None = None) -> int:
    """Rough memory of a step: parameters, gradients, optimizer state, activations in `precision`.
    """
    size = np.dtype(train.dtype).itemsize
    active = 2 if precision and precision.dtype else size  # bytes of an entry
    spare = min(train.parts, train.accumulate * min(train.parts, train.batch) - 1)
    copies = 2 + OPTIMIZERS[train.optimizer].copies + spare  # one more gradient per part at work
    per_token = model.n_layers * (10 * model.width + 3 * model.ffn_width)
    live = train.batch * model.seq_len
    if train.recompute:
        per_token = per_token // model.n_layers + model.n_layers * model.width
    return size * n_parameters(model) * copies + active * per_token * live


def check_memory(model: ModelConfig, train: TrainConfig, precision: Precision | None = None, xp=np,
                 step: bool = False, processes: int = 1, who: str = "") -> None:
    """UserError where the parameters, or with `step` a training step, exceed the memory there is.

    Several processes share the windows and parts of a step.
    """
    check_fits(n_parameters(model) * np.dtype(train.dtype).itemsize,
               f"{who}the parameters do not fit in memory",
               "choose a smaller model, say --width or --vocab-size", xp)
    if step:
        if train.batch * train.accumulate < processes:
            raise UserError(f"--batch {train.batch}: {processes} processes need at least one "
                            "window each per step")
        own = {name: -(-getattr(train, name) // processes) for name in ("batch", "parts")}
        drawn = DRAWN * train.batch * train.accumulate * model.seq_len  # of all processes
        needed = step_bytes(model, replace(train, **own), precision) + drawn
        check_fits(needed, f"a step of --batch {train.batch} x --accumulate {train.accumulate} x "
                   f"{model.seq_len} tokens does not fit in memory",
                   "try --recompute, a smaller --batch with --accumulate, or fewer tokens", xp)


def check_fits(needed: int, problem: str, advice: str, xp=np) -> None:
    """UserError(problem, numbers, advice) where `needed` bytes are more than the device has."""
    if xp.__name__ == "cupy":
        there = xp.cuda.runtime.memGetInfo()[1]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows
        there = math.inf
    if needed > there:
        raise UserError(f"{problem} (about {needed // 2**30:,} GiB, there are {there // 2**30:,}); "
                        f"{advice}")


def decode_bytes(model: ModelConfig, n: int, prompt: int, capacity: int) -> int:
    """Rough memory of drawing n texts: what decoding keeps, logits, a pass over the prompt, tokens.
    """
    stores = sum(array.nbytes for i in range(model.n_layers) for group in head_groups(model, i)
                 for array in group.kind.decoding.store(
                     model, group.heads.stop - group.heads.start, n, capacity, _Unallocated,
                     "float32")
                 if array is not None)
    per_token = 10 * model.width + 3 * model.ffn_width + 4 * model.n_heads * model.n_clusters
    projections = 3 * model.n_layers * model.width ** 2
    return stores + 4 * (projections + n * (
        8 * model.vocab_size + (prompt + 1) * per_token + 2 * capacity))


class _Unallocated:
    """Stands for NumPy where only the sizes of arrays matter."""

    int64 = np.int64

    @staticmethod
    def zeros(shape, dtype):
        return SimpleNamespace(nbytes=math.prod(shape) * np.dtype(dtype).itemsize)
