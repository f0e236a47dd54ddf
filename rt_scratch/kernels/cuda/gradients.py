"""Gradients of parameters, added where they belong: in the buffers of the model."""

from __future__ import annotations

from rt_scratch import layers
from rt_scratch.dispatch import qualified_name
from rt_scratch.kernels.cuda.feed_forward import add_geglu_ffn, add_relu_ffn
from rt_scratch.kernels.cuda.layers import add_layer_norm, add_linear, add_residual
from rt_scratch.kernels.cuda.loss import add_cross_entropy

ADDING = {f"layers.{name}": f for name, f in (
    ("linear_backward", add_linear), ("relu_ffn_backward", add_relu_ffn),
    ("geglu_ffn_backward", add_geglu_ffn), ("layer_norm_backward", add_layer_norm),
    ("residual_backward", add_residual), ("linear_cross_entropy_backward", add_cross_entropy))}


def add_gradients(backward, dy, cache, buffers, dx=None):
    """Twin of layers.add_gradients."""
    adding = ADDING.get(qualified_name(backward))
    if adding is None:
        return layers.add_gradients.reference(backward, dy, cache, buffers, dx)
    return adding(dy, cache, buffers, 1, dx)
