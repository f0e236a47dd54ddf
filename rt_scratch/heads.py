"""The kinds of attention head, one row each: forward, backward, decoding, cost.

A layer is a list of (kind, number of heads); `head_groups` says which queries, keys and values
belong to which. A new kind is its functions and a row of `KINDS`: every choice of a kind reads that
table.

    forward(q, k, v, p, context) -> o, cache, Routed or None
    backward(do, dcommitment, cache) -> dq, dk, dv, {name: gradient} of its own parameters

q, k, v are (B, H, T, D) of the heads of that kind; k is None where keys are queries and not
shifted. p holds the parameters of the layer's attention. How a kind decodes stands in stores.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from rt_scratch import stores
from rt_scratch.attention import (
    local_attention,
    local_attention_backward,
    relative_tables,
)
from rt_scratch.dispatch import array_module
from rt_scratch.layers import shift_right, shift_right_backward
from rt_scratch.multiprobe import MULTIPROBE
from rt_scratch.routing import (
    CAUSAL,
    RANDOM,
    SHIFTED,
    TOPK,
    Membership,
    Mode,
    Route,
    Rule,
    random_clusters,
    routing_attention,
    routing_attention_backward,
)


class Context(NamedTuple):
    """What a kind of head is told besides queries, keys, values and parameters."""

    cfg: Any               # ModelConfig
    layer: int
    mu: Any = None         # (H, K, D) centroids of the layer
    fixed: Any = None      # a Route to use instead of choosing one
    dropped: Any = None    # attention dropout, see dropout.py


class Routed(NamedTuple):
    """What a routing kind reports."""

    commitment: Any        # loss, a 0-d array
    membership: Membership
    route: Route


class Kind(NamedTuple):
    """One kind of head."""

    family: str            # 'local' or 'routing': whose settings and relative tables it takes
    mode: Mode | None      # how it forms clusters, or a variant of that; None: it does not route
    forward: Callable
    backward: Callable
    decoding: stores.Decoding
    keys: Callable         # cfg -> keys that each query is multiplied with, for the cost of a step
    far: bool = True       # whether it may see any earlier token; shift_keys is for such kinds

    @property
    def routes(self) -> bool:
        """Whether it has centroids; its keys may then be its queries (share_qk)."""
        return self.mode is not None

    def parameters(self, cfg) -> dict[str, tuple]:
        """Shaw's tables (2 m + 1, D) for keys and values, shared by the layer's heads."""
        reach = cfg.routing_max_distance if self.routes else cfg.local_max_distance
        shape = 2 * reach + 1, cfg.head_width
        return {f"{self.family}_rel_{x}": shape for x in "kv"} if reach else {}


class HeadGroup(NamedTuple):
    """The heads of one kind in a layer."""

    kind: Kind
    heads: slice           # which of the layer's queries, values and outputs
    keys: slice | None     # which of its keys; None: keys are queries
    shifted: bool          # whether a value has the key of the position before it

    def queries_and_keys(self, q, k):
        """Its share of the layer's (B, H, T, D); None for keys that are the queries.

        Shifted, the value of position t has the key of t - 1, that of position 0 a key of zeros: a
        query finds what followed a token like its own. docs/derivations.md (72).
        """
        q, k = q[:, self.heads], k[:, self.keys] if self.keys else None
        if self.shifted:
            k = shift_right((q if k is None else k).swapaxes(1, 2)).swapaxes(1, 2)
        return q, k

    def unshifted(self, dq, dk):
        """The gradients of the projections, from those of `queries_and_keys`: (72) backward."""
        if not self.shifted:
            return dq, dk
        dk = shift_right_backward(dk.swapaxes(1, 2)).swapaxes(1, 2)
        return (dq, dk) if self.keys else (dq + dk, None)


@functools.lru_cache
def head_groups(cfg, layer: int) -> list[HeadGroup]:
    """How the heads of a layer are divided among its kinds, in the order of the projections."""
    found, head, key = [], 0, 0
    for name, n in cfg.layer_heads(layer):
        kind = KINDS[name]
        own = not (kind.routes and cfg.share_qk)
        found.append(HeadGroup(kind, slice(head, head + n), slice(key, key + n) if own else None,
                          cfg.shift_keys and kind.far))
        head, key = head + n, key + n * own
    return found


def key_heads(cfg, layer: int) -> int:
    """How many heads of a layer have keys of their own."""
    return max((group.keys.stop for group in head_groups(cfg, layer) if group.keys), default=0)


def _table_gradients(family, drel_k, drel_v):
    return {} if drel_k is None else {f"{family}_rel_k": drel_k, f"{family}_rel_v": drel_v}


# ------------------------------------------------------------------------------------ local, full

def local_forward(q, k, v, p, context):
    """Blocks of S queries see their own block, causally, and the `lookback` blocks before."""
    cfg = context.cfg
    return *local_attention(q, k, v, *relative_tables(p, "local"), cfg.block, cfg.lookback, 1.0,
                            dropped=context.dropped), None


def full_forward(q, k, v, p, context):
    """Causal attention to everything: one block that holds the text."""
    return *local_attention(q, k, v, *relative_tables(p, "local"), q.shape[2], 0, 1.0,
                            dropped=context.dropped), None


def local_backward(do, dcommitment, cache):
    """The backward of local and full heads, which differ in the cached reach alone.

    docs/derivations.md (40).
    """
    dq, dk, dv, *drel = local_attention_backward(do, cache)
    return dq, dk, dv, _table_gradients("local", *drel)


# -------------------------------------------------------------------------- causal, topk, random

def causal_forward(q, k, v, p, context):
    """Ours: a key joins its nearest cluster, a query sees the W latest keys of its R nearest.

    Logits are scaled by D^-1/2.
    """
    cfg = context.cfg
    mode = MULTIPROBE if not sortable(cfg) else SHIFTED if cfg.shift_keys else CAUSAL
    return _routing_forward(q, k, v, p, context, Rule(
        mode, cfg.window, cfg.head_width ** -0.5, n_probes=cfg.n_probes))


def sortable(cfg) -> bool:
    """Whether queries of causal heads look into one cluster, and keys are queries, shifted or not:
    then CAUSAL and SHIFTED, which sort vectors by cluster, give what MULTIPROBE gives, faster.
    """
    return min(cfg.n_probes, cfg.n_clusters) == 1 and cfg.share_qk


def topk_forward(q, k, v, p, context):
    """The paper's clusters with the released logits, which are not scaled."""
    return _routing_forward(q, k, v, p, context, Rule(TOPK, context.cfg.window, 1.0))


