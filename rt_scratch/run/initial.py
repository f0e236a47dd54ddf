"""What a run starts from: fresh parameters, those of another run, or its own checkpoint."""

from __future__ import annotations

import numpy as np

from rt_scratch.config import ModelConfig
from rt_scratch.console import say
from rt_scratch.data.batches import training_batch
from rt_scratch.dispatch import array_module
from rt_scratch.errors import UserError
from rt_scratch.heads import KINDS, head_groups
from rt_scratch.kmeans import Centroids, seeded_centroids
from rt_scratch.layers import layer_norm, normalize, shift_right
from rt_scratch.model import block, embed, loss, mu_of, project, target_weights
from rt_scratch.parameters import parameter_table
from rt_scratch.run.checkpoint import Progress, Saved, restore
from rt_scratch.step import State, new_state

DRAWS = 16  # of centroids, see `drawn_centroids`


def initial_state(plan, xp, for_training: bool) -> tuple[State, Progress]:
    """State and progress that a plan (options.Plan) begins with."""
    if plan.saved:
        return restore(plan.saved, xp, for_training)
    state = new_state(plan.model, plan.train, xp)
    return (state if plan.source is None else taken_over(state, plan, xp)), Progress()


def check_shapes(saved: Saved, model: ModelConfig) -> None:
    """UserError unless a model has the parameters of a checkpoint, by name and shape."""
    there, here = ({leaf.name: leaf.shape for leaf in parameter_table(m)}
                   for m in (saved.model, model))
    for name in [*there, *here]:
        if there.get(name) != here.get(name):
            a, b = (shapes.get(name, "missing") for shapes in (there, here))
            raise UserError(f"--init-from: {name} is {a} in {saved.path}, {b} in the model asked "
                            "for; leave out the flag that makes the difference")


def taken_over(state: State, plan, xp) -> State:
    """A fresh state with parameters and centroids of the run plan.source.

    Centroids whose shape has changed, as with --n-clusters, or that did not learn there, are drawn
    from the vectors of the first batch.
    """
    model, train = plan.model, plan.train
    before, _ = restore(plan.source, xp)
    state.flat[...] = before.flat.astype(state.flat.dtype)
    centroids = {i: Centroids(*(a.astype(state.flat.dtype) for a in before.centroids[i]))
                 for i, c in state.centroids.items()
                 if i in before.centroids and before.centroids[i].mu.shape == c.mu.shape
                 and KINDS[plan.source.model.routing].mode.learns}
    drawn = sorted(state.centroids.keys() - centroids.keys()) if KINDS[
        model.routing].mode.learns else []
    if drawn:
        ids, labels = training_batch(plan.dataset, model.seq_len, train.batch * train.accumulate,
                                     train.seed, 0, 0)
        ids, labels = xp.asarray(ids), None if labels is None else xp.asarray(labels)
        weights = target_weights(model, ids, train.dtype)
        centroids = drawn_centroids(before, plan.source.model, model, ids, weights / weights.sum(),
                                    train.seed, labels, centroids)
    say(f"parameters: {plan.source.path}, step {before.step}" + (
        f"; centroids of layers {', '.join(map(str, drawn))}: the best of {DRAWS} draws of k-means"
        if drawn else ""))
    return state._replace(centroids=state.centroids | centroids)


def drawn_centroids(state: State, before: ModelConfig, after: ModelConfig, ids, weights, seed: int,
                    labels=None, kept=None) -> dict[int, Centroids]:
    """Centroids for the model `after` from the vectors of a trained one with its parameters.

    ids (B, T) go through the model `before`, with its own clusters; k-means then clusters what
    the routing heads of `after` compare with centroids: queries and, where they are separate, keys.
    Whether queries meet the keys they need in these clusters depends on where k-means begins, so
    it runs DRAWS times, and the centroids that give `after` the lowest loss on ids are kept (the
    loss of topk heads sees ahead). weights (B, T) as in `model.loss`. Layers in `kept` have their
    centroids already.
    """
    kept, vectors = kept or {}, {}
    x, _ = embed(state.params, before, shift_right(ids), 0, labels)
    for i in range(before.n_layers):
        p = state.params["layers"][i]
        n = layer_norm(x, **p["norm_attention"])[0] if before.norm == "pre" else x
        (q, k, _), _ = project(n, p["attention"], after)
        for group in head_groups(after, i):
            if group.kind.routes and i not in kept:
                own = [q[:, group.heads]] + ([k[:, group.keys]] if group.keys else [])
                rows = [normalize(z)[0].swapaxes(0, 1).reshape(z.shape[1], -1, z.shape[3])
                        for z in own]                                # (H, B T, D)
                vectors[i] = array_module(x).concatenate(rows, axis=1)
        x, _, _ = block(x, p, before, i, mu_of(state.centroids, i))

    def nats(found):
        """A window at a time, recomputed: it takes less memory than a training step."""
        windows = [slice(i, i + 1) for i in range(len(ids))]
        return sum(float(loss(state.params, found, after, ids[i], weights[i],
                              None if labels is None else labels[i], recompute=True)[0][0])
                   for i in windows)

    draws = []
    for draw in range(DRAWS):
        rng = np.random.default_rng([seed, draw])
        draws.append(kept | {i: seeded_centroids(rows, after.n_clusters, rng)
                             for i, rows in vectors.items()})
    losses = [nats(found) for found in draws]
    return draws[int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0]
