"""Twins for NumPy arrays: equal to the plain functions, whatever the sizes and the threads."""

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.models import NOISE, SMALL, check_decoding, setup
from helpers.strategies import configs, lengths, normal, seeds, sizes, widths
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rt_scratch import attention, dispatch, heap, layers, multiprobe, optim, routing, threads
from rt_scratch.dispatch import qualified_name
from rt_scratch.dropout import Dropped, dropout
from rt_scratch.heap import keep_freed_memory
from rt_scratch.kernels import cpu
from rt_scratch.parameters import parameter_table


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces so small that the arrays here are cut into many."""
    for name, value in (("PIECE", 64), ("ATTENTION", 64), ("ROWS", 3), ("COLUMNS", 2),
                        ("LOGITS", 40), ("TRIANGLE", 2),
                        ("WIDTH", 3)):
        monkeypatch.setattr(cpu.sizes, name, value)


def switch_on(monkeypatch):
    for name, function in cpu.TWINS.items():
        monkeypatch.setitem(dispatch.twins[name], "numpy", (function, None))


def same(a, b, rtol=1e-10):
    """Equal trees: arrays nearly, anything else exactly."""
    if isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y, rtol)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape
        # Not below 1: the tails of gelu and gradients near 0 are differences of larger numbers.
        scale = np.abs(b[np.isfinite(b)]).max(initial=1) if b.dtype.kind == "f" else 0
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)
    else:
        assert a == b


def check(function, backward, args, seed, dtype="float64", options=None):
    """Twin = plain function: result, cache, and gradients from either cache."""
    options = options or {}
    rtol = 1e-10 if dtype == "float64" else 1e-4
    args = [a.astype(dtype, copy=False) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a
            for a in args]
    twin, twin_backward = (cpu.TWINS[qualified_name(f)] for f in (function, backward))
    y, cache, *told = function.reference(*args, **options)
    own, own_cache, *own_told = twin(*args, **options)
    same((own, *own_told), (y, *told), rtol)
    same(own_cache, cache, rtol)
    dy = normal(np.random.default_rng(seed), y.shape).astype(dtype)
    expected = backward.reference(dy, cache)
    same(twin_backward(dy, cache), expected, rtol)
    same(twin_backward(dy, own_cache), expected, rtol)


dtypes = st.sampled_from(["float64", "float32"])


@given(sizes, sizes, widths, st.booleans(), dtypes, seeds)
def test_linear(n, width, out, biased, dtype, seed):
    rng = np.random.default_rng(seed)
    args = normal(rng, (2, n, width)), normal(rng, (width, out)), normal(rng, (out,))
    check(layers.linear, layers.linear_backward, args[: 3 if biased else 2], seed, dtype)


@given(lengths, widths, dtypes, seeds)
def test_layer_norm(n, width, dtype, seed):
    rng = np.random.default_rng(seed)
    x, gain, bias = normal(rng, (2, n, width)), normal(rng, (width,)), normal(rng, (width,))
    check(layers.layer_norm, layers.layer_norm_backward, (x, gain, bias), seed, dtype)
    heads = normal(rng, (2, n, 3, width)).swapaxes(1, 2)[:, :2]
    check(layers.normalize, layers.normalize_backward, (heads,), seed, dtype)


@given(lengths, widths, sizes, st.booleans(), dtypes, seeds)
def test_feed_forward(n, width, hidden, dropping, dtype, seed):
    rng = np.random.default_rng(seed)
    dropped = Dropped(0.3, (seed, 1, 2), first=seed % 7) if dropping else None
    shapes = (2, n, width), (width, hidden), (width, hidden), (hidden, width)
    spread = 3 if dtype == "float64" else 1  # in float32 the plain 1 + tanh has no digits in a tail
    args = [spread * normal(rng, shape) for shape in shapes]
    check(layers.geglu_ffn, layers.geglu_ffn_backward, args, seed, dtype, {"dropped": dropped})
    a, b = normal(rng, (2, n, hidden)), normal(rng, (2, n, hidden))
    check(layers.geglu, layers.geglu_backward, (a, b), seed, dtype)
    same(cpu.layers.dropout(a, dropped), dropout.reference(a, dropped))


@pytest.fixture
def large_pieces(monkeypatch):
    """All arrays here are few rows."""
    monkeypatch.setattr(cpu.sizes, "PIECE", 1 << 18)


@given(st.sampled_from([1, 2, 3, 4, 9]), widths, sizes, dtypes, seeds)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_few_rows(large_pieces, n, width, hidden, dtype, seed):
    """As in decoding: a token, or the heads of one, per text."""
    rng = np.random.default_rng(seed)
    x, gain, bias = normal(rng, (n, width)), normal(rng, (width,)), normal(rng, (width,))
    check(layers.layer_norm, layers.layer_norm_backward, (x, gain, bias), seed, dtype)
    heads = normal(rng, (n, 4, width))[:, 1:3]
    check(layers.normalize, layers.normalize_backward, (heads,), seed, dtype)
    shapes = (width, hidden), (width, hidden), (hidden, width)
    for lead in ((n,), (n, 1), (1, n)):
        args = x.reshape(*lead, width), *(normal(rng, shape) for shape in shapes)
        check(layers.geglu_ffn, layers.geglu_ffn_backward, args, seed, dtype)


@given(configs(routings=("causal", "random"), dropout=False), seeds, st.sampled_from([0, 5]))
def test_decoding(cfg, seed, prompt):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu.sizes, "PIECE", 1 << 18)
        switch_on(patch)
        check_decoding(setup(cfg, seed), prompt)


def test_gelu_of_large_numbers(monkeypatch):
    """No overflow, no NaN: gelu(a) is a or 0, its derivative 1 or 0."""
    a = np.array([-1e6, -1e4, -50, -13, 0, 13, 50, 1e4, 1e6], "float32")
    y, cache = cpu.layers.geglu(a, np.ones_like(a))
    da, _ = cpu.layers.geglu_backward(np.ones_like(a), cache)
    np.testing.assert_allclose(y, np.maximum(a, 0), atol=1e-6)
    monkeypatch.setattr(cpu.sizes, "PIECE", 1 << 18)
    few, _ = cpu.layers.geglu_ffn(a[None], *[np.eye(9, dtype="float32")] * 3)
    np.testing.assert_allclose(few[0], np.maximum(a, 0) * a, rtol=1e-6)
    np.testing.assert_allclose(da, (a > 0) + 0.5 * (a == 0), atol=1e-6)


@given(lengths, widths, st.sampled_from([1, 2, 11, 300]), dtypes, seeds)
def test_cross_entropy(n, width, n_values, dtype, seed):
    rng = np.random.default_rng(seed)
    x, w, b = normal(rng, (n, width)), normal(rng, (width, n_values)), normal(rng, (n_values,))
    targets, weights = rng.integers(0, n_values, n), rng.random(n)
    check(layers.linear_cross_entropy, layers.linear_cross_entropy_backward,
          (x, w, b, targets, weights), seed, dtype)


@given(sizes, sizes, widths, st.booleans(), st.sampled_from([None, 0.3]),
       st.sampled_from(["none", "shared", "each", "empty"]), dtypes, seeds)
def test_attend(s, extra, d, relative, rate, masking, dtype, seed):
    rng = np.random.default_rng(seed)
    n = s + extra
    q, k, v = (normal(rng, (2, 3, rows, d)) for rows in (s, n, n))
    mask = {"none": np.ones((1, 1), bool), "shared": rng.random((s, n)) < 0.7,
            "each": rng.random((2, 3, s, n)) < 0.7, "empty": np.zeros((s, n), bool)}[masking]
    rel = [normal(rng, (s + n - 1, d)) if relative else None for _ in "kv"]
    dropped = None if rate is None else Dropped(rate, (seed, 1, 2), first=seed % 7)
    check(attention.attend, attention.attend_backward, (q, k, v, *rel, mask, 0.7), seed, dtype,
          {"dropped": dropped})


@given(lengths, st.sampled_from([1, 2, 4, 5]), st.sampled_from([0, 1, 2]), widths, st.booleans(),
       st.booleans(), st.sampled_from([None, 0.3]), dtypes, seeds)
def test_local_attention(t, block, lookback, d, relative, segmented, rate, dtype, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (normal(rng, (2, t, 3, d)).swapaxes(1, 2) for _ in "qkv")
    rel = [normal(rng, (7, d)) if relative else None for _ in "kv"]
    segments = np.sort(rng.integers(0, 3, (2, 3, t)), axis=-1) if segmented else None
    window = block if segmented else None
    dropped = None if rate is None else Dropped(rate, (seed, 1, 2), first=seed % 7)
    check(attention.local_attention, attention.local_attention_backward,
          (q, k, v, *rel, block, lookback, 0.7, segments, window), seed, dtype,
          {"dropped": dropped})


@given(st.sampled_from([1, 2, 4]), st.integers(1, 4), widths, st.booleans(), st.booleans(), dtypes,
       seeds)
def test_attention_to_every_earlier_token(n_blocks, block, d, relative, segmented, dtype, seed):
    """As full heads and one large cluster have it: every band sees one key block more."""
    t, rng = n_blocks * block, np.random.default_rng(seed)
    q, k, v = (normal(rng, (2, t, 3, d)).swapaxes(1, 2) for _ in "qkv")
    rel = [normal(rng, (7, d)) if relative else None for _ in "kv"]
    segments = np.sort(rng.integers(0, 3, (2, 3, t)), axis=-1) if segmented else None
    reach = attention.Reach(block, n_blocks - 1, segments, t)
    cut = cpu.attention.Cut(t, reach, *rel, q.dtype, None)
    assert [band.lookback for band in cut.bands] == list(range(-(-t // 2))) if t > 2 else [0]
    check(attention.local_attention, attention.local_attention_backward,
          (q, k, v, *rel, block, n_blocks - 1, 0.7, segments, t), seed, dtype)


@given(lengths, sizes, st.sampled_from([1, 2, 3]), sizes, widths, st.booleans(), st.booleans(),
       st.sampled_from([None, None, 0.3]),
       st.sampled_from([("float64", 0.7), ("float64", 30), ("float32", 0.7)]), seeds)
def test_multiprobe(t, n_clusters, r, window, d, relative, shared, rate, numbers, seed):
    """Rows that see nothing, clusters that nobody looks into, logits that need a maximum first."""
    (dtype, scale), rng = numbers, np.random.default_rng(seed)
    q, k, v = (normal(rng, (2, t, 3, d)).swapaxes(1, 2).astype(dtype) for _ in "qkv")
    k = q if shared else k
    probes = np.argsort(rng.random((2, 3, t, n_clusters)))[..., :r]
    probes[0] = probes[0, :1, :1]  # all of one sequence look into the same
    route = routing.Route(probes[..., 0], rng.integers(0, n_clusters, (2, 3, t)), probes=probes)
    rel = [normal(rng, (7, d)).astype(dtype) if relative else None for _ in "kv"]
    rule = routing.Rule(multiprobe.MULTIPROBE, window, scale, n_probes=r)
    dropped = None if rate is None else Dropped(rate, (seed, 1, 2), first=seed % 7)
    check(multiprobe.multiprobe_attention, multiprobe.multiprobe_attention_backward,
          (q, k, v, *rel, route, rule), seed, dtype, {"dropped": dropped})


@given(lengths, sizes, st.booleans(), seeds)
def test_choosing(t, n_clusters, ties, seed):
    """Integers: equal to the last one, ties included."""
    rng = np.random.default_rng(seed)
    scores = normal(rng, (2, 3, n_clusters, t))
    scores = scores.round() if ties else scores
    for window in {1, (t + 1) // 2, t}:
        same(cpu.routing.top_members(scores, window), routing.top_members.reference(scores, window))
    winner = rng.integers(0, n_clusters, (2, 3, t))
    order = routing.by_cluster.reference(winner)
    same(cpu.routing.by_cluster(winner), order)
    same(cpu.routing.inverse(order), routing.inverse.reference(order))
    rows = normal(rng, (2, t, 3, 4)).swapaxes(1, 2)
    for index in (order, routing.top_members.reference(scores, t)):
        same(cpu.routing.gather(rows, index), routing.gather.reference(rows, index))


@given(lengths, sizes, sizes, widths, dtypes, seeds)
def test_scatter_sum(t, n_clusters, window, d, dtype, seed):
    """Tokens in no cluster, in several, and twice in one."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, t, (2, 3, n_clusters, window))
    rows = normal(rng, (2, 3, n_clusters, window, d)).astype(dtype)
    same(cpu.routing.scatter_sum(rows, index, t), routing.scatter_sum.reference(rows, index, t),
         1e-10 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@given(sizes, seeds)
def test_optimizer(name, steps, seed):
    rng = np.random.default_rng(seed)
    table = parameter_table(SMALL)
    flat = rng.normal(size=table[-1].stop)
    own, plain = flat.copy(), flat.copy()
    init, update, _ = optim.OPTIMIZERS[name]
    states = [init(flat, table) for _ in "ab"]
    for i in range(min(steps, 3)):
        grads = rng.normal(size=flat.shape)
        cpu.TWINS[f"optim.{name}_update"](own, grads, states[0], table, 0.1, i, weight_decay=0.2)
        update.reference(plain, grads, states[1], table, 0.1, i, weight_decay=0.2)
    same(own, plain)
    same(list(states[0].values()), list(states[1].values()))


@given(configs(), seeds)
def test_whole_model(cfg, seed):
    """Loss and gradient, with the same routes: rounding may break a tie in them."""
    m = setup(cfg, seed)
    routes = m.loss(noise=NOISE)[2].routes
    ends = []
    with pytest.MonkeyPatch.context() as patch:
        for fast in (False, True):
            if fast:
                switch_on(patch)
            loss, cache, _ = m.loss(noise=NOISE, fixed=routes)
            ends.append((np.asarray(loss), m.gradient(cache)))
    same(ends[1][0], ends[0][0])
    same(ends[1][1], ends[0][1], 1e-8)


def test_number_of_threads_changes_no_bit(monkeypatch):
    switch_on(monkeypatch)
    m = setup(dataclasses.replace(SMALL, attention_dropout=0.2, ffn_dropout=0.2), batch=3)
    results = []
    for n in (1, 2, 4):
        pool = ThreadPoolExecutor(n)
        monkeypatch.setattr(threads, "_pool", lambda pool=pool: pool)
        loss, cache, _ = m.loss(noise=NOISE)
        results.append((loss, m.gradient(cache)))
    for loss, gradient in results[1:]:
        assert loss == results[0][0]
        np.testing.assert_array_equal(gradient, results[0][1])


# ------------------------------------------------------------------------------------ the heap

HEAP = """
import resource, sys
from pathlib import Path
import numpy as np
from rt_scratch import heap
if sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
print(heap.keep_freed_memory() and heap.use_huge_pages())
arrays = [np.full(1 << 19, i, "f4") for i in range(20)]
assert all((array == i).all() for i, array in enumerate(arrays))
address = arrays[-1].ctypes.data
found = False
for line in Path("/proc/self/smaps").read_text().splitlines():
    first = line.split()[0]
    if "-" in first:
        ends = [int(x, 16) for x in first.split("-")]
        found = ends[0] <= address < ends[1]
    elif found and first == "VmFlags:":
        print("hg" in line.split())
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="malloc is not glibc's")
@pytest.mark.parametrize("limit, huge", [((), True), (("150000000",), False)])
def test_heap_of_huge_pages(limit, huge):
    """Arrays lie where the kernel was asked for huge pages; a heap that cannot grow is no error."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without huge pages")
    done = subprocess.run([sys.executable, "-c", HEAP, *limit], capture_output=True, text=True,
                          check=True)
    assert done.stdout.split() == [str(huge)] * 2


def test_no_huge_pages_without_glibc(monkeypatch):
    """Another C library, or none, is no error."""
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.use_huge_pages()
