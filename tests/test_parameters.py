"""parameters.py: the table fills the buffer, the tree is a view of it, initial values."""

import dataclasses

import numpy as np
from helpers.models import SMALL
from helpers.strategies import configs
from hypothesis import given

from rt_scratch.parameters import init_centroids, init_parameters, parameter_table, views


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
    state = init_centroids(cfg, np, "float32", 7)
    mu = state[0].mu
    np.testing.assert_allclose(mu.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose((mu * mu).mean(-1), 1, rtol=1e-3)
