"""The gradient of one optimizer step, from as many parts as the batch is cut into.

On a CPU a few parts run side by side on threads (NumPy releases the interpreter's lock while it
computes), each with one BLAS thread and a gradient buffer of its own. The buffers are added in the
order of the parts, so the result depends on how the batch is cut, never on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rt_scratch.backend import array_module
from rt_scratch.config import ModelConfig
from rt_scratch.model import Noise, Report, loss, loss_backward, target_weights, views
from rt_scratch.routing import Centroids, Membership, update_centroids
from rt_scratch.threads import parallel


class Step(NamedTuple):
    """What one step computed, summed or averaged over its parts."""

    nats: Any                            # mean cross-entropy per counted target, a 0-d array
    commitment: Any                      # mean commitment loss
    memberships: dict[int, Membership]   # counts and sums added, shares averaged
    reports: list[Report]


def gradients(flat, grads, table, centroids, cfg: ModelConfig, parts, seed: int, step: int,
              recompute: bool = False, dtype=None, loss_scale: float = 1.0,
              together: int = 1) -> Step:
    """Fill `grads` with the gradient of nats + beta commitment over all parts of the batch.

    parts: list of (ids (B, T), labels (B,) or None). Every target weighs the same whatever part it
    is in, so cutting a batch differently changes nothing but rounding (and the masks of dropout,
    which are drawn per part). The network computes in
    `dtype` (default: that of flat), on a rounded copy of the parameters; `grads` keeps the dtype of
    flat. With `loss_scale` the backward pass runs on so many times the loss. `together` parts run
    side by side: as many times the activations, and as many gradient buffers.
    """
    xp = array_module(flat)
    params = views(flat if dtype is None else flat.astype(dtype), table)
    weights = [target_weights(cfg, ids, flat.dtype) for ids, _ in parts]
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
            params, centroids, cfg, ids, weights[part] / total, labels, Noise(seed, step, part),
            recompute=recompute)
        loss_backward(loss_scale, loss_scale * cfg.commitment * shares[part], cache,
                      views(buffer, table))
        return nats, commitment, report

    results = []
    for first in range(0, n, together):
        group = range(first, min(first + together, n))
        results += parallel(run, group)
        for part in group:
            if part:
                grads += spare[part % together]
    if loss_scale != 1:
        grads *= 1 / loss_scale
    nats, commitments, reports = zip(*results, strict=True)
    commitment = sum(share * c for share, c in zip(shares, commitments, strict=True))
    return Step(sum(nats), commitment, _merge(reports, shares), list(reports))


def _merge(reports, shares) -> dict[int, Membership]:
    merged = {}
    for layer in reports[0].memberships:
        parts = [r.memberships[layer] for r in reports]
        merged[layer] = Membership(
            sum(m.counts for m in parts), sum(m.sums for m in parts),
            sum(share * m.uncovered for share, m in zip(shares, parts, strict=True)),
            sum(share * m.several for share, m in zip(shares, parts, strict=True)))
    return merged


def move_centroids(centroids: dict[int, Centroids], memberships, cfg: ModelConfig):
    """The centroids after one step of online k-means in every routing layer."""
    if cfg.routing == "random":
        return centroids
    return {i: update_centroids(c, memberships[i].counts, memberships[i].sums, cfg.centroid_decay)
            for i, c in centroids.items()}
