"""The released TensorFlow variables -> our parameters.

The released code (google-research, routing_transformer) differs from ours in three places that the
conversion settles: every head's output goes through one (D, D) matrix shared by the heads before
the output projection, which folds into that projection; routing heads have key columns that are
never used when keys are queries, which are dropped; and names.
"""

from __future__ import annotations

import numpy as np

from rt_scratch.config import ModelConfig
from rt_scratch.errors import UserError
from rt_scratch.heads import key_heads
from rt_scratch.kmeans import Centroids
from rt_scratch.parameters import parameter_table, views


def convert(variables: dict, config: ModelConfig):
    """(params, state): the parameter tree and the centroids of each routing layer.

    variables: arrays by released name, such as
    'decoder_layer_0/self_attention/self_attention/q/kernel', without the model's outer scope and
    ':0'. The tree's leaves are views of one flat buffer, in the order of `parameter_table`; their
    dtype is that of the variables. UserError names a variable that is missing, misshapen or unused.
    """
    left = dict(variables)
    table = parameter_table(config)
    flat = np.empty(table[-1].stop, np.asarray(next(iter(left.values()))).dtype)

    def take(name):
        if name not in left:
            raise UserError(f"the released variables lack {name}")
        return np.asarray(left.pop(name))

    values = {}
    for leaf in table:
        if leaf.name.endswith("attention.w_o"):
            scope = _attention_scope(int(leaf.name.split(".")[1]))
            shared = take(f"{scope}/attention_nd/dense/kernel")  # (D, D)
            values[leaf.name] = fold(shared, take(f"{scope}/output_transform/kernel"))
        else:
            values[leaf.name] = take(released_name(leaf.name, config))
        if leaf.name.endswith("attention.w_k") and config.share_qk:
            routed = config.routing_heads(int(leaf.name.split(".")[1]))
            values[leaf.name] = values[leaf.name][:, routed * config.head_width :]
    for i in range(config.n_layers):
        if not key_heads(config, i):
            take(f"{_attention_scope(i)}/k/kernel")  # every key of this layer is a query
    for leaf in table:
        value = values[leaf.name]
        if value.size != leaf.stop - leaf.start or value.shape[-1] != leaf.shape[-1]:
            raise UserError(f"{released_name(leaf.name, config)} has shape {value.shape}, the "
                            f"configuration needs {leaf.shape}")
        flat[leaf.start : leaf.stop] = value.reshape(-1)

    state = {}
    for i in range(config.n_layers):
        if config.routing_heads(i):
            scope = f"{_attention_scope(i)}/attention_nd/cluster_attention/cluster_attention"
            names = ("means", "ema_count", "ema_means")
            state[i] = Centroids(*(take(f"{scope}/{name}") for name in names))
    if left:
        raise UserError(f"the released variables have {sorted(left)[0]}, which this configuration "
                        "does not use")
    return views(flat, table), state


def fold(shared, w_o):
    """w_o with the (D, D) matrix in front of every head's rows: block_h <- shared block_h."""
    d = shared.shape[0]
    return np.matmul(shared, w_o.reshape(-1, d, w_o.shape[1])).reshape(w_o.shape)


def unfold_gradients(dw, shared, w_o):
    """Gradients of the (D, D) matrix and of the released w_o from that of the folded one."""
    d = shared.shape[0]
    blocks, dblocks = w_o.reshape(-1, d, w_o.shape[1]), dw.reshape(-1, d, w_o.shape[1])
    dshared = np.matmul(dblocks, blocks.swapaxes(1, 2)).sum(0)
    return dshared, np.matmul(shared.T, dblocks).reshape(w_o.shape)


_ATTENTION = {
    "w_q": "q/kernel", "w_k": "k/kernel", "w_v": "v/kernel", "w_o": "output_transform/kernel",
    "local_rel_k": "attention_nd/local_nd/relative_positions_keys/embeddings",
    "local_rel_v": "attention_nd/local_nd/relative_positions_values/embeddings",
    "routing_rel_k":
        "attention_nd/cluster_attention/cluster_attention/relative_positions_keys/embeddings",
    "routing_rel_v":
        "attention_nd/cluster_attention/cluster_attention/relative_positions_values/embeddings",
}
_FFN = {
    "w_gate": "weight1/kernel", "w_value": "weight2/kernel", "w_in": "conv1/kernel",
    "b_in": "conv1/bias", "b_out": "conv2/bias",
}
_TEXT = {
    "embed.table": "embeddings/embedding", "embed.w": "emb_dense/kernel",
    "embed.b": "emb_dense/bias", "output.w_embed": "final_dense_1/kernel",
    "output.b_embed": "final_dense_1/bias", "output.w": "final_dense_2/kernel",
    "output.b": "final_dense_2/bias",
}
_IMAGE = {
    "embed.table": "rgb_target_emb_channel", "embed.rows": "pos_emb_0",
    "embed.columns": "pos_emb_1", "output.w": "final_dense/kernel",
    "output.b": "final_dense/bias",
}


def released_name(name: str, config: ModelConfig) -> str:
    """The released variable of one of our leaves; UserError for what the released code lacks."""
    norm = "layer_prepostprocess" if config.norm == "pre" else "layer_postprocess"
    last = name.rpartition(".")[2]
    if name.startswith("norm."):
        return f"{norm}/layer_norm/{_norm_leaf(last)}"
    if not name.startswith("layers."):
        table = _TEXT if config.kind == "text" else _IMAGE
        if name not in table:
            raise UserError(f"{name} has no counterpart in the released code")
        return table[name]
    _, layer, part, leaf = name.split(".")
    scope = f"decoder_layer_{layer}/self_attention"
    if part == "attention":
        return f"{scope}/self_attention/{_ATTENTION[leaf]}"
    if part == "ffn":
        out = "weight3/kernel" if config.ffn == "geglu" else "conv2/kernel"
        return f"{scope}/ffn/{_FFN.get(leaf, out)}"
    which = "" if part == "norm_attention" else "_1"
    return f"{scope}/{norm}{which}/layer_norm/{_norm_leaf(leaf)}"


def _norm_leaf(name):
    return "layer_norm_scale" if name == "gain" else "layer_norm_bias"


def _attention_scope(layer: int) -> str:
    return f"decoder_layer_{layer}/self_attention/self_attention"
