"""One optimizer step: the gradient of a batch, clipping, the update, the centroids.

On a CPU the parts of a batch run side by side on threads (NumPy releases the interpreter's lock
while it computes), each with one BLAS thread and a gradient buffer of its own. The buffers are
added in the order of the parts, so the result depends on how the batch is cut, never on the number
of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.dispatch import array_module
from rt_scratch.heads import KINDS
from rt_scratch.kmeans import Centroids, update_centroids
from rt_scratch.model import Noise, Report, loss, loss_backward, target_weights
from rt_scratch.optim import (
    FIRST_SCALE,
    OPTIMIZERS,
    LossScale,
    clip_by_global_norm,
    global_norm,
    learning_rate,
)
from rt_scratch.parameters import init_centroids, init_parameters, views
from rt_scratch.routing import Membership
from rt_scratch.threads import parallel


class State(NamedTuple):
    """All that an optimizer step changes."""

    flat: Any                         # parameters
    table: list                       # their names and shapes
    centroids: dict[int, Centroids]
    optimizer: dict[str, Any]
    step: int                         # optimizer steps done
    scale: LossScale

    @property
    def params(self) -> dict:
        """The parameters as a tree of views."""
        return views(self.flat, self.table)


class Gradients(NamedTuple):
    """What the passes of one step computed, summed or averaged over the parts of its batch."""

    nats: Any                            # mean cross-entropy per counted target, a 0-d array
    commitment: Any                      # mean commitment loss
    memberships: dict[int, Membership]   # counts and sums added, shares averaged
    reports: list[Report]


class Step(NamedTuple):
    """What a step reports."""

    nats: Any                            # as in Gradients
    memberships: dict[int, Membership]
    norm: Any                            # global norm of the gradient before clipping, 0-d
    lr: float
    applied: bool                        # False: a gradient left the range of fp16


def new_state(model: ModelConfig, train: TrainConfig, xp) -> State:
    """Fresh parameters, centroids and optimizer state."""
    flat, table = init_parameters(model, xp, train.dtype, train.seed)
    centroids = init_centroids(model, xp, train.dtype, train.seed)
    optimizer = OPTIMIZERS[train.optimizer].init(flat, table)
    scale = FIRST_SCALE if train.precision == "fp16" else LossScale(1.0, 0)
    return State(flat, table, centroids, optimizer, 0, scale)


def train_step(state: State, grads, parts, model: ModelConfig, train: TrainConfig, dtype=None):
    """One optimizer step -> (the state after it, Step).

    parts: what `cut` makes of the batch. Writes into the buffers of the state and into `grads`, a
    buffer like state.flat; makes no check, so that nothing waits for a GPU (but with fp16, where a
    step whose gradient overflows is left out and the loss scale halved).
    """
    result = gradients(state, grads, parts, model, train, dtype)
    norm = clip_by_global_norm(grads, train.clip) if train.clip else global_norm(grads)
    lr = learning_rate(state.step, train.schedule, train.lr, train.warmup, train.steps)
    fp16 = train.precision == "fp16"
    applied, centroids = not fp16 or bool(np.isfinite(float(norm))), state.centroids
    if applied:
        OPTIMIZERS[train.optimizer].update(state.flat, grads, state.optimizer, state.table, lr,
                                           state.step, weight_decay=train.weight_decay)
        centroids = move_centroids(centroids, result.memberships, model)
    scale = state.scale.after(applied) if fp16 else state.scale
    return (state._replace(centroids=centroids, step=state.step + 1, scale=scale),
            Step(result.nats, result.memberships, norm, lr, applied))


def cut(ids, labels, train: TrainConfig, xp) -> list[tuple]:
    """The parts of a batch ids (N, T), labels (N,) or None, as arrays of xp: [(ids, labels), ...].

    As many as --accumulate says, on a CPU --parts times as many; no more than windows.
    """
    n = train.accumulate * (train.parts if xp is np else 1)
    pieces = np.array_split(np.arange(len(ids)), min(len(ids), n))
    return [(xp.asarray(ids[p]), None if labels is None else xp.asarray(labels[p]))
            for p in pieces]


def gradients(state: State, grads, parts, model: ModelConfig, train: TrainConfig,
              dtype=None) -> Gradients:
    """Fill `grads` with the gradient of nats + beta commitment over all parts of the batch.

    Every target weighs the same whatever part it is in, so cutting a batch differently changes
    nothing but rounding (and the masks of dropout, which are drawn per part). The network computes
    in `dtype` (default: that of the parameters), on a rounded copy of them; `grads` keeps theirs.
    The backward pass runs on state.scale times the loss. On a CPU train.parts parts run side by
    side: as many times the activations, and as many gradient buffers.
    """
    flat, table, scale = state.flat, state.table, state.scale.value
    xp = array_module(flat)
    together = train.parts if xp is np else 1
    params = views(flat if dtype is None else flat.astype(dtype), table)
    weights = [target_weights(model, ids, flat.dtype) for ids, _ in parts]
    total = sum(w.sum() for w in weights)
    n = len(parts)
    rows = [len(ids) for ids, _ in parts]
    shares = [r / sum(rows) for r in rows]
    spare = {slot: xp.empty_like(grads) for slot in {part % together for part in range(1, n)}}
    grads[...] = 0

    def run(part):
        (ids, labels), buffer = parts[part], grads
        if part:
            buffer = spare[part % together]
            buffer[...] = 0
        (nats, commitment), cache, report = loss(
            params, state.centroids, model, ids, weights[part] / total, labels,
            Noise(train.seed, state.step, part), recompute=train.recompute)
        loss_backward(scale, scale * model.commitment * shares[part], cache, views(buffer, table))
        return nats, commitment, report

    results = []
    for first in range(0, n, together):
        group = range(first, min(first + together, n))
        results += parallel(run, group)
        for part in group:
            if part:
                grads += spare[part % together]
    if scale != 1:
        grads *= 1 / scale
    nats, commitments, reports = zip(*results, strict=True)
    commitment = sum(share * c for share, c in zip(shares, commitments, strict=True))
    return Gradients(sum(nats), commitment, _merge(reports, shares), list(reports))


def _merge(reports, shares) -> dict[int, Membership]:
    merged = {}
    for layer in reports[0].memberships:
        parts = [r.memberships[layer] for r in reports]
        merged[layer] = Membership(
            sum(m.counts for m in parts), sum(m.sums for m in parts),
            sum(share * m.uncovered for share, m in zip(shares, parts, strict=True)),
            sum(share * m.several for share, m in zip(shares, parts, strict=True)))
    return merged


def move_centroids(centroids: dict[int, Centroids], memberships, model: ModelConfig):
    """The centroids after one step of online k-means, in every layer whose centroids learn."""
    if not KINDS[model.routing].mode.learns:
        return centroids
    return {i: update_centroids(c, memberships[i].counts, memberships[i].sums,
                                model.centroid_decay) for i, c in centroids.items()}
