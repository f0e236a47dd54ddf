"""Configuration: frozen dataclasses whose fields carry their help, bounds and choices.

`ModelConfig` says what the network is, `TrainConfig` how it is trained. `train.py` builds its flags
from the fields, and a checkpoint stores both as JSON. Choices come from the tables that the code
looks them up in (feed-forward layers, kinds of head, optimizers, schedules), which is why this file
stands above those: a new row is a new choice.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from rt_scratch.errors import UserError
from rt_scratch.heads import KINDS
from rt_scratch.kmeans import MAX_CLUSTERS
from rt_scratch.layers import FEED_FORWARDS
from rt_scratch.optim import OPTIMIZERS, SCHEDULES

PRECISIONS = ("auto", "float32", "float64", "tf32", "bf16", "fp16")


def _field(default, text, choices=(), least=None, most=None):
    """`choices`: names, a table whose keys they are, or a function that gives them."""
    return field(default=default, metadata={
        "help": text, "choices": choices, "least": least, "most": most})


def _dropout(text):
    return _field(0.0, text, least=0, most=0.999)


@dataclass(frozen=True)
class ModelConfig:
    """The network. Letters: see `rt_scratch/__init__.py`."""

    # input and output
    kind: str = _field("text", "what the tokens are", ("text", "image"))
    vocab_size: int = _field(256, "V, number of token values", least=1)
    seq_len: int = _field(512, "T, tokens per training window", least=1)
    image_size: int = _field(0, "pixels per side of a square RGB image (0: text)", least=0)
    n_classes: int = _field(0, "classes to condition on; 0: unconditional", least=0)
    pad_id: int = _field(-1, "targets with this id are not scored; -1: every token counts")
    # size
    n_layers: int = _field(4, "L, number of blocks", least=1, most=1024)  # streams of dropout
    width: int = _field(128, "C, width of the residual stream", least=1)
    embed_width: int = _field(0, "E, width of the token table; 0: same as width (text)", least=0)
    input_tokens: int = _field(1, "tokens whose embeddings the input layer sees at each position "
                                  "(text; small presets: 3)", least=1, most=64)
    ngram_rows: int = _field(0, "rows, best a prime number, of a table that the n-gram of the "
                                "input tokens is looked up in; 0: none (text; stdlib, own "
                                "text, enwik8: 6763)", least=0)
    ffn: str = _field("geglu", "feed-forward layer", FEED_FORWARDS)
    ffn_width: int = _field(384, "M, hidden width of the feed-forward layer", least=1)
    norm: str = _field("pre", "where LayerNorm stands: x + f(LN(x)) or LN(x + f(x))",
                       ("pre", "post"))
    tie_embedding: bool = _field(False, "output matrix = token table transposed (text)")
    timing_signal: bool = _field(False, "add sinusoidal absolute positions (text)")
    # attention
    attention: str = _field("routing", "ablation: all heads of one kind that does not route, such "
                                       "as local or full causal attention",
                            lambda: ("routing", *(k for k in KINDS if not KINDS[k].routes)))
    n_local_heads: int = _field(2, "heads with local attention, per layer", least=0)
    n_routing_heads: int = _field(2, "heads with routing attention, in routing layers", least=0)
    routing_layers: tuple[int, ...] = _field(
        (), "layers with routing heads, such as 2,3 or, from the end and with =, "
            "--routing-layers=-2,-1; empty: all. Elsewhere these heads are local")
    full_layers: tuple[int, ...] = _field(
        (), "layers in which all heads have full causal attention, among routing layers")
    routing: str = _field("causal", "causal: nothing leaks; topk: the paper, membership depends "
                                    "on later tokens; random: control",
                           lambda: (k for k in KINDS if KINDS[k].routes))
    share_qk: bool = _field(True, "routing heads use their queries as keys")
    shift_keys: bool = _field(False, "routing and full heads: the value of a position has the key "
                                     "of the one before, so that a query finds what followed "
                                     "tokens like its own (small presets: on)")
    n_clusters: int = _field(8, "K, centroids per routing head", least=1, most=MAX_CLUSTERS)
    n_probes: int = _field(1, "R, clusters that a query of causal heads looks into", least=1)
    window: int = _field(64, "W, tokens that attend to each other in a cluster", least=1)
    block: int = _field(16, "S, queries per block of local attention", least=1)
    lookback: int = _field(1, "earlier blocks that a local block sees", least=0)
    local_max_distance: int = _field(
        17, "relative positions (Shaw et al. 2018) of local heads, clipped at this distance; 0: "
        "none", least=0)
    routing_max_distance: int = _field(
        65, "the same for routing heads, where distance is the rank in the cluster; 0: none",
        least=0)
    # k-means
    centroid_decay: float = _field(0.999, "decay of the moving averages of online k-means",
                                   least=0, most=1)
    commitment: float = _field(1e-4, "beta, weight of the commitment loss", least=0)
    seed_random: int = _field(0, "seed of the memberships of random heads", least=0)
    init_gain: float = _field(1.0, "gain of the uniform initialiser (released: 0.2)", least=0)
    init_out_scale: float = _field(
        0.0, "factor of the last matrix of each sublayer at the start (released: 1); 0: every "
             "block begins as the identity", least=0)
    init_frequency: float = _field(
        0.0, "images: values begin as cosines of their intensity, with frequencies N(0, this^2), "
             "so that similar ones are alike; 0: at random", least=0)
    # dropout
    embed_dropout: float = _dropout("dropout on token embeddings")
    attention_dropout: float = _dropout("dropout on attention weights")
    ffn_dropout: float = _dropout("dropout on the feed-forward hidden layer")
    residual_dropout: float = _dropout("dropout on sublayer outputs and on the first input")
    target_dropout: float = _dropout("share of input tokens replaced by id 0 (text)")

    @property
    def n_heads(self) -> int:
        return self.n_local_heads + self.n_routing_heads

    @property
    def head_width(self) -> int:
        """D, the width of a head."""
        return self.width // self.n_heads

    @property
    def ngram_width(self) -> int:
        """Width of the table of n-grams: a quarter of E, 0 without one."""
        return -(-self.token_width // 4) if self.ngram_rows else 0

    @property
    def token_width(self) -> int:
        """E, the width of the token table."""
        return self.embed_width or self.width

    def layer_heads(self, layer: int) -> tuple[tuple[str, int], ...]:
        """The heads of a layer: (kind, how many), routing heads first (the released order)."""
        if self.attention != "routing":
            return ((self.attention, self.n_heads),)
        if layer in self._layers(self.full_layers):
            return (("full", self.n_heads),)
        if self.routing_layers and layer not in self._layers(self.routing_layers):
            return (("local", self.n_heads),)
        heads = (self.routing, self.n_routing_heads), ("local", self.n_local_heads)
        return tuple((kind, n) for kind, n in heads if n)

    def _layers(self, numbers):
        return {i % self.n_layers for i in numbers}

    def routing_heads(self, layer: int) -> int:
        """How many heads of a layer have centroids."""
        return sum(n for kind, n in self.layer_heads(layer) if KINDS[kind].routes)

    def kinds(self) -> set[str]:
        """The kinds of head in the model."""
        return {kind for i in range(self.n_layers) for kind, _ in self.layer_heads(i)}

    def validate(self) -> ModelConfig:
        """Raise UserError on a configuration that cannot run; else return it."""
        _check_fields(self)
        if self.n_heads < 1:
            _fail("--n-local-heads and --n-routing-heads are both 0: give at least one head")
        if self.width % self.n_heads:
            low = self.width - self.width % self.n_heads
            _fail(f"--width {self.width}: must be a multiple of the {self.n_heads} heads, such as "
                  f"{low or self.n_heads} or {low + self.n_heads}")
        for name in ("routing_layers", "full_layers"):
            for i in getattr(self, name):
                if not -self.n_layers <= i < self.n_layers:
                    _fail(f"--{flag(name)} {i}: the layers are 0 to {self.n_layers - 1}")
        if both := self._layers(self.routing_layers) & self._layers(self.full_layers):
            _fail(f"--full-layers {min(both)}: is among --routing-layers too")
        if self.window > self.seq_len and "topk" in self.kinds():
            _fail(f"--window {self.window}: larger than --seq-len {self.seq_len}; each cluster "
                  "takes W of the T tokens")
        if self.n_probes > 1 and "causal" not in self.kinds():
            _fail(f"--n-probes {self.n_probes}: is for causal heads")
        if self.kind == "image":
            if self.seq_len != 3 * self.image_size ** 2:
                _fail(f"--image-size {self.image_size}: --seq-len must be 3 x size x size = "
                      f"{3 * self.image_size ** 2}, not {self.seq_len}")
            if (self.tie_embedding or self.timing_signal or self.embed_width
                    or self.input_tokens > 1 or self.ngram_rows):
                _fail("--tie-embedding, --timing-signal, --embed-width, --input-tokens and "
                      "--ngram-rows are for text, not images")
        elif self.image_size or self.n_classes or self.init_frequency:
            _fail("--image-size, --n-classes and --init-frequency are for images, not text")
        return self


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    batch: int = _field(2, "windows per forward pass", least=1)
    accumulate: int = _field(1, "forward passes per optimizer step", least=1)
    parts: int = _field(2, "parts a batch is cut into on a CPU, one core each", least=1)
    recompute: bool = _field(False, "store only block inputs and compute the rest again: less "
                                    "memory, the same numbers")
    steps: int = _field(2000, "optimizer steps", least=1)
    optimizer: str = _field("muon", "optimizer", OPTIMIZERS)
    lr: float = _field(4e-3, "peak learning rate")
    schedule: str = _field("linear", "linear: linear warm-up, then to 0; cosine: the same, then to "
                                     "10 %%; constant: the same, then flat; rsqrt: the released "
                                     "one, flat for warmup steps, then lr sqrt(warmup / step)",
                           SCHEDULES)
    warmup: int = _field(0, "warm-up steps (see schedule)", least=0)
    weight_decay: float = _field(0.0, "decoupled decay (adamw, muon), L2 loss (adafactor)", least=0)
    clip: float = _field(1.0, "largest global norm of the gradient; 0: no clipping", least=0)
    precision: str = _field(
        "auto", "arithmetic of the network. auto: on a GPU that has it bf16, or tf32 where the "
                "packages for bf16 are missing, else float32. tf32, bf16 and fp16 (with loss "
                "scaling) are for GPUs; parameters, their gradients, statistics and centroids stay "
                "float32",
        PRECISIONS)
    cuda_graph: bool = _field(True, "on a GPU, record a step as one CUDA graph and repeat it, "
                                    "instead of starting a thousand kernels or more from Python; "
                                    "where that is possible: not with fp16, float64, several "
                                    "processes, or causal heads with several --n-probes or keys of "
                                    "their own")
    seed: int = _field(0, "seed of weights, data order and dropout", least=0)
    eval_every: int = _field(500, "steps between evaluations; 0: only at the end", least=0)
    eval_windows: int = _field(64, "windows per evaluation, evenly spread over the "
                                   "split; 0: the whole split", least=0)
    sample_every: int = _field(0, "steps between samples, drawn at the next evaluation; 0: text at "
                                  "each, pictures only at the end of the run", least=0)
    log_every: int = _field(20, "steps between log lines", least=1)

    @property
    def dtype(self) -> str:
        """The dtype of parameters, gradients, optimizer state and centroids."""
        return "float64" if self.precision == "float64" else "float32"

    def validate(self) -> TrainConfig:
        """Raise UserError on settings that cannot run; else return them."""
        _check_fields(self)
        if not self.lr > 0:
            _fail(f"--lr {self.lr}: must be positive")
        return self


def _check_fields(config):
    for f in dataclasses.fields(config):
        value, rules = getattr(config, f.name), f.metadata
        if isinstance(value, float) and not math.isfinite(value):
            _fail(f"--{flag(f.name)} {value}: must be a finite number")
        if isinstance(value, int) and abs(value) >= 2 ** 31:
            _fail(f"--{flag(f.name)} {value}: must be below 2^31")
        if (names := choices(f)) and value not in names:
            _fail(f"--{flag(f.name)} {value}: choose from {', '.join(names)}")
        if rules["least"] is not None and value < rules["least"]:
            _fail(f"--{flag(f.name)} {value}: must be at least {rules['least']}")
        if rules["most"] is not None and value > rules["most"]:
            _fail(f"--{flag(f.name)} {value}: must be at most {rules['most']}")


def choices(f: dataclasses.Field) -> tuple[str, ...]:
    """The values that a field may take, from the rows that its table has now; () for any value."""
    names = f.metadata["choices"]
    return tuple(names() if callable(names) else names)


def flag(name: str) -> str:
    """A field's name on the command line, without the dashes in front."""
    return name.replace("_", "-")


def _fail(message: str):
    raise UserError(message)


def to_json(config) -> dict:
    """A dataclass as plain JSON values."""
    return {k: list(v) if isinstance(v, tuple) else v
            for k, v in dataclasses.asdict(config).items()}


def from_json(cls, values: dict):
    """The inverse of `to_json`, validated; UserError on fields this version does not know."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict) or set(values) - set(known):
        unknown = sorted(set(values) - set(known)) if isinstance(values, dict) else values
        _fail(f"the configuration has unknown fields {unknown}: it was written by another version "
              "of rt_scratch")
    if "share_qk" in values and "shift_keys" not in values:  # from before `causal` had probes
        if values.get("routing") == "causal" and not values["share_qk"]:
            _fail("the configuration has causal heads with keys of their own as an earlier version "
                  "of rt_scratch had them: train again")
        values = values | {"n_probes": 1}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in values.items():
        if not _same_type(value, known[name].default):
            _fail(f"the configuration has {name} {value!r}, which is no "
                  f"{type(known[name].default).__name__}")
    return cls(**values).validate()


def _same_type(value, default):
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(type(i) is int for i in value)
    return type(value) is type(default) or type(value) is int and type(default) is float
