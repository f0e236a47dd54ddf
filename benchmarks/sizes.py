"""The three sizes of the race, as configurations of this project."""

from rt_scratch.config import ModelConfig

SIZES = {  # name: (configuration, batch). GEGLU of hidden width 4 C, half of the heads local, bytes
    "1.1M": (dict(width=128, n_layers=4, heads=4, window=64, seq_len=512), 8),
    "4.2M": (dict(width=256, n_layers=4, heads=4, window=128, seq_len=1024), 4),
    "24.7M": (dict(width=512, n_layers=6, heads=8, window=128, seq_len=4096), 1),
}


def model(name: str, **changes) -> tuple[ModelConfig, int]:
    """(ModelConfig, batch) of a size; K = T / W, relative positions in every head."""
    size, batch = SIZES[name]
    size = dict(size)
    heads, window = size.pop("heads"), size["window"]
    fields = dict(
        size, ffn_width=4 * size["width"], n_local_heads=heads // 2, n_routing_heads=heads // 2,
        block=window, n_clusters=max(1, size["seq_len"] // window), local_max_distance=window,
        routing_max_distance=window)
    return ModelConfig(**fields | changes).validate(), batch
