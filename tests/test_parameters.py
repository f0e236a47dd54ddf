"""parameters.py: the table fills the buffer, the tree is a view of it, initial values."""

import dataclasses
import zlib

import numpy as np
import pytest
from helpers.models import SMALL
from helpers.strategies import configs
from hypothesis import given
from numpy.random import Generator, Philox

from rt_scratch.config import ModelConfig
from rt_scratch.parameters import (
    compute_copy,
    compute_layout,
    init_centroids,
    init_parameters,
    parameter_table,
    views,
)
from rt_scratch.presets import PRESETS


@given(configs())
def test_table_fills_the_buffer(cfg):
    table = parameter_table(cfg)
    assert len({leaf.name for leaf in table}) == len(table)
    assert [leaf.start for leaf in table] == [0] + [leaf.stop for leaf in table[:-1]]
    flat = np.arange(table[-1].stop, dtype=float)
    tree = views(flat, table)
    tree["output"]["b"] += 1  # a view
    assert flat[table[-1].start] == table[-1].start + 1


def test_initial_values():
    cfg = dataclasses.replace(SMALL, width=96, ffn_width=64, init_gain=0.2)
    flat, table = init_parameters(cfg, np, "float32", 7)
    again, _ = init_parameters(cfg, np, "float32", 7)
    other, _ = init_parameters(cfg, np, "float32", 8)
    np.testing.assert_array_equal(flat, again)
    assert (flat != other).any()
    leaves = {leaf.name: flat[leaf.start : leaf.stop].reshape(leaf.shape) for leaf in table}
    w = leaves["layers.0.ffn.w_gate"]
    bound = np.sqrt(3 * 0.2 / ((96 + 64) / 2))
    assert 0.98 * bound < np.abs(w).max() <= bound and abs(w.mean()) < bound / 30
    for other in ("layers.0.ffn.w_value", "layers.1.ffn.w_gate"):  # a stream for each leaf
        assert (w != leaves[other]).any()
    assert (leaves["norm.gain"] == 1).all() and (leaves["norm.bias"] == 0).all()
    image = dataclasses.replace(SMALL, kind="image", image_size=32, seq_len=3072, vocab_size=256)
    flat, table = init_parameters(image, np, "float32", 7)
    rows = next(flat[x.start : x.stop] for x in table if x.name == "embed.rows")
    assert abs(rows.std() / (3 * 12) ** -0.5 - 1) < 0.1
    last = next(flat[x.start : x.stop] for x in table if x.name == "output.w")
    rng = Generator(Philox(key=[7, zlib.crc32(b"output.w")]))  # row by row, as any other matrix
    bound = np.sqrt(3 / ((12 + 256) / 2))
    np.testing.assert_allclose(last, rng.uniform(-bound, bound, 12 * 256), rtol=1e-6)
    flat, table = init_parameters(dataclasses.replace(image, width=96, init_frequency=2.0), np,
                                  "float32", 7)
    tables = {x.name: flat[x.start : x.stop].reshape(x.shape) for x in table}
    colours = tables["embed.table"].reshape(3, 256, 96)
    out = tables["output.w"].T
    for values, fan in ((colours[0], 768 + 96), (colours[2], 768 + 96), (out, 256 + 96)):
        np.testing.assert_allclose(values.std(), (fan / 2) ** -0.5, rtol=0.1)
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        near, far = ((unit[apart:] * unit[: 256 - apart]).sum(1) for apart in (1, 100))
        assert near.min() > 0.99 and abs(far.mean()) < 0.3
    assert abs(np.corrcoef(colours[0].ravel(), colours[1].ravel())[0, 1]) < 0.2
    state = init_centroids(cfg, np, "float32", 7)
    mu = state[0].mu
    np.testing.assert_allclose(mu.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose((mu * mu).mean(-1), 1, rtol=1e-3)


PIECES = {"wikitext103": 267_735, "pg19": 98_304}  # tokens of the datasets whose V is not 256


def preset_model(dataset, name):
    fields = {k: v for k, v in PRESETS[dataset][name].items()
              if k in ModelConfig.__dataclass_fields__}
    if side := {"imagenet64": 64, "cifar10": 32}.get(dataset):
        fields |= {"kind": "image", "image_size": side}
    return ModelConfig(**{"vocab_size": PIECES.get(dataset, 256)} | fields).validate()


@pytest.mark.parametrize("dataset, name", [(d, n) for d in PRESETS for n in PRESETS[d]])
def test_every_matrix_is_aligned(dataset, name):
    """In the compute copy of every preset, from the shapes alone: matrices begin at multiples of
    128 bytes of half precision, rows at multiples of 16, and none overlaps another."""
    table = parameter_table(preset_model(dataset, name))
    places, size = compute_layout(tuple(table))
    assert list(places) == [leaf.name for leaf in table if len(leaf.shape) > 1]
    end = 0
    for leaf in table:
        if len(leaf.shape) > 1:
            place = places[leaf.name]
            assert place.start % 64 == place.stride % 8 == 0 and place.start >= end
            assert place.columns == leaf.shape[-1] <= place.stride < place.columns + 8
            assert place.source == leaf.start
            assert place.rows * place.columns == leaf.stop - leaf.start
            end = place.start + place.rows * place.stride
    assert end <= size


@given(configs())
def test_compute_copy(cfg):
    """Matrices rounded, vectors not: those are views of the buffer."""
    flat, table = init_parameters(cfg, np, "float32", 7)
    flat += np.random.default_rng(0).normal(size=flat.shape).astype("float32")
    assert np.shares_memory(compute_copy(flat, table, None)["output"]["b"], flat)
    trees = [compute_copy(flat, table, "float16"), views(flat, table)]
    for leaf in table:
        got, want = trees
        for key in leaf.name.split("."):
            got, want = (tree[int(key) if key.isdigit() else key] for tree in (got, want))
        assert got.shape == want.shape
        if want.ndim < 2:
            assert np.shares_memory(got, flat) and got.dtype == np.float32
        else:
            np.testing.assert_array_equal(got, want.astype("float16"), strict=True)
            assert got.strides[-1] == 2 and all(s % 16 == 0 for s in got.strides[:-1])
