"""What a step costs: floating-point operations and bytes, from the configuration alone."""

from __future__ import annotations

import numpy as np

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.heads import KINDS
from rt_scratch.optim import OPTIMIZERS
from rt_scratch.parameters import parameter_table

LOOKED_UP = ("embed.table", "embed.classes")  # rows are taken from them, no product


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


def step_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """Rough memory of a step: parameters, gradients, optimizer state, activations."""
    size = np.dtype(train.dtype).itemsize
    spare = min(train.parts, train.accumulate * min(train.parts, train.batch) - 1)
    copies = 2 + OPTIMIZERS[train.optimizer].copies + spare  # one more gradient per part at work
    per_token = model.n_layers * (10 * model.width + 3 * model.ffn_width)
    live = train.batch * model.seq_len
    if train.recompute:
        per_token = per_token // model.n_layers + model.n_layers * model.width
    return size * (n_parameters(model) * copies + per_token * live)
