"""Every registered twin against its plain function: the tables of twins are the list of tests.

A twin without a row in CASES fails here. Sizes at which twins are hard, and their tolerances, are
the matter of test_cpu_kernels.py and test_cuda_kernels.py; this says that none is left out.
"""

import importlib
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.strategies import normal

from rt_scratch import dispatch, layers, multiprobe, optim, routing
from rt_scratch.device import select_device
from rt_scratch.dropout import Dropped
from rt_scratch.kernels import cpu, cuda
from rt_scratch.kmeans import Centroids
from rt_scratch.parameters import Leaf, Place

sys.path.insert(0, str(Path(__file__).parent / "cuda"))

import run_on_cpu  # noqa: E402

TWINS = [("cpu", name) for name in cpu.TWINS] + [("cuda", name) for name in cuda.TWINS]
B, H, T, D, C, M, K, W = 2, 3, 23, 4, 6, 7, 5, 4
DROPPED = Dropped(0.3, (1, 2, 3))


def plain(name):
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"rt_scratch.{module}"), function).reference


def draw(rng, *shapes):
    return [normal(rng, shape).astype("float32") for shape in shapes]


def heads(rng):
    """q, k, v and tables by distance, for local attention."""
    return draw(rng, *[(B, H, T, D)] * 3, (9, D), (9, D))


def winners(rng):
    return rng.integers(0, K, (B, H, T))


def members(rng):
    return routing.top_members.reference(normal(rng, (B, H, K, T)), W)


def buffer(init):
    def arguments(rng):
        shapes = {"table": (2, 3), "layers.0.w": (5, 8), "layers.0.b": (9,), "layers.1.w": (4, 2)}
        stops = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
        table = [Leaf(name, shape, stop - math.prod(shape), stop, "")
                 for (name, shape), stop in zip(shapes.items(), stops, strict=True)]
        flat, grads = draw(rng, (stops[-1],), (stops[-1],))
        return flat, grads, init(flat, table), table, 0.1, 3
    return arguments


def segments(rng):
    """The last two of `local_attention`: as routing attention uses it."""
    return np.sort(winners(rng), axis=-1), W


def cached(forward, arguments):
    """Arguments of a backward: a gradient for the result, and the plain function's cache."""
    def both(rng):
        y, cache = forward(*arguments(rng))
        return np.asarray(rng.normal(size=np.shape(y)), "float32"), cache
    return both


def probing(rng):
    """Arguments of `multiprobe_attention`, each query seeing its own key at least."""
    probes = rng.permuted(np.tile(np.arange(K), (B, H, T, 1)), axis=-1)[..., :2]
    route = routing.Route(probes[..., 0], probes[..., 0], probes=probes)
    return (*draw(rng, *[(B, H, T, D)] * 3, (2 * W + 1, D), (2 * W + 1, D)), route,
            routing.Rule(multiprobe.MULTIPROBE, W, 0.5, n_probes=2))


def probed(rng):
    """Arguments of `multiprobe_attention_backward`."""
    y, cache, _ = plain("multiprobe.multiprobe_attention")(*probing(rng))
    return *draw(rng, y.shape), cache


