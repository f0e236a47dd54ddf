"""The rivals in torch, in training: the PyTorch port, and our own model with autograd."""

import numpy as np
import torch
import torch_twin
from common import RECIPE
from routing_transformer import RoutingTransformerLM
from routing_transformer.autoregressive_wrapper import AutoregressiveWrapper
from routing_transformer.routing_transformer import SelfAttention

from rt_scratch import new_state
from rt_scratch.parameters import init_centroids, init_parameters, views


def port(cfg):
    """routing-transformer at the sizes of cfg: topk heads, GEGLU, no relative positions."""
    return AutoregressiveWrapper(RoutingTransformerLM(
        num_tokens=cfg.vocab_size, dim=cfg.width, depth=cfg.n_layers, max_seq_len=cfg.seq_len,
        heads=cfg.n_heads, dim_head=cfg.head_width, window_size=cfg.window, causal=True,
        n_local_attn_heads=cfg.n_local_heads, ff_glu=True, shared_qk=True))


def port_training(cfg, batch, autocast=False):
    """(a function that takes one training step on random windows, number of parameters)."""
    net = port(cfg)
    ids = torch.randint(0, cfg.vocab_size, (batch, cfg.seq_len + 1))
    return training(lambda: net(ids, return_loss=True), list(net.parameters()), autocast)


def twin_training(cfg, batch, autocast=False, compiled=None):
    """The same of our own model, eager or in a mode of torch.compile; its centroids stay where they
    are."""
    state = new_state(cfg, RECIPE, np)
    params = torch_twin.tree(state.params)
    mu = {i: torch.tensor(c.mu) for i, c in state.centroids.items()}
    ids = torch.randint(0, cfg.vocab_size, (batch, cfg.seq_len))
    loss = torch.compile(torch_twin.loss, mode=compiled) if compiled else torch_twin.loss
    return training(lambda: loss(params, mu, cfg, ids), list(torch_twin.leaves(params)), autocast)


def port_layer(cfg, x):
    """A function that runs an attention layer of the port on x (B, T, C), forward and backward."""
    net = next(m for m in port(cfg).modules() if isinstance(m, SelfAttention))
    return passes(lambda x: net(x)[0], x, list(net.parameters()))


def twin_layer(cfg, x):
    """The same of our own model; full attention without relative positions is torch's kernel."""
    flat, table = init_parameters(cfg, np, "float32", 0)
    p = torch_twin.tree(views(flat, table)["layers"][0]["attention"])
    mu = {i: torch.tensor(c.mu) for i, c in init_centroids(cfg, np, "float32", 0).items()}
    return passes(lambda x: torch_twin.attention(x, p, mu.get(0), cfg, cfg.layer_heads(0))[0], x,
                  list(torch_twin.leaves(p)))


def passes(forward, x, parameters):
    x = torch.tensor(x, requires_grad=True)
    dy = torch.ones_like(x)

    def one(_):
        for leaf in (x, *parameters):
            leaf.grad = None
        forward(x).backward(dy)

    return one


def training(make_loss, parameters, autocast):
    optimizer = torch.optim.AdamW(parameters, RECIPE.lr)
    device = parameters[0].device.type

    def one(_):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = make_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return one, sum(p.numel() for p in parameters)