def random_forward(q, k, v, p, context):
    """The paper's control: as `causal`, with clusters drawn at random by position."""
    cfg = context.cfg
    clusters = random_clusters(cfg, context.layer, array_module(q), q.shape[1], q.shape[2])
    return _routing_forward(q, k, v, p, context, Rule(
        RANDOM, cfg.window, cfg.head_width ** -0.5, clusters=clusters))


def _routing_forward(q, k, v, p, context, rule):
    (o, loss), cache, membership, route = routing_attention(
        q, k, v, *relative_tables(p, "routing"), context.mu, rule, context.fixed, context.dropped)
    return o, cache, Routed(loss, membership, route)


def routing_backward(do, dcommitment, cache):
    """The backward of all routing heads; the cached rule has the mode. docs/derivations.md (49)."""
    dq, dk, dv, *drel = routing_attention_backward(do, dcommitment, cache)
    return dq, dk, dv, _table_gradients("routing", *drel)


KINDS = {
    "local": Kind(
        "local", None, local_forward, local_backward, stores.LOCAL,
        lambda cfg: (cfg.lookback + 1) * cfg.block, far=False),
    "full": Kind(
        "local", None, full_forward, local_backward, stores.FULL, lambda cfg: cfg.seq_len),
    "causal": Kind(
        "routing", CAUSAL, causal_forward, routing_backward, stores.CAUSAL,
        lambda cfg: 3 * -(-cfg.window // 2) * (
            1 if sortable(cfg) else min(cfg.n_probes, cfg.n_clusters) + 1)),
    "topk": Kind(
        "routing", TOPK, topk_forward, routing_backward, stores.TOPK,
        lambda cfg: cfg.n_clusters * cfg.window ** 2 / cfg.seq_len),
    "random": Kind(
        "routing", RANDOM, random_forward, routing_backward, stores.RANDOM,
        lambda cfg: 3 * -(-cfg.window // 2)),
}
