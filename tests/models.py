"""A small model with its inputs, for tests."""

from typing import Any, NamedTuple

import numpy as np

from rt_scratch import model


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
        return model.views(self.flat, self.table)

    def loss(self, flat=None, **options):
        """(nats + beta commitment, cache, report)."""
        params = model.views(self.flat if flat is None else flat, self.table)
        (nats, commitment), cache, report = model.loss(
            params, self.centroids, self.cfg, self.ids, self.weights, self.labels, **options)
        return nats + self.cfg.commitment * commitment, cache, report

    def gradient(self, cache):
        flat = np.zeros_like(self.flat)
        model.loss_backward(1.0, self.cfg.commitment, cache, model.views(flat, self.table))
        return flat

    def logits(self, ids=None):
        ids = self.ids if ids is None else ids
        return model.logits(self.params, self.centroids, self.cfg, ids, self.labels)


def setup(cfg, seed=0, batch=2, dtype="float64", noise=0.2) -> Setup:
    rng = np.random.default_rng(seed)
    flat, table = model.init_parameters(cfg, np, dtype, seed)
    flat = flat + noise * rng.normal(size=flat.shape).astype(dtype)
    ids = rng.integers(0, cfg.vocab_size, (batch, cfg.seq_len))
    ids[:, -1] = 1  # at least one target counts, padding or not
    labels = rng.integers(0, cfg.n_classes, batch) if cfg.n_classes else None
    weights = model.target_weights(cfg, ids, dtype)
    return Setup(cfg, flat, table, model.init_centroids(cfg, np, dtype, seed), ids, labels,
                 weights / weights.sum())
