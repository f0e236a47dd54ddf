"""Configuration: frozen dataclasses, their validation, and the presets.

`ModelConfig` says what the network is, `TrainConfig` how it is trained. Every field carries its
help text; `train.py` builds its flags from them, and a checkpoint stores both as JSON.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from rt_scratch.errors import UserError

ROUTING_MODES = ("causal", "topk", "random")
ATTENTION_KINDS = ("routing", "local", "full")
MAX_CLUSTERS = 1024  # per head: the GPU kernels count them in the memory of one block
PRECISIONS = ("auto", "float32", "float64", "tf32", "bf16", "fp16")


def _field(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """The network. Letters: see `rt_scratch/__init__.py`."""

    # input and output
    kind: str = _field("text", "what the tokens are", ("text", "image"))
    vocab_size: int = _field(256, "V, number of token values")
    seq_len: int = _field(512, "T, tokens per training window")
    image_size: int = _field(0, "pixels per side of a square RGB image (0: text)")
    n_classes: int = _field(0, "classes to condition on; 0: unconditional")
    pad_id: int = _field(-1, "targets with this id are not scored; -1: every token counts")
    # size
    n_layers: int = _field(4, "L, number of blocks")
    width: int = _field(128, "C, width of the residual stream")
    embed_width: int = _field(0, "E, width of the token table; 0: same as width (text)")
    ffn: str = _field("geglu", "feed-forward layer", ("geglu", "relu"))
    ffn_width: int = _field(384, "M, hidden width of the feed-forward layer")
    norm: str = _field("pre", "where LayerNorm stands: x + f(LN(x)) or LN(x + f(x))",
                       ("pre", "post"))
    tie_embedding: bool = _field(False, "output matrix = token table transposed (text)")
    timing_signal: bool = _field(False, "add sinusoidal absolute positions (text)")
    # attention
    attention: str = _field("routing", "ablation: all heads local, or full causal attention",
                            ATTENTION_KINDS)
    n_local_heads: int = _field(2, "heads with local attention, per layer")
    n_routing_heads: int = _field(2, "heads with routing attention, in routing layers")
    routing_layers: tuple[int, ...] = _field(
        (), "layers with routing heads, such as 2,3 or, from the end and with =, "
            "--routing-layers=-2,-1; empty: all. Elsewhere these heads are local")
    routing: str = _field("causal", "causal: nothing leaks; topk: the paper, membership depends "
                                    "on later tokens; random: control", ROUTING_MODES)
    share_qk: bool = _field(True, "routing heads use their queries as keys")
    n_clusters: int = _field(8, "K, centroids per routing head")
    window: int = _field(64, "W, tokens that attend to each other in a cluster")
    block: int = _field(16, "S, queries per block of local attention")
    lookback: int = _field(1, "earlier blocks that a local block sees")
    local_max_distance: int = _field(
        17, "Shaw relative positions of local heads, clipped at this distance; 0: none")
    routing_max_distance: int = _field(
        65, "the same for routing heads, where distance is the rank in the cluster; 0: none")
    # k-means
    centroid_decay: float = _field(0.999, "decay of the moving averages of online k-means")
    commitment: float = _field(1e-4, "beta, weight of the commitment loss")
    seed_random: int = _field(0, "seed of the memberships in routing mode random")
    init_gain: float = _field(1.0, "gain of the uniform initialiser (released: 0.2)")
    # dropout
    embed_dropout: float = _field(0.0, "dropout on token embeddings")
    attention_dropout: float = _field(0.0, "dropout on attention weights")
    ffn_dropout: float = _field(0.0, "dropout on the feed-forward hidden layer")
    residual_dropout: float = _field(0.0, "dropout on sublayer outputs and on the first input")
    target_dropout: float = _field(0.0, "share of input tokens replaced by id 0 (text)")

    @property
    def n_heads(self) -> int:
        return self.n_local_heads + self.n_routing_heads

    @property
    def head_width(self) -> int:
        return self.width // self.n_heads

    @property
    def token_width(self) -> int:
        """E, the width of the token table."""
        return self.embed_width or self.width

    def heads(self, layer: int) -> tuple[int, int]:
        """(routing heads, local heads) of a layer."""
        routed = {i % self.n_layers for i in self.routing_layers} or range(self.n_layers)
        n = self.n_routing_heads if self.attention == "routing" and layer in routed else 0
        return n, self.n_heads - n

    def validate(self) -> ModelConfig:
        """Raise UserError on a configuration that cannot run; else return it."""
        _check_numbers(self)
        for name in ("vocab_size", "seq_len", "n_layers", "width", "ffn_width", "n_clusters",
                     "window", "block"):
            if getattr(self, name) < 1:
                _fail(f"--{_flag(name)} {getattr(self, name)}: must be at least 1")
        for name in ("image_size", "n_classes", "embed_width", "n_local_heads", "n_routing_heads",
                     "lookback", "local_max_distance", "routing_max_distance", "commitment"):
            if getattr(self, name) < 0:
                _fail(f"--{_flag(name)} {getattr(self, name)}: must not be negative")
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                _fail(f"--{_flag(f.name)} {getattr(self, f.name)}: choose from "
                      f"{', '.join(choices)}")
            if f.name.endswith("dropout") and not 0 <= getattr(self, f.name) <= 0.999:
                _fail(f"--{_flag(f.name)} {getattr(self, f.name)}: must be from 0 to 0.999")
        if self.n_clusters > MAX_CLUSTERS:
            _fail(f"--n-clusters {self.n_clusters}: at most {MAX_CLUSTERS}")
        if self.n_heads < 1:
            _fail("--n-local-heads and --n-routing-heads are both 0: give at least one head")
        if self.width % self.n_heads:
            low = self.width - self.width % self.n_heads
            _fail(f"--width {self.width}: must be a multiple of the {self.n_heads} heads, such as "
                  f"{low or self.n_heads} or {low + self.n_heads}")
        for i in self.routing_layers:
            if not -self.n_layers <= i < self.n_layers:
                _fail(f"--routing-layers {i}: the layers are 0 to {self.n_layers - 1}")
        if not 0 <= self.centroid_decay <= 1:
            _fail(f"--centroid-decay {self.centroid_decay}: must be in [0, 1]")
        if self.window > self.seq_len and self.routing == "topk" and self.heads_route():
            _fail(f"--window {self.window}: larger than --seq-len {self.seq_len}; each cluster "
                  "takes W of the T tokens")
        if self.kind == "image":
            if self.seq_len != 3 * self.image_size ** 2:
                _fail(f"--image-size {self.image_size}: --seq-len must be 3 x size x size = "
                      f"{3 * self.image_size ** 2}, not {self.seq_len}")
            if self.tie_embedding or self.timing_signal or self.embed_width:
                _fail("--tie-embedding, --timing-signal and --embed-width are for text, not "
                      "images")
        elif self.image_size or self.n_classes:
            _fail("--image-size and --n-classes are for images, not text")
        return self

    def heads_route(self) -> bool:
        """True when some layer has routing heads."""
        return any(self.heads(i)[0] for i in range(self.n_layers))


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    batch: int = _field(2, "windows per forward pass")
    accumulate: int = _field(1, "forward passes per optimizer step")
    parts: int = _field(2, "parts a batch is cut into on a CPU, one thread each")
    recompute: bool = _field(False, "store only block inputs and compute the rest again: less "
                                    "memory, the same numbers")
    steps: int = _field(2400, "optimizer steps")
    optimizer: str = _field("adamw", "optimizer", ("adamw", "adafactor"))
    lr: float = _field(3e-3, "peak learning rate")
    schedule: str = _field("cosine", "cosine: linear warm-up, then to 10 %%; constant: linear "
                                     "warm-up; rsqrt: the released one, flat for warmup steps, "
                                     "then lr sqrt(warmup / step)",
                           ("cosine", "constant", "rsqrt"))
    warmup: int = _field(50, "warm-up steps (see schedule)")
    weight_decay: float = _field(0.0, "decoupled decay (adamw), L2 loss (adafactor)")
    clip: float = _field(1.0, "largest global norm of the gradient; 0: no clipping")
    precision: str = _field(
        "auto", "arithmetic of the network. auto: bf16 on a GPU that has it, else float32. tf32, "
                "bf16 and fp16 (with loss scaling) are for GPUs; parameters, their gradients, "
                "statistics and centroids stay float32", PRECISIONS)
    seed: int = _field(0, "seed of weights, data order and dropout")
    eval_every: int = _field(600, "steps between evaluations; 0: only at the end")
    eval_windows: int = _field(64, "windows per evaluation, evenly spread over the "
                                  "split; 0: the whole split")
    log_every: int = _field(20, "steps between log lines")

    @property
    def dtype(self) -> str:
        """Of parameters, gradients, optimizer state and centroids."""
        return "float64" if self.precision == "float64" else "float32"

    def validate(self) -> TrainConfig:
        """Raise UserError on settings that cannot run; else return them."""
        _check_numbers(self)
        for name in ("batch", "accumulate", "parts", "steps", "log_every"):
            if getattr(self, name) < 1:
                _fail(f"--{_flag(name)} {getattr(self, name)}: must be at least 1")
        for name in ("warmup", "weight_decay", "clip", "eval_every", "eval_windows", "seed"):
            if getattr(self, name) < 0:
                _fail(f"--{_flag(name)} {getattr(self, name)}: must not be negative")
        if not self.lr > 0:
            _fail(f"--lr {self.lr}: must be positive")
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                _fail(f"--{_flag(f.name)} {getattr(self, f.name)}: choose from "
                      f"{', '.join(choices)}")
        return self


def _check_numbers(config):
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            _fail(f"--{_flag(f.name)} {value}: must be a finite number")
        if isinstance(value, int) and abs(value) >= 2 ** 31:
            _fail(f"--{_flag(f.name)} {value}: must be below 2^31")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _fail(message: str):
    raise UserError(message)


def to_json(config) -> dict:
    """A dataclass as plain JSON values."""
    return {k: list(v) if isinstance(v, tuple) else v
            for k, v in dataclasses.asdict(config).items()}


def from_json(cls, values: dict):
    """The inverse of `to_json`; UserError on fields this version does not know."""
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := set(values) - known:
        _fail(f"the configuration has unknown fields {sorted(unknown)}: it was written by "
              "another version of rt_scratch")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
