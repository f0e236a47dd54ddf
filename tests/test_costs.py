"""What a step costs, against numbers worked out by hand.

The model of most cases: V 10, T 8, one layer, C = E = 4, two heads of D 2, GEGLU of M 3, S 2 with
one block of lookback, relative positions up to 3.

Matrices in products: embed.w 4 x 4 = 16, four projections of the attention 4 x 16 = 64, three of
the feed-forward 3 x 12 = 36, output 4 x 10 = 40: 156 entries, 6 FLOP each.
"""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.device import Precision
from rt_scratch.presets import preset
from rt_scratch.run.costs import flops_per_token, n_parameters, step_bytes
from rt_scratch.run.evaluate import mode
from rt_scratch.step import cut, new_state, train_step

LOCAL = ModelConfig(
    vocab_size=10, seq_len=8, n_layers=1, width=4, ffn_width=3, attention="local", n_local_heads=1,
    n_routing_heads=1, n_clusters=3, window=2, block=2, lookback=1, local_max_distance=3,
    routing_max_distance=4)


def but(**changes):
    return dataclasses.replace(LOCAL, **changes).validate()


# Attention: 14 D = 28 FLOP for each head and key. Where keys are queries, the routing head has no
# columns in w_k: 8 entries less, 148.
@pytest.mark.parametrize("cfg, flops", [
    (LOCAL, 6 * 156 + 28 * 2 * 4),                          # a block and the one before: 4 keys
    (but(lookback=0), 6 * 156 + 28 * 2 * 2),
    (but(attention="full"), 6 * 156 + 28 * 2 * 8),          # all of T
    (but(attention="routing"), 6 * 148 + 28 * (3 + 4)),     # causal: 3 W / 2 = 3; and a local head
    (but(attention="routing", share_qk=False), 6 * 156 + 28 * (6 + 4)),
    (but(attention="routing", routing="random"), 6 * 148 + 28 * (3 + 4)),
    (but(attention="routing", routing="topk"), 6 * 148 + 28 * (1.5 + 4)),  # K W^2 / T = 12 / 8
    (but(attention="routing", n_layers=2, full_layers=(0,)),
     # embedding and output 56, a full layer 64 + 36, a mixed one 56 + 36
     6 * (56 + 100 + 92) + 28 * (2 * 8 + 3 + 4)),
    (but(attention="routing", n_layers=3, routing_layers=(-1,)),
     6 * (56 + 2 * 100 + 92) + 28 * (2 * 2 * 4 + 3 + 4)),
    (but(ffn="swiglu"), 6 * 156 + 28 * 2 * 4),
    (but(ffn="relu"), 6 * 144 + 28 * 2 * 4),                # two matrices of 12; biases: no product
    # E 5: embed.w and output.w_embed 20 each; tied, the table 10 x 5 is the output matrix
    (but(embed_width=5, tie_embedding=True), 6 * (20 + 64 + 36 + 20 + 50) + 28 * 2 * 4),
    (but(embed_width=5), 6 * (20 + 64 + 36 + 20 + 50) + 28 * 2 * 4),
    (but(input_tokens=3), 6 * (156 + 32) + 28 * 2 * 4),
    (but(ngram_rows=9), 6 * (156 + 4) + 28 * 2 * 4),        # its table of width 1 is looked up
    # images: tables are looked up, classes and positions too; output 4 x 256, ReLU 24
    (but(kind="image", image_size=2, seq_len=12, vocab_size=256, n_classes=7, ffn="relu"),
     6 * (64 + 24 + 1024) + 28 * 2 * 4),
], ids=str)
def test_flops_per_token(cfg, flops):
    assert flops_per_token(cfg) == flops


# embed 40 + 16 + 4, two norms of the layer 8 each, attention 64 and two tables 7 x 2, feed-forward
# 36, last norm 8, output 40 + 10
N = 262
LAYER = 8 + 64 + 28 + 8 + 36


@pytest.mark.parametrize("cfg, n", [
    (LOCAL, N),
    (but(n_layers=3), N + 2 * LAYER),
    (but(attention="full"), N),
    (but(attention="routing"), N - 8 + 2 * 9 * 2),          # tables of both kinds
    (but(attention="routing", share_qk=False), N + 2 * 9 * 2),
    (but(attention="routing", n_layers=2, full_layers=(1,)), N + LAYER - 8 + 2 * 9 * 2),
    (but(ffn="relu"), N - 36 + 12 + 3 + 12 + 4),
    (but(norm="post"), N - 8),
    (but(local_max_distance=0), N - 28),
    (but(tie_embedding=True), N - 40),
    (but(embed_width=5), N + 10 + 4 + 25 + 10),            # table, embed.w, w_embed and b_embed, w
    (but(input_tokens=3), N + 2 * 16),
    (but(ngram_rows=9), N + 9 + 4),
    (but(kind="image", image_size=2, seq_len=12, vocab_size=256, n_classes=7),
     # tables 3 x 256 x 4, positions 2 x 12 twice, classes 28; output 4 x 256 + 256
     3072 + 24 + 24 + 28 + LAYER + 8 + 1024 + 256),
], ids=str)
def test_n_parameters(cfg, n):
    assert n_parameters(cfg) == n


