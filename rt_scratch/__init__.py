"""The Routing Transformer from scratch: every forward and backward pass by hand, NumPy or CuPy.

Letters, used in every shape comment:

    B batch          T tokens           C model width       H heads         D head width
    K clusters       W routing window   S local block       L layers        M feed-forward width
    V vocabulary     E embedding width

Weights are (in, out), so code reads `x @ w`. A gradient is `d` and the name. Every layer is a pair

    y, cache = f(x, w)          dx, dw = f_backward(dy, cache)

with no state but what is passed. Reading order, an evening:

    config      what a model and a training run are
    backend     NumPy or CuPy: the array decides; faster twins of plain functions
    layers      linear, LayerNorm, feed-forward, embeddings, dropout, output layer with its loss
    attention   softmax attention in blocks, relative positions by a skew, local attention
    routing     online k-means, who meets whom, attention inside clusters: the paper
    model       parameters, block, whole model, forward and backward
    step        the gradient of one optimizer step; centroids move here, in the open
    optim       Adafactor, AdamW, schedules
    decode      one token at a time, at a cost that does not grow with the text

Around them: checkpoint, run (a run folder), console (errors in one line), released (the authors'
variables), presets, data/ (one file per dataset), kernels/ (the twins).
"""

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.decode import generate
from rt_scratch.errors import UserError
from rt_scratch.model import (
    init_centroids,
    init_parameters,
    logits,
    loss,
    loss_backward,
    parameter_table,
    target_weights,
    views,
)
from rt_scratch.step import gradients, move_centroids

__all__ = [
    "ModelConfig", "TrainConfig", "UserError", "generate", "gradients", "init_centroids",
    "init_parameters", "logits", "loss", "loss_backward", "move_centroids", "parameter_table",
    "target_weights", "views",
]
