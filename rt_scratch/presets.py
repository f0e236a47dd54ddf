"""Presets: the fields in which each dataset's recipes differ from the defaults of config.py.

`released` is what the authors' code sets; `released-12k` and `released-1k` are its settings for
other lengths, `released-local` those of its baselines without routing. `paper` exists where the
paper says something else; for CIFAR-10 there are the rows of its table 1, where `paper-HxL` has H
routing heads of 8 in the last L layers of 12. `small` is ours and fits a laptop; the default
dataset and text of your own use TEXT. A flag given on the command line wins over the preset.
"""

from __future__ import annotations

from rt_scratch.errors import UserError

_RELEASED_TEXT = dict(
    routing="topk", norm="post", residual_dropout=0.1, init_gain=0.2, init_out_scale=1.0,
    optimizer="adafactor", lr=0.01, schedule="rsqrt", warmup=10_000, clip=0.0, batch=1,
    steps=100_000, ffn="geglu",
)
_RELEASED_IMAGE = dict(
    _RELEASED_TEXT, ffn="relu", ffn_width=2048, residual_dropout=0.3, width=1024,
    local_max_distance=0, routing_max_distance=0,
)
# Not defaults of config.py, because the released models do without.
TEXT = dict(input_tokens=3, ngram_rows=6763, shift_keys=True)
_SMALL = dict(seq_len=1024, n_clusters=16)  # and the defaults of config.py
_SMALL_IMAGE = dict(  # a block is one row: it sees the row above
    shift_keys=True, lr=0.016, init_frequency=2.0, eval_windows=16, eval_every=250)

PRESETS: dict[str, dict[str, dict]] = {
    "enwik8": {
        "released": dict(
            _RELEASED_TEXT, seq_len=8192, n_layers=12, width=1024, ffn_width=3072,
            n_local_heads=4, n_routing_heads=4, n_clusters=16, window=512, block=256, lookback=1,
            local_max_distance=513, routing_max_distance=513),
        "released-12k": dict(
            _RELEASED_TEXT, seq_len=12288, n_layers=12, width=1024, ffn_width=3072,
            n_local_heads=4, n_routing_heads=4, n_clusters=48, window=256, block=128, lookback=1,
            local_max_distance=257, routing_max_distance=257),
        "small": dict(_SMALL, **TEXT, steps=1800, eval_every=600),
    },
    "wikitext103": {
        "released": dict(
            _RELEASED_TEXT, seq_len=4096, n_layers=14, width=1024, embed_width=256,
            ffn_width=3072, n_local_heads=8, n_routing_heads=8, n_clusters=8, window=512,
            block=256, lookback=1, local_max_distance=513, routing_max_distance=513,
            embed_dropout=0.4, attention_dropout=0.4, ffn_dropout=0.4, target_dropout=0.25,
            weight_decay=2e-5),
        "small": dict(_SMALL, embed_width=64, input_tokens=3, shift_keys=True, steps=1200,
                      eval_every=600),
    },
    "pg19": {
        "released": dict(
            _RELEASED_TEXT, seq_len=8192, n_layers=22, width=1032, ffn_width=4096,
            n_local_heads=6, n_routing_heads=2, routing_layers=(-1,), n_clusters=16, window=512,
            block=256, lookback=1, local_max_distance=513, routing_max_distance=513),
        "small": dict(_SMALL, vocab_size=8192, input_tokens=3, shift_keys=True, steps=1600,
                      eval_every=400),
    },
    "imagenet64": {
        "released": dict(
            _RELEASED_IMAGE, seq_len=12288, n_layers=24, n_local_heads=12, n_routing_heads=4,
            n_clusters=8, window=2048, block=256, lookback=1),
        "small": dict(
            _SMALL_IMAGE, seq_len=12288, batch=1, n_clusters=64, window=192, block=192,
            local_max_distance=384, routing_max_distance=192, steps=400, eval_every=100,
            eval_windows=4),
    },
    "cifar10": {
        "released": dict(
            _RELEASED_IMAGE, seq_len=3072, n_layers=12, n_local_heads=4, n_routing_heads=4,
            n_clusters=6, window=512, block=256, lookback=1),
        "small": dict(
            _SMALL_IMAGE, seq_len=3072, batch=2, n_clusters=32, window=96, block=96,
            local_max_distance=192, routing_max_distance=96, steps=1000),
    },
}
PRESETS["wikitext103"]["released-1k"] = dict(
    PRESETS["wikitext103"]["released"], seq_len=1024, n_layers=20, n_clusters=2, target_dropout=0.2)
PRESETS["enwik8"]["released-local"] = dict(
    PRESETS["enwik8"]["released"], n_layers=22, n_local_heads=8, n_routing_heads=0,
    attention_dropout=0.4, ffn_dropout=0.4)
PRESETS["wikitext103"]["released-local"] = dict(
    PRESETS["wikitext103"]["released"], n_local_heads=16, n_routing_heads=0)
PRESETS["pg19"]["released-local"] = dict(
    PRESETS["pg19"]["released"], n_layers=24, n_local_heads=8, n_routing_heads=0,
    routing_layers=())
PRESETS["enwik8"]["paper"] = dict(PRESETS["enwik8"]["released"], n_clusters=32, window=256)
PRESETS["wikitext103"]["paper"] = dict(
    PRESETS["wikitext103"]["released"], n_layers=10, n_clusters=16, window=256)
PRESETS["pg19"]["paper"] = dict(PRESETS["pg19"]["released"], routing_layers=(-2, -1))
for _heads in (2, 4, 8):
    for _layers in (2, 4, 8, 12):
        PRESETS["cifar10"][f"paper-{_heads}x{_layers}"] = dict(
            PRESETS["cifar10"]["released"], n_local_heads=8 - _heads, n_routing_heads=_heads,
            routing_layers=tuple(range(-_layers, 0)))
PRESETS["cifar10"]["paper-random"] = dict(PRESETS["cifar10"]["paper-4x8"], routing="random")
PRESETS["cifar10"]["paper-local"] = dict(PRESETS["cifar10"]["released"], attention="local")
PRESETS["cifar10"]["paper-full"] = dict(PRESETS["cifar10"]["released"], attention="full")


def preset(dataset: str, name: str) -> dict:
    """Field values of a preset; `small` by default."""
    table = PRESETS.get(dataset, {"small": TEXT})
    if name not in table:
        raise UserError(f"--preset {name}: {dataset} has {', '.join(table)}")
    return dict(table[name])
