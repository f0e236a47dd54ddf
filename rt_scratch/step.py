"""One optimizer step: the gradient of a batch, clipping, the update, the centroids.

On a CPU the parts of a batch run side by side, on threads or in forked processes (workers.py), each
with one BLAS thread and a gradient buffer of its own. The buffers are added in the order of the
parts, so the result depends on how the batch is cut, never on the number of cores. Several machines
or GPUs (parallel.py) each take a share of the windows and sum their results once, so that all
take the same step.
"""

from __future__ import annotations

import functools
import operator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.dispatch import array_module
from rt_scratch.heads import KINDS
from rt_scratch.kmeans import Centroids, replace_centroids
from rt_scratch.model import Noise, Report, loss, loss_backward, target_weights
from rt_scratch.optim import (
    FIRST_SCALE,
    OPTIMIZERS,
    LossScale,
    clip_by_global_norm,
    global_norm,
    learning_rate,
)
from rt_scratch.parallel import SINGLE, World
from rt_scratch.parameters import compute_copy, init_centroids, init_parameters, views
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

    @property
    def arrays(self) -> list:
        """Every array of the state."""
        centroids = [array for c in self.centroids.values() for array in c]
        return [self.flat, *centroids, *self.optimizer.values()]


class Part(NamedTuple):
    """Windows of a batch that go through the network together."""

    ids: Any         # (B, T)
    labels: Any      # (B,) or None
    weights: Any     # (B, T) of the targets; over all parts of the step they add up to 1
    first: int       # position of the first window among those of the step
    share: float     # of the windows of the step


class Gradients(NamedTuple):
    """What the passes of one step computed, summed or averaged over the windows of its batch."""

    nats: Any                            # mean cross-entropy per counted target, a 0-d array
    commitment: Any                      # mean commitment loss
    memberships: dict[int, Membership]   # counts and sums added, shares averaged
    reports: list[Report]                # of the parts of this process


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


def part_gradient(params, state: State, part: Part, buffer, model: ModelConfig,
                  train: TrainConfig):
    """Fill a buffer with a part's share of the gradient -> (nats, commitment, Report) of the part.
    """
    buffer[...] = 0
    (nats, commitment), cache, report = loss(
        params, state.centroids, model, part.ids, part.weights, part.labels,
        Noise(train.seed, state.step, part.first), recompute=train.recompute)
    scale = state.scale.value
    loss_backward(scale, scale * model.commitment * part.share, cache, views(buffer, state.table))
    return nats, commitment, report


class Threads:
    """Computes parts of a batch side by side, on threads of this process."""

    def spare(self, grads, n: int) -> list:
        """n buffers like grads."""
        return [array_module(grads).empty_like(grads) for _ in range(n)]

    def run(self, params, state: State, parts: list[Part], buffers: list, model: ModelConfig,
            train: TrainConfig) -> list:
        """[the result of part_gradient for each part]; each gradient is in a buffer of its own."""
        return parallel(lambda i: part_gradient(params, state, parts[i], buffers[i], model, train),
                        range(len(parts)))


THREADS = Threads()


def train_step(state: State, grads, parts: list[Part], model: ModelConfig, train: TrainConfig,
               dtype=None, world: World = SINGLE, lr=None, crew: Threads = THREADS):
    """One optimizer step -> (the state after it, Step).

    parts: what `cut` makes of the batch, for this process of `world`. Writes into the buffers of
    the state and into `grads`, a buffer like state.flat; makes no check, so that nothing waits for
    a GPU (except with fp16, where a step whose gradient overflows is left out and the loss scale is
    halved). lr: the learning rate, None for that of the schedule; it and state.step may be arrays
    of a GPU (graph.py). crew: what computes the parts on a CPU (workers.py).
    """
    result = gradients(state, grads, parts, model, train, dtype, world, crew)
    norm = clip_by_global_norm(grads, train.clip) if train.clip else global_norm(grads)
    if lr is None:
        lr = learning_rate(state.step, train.schedule, train.lr, train.warmup, train.steps)
    fp16 = train.precision == "fp16"
    applied = not fp16 or bool(np.isfinite(float(norm)))
    if applied:
        OPTIMIZERS[train.optimizer].update(state.flat, grads, state.optimizer, state.table, lr,
                                           state.step, weight_decay=train.weight_decay)
        move_centroids(state.centroids, result.memberships, model)
    scale = state.scale.after(applied) if fp16 else state.scale
    return (state._replace(step=state.step + 1, scale=scale),
            Step(result.nats, result.memberships, norm, lr, applied))


