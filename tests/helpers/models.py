"""Small models with their inputs, for tests."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import assume

from helpers.gradcheck import close
from rt_scratch import decode, model
from rt_scratch.config import ModelConfig
from rt_scratch.optim import LossScale
from rt_scratch.parameters import init_centroids, init_parameters, views
from rt_scratch.step import Part, State

NOISE = model.Noise(seed=3, step=5, first=2)
SMALL = ModelConfig(
    vocab_size=11, seq_len=23, n_layers=2, width=12, ffn_width=10, n_local_heads=1,
    n_routing_heads=2, n_clusters=3, window=5, block=4, lookback=2, local_max_distance=3,
    routing_max_distance=2)


class Setup(NamedTuple):
    cfg: Any
    flat: Any        # parameters, moved away from their initial ones and zeros
    table: Any
    centroids: Any
    ids: Any         # (batch, T)
    labels: Any
    weights: Any     # of the targets; they add up to 1

    @property
    def params(self):
        return views(self.flat, self.table)

    def loss(self, flat=None, **options):
        """(nats + beta commitment, cache, report)."""
        params = views(self.flat if flat is None else flat, self.table)
        (nats, commitment), cache, report = model.loss(
            params, self.centroids, self.cfg, self.ids, self.weights, self.labels, **options)
        return nats + self.cfg.commitment * commitment, cache, report

    def gradient(self, cache):
        flat = np.zeros_like(self.flat)
        model.loss_backward(1.0, self.cfg.commitment, cache, views(flat, self.table))
        return flat

    def logits(self, ids=None):
        ids = self.ids if ids is None else ids
        return model.logits(self.params, self.centroids, self.cfg, ids, self.labels)

    def parts(self, *sizes, xp=np):
        """The batch in parts of these sizes, or in one, as `step.cut` gives them."""
        n = len(self.ids)
        ends = np.cumsum(sizes or (n,)).tolist()
        rows = [slice(end - size, end) for end, size in zip(ends, sizes or (n,), strict=True)]
        return [Part(xp.asarray(self.ids[r]),
                     None if self.labels is None else xp.asarray(self.labels[r]),
                     xp.asarray(self.weights[r]), r.start, (r.stop - r.start) / n) for r in rows]

    def state(self, step=0, scale=LossScale(1.0, 0), optimizer=None):  # noqa: B008
        """What `step.gradients` and `step.train_step` take."""
        return State(self.flat, self.table, self.centroids, optimizer, step, scale)


def setup(cfg, seed=0, batch=2, dtype="float64", noise=0.2) -> Setup:
    rng = np.random.default_rng(seed)
    flat, table = init_parameters(cfg, np, dtype, seed)
    flat = flat + noise * rng.normal(size=flat.shape).astype(dtype)
    ids = rng.integers(0, cfg.vocab_size, (batch, cfg.seq_len))
    ids[:, -1] = 1  # at least one target counts, padding or not
    labels = rng.integers(0, cfg.n_classes, batch) if cfg.n_classes else None
    weights = model.target_weights(cfg, ids, dtype)
    return Setup(cfg, flat, table, init_centroids(cfg, np, dtype, seed), ids, labels,
                 weights / weights.sum())


def check_gradient(m: Setup, seed, noise=NOISE, step=1e-6):
    """One direction through all parameters at once, routing held fixed."""
    v = np.random.default_rng(seed).normal(size=m.flat.shape)
    _, cache, report = m.loss(noise=noise)
    moved = [m.loss(m.flat + sign * step * v, noise=noise, fixed=report.routes) for sign in (1, -1)]
    if m.cfg.ffn == "relu":  # the step must not cross a kink
        signs = [[block.ffn.out.x > 0 for block in c.forward.blocks] for _, c, _ in moved]
        assume(all(np.array_equal(a, b) for a, b in zip(*signs, strict=True)))
    g = m.gradient(cache)
    numeric = (moved[0][0] - moved[1][0]) / (2 * step)
    close(numeric, g @ v, np.abs(g * v).sum(), 1e-15 * (1 + abs(moved[0][0])) / step, m.cfg)


def check_decoding(m: Setup, prompt=0, ids=None):
    """Every prefix, after a prompt that is read in one pass: the logits of the forward pass."""
    ids = m.ids if ids is None else ids
    full, length = m.logits(ids), ids.shape[1]
    prompt = min(prompt, length - 1)
    logits, memory = decode.prefill(m.params, m.centroids, m.cfg, ids[:, :prompt], length, m.labels)
    for t in range(prompt, length):
        np.testing.assert_allclose(logits, full[:, t], rtol=0, atol=1e-10)
        if t + 1 < length:
            logits = decode.step(m.params, m.centroids, m.cfg, memory, ids[:, t])