def recipe(**changes):
    return TrainConfig(**{"optimizer": "adamw"} | changes).validate()


# Copies of the parameters: themselves, gradients, AdamW's two moments, and a gradient buffer for
# every part at work but the first of the step. A token keeps 10 C + 3 M = 49 entries in a layer.
@pytest.mark.parametrize("cfg, train, entries", [
    (LOCAL, recipe(batch=2), 5 * N + 49 * 16),
    (LOCAL, recipe(batch=2, optimizer="adafactor"), 3 * N + 49 * 16),
    (LOCAL, recipe(batch=2, optimizer="muon"), 4 * N + 49 * 16),  # second moments of few
    (LOCAL, recipe(batch=2, parts=1), 4 * N + 49 * 16),
    (LOCAL, recipe(batch=8, parts=4), 7 * N + 49 * 64),
    (LOCAL, recipe(batch=1, parts=2), 4 * N + 49 * 8),      # no more parts than windows
    (LOCAL, recipe(batch=2, accumulate=5), 6 * N + 49 * 16),   # later passes start with a buffer
    (LOCAL, recipe(batch=1, accumulate=2, parts=1), 5 * N + 49 * 8),
    (LOCAL, recipe(batch=1, accumulate=2, parts=4), 5 * N + 49 * 8),
    (but(n_layers=3), recipe(batch=2), 5 * (N + 2 * LAYER) + 3 * 49 * 16),
    # one layer at a time, and the inputs of all
    (but(n_layers=3), recipe(batch=2, recompute=True),
     5 * (N + 2 * LAYER) + (49 + 3 * 4) * 16),
], ids=str)
@pytest.mark.parametrize("precision, size", [("float32", 4), ("float64", 8)])
def test_step_bytes(cfg, train, entries, precision, size):
    train = dataclasses.replace(train, precision=precision)
    assert step_bytes(cfg, train) == size * entries


def test_step_bytes_of_a_gpu():
    """MiB that an H100 gave, in float32 and bf16: benchmarks/results/gpu-h100.md."""
    common = {"vocab_size": 256, "ffn": "geglu"}
    small = ModelConfig(**common, seq_len=1024, width=256, ffn_width=1024, n_layers=4)
    large = ModelConfig(**common, seq_len=4096, width=512, ffn_width=2048, n_layers=6)
    released = ModelConfig(**{name: value for name, value in preset("enwik8", "released").items()
                              if name in ModelConfig.__dataclass_fields__})
    for cfg, batch, *measured in (
            (released, 1, 9018, 6476), (large, 1, 1016, 626), (small, 16, 1458, 866)):
        train = recipe(batch=batch, parts=1)
        for precision, mib in zip((Precision(), Precision("bf16", "bfloat16")), measured,
                                  strict=True):
            assert 0.6 < mib * 2**20 / step_bytes(cfg, train, precision) < 1.3


@pytest.mark.parametrize("changes, recipe", [
    ({}, {}), ({"n_layers": 8}, {}), ({}, {"recompute": True}), ({}, {"accumulate": 3}),
    ({"attention": "full"}, {"optimizer": "adafactor"})], ids=str)
def test_step_bytes_against_a_step(changes, recipe):
    """What NumPy holds at its most is about the estimate, and never above twice that.

    It may be below: the parts run on threads, which need not be at their peaks together.
    """
    model = ModelConfig(**dict(seq_len=256, width=64, ffn_width=128, n_layers=4) | changes)
    train = TrainConfig(**{"optimizer": "adamw"} | recipe)
    ids = np.random.default_rng(0).integers(0, 256, (train.batch * train.accumulate, 256))
    tracemalloc.start()
    try:
        state = new_state(model, train, np)
        train_step(state, np.empty_like(state.flat), cut(ids, None, model, train, np), model, train)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.8 < peak / step_bytes(model, train) < 2


@pytest.mark.parametrize("cfg, told", [
    (but(shift_keys=True), "local heads only"),
    (but(attention="full", shift_keys=True), "full attention, shifted keys"),
    (but(attention="routing"), "routing causal"),
    (but(attention="routing", share_qk=False, n_probes=2), "routing causal, own keys, 2 probes"),
    (but(attention="routing", routing="topk", shift_keys=True), "routing topk, shifted keys")])
def test_how_a_model_attends(cfg, told):
    assert mode(cfg) == told