FORWARD = {
    "layers.linear": lambda rng: draw(rng, (B, T, C), (C, M), (M,)),
    "layers.layer_norm": lambda rng: draw(rng, (B, T, C), (C,), (C,)),
    "layers.normalize": lambda rng: draw(rng, (B, H, T, D)),
    "layers.geglu": lambda rng: draw(rng, (B, T, M), (B, T, M)),
    "layers.residual": lambda rng: (*draw(rng, (B, T, C), (B, T, C)), DROPPED,
                                    *draw(rng, (C,), (C,))),
    "layers.geglu_ffn": lambda rng: (*draw(rng, (B, T, C), (C, M), (C, M), (M, C)), DROPPED),
    "layers.relu_ffn": lambda rng: (*draw(rng, (B, T, C), (C, M), (M,), (M, C), (C,)), DROPPED),
    "layers.linear_cross_entropy": lambda rng: (
        *draw(rng, (T, C), (C, 11), (11,)), rng.integers(0, 11, T), *draw(rng, (T,))),
    "attention.attend": lambda rng: (
        *draw(rng, (B, H, 3, W, D), (B, H, 3, 2 * W, D), (B, H, 3, 2 * W, D), (2 * W, D),
              (2 * W, D)), np.tri(W, 2 * W, W, dtype=bool), 0.5, DROPPED),
    "attention.local_attention": lambda rng: (*heads(rng), W, 1, 0.5, *segments(rng), DROPPED),
}
ADD = cached(plain("layers.linear"), FORWARD["layers.linear"])
CASES = FORWARD | {f"{name}_backward": cached(plain(name), FORWARD[name]) for name in FORWARD} | {
    "layers.add_gradients": lambda rng: (
        layers.linear_backward, *ADD(rng), tuple(draw(rng, (C, M), (M,))), *draw(rng, (B, T, C))),
    "layers.segment_sum": lambda rng: (*draw(rng, (T, C)), rng.integers(0, K, T), K),
    "parameters.round_matrices": lambda rng: (
        *draw(rng, (200,)), (Place(3, 8, 6, 0, 8), Place(51, 4, 16, 64, 16)), 128, "float32"),
    "dropout.dropout": lambda rng: (*draw(rng, (B, T, C)), DROPPED),
    "kmeans.compare": lambda rng: (*draw(rng, (B, H, T, D), (H, K, D)), True),
    "kmeans.commitment": lambda rng: (*draw(rng, (B, H, T, D), (H, K, D)), winners(rng)),
    "kmeans.add_commitment_gradient": lambda rng: (
        *draw(rng, (B, H, T, D)), 0.5,
        plain("kmeans.commitment")(*CASES["kmeans.commitment"](rng))[1]),
    "kmeans.cluster_statistics": lambda rng: (*draw(rng, (B, H, T, D)), winners(rng), K),
    "kmeans.replace_centroids": lambda rng: (
        Centroids(*draw(rng, (H, K, D)), rng.random((H, K), "float32"), *draw(rng, (H, K, D))),
        rng.integers(0, 3, (H, K)).astype("float32"), *draw(rng, (H, K, D)), 0.9),
    "multiprobe.multiprobe_attention": probing,
    "multiprobe.multiprobe_attention_backward": probed,
    "routing.top_members": lambda rng: (*draw(rng, (B, H, K, T)), W),
    "routing.by_cluster": lambda rng: (winners(rng),),
    "routing.inverse": lambda rng: (routing.by_cluster.reference(winners(rng)),),
    "routing.gather": lambda rng: (*draw(rng, (B, H, T, D)), members(rng)),
    "routing.scatter_sum": lambda rng: (*draw(rng, (B, H, K, W, D)), members(rng), T),
    "routing.scatter_mean": lambda rng: (*draw(rng, (B, H, K, W, D)), members(rng), T),
    "routing.scatter_mean_backward": lambda rng: (*draw(rng, (B, H, T, D)), plain(
        "routing.scatter_mean")(*CASES["routing.scatter_mean"](rng))[1]),
    "routing.coverage": lambda rng: (rng.integers(0, 3, (B, H, T, 1)).astype("float32"),),
    "optim.global_norm": lambda rng: draw(rng, (3 * T,)),
    "optim.adamw_update": buffer(optim.adamw_init),
    "optim.muon_update": buffer(optim.muon_init),
    "optim.adafactor_update": buffer(optim.adafactor_init),
}


def exact(tree):
    """The tree with its numbers in float64; dicts of optimizer state are copied."""
    if isinstance(tree, np.ndarray):
        return tree.astype("float64") if tree.dtype.kind == "f" else tree.copy()
    if isinstance(tree, dict):
        return {key: exact(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and not isinstance(tree, Leaf | Place):
        values = map(exact, tree)
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree


def same(got, want):
    """Arrays to float32's rounding, integers and structure exactly."""
    if isinstance(want, dict):
        got, want = tuple(got.values()), tuple(want.values())
    if isinstance(want, tuple | list):
        assert len(got) == len(want)
        for x, y in zip(got, want, strict=True):
            same(x, y)
    elif isinstance(want, np.ndarray | np.generic) and want.dtype.kind == "f":
        assert np.shape(got) == want.shape and np.asarray(got).dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(initial=1))
    elif isinstance(want, np.ndarray):
        np.testing.assert_array_equal(got, want)
    else:
        assert got == want


@pytest.mark.parametrize("device, name", TWINS)
def test_twin(device, name, monkeypatch):
    """Result, cache and what is written in place: those of the plain function in float64."""
    if device == "cuda":
        if run_on_cpu.compiler() is None:
            pytest.skip("g++ is not installed")
        run_on_cpu.install(monkeypatch)
    arguments = tuple(CASES[name](np.random.default_rng(0)))
    truth = exact(arguments)
    got = {"cpu": cpu, "cuda": cuda}[device].TWINS[name](*arguments)
    same(got, plain(name)(*truth))
    same(arguments, truth)  # optimizers write into theirs, the others into nothing


def test_no_case_without_a_twin():
    assert set(CASES) == {name for _, name in TWINS}


def test_every_accelerated_function_has_a_twin():
    assert set(dispatch.twins) == {name for _, name in TWINS}


def test_a_twin_of_nothing_is_refused():
    with pytest.raises(KeyError, match="layers.nothing"):
        dispatch.register_twins("numpy", {"layers.nothing": cpu.layers.linear})


def test_one_call_makes_the_fast_path_available(monkeypatch):
    """The public name then runs the twin, for arrays worth it; `.reference` stays the plain one."""
    calls = []
    monkeypatch.setitem(cpu.TWINS, "layers.linear", lambda *a: calls.append(a) or "twin")
    large, small = np.ones((1, cpu.sizes.PIECE), "float32"), np.ones((1, 2), "float32")
    assert layers.linear(large, np.ones((cpu.sizes.PIECE, 1), "float32"))[0].shape == (1, 1)
    assert select_device("cpu")[0] is np
    assert layers.linear(large, None) == "twin" and len(calls) == 1
    assert layers.linear(small, np.ones((2, 1), "float32"))[0] == 2 and len(calls) == 1
    assert layers.linear.reference(large, large.T)[0] == cpu.sizes.PIECE and len(calls) == 1
