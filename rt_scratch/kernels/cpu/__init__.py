"""Faster twins for NumPy arrays: the same numbers up to rounding, in pieces that stay in cache.

Three things make the plain functions slow on a CPU: every operation on a wide array is a pass
through memory, NumPy's element-wise functions use one thread, and copies (windows of keys, masks,
gathered rows) are written only to be read once. The twins work on pieces of some hundred kilobytes,
in place, side by side on threads (`threads.parallel`), and build windows and masks piece by piece.
"""

from __future__ import annotations

from rt_scratch.dispatch import first_array
from rt_scratch.kernels.cpu import attention, layers, multiprobe, optim, routing, sizes


def worthwhile(*args) -> bool:
    """False for arrays so small that the plain functions are quicker."""
    return not sizes.few(first_array(args))


TWINS = {f"{plain}.{name}": getattr(module, name) for plain, module, names in (
    ("layers", layers, "linear linear_backward layer_norm layer_norm_backward normalize "
                       "normalize_backward geglu geglu_backward geglu_ffn geglu_ffn_backward "
                       "linear_cross_entropy linear_cross_entropy_backward"),
    ("dropout", layers, "dropout"),
    ("attention", attention, "attend attend_backward local_attention local_attention_backward"),
    ("multiprobe", multiprobe, "multiprobe_attention multiprobe_attention_backward"),
    ("routing", routing, "top_members by_cluster inverse gather scatter_sum"),
    ("optim", optim, "adamw_update muon_update"),
) for name in names.split()}
ANY_SIZE = ("layers.layer_norm", "layers.normalize", "layers.geglu_ffn")  # have a way for few rows
