"""The Routing Transformer from scratch: every forward and backward pass by hand, NumPy or CuPy.

Letters of the shape comments, where none says otherwise:

    B batch          T tokens           C model width       H heads         D head width
    K clusters       W routing window   S local block       L layers        M feed-forward width
    V vocabulary     E embedding width  R clusters per query
    N keys that a block sees            P distances between those and its queries

Weights are (in, out), so code reads `x @ w`. The gradient of `x` is `dx`. Two conventions:

    y, cache = f(x, w)          dx, dw = f_backward(dy, cache)

holds for every plain function: one gradient per differentiable argument, in their order (alone, it
is returned bare), no state but what is passed. Routing adds results after the cache, and what is
called add_... or replace_... works in place. The parts of the model take a tree of parameters
instead; their backward adds the parameters' gradients to an identical tree and returns the gradient
of the input. Caches are NamedTuples. Docstrings cite the equations of docs/derivations.md;
docs/walkthrough.md runs through all this with eight tokens. Reading order, for an evening:

    layers      linear, LayerNorm, feed-forward, embeddings, output layer with its loss
    attention   softmax attention in blocks, relative positions by a skew, local attention
    kmeans      online k-means, commitment loss
    routing     who meets whom, attention inside clusters: topk (the paper), sorted ones
    multiprobe  ours: each key in one cluster, each query in one or several
    heads       the kinds of head, one row each: local, full, causal, topk, random
    model       one block, the whole model, forward and backward
    step        one optimizer step, which also moves the centroids

then train.py. Around them: config (what a model and a run are), parameters, optim, decode (one
token at a time, with the stores of each kind of head), dropout, dispatch (NumPy or CuPy, plain or
twin), device, graph (a step as one CUDA graph), released (the authors' checkpoint, read by
tf_checkpoint, becomes a run folder), presets, run/ (a run folder), report (a run as one HTML page),
data/ (one file per dataset), kernels/ (faster twins of plain functions; the plain ones are the
specification).
"""

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.decode import generate
from rt_scratch.device import select_device
from rt_scratch.errors import UserError
from rt_scratch.model import logits, loss, loss_backward, target_weights
from rt_scratch.parameters import init_centroids, init_parameters, parameter_table, views
from rt_scratch.step import State, cut, gradients, move_centroids, new_state, train_step

__all__ = [
    "ModelConfig", "State", "TrainConfig", "UserError", "cut", "generate", "gradients",
    "init_centroids", "init_parameters", "logits", "loss", "loss_backward", "move_centroids",
    "new_state", "parameter_table", "select_device", "target_weights", "train_step", "views",
]
