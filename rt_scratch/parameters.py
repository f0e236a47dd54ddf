"""Parameters: one table of names and shapes, one flat buffer, a tree of views of it.

A network that computes in half precision takes a rounded copy of the buffer instead, laid out for
matrix products.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator, Philox

from rt_scratch.config import ModelConfig
from rt_scratch.dispatch import accelerated, array_module
from rt_scratch.heads import head_groups, key_heads
from rt_scratch.kmeans import Centroids
from rt_scratch.layers import FEED_FORWARDS, normalize


class Leaf(NamedTuple):
    """One parameter: its name, its shape, its range of the flat buffer, its initialiser."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    init: str  # a name of INITIALISERS


def parameter_table(cfg: ModelConfig) -> list[Leaf]:
    """Every parameter of the model, in the order of the flat buffer."""
    c, e = cfg.width, cfg.token_width
    table: list[Leaf] = []

    def add(name, *shape, init="uniform"):
        start = table[-1].stop if table else 0
        table.append(Leaf(name, shape, start, start + math.prod(shape), init))

    def add_norm(name):
        add(f"{name}.gain", c, init="ones")
        add(f"{name}.bias", c, init="zeros")

    if cfg.kind == "text":
        add("embed.table", cfg.vocab_size, e)
        add("embed.w", cfg.input_tokens * e + cfg.ngram_width, c)
        add("embed.b", c, init="zeros")
        if cfg.ngram_rows:
            add("embed.ngrams", cfg.ngram_rows, cfg.ngram_width)
    else:
        add("embed.table", 3 * cfg.vocab_size, c,
            init="cosines" if cfg.init_frequency else "uniform")
        add("embed.rows", cfg.image_size, 1, 3 * c, init="positions")
        add("embed.columns", 1, cfg.image_size, 3 * c, init="positions")
        if cfg.n_classes:
            add("embed.classes", cfg.n_classes, c)
    for i in range(cfg.n_layers):
        add_norm(f"layers.{i}.norm_attention")
        add(f"layers.{i}.attention.w_q", c, c)
        if n_keys := key_heads(cfg, i):
            add(f"layers.{i}.attention.w_k", c, n_keys * cfg.head_width)
        add(f"layers.{i}.attention.w_v", c, c)
        add(f"layers.{i}.attention.w_o", c, c)
        own = {}
        for group in reversed(head_groups(cfg, i)):
            own |= group.kind.parameters(cfg)
        for name, shape in own.items():
            add(f"layers.{i}.attention.{name}", *shape)
        add_norm(f"layers.{i}.norm_ffn")
        for name, shape in FEED_FORWARDS[cfg.ffn].parameters(c, cfg.ffn_width).items():
            add(f"layers.{i}.ffn.{name}", *shape, init="uniform" if len(shape) > 1 else "zeros")
    if cfg.norm == "pre":
        add_norm("norm")
    if cfg.kind == "text" and e != c:
        add("output.w_embed", c, e)
        add("output.b_embed", e, init="zeros")
    if not cfg.tie_embedding:
        add("output.w", e, cfg.vocab_size,
            init="cosines, transposed" if cfg.init_frequency else "uniform")
    add("output.b", cfg.vocab_size, init="zeros")
    return table


def views(flat, table: list[Leaf]) -> dict:
    """The tree of the flat buffer: tree['layers'][0]['attention']['w_q'] is a view of it."""
    return _tree(table, lambda leaf: flat[leaf.start : leaf.stop].reshape(leaf.shape))


def _tree(table, array_of):
    tree: dict[str, Any] = {}
    for leaf in table:
        *path, last = leaf.name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(int(part) if part.isdigit() else part, {})
        node[last] = array_of(leaf)
    return tree


class Place(NamedTuple):
    """Where a matrix stands in the compute copy, in entries; leading axes count as rows."""

    source: int    # in the flat buffer
    rows: int
    columns: int
    start: int     # a multiple of LEAF
    stride: int    # from row to row, a multiple of ROW


LEAF, ROW = 64, 8  # entries: 128 and 16 bytes of half precision, what products read at a time


@functools.lru_cache(maxsize=8)
def compute_layout(table: tuple[Leaf, ...]) -> tuple[dict[str, Place], int]:
    """The places of the leaves of two or more axes, by name, and the size of all."""
    places, size = {}, 0
    for leaf in table:
        if len(leaf.shape) > 1:
            rows, columns = math.prod(leaf.shape[:-1]), leaf.shape[-1]
            place = Place(leaf.start, rows, columns, size, columns + -columns % ROW)
            places[leaf.name] = place
            size += rows * place.stride + -rows * place.stride % LEAF
    return places, size


