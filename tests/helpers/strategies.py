"""What hypothesis draws: awkward sizes, seeds, and arrays that are not always contiguous."""

import dataclasses

from hypothesis import strategies as st

from rt_scratch.config import ModelConfig
from rt_scratch.heads import KINDS
from rt_scratch.layers import FEED_FORWARDS

ROUTING = tuple(name for name, kind in KINDS.items() if kind.routes)
OTHER = tuple(name for name, kind in KINDS.items() if not kind.routes)

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11])
widths = st.sampled_from([2, 3, 5, 8])       # a LayerNorm of width 1 has no gradient
lengths = st.sampled_from([1, 2, 3, 7, 8, 13, 16, 23])
layouts = st.sampled_from(["plain", "strided", "swapped"])


def normal(rng, shape, layout="plain"):
    """Normal numbers; `strided` has gaps, `swapped` has its last axes in the other order."""
    shape = tuple(shape)
    if layout == "strided" and shape:
        return rng.normal(size=(*shape[:-1], 2 * shape[-1]))[..., ::2]
    if layout == "swapped" and len(shape) > 1:
        return rng.normal(size=(*shape[:-2], shape[-1], shape[-2])).swapaxes(-1, -2)
    return rng.normal(size=shape)


@st.composite
def configs(draw, kinds=("text", "image"), routings=ROUTING, dropout=True):
    """Small models of every sort: every row of the tables, head counts, odd lengths, dropouts."""
    image = draw(st.sampled_from(kinds)) == "image"
    side = draw(st.sampled_from([1, 2, 3])) if image else 0
    t = 3 * side * side if image else draw(st.sampled_from([1, 2, 7, 16, 23]))
    heads = draw(st.sampled_from([(1, 2), (0, 2), (2, 0), (2, 1)]))
    routing = draw(st.sampled_from(routings))
    routing_layers, full_layers = draw(st.sampled_from(
        [((), ()), ((1,), ()), ((-2,), ()), ((), (0,)), ((), (-1,)), ((1,), (0,))]))
    rates = {f"{site}_dropout": draw(st.sampled_from([0.0, 0.2])) if dropout else 0.0
             for site in ("embed", "attention", "ffn", "residual")}
    if not image:
        rates["target_dropout"] = draw(st.sampled_from([0.0, 0.2])) if dropout else 0.0
    cfg = ModelConfig(
        kind="image" if image else "text", image_size=side, seq_len=t,
        vocab_size=256 if image else 11, n_classes=draw(st.sampled_from([0, 3])) if image else 0,
        pad_id=draw(st.sampled_from([-1, 0])), n_layers=2, width=4 * sum(heads),
        embed_width=0 if image else draw(st.sampled_from([0, 5])),
        input_tokens=1 if image else draw(st.sampled_from([1, 3])),
        ngram_rows=0 if image else draw(st.sampled_from([0, 7])),
        tie_embedding=not image and draw(st.booleans()),
        timing_signal=not image and draw(st.booleans()),
        ffn=draw(st.sampled_from([*FEED_FORWARDS])), ffn_width=5,
        norm=draw(st.sampled_from(["pre", "post"])),
        attention=draw(st.sampled_from(["routing"] * len(OTHER) + [*OTHER])),
        n_local_heads=heads[0], n_routing_heads=heads[1],
        routing_layers=routing_layers, full_layers=full_layers, routing=routing,
        share_qk=draw(st.booleans()), shift_keys=draw(st.booleans()),
        n_clusters=draw(st.sampled_from([1, 3])),
        window=draw(st.sampled_from([1, 4, 30])) if routing != "topk" else min(4, t),
        block=draw(st.sampled_from([1, 4, 30])), lookback=draw(st.sampled_from([0, 1, 2])),
        local_max_distance=draw(st.sampled_from([0, 3])),
        routing_max_distance=draw(st.sampled_from([0, 3])), commitment=0.3, **rates).validate()
    if "causal" in cfg.kinds():
        cfg = dataclasses.replace(cfg, n_probes=draw(st.sampled_from([1, 2])))
    return cfg
