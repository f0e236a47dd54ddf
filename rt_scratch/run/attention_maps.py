"""Who attends to whom: the attention weights of every head, from the model's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from rt_scratch.config import ModelConfig
from rt_scratch.heads import Context, HeadGroup, Routed, head_groups
from rt_scratch.layers import layer_norm, normalize, shift_right
from rt_scratch.model import block, embed, mu_of, project

CHUNK = 512  # keys whose weights are computed at a time


class Map(NamedTuple):
    """The heads of one kind in a layer, as they attend in one window."""

    name: str                # of the kind
    group: HeadGroup
    queries: Any             # (H, T, D), normalised
    routed: Routed | None    # what routing heads report
    arguments: tuple         # of the heads' forward, without the values

    def columns(self, first: int, last: int):
        """Weights (H, T, last - first) of the keys first .. last - 1.

        A head's output is sum_j weight_ij (value_j + table row of the distance): with the columns
        of the identity in place of the values, and 0 in that of the table, it is the weights. Rows
        of local, full, causal and random heads add up to 1. A topk row, a mean over the n clusters
        of the token, adds up to n / (n + 1e-2).
        """
        q, k, p, context = self.arguments
        t = q.shape[2]
        identity = np.zeros((t, last - first), q.dtype)
        identity[np.arange(first, last), np.arange(last - first)] = 1
        values = np.broadcast_to(identity, (*q.shape[:2], *identity.shape))
        tables = {name: np.zeros((len(a), last - first), a.dtype) if name.endswith("rel_v") else a
                  for name, a in p.items()}
        return self.group.kind.forward(q, k, values, tables, context)[0][0]


def attention_maps(params, centroids, cfg: ModelConfig, ids, labels=None) -> Iterator[list[Map]]:
    """The maps of each layer in turn, for one window ids (1, T) of NumPy arrays.

    Needs the plain functions or their CPU twins: values are as wide here as there are keys.
    """
    x, _ = embed(params, cfg, shift_right(ids), 0, labels)
    for layer in range(cfg.n_layers):
        p, mu = params["layers"][layer], mu_of(centroids, layer)
        n = layer_norm(x, **p["norm_attention"])[0] if cfg.norm == "pre" else x
        (q, k, _), _ = project(n, p["attention"], cfg)
        x, _, routed = block(x, p, cfg, layer, mu)
        context = Context(cfg, layer, mu, routed and routed.route)
        found = []
        for (name, _), group in zip(cfg.layer_heads(layer), head_groups(cfg, layer), strict=True):
            own = group.queries_and_keys(q, k)
            found.append(Map(name, group, normalize(own[0])[0][0],
                             routed if group.kind.routes else None,
                             (*own, p["attention"], context)))
        yield found


def strongest(found: Map, n: int):
    """The n largest weights of every row, by position, and what the row holds in all.

    Returns positions (H, T, n) and weights (H, T, n), -1 and 0 where a row has fewer; the number of
    keys with a weight (H, T) and the sum of the weights (H, T).
    """
    h, t = found.queries.shape[:2]
    positions = np.full((h, t, n), -1)
    weights = np.zeros((h, t, n), found.queries.dtype)
    seen, total = np.zeros((h, t), int), np.zeros((h, t))
    for first in range(0, t, CHUNK):
        last = min(first + CHUNK, t)
        some = found.columns(first, last)[:, first:]  # no query before a key sees it
        seen[:, first:] += (some > 0).sum(-1)
        total[:, first:] += some.sum(-1, dtype="float64")
        here = np.where(some > 0, np.arange(first, last), -1)
        both = np.append(weights[:, first:], some, -1)
        best = np.argpartition(-both, n - 1, axis=-1)[..., :n]
        weights[:, first:] = np.take_along_axis(both, best, -1)
        positions[:, first:] = np.take_along_axis(np.append(positions[:, first:], here, -1), best,
                                                  -1)
    order = np.argsort(positions, axis=-1, kind="stable")
    return *(np.take_along_axis(a, order, -1) for a in (positions, weights)), seen, total
