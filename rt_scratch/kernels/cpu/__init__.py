"""Faster twins for NumPy arrays: the same numbers up to rounding, in pieces that stay in cache.

Three things make the plain functions slow on a CPU: every operation on a wide array is a pass
through memory, NumPy's element-wise functions use one thread, and copies (windows of keys, masks,
gathered rows) are written only to be read once. The twins work on pieces of some hundred kilobytes,
in place, side by side on threads (`threads.parallel`), and build windows and masks piece by piece.
"""

from __future__ import annotations

from rt_scratch.dispatch import first_array
from rt_scratch.kernels.cpu import sizes
from rt_scratch.kernels.cpu.attention import (
    attend,
    attend_backward,
    local_attention,
    local_attention_backward,
)
from rt_scratch.kernels.cpu.layers import (
    dropout,
    geglu,
    geglu_backward,
    geglu_ffn,
    geglu_ffn_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    normalize,
    normalize_backward,
)
from rt_scratch.kernels.cpu.optim import adamw_update, muon_update
from rt_scratch.kernels.cpu.routing import by_cluster, gather, inverse, scatter_sum, top_members


def worthwhile(*args) -> bool:
    """False for arrays so small that the plain functions are quicker."""
    return not sizes.few(first_array(args))


TWINS = {f"{module}.{f.__name__}": f for module, functions in {
    "layers": (linear, linear_backward, layer_norm, layer_norm_backward, normalize,
               normalize_backward, geglu, geglu_backward, geglu_ffn, geglu_ffn_backward,
               linear_cross_entropy, linear_cross_entropy_backward),
    "dropout": (dropout,),
    "attention": (attend, attend_backward, local_attention, local_attention_backward),
    "routing": (top_members, by_cluster, inverse, gather, scatter_sum),
    "optim": (adamw_update, muon_update),
}.items() for f in functions}
ANY_SIZE = ("layers.layer_norm", "layers.normalize", "layers.geglu_ffn")  # have a way for few rows