def cut(ids, labels, model: ModelConfig, train: TrainConfig, xp,
        world: World = SINGLE) -> list[Part]:
    """What a process takes of a batch ids (N, T), labels (N,) or None, in parts, as arrays of xp.

    All processes together cut it into as many parts as --accumulate says, on a CPU --parts times as
    many; no more parts than windows, and no fewer than processes.
    """
    n = -(-train.accumulate * (train.parts if xp is np else 1) // world.size)
    own = np.array_split(np.arange(len(ids)), world.size)[world.rank]
    weights = target_weights(model, ids, train.dtype)
    weights = weights / weights.sum()
    return [Part(xp.asarray(ids[p]), None if labels is None else xp.asarray(labels[p]),
                 xp.asarray(weights[p]), int(p[0]), len(p) / len(ids))
            for p in np.array_split(own, min(len(own), n))]


def gradients(state: State, grads, parts: list[Part], model: ModelConfig, train: TrainConfig,
              dtype=None, world: World = SINGLE, crew: Threads = THREADS) -> Gradients:
    """Fill `grads` with the gradient of nats + beta commitment over all windows of the step.

    Every target weighs the same whatever part it is in, and a window draws the same dropout, so
    cutting a batch differently, between processes too, changes nothing but rounding. The network
    computes in `dtype` (default: that of the parameters), on a copy of them whose matrices are
    rounded; `grads` has the dtype of the parameters. The backward pass runs on state.scale
    times the loss. On a CPU train.parts parts run side by side, each with its own activations and
    gradient buffer.
    """
    flat, scale, n = state.flat, state.scale.value, len(parts)
    xp = array_module(flat)
    together = -(-train.parts // world.size) if xp is np else 1
    params = compute_copy(flat, state.table, dtype)
    spare = crew.spare(grads, min(n - 1, together))
    results = []
    for first in range(0, n, together):
        buffers = spare if first else [grads, *spare]
        group = parts[first : first + together]
        results += crew.run(params, state, group, buffers, model, train)
        for buffer in buffers[not first : len(group)]:
            grads += buffer
    if scale != 1:
        grads *= 1 / scale
    world.sum(grads)
    nats, commitments, reports = zip(*results, strict=True)
    shares = [part.share for part in parts]
    merged = _merge(reports, shares)
    totals = world.totals([_sum(nats), _sum(commitments, shares), *chain(*merged.values())],
                          flat.dtype)
    members = zip(*[iter(totals[2:])] * len(Membership._fields), strict=True)
    memberships = {i: Membership(*m) for i, m in zip(merged, members, strict=True)}
    return Gradients(*totals[:2], memberships, list(reports))


def _merge(reports, shares) -> dict[int, Membership]:
    merged = {}
    for layer in reports[0].memberships:
        counts, sums, uncovered, several = zip(*(r.memberships[layer] for r in reports),
                                               strict=True)
        merged[layer] = Membership(_sum(counts), _sum(sums), _sum(uncovered, shares),
                                   _sum(several, shares))
    return merged


def _sum(arrays, shares=None):
    """The (weighted) sum; of one array with a share of 1 the array itself, no kernel of a GPU."""
    if shares is not None:
        arrays = [a if share == 1 else share * a for a, share in zip(arrays, shares, strict=True)]
    return functools.reduce(operator.add, arrays)


def move_centroids(centroids: dict[int, Centroids], memberships, model: ModelConfig) -> None:
    """One step of online k-means, in place, in every layer whose centroids learn."""
    if KINDS[model.routing].mode.learns:
        for i, own in centroids.items():
            replace_centroids(own, memberships[i].counts, memberships[i].sums,
                              model.centroid_decay)