def compute_copy(flat, table: list[Leaf], dtype) -> dict:
    """The parameters for a network that computes in `dtype`: a tree like `views`.

    Matrices are rounded to dtype, and each matrix and each of its rows begins where a GPU's matrix
    products read fastest, whatever its size. Vectors, the gains and biases, are views of the
    buffer, unrounded. Without a dtype all leaves are such views.
    """
    if dtype is None:
        return views(flat, table)
    places, size = compute_layout(tuple(table))
    rounded = round_matrices(flat, tuple(places.values()), size, dtype)

    def array_of(leaf):
        if len(leaf.shape) < 2:
            return flat[leaf.start : leaf.stop].reshape(leaf.shape)
        _, rows, columns, start, stride = places[leaf.name]
        wide = rounded[start : start + rows * stride].reshape(*leaf.shape[:-1], stride)
        return wide[..., :columns]

    return _tree(table, array_of)


@accelerated
def round_matrices(flat, places: tuple[Place, ...], size: int, dtype):
    """The matrices at their places in an array (size,) of `dtype`, with 0 between their rows."""
    rounded = array_module(flat).zeros(size, dtype)
    for source, rows, columns, start, stride in places:
        wide = rounded[start : start + rows * stride].reshape(rows, stride)
        wide[:, :columns] = flat[source : source + rows * columns].reshape(rows, columns)
    return rounded


def _uniform(rng, shape, cfg):
    bound = math.sqrt(3 * cfg.init_gain / (sum(shape) / 2))
    return rng.uniform(-bound, bound, shape)


def _cosines(rng, shape, cfg):
    """(colours x V, C): cosines of the value, one set for each colour."""
    value = np.arange(cfg.vocab_size)[:, None] / cfg.vocab_size
    sets = (shape[0] // cfg.vocab_size, 1, shape[1])
    frequency, phase = rng.normal(0, cfg.init_frequency, sets), rng.uniform(0, 1, sets)
    scale = math.sqrt(2 * cfg.init_gain / (sum(shape) / 2))
    return scale * np.cos(2 * np.pi * (frequency * value + phase)).reshape(shape)


INITIALISERS = {  # (rng, shape, cfg) -> values
    "uniform": _uniform,
    "cosines": _cosines,
    "cosines, transposed": lambda rng, shape, cfg: _cosines(rng, shape[::-1], cfg).T,
    "positions": lambda rng, shape, cfg: rng.normal(0, shape[-1] ** -0.5, shape),
    "ones": lambda rng, shape, cfg: np.ones(shape),
    "zeros": lambda rng, shape, cfg: np.zeros(shape),
}


def init_parameters(cfg: ModelConfig, xp, dtype, seed: int):
    """(flat buffer, table). Drawn on the host, so that every device starts from the same numbers.

    Released initialisers: matrices and tables uniform with variance gain / average of fan-in and
    fan-out, image positions N(0, 1 / (3 C)), biases 0, LayerNorm 1 and 0. The released gain is
    0.2. Each leaf draws from a stream of its own, keyed by its name. The last matrix of attention
    and of the feed-forward layer is then multiplied by `init_out_scale`.

    Ours, with `init_frequency`: value v of an image begins as sqrt(2 variance) cos(2 pi (f v / V +
    phase)), with f ~ N(0, init_frequency^2) and a uniform phase for every channel and colour. So
    values that are close begin alike, in the input's table and in the columns of the output matrix.
    """
    table = parameter_table(cfg)
    flat = xp.empty(table[-1].stop, dtype)
    for leaf in table:
        rng = Generator(Philox(key=[seed, zlib.crc32(leaf.name.encode())]))
        values = INITIALISERS[leaf.init](rng, leaf.shape, cfg)
        if leaf.name.endswith((".attention.w_o", ".ffn.w_out")):
            values *= cfg.init_out_scale
        flat[leaf.start : leaf.stop] = xp.asarray(values.astype(dtype).reshape(-1))
    return flat, table


def init_centroids(cfg: ModelConfig, xp, dtype, seed: int) -> dict[int, Centroids]:
    """Centroids of the layers with routing heads: LayerNorm of a Gaussian (released code).

    The averages start at count 1 and total mu, so that the first update is sane.
    """
    state = {}
    for i in range(cfg.n_layers):
        if routed := cfg.routing_heads(i):
            rng = Generator(Philox(key=[seed, zlib.crc32(f"centroids.{i}".encode())]))
            draw = rng.normal(size=(routed, cfg.n_clusters, cfg.head_width))
            mu = xp.asarray(normalize.reference(draw.astype(dtype))[0])
            state[i] = Centroids(mu, xp.ones(mu.shape[:2], dtype), mu.copy())
    return state
