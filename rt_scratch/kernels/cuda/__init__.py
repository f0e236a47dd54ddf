"""GPU twins: plain functions of layers, attention, routing and optim as CUDA kernels.

Each twin has the signature, the values and the cache of the function of its name, for float32,
float16 and bfloat16 arrays. Row statistics, parameters of LayerNorm and integers are float32 and
int32 whatever the activations are. Nothing here waits for the GPU.
"""

from __future__ import annotations

import functools

from rt_scratch.kernels.cuda import (
    attention,
    dropout,
    feed_forward,
    gradients,
    kmeans,
    layers,
    loss,
    optim,
    routing,
    sums,
)
from rt_scratch.kernels.launch import WORD


def supports(*arguments) -> bool:
    """Whether the twins take these arguments: none of the arrays among them is, say, float64."""
    for x in arguments:
        if isinstance(x, tuple):
            if not supports(*x):
                return False
        elif hasattr(x, "dtype") and not _supported(x.dtype):
            return False
    return True


@functools.cache
def _supported(dtype) -> bool:
    return dtype.kind in "iub" or dtype.name in WORD


# What may be registered as the twin of the function of the same name, when `supports` agrees.
TWINS = {f"{plain}.{name}": getattr(module, name) for plain, module, names in (
    ("layers", gradients, "add_gradients"),
    ("layers", layers, "linear linear_backward normalize normalize_backward layer_norm "
                       "layer_norm_backward residual residual_backward"),
    ("layers", feed_forward, "geglu geglu_backward geglu_ffn geglu_ffn_backward relu_ffn "
                             "relu_ffn_backward"),
    ("layers", sums, "segment_sum"),
    ("layers", loss, "linear_cross_entropy linear_cross_entropy_backward"),
    ("dropout", dropout, "dropout"),
    ("parameters", optim, "round_matrices"),
    ("attention", attention, "attend attend_backward local_attention local_attention_backward"),
    ("kmeans", kmeans, "compare cluster_statistics commitment add_commitment_gradient "
                       "replace_centroids"),
    ("routing", routing, "top_members by_cluster inverse gather scatter_sum scatter_mean "
                         "scatter_mean_backward coverage"),
    ("optim", optim, "global_norm adamw_update muon_update adafactor_update"),
) for name in names.split()}
