"""The CUDA kernels without a GPU: executed on the CPU against the plain functions, and compiled.

The launchers of rt_scratch.kernels.cuda run on NumPy arrays here, with the kernels' own source
compiled by g++ and cuBLAS written out in NumPy (tests/cuda). Threads take their turns forwards and
backwards: a kernel that lacks a barrier cannot give the same bits both ways.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda"))

import nvrtc_check  # noqa: E402
import run_on_cpu  # noqa: E402
from helpers.models import SMALL, setup  # noqa: E402

from rt_scratch import (  # noqa: E402
    attention,
    config,
    dispatch,
    kmeans,
    layers,
    model,
    optim,
    routing,
)
from rt_scratch import step as step_module  # noqa: E402
from rt_scratch.dropout import Dropped, dropout_mask  # noqa: E402
from rt_scratch.kernels import cuda, gemm, launch  # noqa: E402
from rt_scratch.optim import LossScale  # noqa: E402
from rt_scratch.parameters import (  # noqa: E402
    Place,
    init_centroids,
    init_parameters,
    round_matrices,
    views,
)

FILES = sorted({kernel.file for kernel in launch.kernels().values()})
HAVE_COMPILER = pytest.mark.skipif(run_on_cpu.compiler() is None, reason="g++ is not installed")

try:
    import ml_dtypes

    DTYPES = ["float32", "float16", ml_dtypes.bfloat16]
except ImportError:
    DTYPES = ["float32", "float16",
              pytest.param(None, marks=pytest.mark.skip(reason="ml_dtypes is not installed"))]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])


@pytest.fixture(params=["forwards", "backwards"])
def on_cpu(request, monkeypatch):
    """The launchers work on NumPy arrays."""
    if run_on_cpu.compiler() is None:
        pytest.skip("g++ is not installed")
    run_on_cpu.install(monkeypatch, request.param == "backwards")


@pytest.fixture(params=["forwards", "backwards", pytest.param("gpu", marks=pytest.mark.gpu)])
def twins(request, monkeypatch):
    """The functions of kernels/cuda for NumPy arrays: on the CPU in either order, and on a GPU."""
    functions = {name.partition(".")[2]: f for name, f in cuda.TWINS.items()}
    functions["matmul"] = gemm.matmul
    if request.param == "gpu":
        cupy = pytest.importorskip("cupy")
        if not cupy.is_available():
            pytest.skip("no GPU")
        return SimpleNamespace(**{name: through_gpu(f) for name, f in functions.items()})
    if run_on_cpu.compiler() is None:
        pytest.skip("g++ is not installed")
    run_on_cpu.install(monkeypatch, request.param == "backwards")
    return SimpleNamespace(**functions)


def through_gpu(function):
    """The function on CuPy copies of its arrays; results come back, and what it changes in place.
    """
    import cupy

    def call(*arguments, **named):
        pairs = {}  # by id: an array here and its copy there

        def put(x):
            return pairs.setdefault(id(x), (x, cupy.asarray(x)))[1]

        arguments, named = each_array((arguments, named), np.ndarray, put)
        result = function(*arguments, **named)
        for here, there in pairs.values():
            if here.flags.writeable:
                here[...] = there.get()
        known = {id(there): here for here, there in pairs.values()}

        def get(x):
            return known[id(x)] if id(x) in known else x.get()

        return each_array(result, cupy.ndarray, get)

    return call


def each_array(x, kind, function):
    """x with function(array) in place of every array of that kind, whatever tuples hold it."""
    if isinstance(x, dict):
        return {name: each_array(y, kind, function) for name, y in x.items()}
    if isinstance(x, tuple):
        items = [each_array(y, kind, function) for y in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    return function(x) if isinstance(x, kind) else x


def test_supports():
    """Twins leave float64 to the plain functions, wherever in the arguments it is."""
    x = np.ones(2, np.float32)
    assert cuda.supports(x, (x, None, 3, (x.astype(np.float16), x > 0, np.arange(2))), "text", 1.5)
    assert not cuda.supports(x.astype(np.float64))
    assert not cuda.supports(1.0, (x, (x, x.astype(np.float64))))


def normal(*shape, dtype="float32", seed=0, spread=1.0):
    """Seeded normal numbers that `dtype` holds exactly."""
    x = spread * np.random.default_rng([seed, *shape]).standard_normal(shape)
    return x.astype(dtype)


def epsilon(dtype):
    return {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[np.dtype(dtype).name]


def plain(function, *arguments, dtype=np.float64):
    """The reference on copies of the arguments in another floating type."""
    def convert(x):
        if isinstance(x, tuple):
            return type(x)(*map(convert, x)) if hasattr(x, "_fields") else tuple(map(convert, x))
        if not isinstance(x, np.ndarray) or x.dtype.kind in "iub":
            return x
        return x.astype(dtype)

    return getattr(function, "reference", function)(*map(convert, arguments))


def assert_close(got, truth, working=None, factor=2, dtype=None, lost=0.0):
    """`got` is as near to the float64 truth as `working`, the same in float32, times a factor.

    Besides, the largest entry's rounding in `dtype` (that of got) is allowed, and `lost`, that of
    terms which cancel. NaN fails.
    """
    got = np.asarray(got)
    assert got.shape == truth.shape
    error = np.abs(got.astype(np.float64) - truth)
    allowed = 2 * epsilon(dtype or got.dtype) * np.abs(truth).max(initial=1e-30) + lost
    if working is not None:
        allowed += factor * np.abs(working - truth).max(initial=0)
    assert (error <= allowed).all(), f"error {np.nanmax(error)} above {allowed}"


# --------------------------------------------------------------------------------- compute copy

@each_dtype
def test_round_matrices(twins, dtype):
    """Rows of any length, one of them over several blocks; what lies between matrices is free."""
    places = (Place(1, 3, 5, 0, 8), Place(16, 1, 4, 64, 8), Place(20, 2, 300_001, 128, 300_008))
    flat = normal(600_030)
    got = twins.round_matrices(flat, places, 128 + 2 * 300_008, dtype)
    want = round_matrices.reference(flat, places, 128 + 2 * 300_008, dtype)
    assert got.dtype == dtype
    for _, rows, _, start, stride in places:
        inside = slice(start, start + rows * stride)
        assert np.array_equal(got[inside], want[inside])


# ------------------------------------------------------------------------------------ LayerNorm

@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 64), (7, 1023), (2, 33), (70, 40)], ids=str)
def test_layer_norm(twins, shape, dtype):
    x, dy = (normal(*shape, dtype=dtype, seed=seed, spread=3) for seed in (0, 1))
    gain, bias = normal(shape[-1], seed=2), normal(shape[-1], seed=3)
    y, cache = twins.layer_norm(x, gain, bias)
    truth, true_cache = plain(layers.layer_norm, x, gain, bias)
    working, working_cache = plain(layers.layer_norm, x, gain, bias, dtype=np.float32)
    assert y.dtype == x.dtype and cache[2].dtype == np.float32 and cache[3].shape[-1] == 1
    assert_close(y, truth, working)
    true_gradients = plain(layers.layer_norm_backward, dy, true_cache)
    working_gradients = plain(layers.layer_norm_backward, dy, working_cache, dtype=np.float32)
    lost = epsilon("float32") * np.abs(dy * np.float64(gain)).max() * true_cache.rstd.max()
    for got, *others in zip(twins.layer_norm_backward(dy, cache), true_gradients,
                            working_gradients, strict=True):
        assert_close(got, *others, factor=3, dtype=dtype, lost=lost)
        lost = 0  # only in dx do terms cancel, to 0 in rows of one


@each_dtype
def test_normalize(twins, dtype):
    x, dn = normal(2, 3, 5, 16, dtype=dtype), normal(2, 3, 5, 16, dtype=dtype, seed=1)
    strided = np.swapaxes(x, 1, 2)
    n, cache = twins.normalize(strided)
    truth, true_cache = plain(layers.normalize, strided)
    assert_close(n, truth, plain(layers.normalize, strided, dtype=np.float32)[0])
    dn = np.swapaxes(dn, 1, 2)
    expected = plain(layers.normalize_backward, dn, true_cache)
    assert_close(twins.normalize_backward(dn, cache), expected, factor=3)


@each_dtype
@pytest.mark.parametrize("rate, normed", [(0.0, True), (0.3, True), (0.3, False), (0.0, False)])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 1, 1023), (2, 9, 33)], ids=str)
def test_residual(twins, shape, rate, normed, dtype):
    """Rows whose dropout begins anywhere in an octet."""
    x, f, dy = (normal(*shape, dtype=dtype, seed=seed, spread=3) for seed in range(3))
    norm = (normal(shape[-1], seed=3), normal(shape[-1], seed=4)) if normed else ()
    dropped = Dropped(rate, (5, 6, 7), first=3)
    arguments = x, f, dropped, *norm
    y, cache = twins.residual(*arguments)
    truth, true_cache = plain(layers.residual, *arguments)
    working, working_cache = plain(layers.residual, *arguments, dtype=np.float32)
    assert y.dtype == x.dtype and (cache.norm is None) == (not normed)
    assert_close(y, truth, working, factor=4)  # the sum is rounded before it is normalised
    (dx, df), *gradients = twins.residual_backward(dy, cache)
    (true_dx, true_df), *true_gradients = plain(layers.residual_backward, dy, true_cache)
    (work_dx, work_df), *_ = plain(layers.residual_backward, dy, working_cache, dtype=np.float32)
    assert_close(dx, true_dx, work_dx, factor=3, dtype=dtype)
    assert_close(df, true_df, work_df, factor=3, dtype=dtype)
    assert np.array_equal(np.asarray(df, np.float64) == 0, true_df == 0)
    for got, true in zip(gradients, true_gradients, strict=True):
        assert got.dtype == np.float32
        assert_close(got, true, working=true * (1 + epsilon(dtype)), factor=3, dtype=dtype)


def test_layer_norm_backward_is_added(twins):
    x, dy, dx = (normal(3, 7, 40, seed=seed) for seed in range(3))
    gain, bias, dgain, dbias = (normal(40, seed=seed) for seed in (3, 4, 5, 6))
    _, cache = layers.layer_norm.reference(x, gain, bias)
    want = layers.layer_norm_backward.reference(dy, cache)
    wanted = [a + b for a, b in zip((dx, dgain, dbias), want, strict=True)]
    assert twins.add_gradients(layers.layer_norm_backward, dy, cache, (dgain, dbias), dx) is dx
    for got, true in zip((dx, dgain, dbias), wanted, strict=True):
        assert_close(got, true.astype(np.float64), true)


# ------------------------------------------------------------------ linear, feed-forward, gradients

def gradient_cases(dtype):
    """Name -> (backward, cache of the plain forward, result's shape)."""
    x, w, b = normal(3, 7, 9, dtype=dtype), normal(9, 12, dtype=dtype, seed=1), normal(12, seed=2)
    dropped = Dropped(0.3, (5, 6, 7), first=1)
    wide = normal(2, 9, 12, dtype=dtype, seed=3)      # gate and value in one buffer
    back = normal(12, 9, dtype=dtype, seed=4)
    rows, weights = _rows_of(x), np.full(21, 1 / 21, np.float32)
    targets = np.random.default_rng(0).integers(0, 12, 21)
    forwards = {
        "linear": (layers.linear, (x, w, b, 0.4)),
        "linear without bias": (layers.linear, (x, w)),
        "geglu_ffn": (layers.geglu_ffn, (x, wide[0], wide[1], back, dropped)),
        "geglu_ffn apart": (layers.geglu_ffn, (x, wide[1], wide[0], back)),
        "relu_ffn": (layers.relu_ffn, (x, w, b, back, normal(9, seed=5), dropped)),
        "residual": (layers.residual, (x, x[::-1], dropped, normal(9, seed=6), normal(9, seed=7))),
        "linear_cross_entropy": (layers.linear_cross_entropy, (rows, w, b, targets, weights))}
    return forwards


def _rows_of(x):
    return x.reshape(-1, x.shape[-1])


@each_dtype
@pytest.mark.parametrize("name", gradient_cases("float32"))
def test_forward_and_gradients(twins, name, dtype):
    """Result and gradients; and the same gradients, added to what buffers and dx hold."""
    function, arguments = gradient_cases(dtype)[name]
    backward = getattr(layers, f"{function.__name__}_backward")
    y, cache = getattr(twins, function.__name__)(*arguments)
    truth, true_cache = plain(function, *arguments)
    working, working_cache = plain(function, *arguments, dtype=np.float32)
    rounding = dict(factor=4, dtype=dtype if y.ndim else "float32")
    assert_close(y, truth, working, **rounding)
    dy = normal(*y.shape, dtype=dtype, seed=9) if y.ndim else 1.5
    want = plain(backward, dy, true_cache)
    work = plain(backward, dy, working_cache, dtype=np.float32)
    got = getattr(twins, backward.__name__)(dy, cache)

    def compare(got, want, work, rounding=4):
        if isinstance(want, tuple):
            for x in zip(got, want, work, strict=True):
                compare(*x, rounding)
        elif want is not None:
            scale = np.abs(want).max() * rounding * epsilon(dtype)
            assert_close(got, want, work + scale, factor=3, dtype=dtype)

    compare(got, want, work)
    gradients = [x for x in want[1:] if x is not None]
    assert all(x.dtype == np.float32 for x in got[1:] if x is not None)
    buffers = tuple(normal(*x.shape, seed=10 + i) for i, x in enumerate(gradients))
    sums = tuple(x + y for x, y in zip(buffers, gradients, strict=True))
    other = tuple(x + y for x, y in zip(buffers, [x for x in work[1:] if x is not None],
                                        strict=True))
    first = None
    if name.startswith(("linear", "geglu", "relu")) and "cross" not in name:
        first = normal(*want[0].shape, dtype=dtype, seed=20)
        total = first.astype(np.float64) + want[0]
    result = twins.add_gradients(backward, dy, cache, buffers, first)
    compare(buffers, sums, other)
    if first is None:
        compare(result, want[0], work[0])
    else:
        assert result is first
        compare(result, total, total, 8)


def test_gradient_of_a_tied_matrix(twins):
    """The output matrix is the token table transposed, and so is the buffer of its gradient."""
    table, x, dtable, db = (normal(*s, seed=i) for i, s in enumerate([(11, 6), (5, 6), (11, 6),
                                                                       (11,)]))
    targets, weights = np.arange(5), np.full(5, 0.2, np.float32)
    _, cache = twins.linear_cross_entropy(x, table.T, normal(11, seed=4), targets, weights)
    _, dw, bias = layers.linear_cross_entropy_backward.reference(1.0, cache)
    wanted = dtable + dw.T, db + bias
    buffers = dtable.T, db
    twins.add_gradients(layers.linear_cross_entropy_backward, 1.0, cache, buffers)
    assert_close(buffers[0].T, wanted[0].astype(np.float64), wanted[0] * (1 + 1e-6))
    assert_close(buffers[1], wanted[1].astype(np.float64), wanted[1] * (1 + 1e-6))


def test_gradients_without_a_kernel():
    """A backward that has no row in ADDING runs as it is."""
    a, w, dy, dw = normal(3, 4), normal(4, 2, seed=1), normal(3, 2, seed=2), np.ones((4, 2), "f")

    def doubled_backward(dy, cache):
        return dy @ cache.w.T, 2 * cache.x.T @ dy

    dx = cuda.gradients.add_gradients(doubled_backward, dy, layers.LinearCache(a, w, False), (dw,))
    np.testing.assert_array_equal(dx, dy @ w.T)
    np.testing.assert_array_equal(dw, 1 + 2 * a.T @ dy)


@each_dtype
def test_relu_shows_nan(twins, dtype):
    x = np.array([[np.nan, 1.0], [2.0, 3.0]]).astype(dtype)
    eye, zero = np.eye(2).astype(dtype), np.zeros(2, np.float32)
    y, _ = twins.relu_ffn(x, eye, zero, eye, zero)
    assert np.isnan(np.asarray(y, np.float32)[0]).all()
    assert np.isfinite(np.asarray(y, np.float32)[1]).all()


# ----------------------------------------------------------------------------- GEGLU and dropout

@each_dtype
@pytest.mark.parametrize("size", [1, 7, 8, 1027, 4096])
def test_geglu(twins, size, dtype):
    a, b, dy = (normal(size, dtype=dtype, seed=i, spread=2) for i in range(3))
    y, cache = twins.geglu(a, b)
    assert_close(y, plain(layers.geglu, a, b)[0], plain(layers.geglu, a, b, dtype=np.float32)[0])
    truth = plain(layers.geglu_backward, dy, cache)
    working = plain(layers.geglu_backward, dy, cache, dtype=np.float32)
    for got, *others in zip(twins.geglu_backward(dy, cache), truth, working, strict=True):
        assert_close(got, *others, factor=3)


def test_geglu_of_misaligned_arrays(twins):
    """Views that do not begin at a multiple of 16 bytes are read one entry at a time."""
    a, b = normal(65)[1:], normal(66, seed=1)[2:]
    assert_close(twins.geglu(a, b)[0], plain(layers.geglu, a, b)[0])


def test_geglu_far_from_zero(twins):
    a = np.array([-1e30, -20, 20, 1e10, np.inf, np.nan], np.float32)
    b = np.ones(6, np.float32)
    with np.errstate(all="ignore"):
        expected = layers.geglu.reference(a, b)[0]
    np.testing.assert_allclose(twins.geglu(a, b)[0], expected, rtol=1e-6)


def philox_numpy(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): counter (n, 4), key (2,) uint32 -> (n, 4) uint32."""
    counter = [counter[:, i].astype(np.uint64) for i in range(4)]
    key = [int(k) for k in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [(second >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]), second & low,
                   (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]), first & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, axis=1).astype(np.uint32)


@pytest.mark.parametrize("counter, key, expected", [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
])
def test_philox_known_answers(counter, key, expected):
    """The known answers published with Random123."""
    got = philox_numpy(np.array([counter], np.uint32), key)
    assert got[0].tolist() == expected


@each_dtype
@pytest.mark.parametrize("first", [0, 3, 8 * 2**32 - 1])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_draws_philox(twins, rate, first, dtype):
    key = (0x123456789ABCDEF0, 7, 0xFFFFFFFE)
    x = np.ones((7, 40009), dtype)  # enough for numbers equal to the threshold
    y, cache = twins.dropout(x, Dropped(rate, key, first))
    octet, lead = divmod(first * 40009, 8)
    counters = np.zeros((-(-(x.size + lead) // 8), 4), np.uint32)
    octets = octet + np.arange(len(counters), dtype=np.uint64)
    counters[:, 0], counters[:, 1] = octets & 0xFFFFFFFF, octets >> 32
    counters[:, 2], counters[:, 3] = key[1], key[2]
    words = philox_numpy(counters, (key[0] & 0xFFFFFFFF, key[0] >> 32))
    halves = np.stack([words & 0xFFFF, words >> 16], axis=2).reshape(-1)[lead : x.size + lead]
    keep = (halves >= round(rate * 65536)).reshape(x.shape)
    assert np.array_equal(np.asarray(y, np.float32) != 0, keep)
    assert_close(y, keep / (1 - round(rate * 65536) / 65536))
    mask = dropout_mask(np, x.shape, Dropped(rate, key, first), np.float64)
    assert np.array_equal(mask != 0, keep)
    assert cache == (rate, key, first)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_reads_the_step(twins, rate):
    """Not a number but an array: what it holds when the kernel runs counts, in attention too."""
    x, q = np.ones((3, 41), np.float32), normal(2, 5, 8)
    step, masks = np.full((), 3, np.uint32), []
    for later in (3, 4):
        step[...] = later
        pairs = [(twins.dropout(x, Dropped(rate, (1, 2, number)))[0],
                  twins.attend(q, q, q, None, None, np.ones((5, 5), bool), 1.0,
                               Dropped(rate, (1, 2, number)))[0]) for number in (step, later)]
        for got, want in zip(*pairs, strict=True):
            assert np.array_equal(got, want)
        masks.append(pairs[0])
    assert all((a != b).any() for a, b in zip(*masks, strict=True))


def test_no_dropout(twins):
    x = normal(3)
    for dropped in (None, Dropped(0.0, (1, 2, 3))):
        y, cache = twins.dropout(x, dropped)
        assert np.array_equal(y, x) and cache is None


# --------------------------------------------------------------------------------- cross-entropy

@each_dtype
@pytest.mark.parametrize("rows, vocabulary", [(1, 1), (5, 256), (9, 37), (3, 1500)])
def test_linear_cross_entropy(twins, monkeypatch, rows, vocabulary, dtype):
    monkeypatch.setattr(cuda.sizes, "CHUNK_ENTRIES", 4 * vocabulary)  # two or three chunks
    width = 12
    x, w = normal(rows, width, dtype=dtype), normal(width, vocabulary, dtype=dtype, seed=1)
    b, weights = normal(vocabulary, seed=2), np.abs(normal(rows, seed=3))
    weights[rows // 2] = 0
    targets = np.random.default_rng(0).integers(0, vocabulary, rows)
    loss, cache = twins.linear_cross_entropy(x, w, b, targets, weights)
    truth, true_cache = plain(layers.linear_cross_entropy, x, w, b, targets, weights)
    assert_close(loss, truth, dtype="float32")
    assert_close(cache[-1], true_cache[-1], dtype="float32")
    gradients = twins.linear_cross_entropy_backward(1.5, cache)
    for got, true in zip(gradients, plain(layers.linear_cross_entropy_backward, 1.5, true_cache),
                         strict=True):
        assert_close(got, true, dtype=dtype, working=true * (1 + 2 * epsilon(dtype)))


def test_cross_entropy_of_large_logits(twins):
    """No overflow, and NaN is not hidden."""
    x, w = np.ones((2, 1), np.float32), np.array([[1e4, -1e4, 3e4]], np.float32)
    zeros, targets, ones = np.zeros(3, np.float32), np.array([0, 2]), np.ones(2, np.float32)
    loss, cache = twins.linear_cross_entropy(x, w, zeros, targets, ones)
    assert loss == 2e4
    assert all(np.isfinite(d).all() for d in twins.linear_cross_entropy_backward(1.0, cache))
    w[0, 1] = np.nan
    assert np.isnan(twins.linear_cross_entropy(x, w, zeros, targets, ones)[0])


# -------------------------------------------------------------------------------------- attention

def masks(shape, queries, keys):
    """Name -> mask, each broadcasting to (*shape, queries, keys)."""
    rng = np.random.default_rng(0)
    causal = np.arange(keys) - (keys - queries) <= np.arange(queries)[:, None]
    some = rng.random((*shape, queries, keys)) < 0.6
    some[0, 0, 0] = False  # some rows see nothing
    return {"causal": causal, "per block": causal & (rng.random((shape[-1], queries, keys)) < 0.8),
            "per head": causal & (rng.random((shape[1], 1, queries, keys)) < 0.8),
            "by key": causal & (rng.random((*shape, 1, keys)) < 0.8), "full": some & causal}


@each_dtype
@pytest.mark.parametrize("queries, keys, distances, rate, which", [
    (3, 300, 300, 0.1, "causal"),
    *[(*sizes, which) for which in ("causal", "per block", "per head", "by key", "full")
      for sizes in [(4, 4, 4, 0.0), (4, 12, 12, 0.25), (5, 5, 9, 0.0), (1, 1, 1, 0.0),
                    (6, 12, 0, 0.5)]],
])
def test_attend(twins, monkeypatch, queries, keys, distances, rate, which, dtype):
    monkeypatch.setattr(cuda.sizes, "CHUNK_ENTRIES", 5 * queries * keys)  # chunks of five blocks
    shape, width = (2, 2, 3), 8
    q, do = (normal(*shape, queries, width, dtype=dtype, seed=i) for i in (0, 1))
    k, v = (normal(*shape, keys, width, dtype=dtype, seed=i) for i in (2, 3))
    tables = [normal(distances, width, dtype=dtype, seed=i) for i in (4, 5)]
    rel_k, rel_v = tables if distances else (None, None)
    mask = masks(shape, queries, keys)[which]
    dropped = Dropped(rate, (123, 4, 5), first=3) if rate else None
    arguments = (q, k, v, rel_k, rel_v, mask, 0.5, dropped)
    o, cache = twins.attend(*arguments)
    truth, true_cache = plain(attention.attend, *arguments)
    working, working_cache = plain(attention.attend, *arguments, dtype=np.float32)
    assert o.dtype == q.dtype
    assert_close(o, truth, working)
    assert_close(cache[-1], true_cache[-1], working_cache[-1])
    gradients = twins.attend_backward(do, cache)
    true_gradients = plain(attention.attend_backward, do, true_cache)
    working_gradients = plain(attention.attend_backward, do, working_cache, dtype=np.float32)
    for got, true, work in zip(gradients, true_gradients, working_gradients, strict=True):
        if true is None:
            assert got is None
        else:
            assert_close(got, true, work, factor=3, dtype=dtype)


@each_dtype
@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("tokens, block, lookback, reach, window, rate, shared", [
    (24, 4, 1, 9, None, 0.0, False), (23, 4, 2, 3, None, 0.2, False), (23, 4, 2, 3, 5, 0.0, True),
    (5, 8, 1, 2, None, 0.0, False), (30, 3, 2, 0, 4, 0.3, True), (1, 1, 0, 1, 1, 0.0, False),
    (50, 5, 3, 40, None, 0.0, False), (300, 140, 1, 40, 20, 0.2, False)])
def test_local_attention(twins, monkeypatch, tokens, block, lookback, reach, window, rate, shared,
                         width, dtype):
    """Windows that are views, in chunks, from heads that stand between tokens; distances that are
    clipped, and that no query sees; rows of odd widths, and of which whole tiles are not seen."""
    monkeypatch.setattr(cuda.sizes, "CHUNK_ENTRIES", 3 * block * block * (lookback + 1))
    b, h = 2, 3
    q, k, v, do = (normal(b, tokens, h, width, dtype=dtype, seed=i).swapaxes(1, 2)
                   for i in range(4))
    k = q if shared else k
    tables = [normal(2 * reach + 1, width, dtype=dtype, seed=i) for i in (4, 5)]
    rel = tables if reach else (None, None)
    segments = None if window is None else np.sort(
        np.random.default_rng(0).integers(0, 3, (b, h, tokens)), axis=-1)
    dropped = Dropped(rate, (1, 2, 3), first=1) if rate else None
    arguments = q, k, v, *rel, block, lookback, 0.7, segments, window, dropped
    o, cache = twins.local_attention(*arguments)
    truth, true_cache = plain(attention.local_attention, *arguments)
    working, working_cache = plain(attention.local_attention, *arguments, dtype=np.float32)
    assert o.dtype == q.dtype
    assert_close(o, truth, working)
    assert_close(attention.join_blocks(cache[-1], tokens),
                 attention.join_blocks(true_cache[-1], tokens), dtype=dtype, factor=3,
                 working=attention.join_blocks(working_cache[-1], tokens))
    gradients = twins.local_attention_backward(do, cache)
    expected = plain(attention.local_attention_backward, do, true_cache)
    others = plain(attention.local_attention_backward, do, working_cache, dtype=np.float32)
    for got, true, work in zip(gradients, expected, others, strict=True):
        if true is None:
            assert got is None
        else:
            assert_close(got, true, work, factor=3, dtype=dtype)


def test_tables_are_padded_so_that_rows_by_distance_are_aligned(on_cpu):
    rel = normal(9, 5), normal(9, 5, seed=1)
    for table, own in zip(cuda.attention._tables(*rel, np.float32), rel, strict=True):
        assert table.shape == (16, 5) and not table[9:].any()
        np.testing.assert_array_equal(table[:9], own)


def test_windows_are_views_that_products_read(on_cpu):
    """Keys are not copied: the planner takes overlapping windows of the padded sequence."""
    x = normal(2, 10, 3, 8).swapaxes(1, 2)
    (rows,) = cuda.attention._split_heads([x], 4, 12)
    windows = cuda.attention._windows(rows, 18, 4, 8)
    assert np.shares_memory(windows, rows)
    heads = rows[4:].reshape(2, 3, 12, 8)
    assert np.array_equal(heads[:, :, :10], x)
    assert not rows[:4].any() and not heads[:, :, 10:].any()
    product = gemm.plan(windows, np.empty((18, 8, 8), "f").swapaxes(-1, -2),
                        np.empty((18, 8, 8), "f"))
    assert product.batch == 18 and product.stride_a == 4 * 8 and product.ld_a == 8


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("tokens, block, lookback", [(12, 4, 1), (13, 4, 2), (5, 5, 0)])
def test_attend_by_rule(twins, tokens, block, lookback, window):
    """A Band sees what the mask of local_attention shows."""
    b, h, width = 2, 2, 4
    segments = np.sort(np.random.default_rng(0).integers(0, 3, (b, h, tokens)), axis=-1)
    q, k, v = (normal(b, h, tokens, width, seed=i) for i in range(3))
    queries = attention.split_blocks(q, block)
    keys, values = (attention._windows(x, block, lookback) for x in (k, v))
    mask = attention._local_mask(q, tokens, block, lookback, segments, window)
    band = cuda.attention.Band(queries.shape[2], tokens, lookback * block, window or tokens,
                               segments)
    expected = twins.attend(queries, keys, values, None, None, mask, 1.0)[0]
    got = twins.attend(queries, keys, values, None, None, band, 1.0)[0]
    assert np.array_equal(*(attention.join_blocks(x, tokens) for x in (got, expected)))
    mask = attention._local_mask(q, tokens, block, lookback, None, window)
    expected = twins.attend(queries, keys, values, None, None, mask, 1.0)[0]
    band = band._replace(segment=None)
    got = twins.attend(queries, keys, values, None, None, band, 1.0)[0]
    assert np.array_equal(*(attention.join_blocks(x, tokens) for x in (got, expected)))


def test_attend_shows_nan(twins):
    """One NaN logit makes its whole row NaN, as in the plain function."""
    q, k, v = (normal(1, 1, 4, 8, seed=i) for i in range(3))
    q[0, 0, 2, 0] = np.nan
    o = twins.attend(q, k, v, None, None, np.tri(4, dtype=bool), 1.0,
                     Dropped(0.5, (1, 2, 3)))[0]
    assert np.isnan(o[0, 0, 2]).all() and np.isfinite(o[0, 0, [0, 1, 3]]).all()


# ---------------------------------------------------------------------------------------- routing

@pytest.mark.parametrize("rows, tokens, window", [
    (3, 64, 16), (1, 1, 1), (2, 1023, 37), (1, 1023, 1023), (2, 5, 1), (1, 20000, 777),
])
@pytest.mark.parametrize("values", ["normal", "ties", "equal"])
def test_top_members(twins, rows, tokens, window, values):
    scores = normal(rows, tokens)
    if values == "ties":
        scores = np.round(scores * 2) / 2  # with both zeros
    if values == "equal":
        scores[:] = -1.5
    got = twins.top_members(scores, window)
    assert got.dtype == np.int32
    assert np.array_equal(got, routing.top_members.reference(scores, window))


def test_top_members_of_odd_values(twins):
    scores = [np.nan, -np.inf, 1e-40, -0.0, 0, np.inf, -1e-40, 3, -3, np.nan]
    scores = np.array([scores], np.float32)
    for window in range(1, 11):
        expected = routing.top_members.reference(scores, window)
        assert np.array_equal(twins.top_members(scores, window), expected), window


def test_top_members_of_a_long_row(twins):
    scores = normal(1, 131072)
    expected = routing.top_members.reference(scores, 1000)
    assert np.array_equal(twins.top_members(scores, 1000), expected)


@pytest.mark.parametrize("shape, clusters", [
    ((2, 3, 100), 5), ((1, 1, 1), 1), ((1, 2, 5000), 1024), ((1, 1, 33000), 7), ((2, 1, 513), 1),
])
def test_by_cluster(twins, shape, clusters):
    winner = np.random.default_rng(0).integers(0, clusters, shape)
    order = twins.by_cluster(winner, clusters)
    assert np.array_equal(order, twins.by_cluster(winner))
    assert order.dtype == np.int32
    assert np.array_equal(order, routing.by_cluster.reference(winner))
    assert np.array_equal(twins.inverse(order), np.argsort(order, axis=-1))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "uint8", "int64"])
@pytest.mark.parametrize("width", [1, 3, 8, 64])
def test_gather(twins, width, dtype):
    """Bytes are moved as they are, also from heads that lie between tokens."""
    x = normal(2, 5, 3, width, spread=50).astype(dtype).swapaxes(1, 2)  # (B, H, T, D), strided
    index = np.random.default_rng(0).integers(0, 5, (2, 3, 4, 7))
    got = twins.gather(x, index)
    assert got.dtype == x.dtype and np.array_equal(got, routing.gather(x, index))
    contiguous = np.ascontiguousarray(x)
    assert np.array_equal(twins.gather(contiguous, index), got)


@each_dtype
@pytest.mark.parametrize("clusters, window, tokens, width", [
    (4, 8, 30, 16), (1, 1, 1, 1), (3, 100, 300, 40), (7, 13, 29, 130), (70, 5, 29, 8),
])
def test_scatter(twins, clusters, window, tokens, width, dtype):
    b, h = 2, 3
    rows = normal(b, h, clusters, window, width, dtype=dtype)
    index = routing.top_members.reference(normal(b, h, clusters, tokens, seed=1), window)
    out, (_, times) = twins.scatter_mean(rows, index, tokens)
    expected, (_, expected_times) = plain(routing.scatter_mean, rows, index, tokens)
    assert out.dtype == rows.dtype and times.dtype == rows.dtype
    assert np.array_equal(times.astype(np.float64), expected_times)
    assert_close(out, expected)
    expected = plain(routing.scatter_sum, rows, index, tokens)
    assert_close(twins.scatter_sum(rows, index, tokens), expected)


@pytest.mark.parametrize("n", [1, 3, 1024, 1025, 267_735, 2**21 + 5])
def test_stable_order(on_cpu, n):
    index = np.random.default_rng(0).integers(0, n, 3000).astype(np.int32)
    index[::3] = index[0]
    assert np.array_equal(cuda.sums.stable_order(index, n), np.argsort(index, kind="stable"))


@each_dtype
@pytest.mark.parametrize("size, width, segments", [
    (1, 1, 1), (50, 7, 10), (1000, 33, 3), (300, 300, 1000), (129, 4, 1), (700, 3, 1500),
])
def test_segment_sum(twins, size, width, segments, dtype):
    rows = normal(size, width, dtype=dtype)
    index = np.random.default_rng(0).integers(0, segments, size)
    expected = np.zeros((segments, width))
    np.add.at(expected, index, rows.astype(np.float64))
    got = twins.segment_sum(rows, index, segments)
    assert got.dtype == np.float32
    assert_close(got, expected, factor=4, working=expected * (1 + epsilon("float32")))


@each_dtype
@pytest.mark.parametrize("b, h, tokens, width, clusters", [
    (2, 2, 700, 5, 9), (1, 1, 1, 1, 1), (1, 2, 60, 64, 200),
])
def test_cluster_statistics(twins, b, h, tokens, width, clusters, dtype):
    x = normal(b, h, tokens, width, dtype=dtype)
    winner = np.random.default_rng(0).integers(0, clusters, (b, h, tokens))
    counts, sums = twins.cluster_statistics(x, winner, clusters)
    true_counts, true_sums = plain(kmeans.cluster_statistics, x, winner, clusters)
    assert np.array_equal(counts, true_counts)
    assert_close(sums, true_sums, dtype="float32", factor=4,
                 working=true_sums * (1 + epsilon("float32")))


@pytest.mark.parametrize("heads, clusters, width", [(1, 1, 1), (3, 7, 5), (2, 1024, 3)])
def test_replace_centroids(twins, heads, clusters, width):
    """Three steps in place; a centroid that wins nothing stays, also where nobody wins."""
    rng = np.random.default_rng(0)
    mu, total = normal(heads, clusters, width), normal(heads, clusters, width, seed=1)
    got = kmeans.Centroids(mu, rng.random((heads, clusters), np.float32), total)
    truth = kmeans.Centroids(*(x.astype(np.float64) for x in got))
    working = kmeans.Centroids(*(x.copy() for x in got))
    for step in range(3):
        counts = rng.integers(0, 3, (heads, clusters)).astype(np.float32) * (step > 0)
        sums, stays = normal(heads, clusters, width, seed=step + 2), got.mu[counts == 0].copy()
        twins.replace_centroids(got, counts, sums, 0.9)
        assert np.array_equal(got.mu[counts == 0], stays)
        for state in (truth, working):
            kmeans.replace_centroids.reference(state, counts.astype(state.mu.dtype),
                                               sums.astype(state.mu.dtype), 0.9)
        for own, *others in zip(got, truth, working, strict=True):
            assert_close(own, *others)


@each_dtype
@pytest.mark.parametrize("equal_length", [False, True])
@pytest.mark.parametrize("tokens, width, clusters", [(70, 40, 5), (1, 1, 1), (33, 7, 70)])
def test_compare(twins, tokens, width, clusters, equal_length, dtype):
    x, mu = normal(2, 3, tokens, width, dtype=dtype), normal(3, clusters, width, seed=1)
    winner, products = twins.compare(x, mu, equal_length)
    truth, true_products = plain(kmeans.compare, x, mu, equal_length)
    assert winner.dtype == np.int32 and products.dtype == np.float32
    assert_close(products, true_products, true_products * (1 + 1e-6))
    chosen = np.take_along_axis(true_products, np.asarray(winner)[:, :, None], axis=2)[:, :, 0]
    best = true_products.max(2)
    assert (chosen >= best - 1e-5 * np.abs(best)).all()
    assert (np.asarray(winner) == truth).mean() > 0.99


def test_compare_takes_the_lower_index_on_ties(twins):
    for clusters in (4, 9, 40):
        x, mu = np.ones((1, 1, 40, 3), np.float32), np.ones((1, clusters, 3), np.float32)
        assert not np.asarray(twins.compare(x, mu)[0]).any()
        mu[0, : clusters // 2] = -1
        assert (np.asarray(twins.compare(x, mu)[0]) == clusters // 2).all()


@each_dtype
def test_commitment(twins, dtype):
    x, mu = normal(2, 3, 70, 9, dtype=dtype), normal(3, 5, 9, seed=1)
    winner = np.random.default_rng(0).integers(0, 5, (2, 3, 70))
    loss, cache = twins.commitment(x, mu, winner)
    truth, true_cache = plain(kmeans.commitment, x, mu, winner)
    assert_close(loss, truth, dtype="float32")
    assert_close(cache.apart, true_cache.apart, dtype="float32")
    dx = normal(2, 3, 70, 9, dtype=dtype, seed=2)
    want = dx.astype(np.float64) + plain(kmeans.commitment_backward, 40.0, true_cache)
    assert twins.add_commitment_gradient(dx, 40.0, cache) is None
    assert_close(dx, want)


@each_dtype
def test_coverage(twins, dtype):
    times = np.random.default_rng(0).integers(0, 4, (2, 3, 77, 1)).astype(dtype)
    got, want = twins.coverage(times), plain(routing.coverage, times)
    np.testing.assert_allclose([float(x) for x in got], want, rtol=1e-6)


@each_dtype
@pytest.mark.parametrize("width", [5, 16])
def test_scatter_mean_backward(twins, width, dtype):
    dout = normal(2, 30, 3, width, dtype=dtype).swapaxes(1, 2)
    index = routing.top_members.reference(normal(2, 3, 4, 30, seed=1), 8)
    times = np.random.default_rng(0).integers(1, 4, (2, 3, 30, 1)).astype(dtype)
    cache = routing.ScatterMeanCache(index, times)
    assert_close(twins.scatter_mean_backward(dout, cache),
                 plain(routing.scatter_mean_backward, dout, cache))


# ------------------------------------------------------------------------------------- optimizers

class Leaf(NamedTuple):
    name: str
    shape: tuple
    start: int
    stop: int


SHAPES = {"a.w": (6, 10), "a.bias": (7,), "heads": (2, 3, 4), "rows": (1, 5, 1, 6), "scalar": (),
          "b.w": (1100, 20), "b.gain": (1100,),
          "layers.0.w_in": (6, 40), "layers.1.w_in": (6, 40), "layers.0.w_out": (40, 6),
          "layers.0.local_rel_k": (5, 4), "wide": (2, 1100), "b.b_in": (5,), "small": (3, 4)}


def flat_buffer():
    """(parameters, table): the last leaf lies below Adafactor's least scale."""
    table, start = [], 0
    for name, shape in SHAPES.items():
        table.append(Leaf(name, shape, start, start + int(np.prod(shape))))
        start = table[-1].stop
    flat = normal(start)
    flat[table[-1].start :] = 0
    return flat, table


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizer(twins, name, decay):
    """Matrices, stacks of matrices, vectors and scalars in one buffer, three steps."""
    init, update, _ = optim.OPTIMIZERS[name]
    update = getattr(update, "reference", update)
    flat, table = flat_buffer()
    runs = [(x, init(x, table)) for x in (flat, flat.astype(np.float64), flat.copy())]
    for step in range(3):
        grads = normal(flat.size, seed=step + 1, spread=10.0**-step)
        getattr(twins, f"{name}_update")(flat, grads, runs[0][1], table, 0.01, step,
                                         weight_decay=decay)
        for x, state in runs[1:]:
            update(x, grads.astype(x.dtype), state, table, 0.01, step, weight_decay=decay)
        (got, got_state), (truth, true_state), (working, working_state) = runs
        assert_close(got, truth, working)
        for key in true_state:
            assert_close(got_state[key], true_state[key], working_state[key])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizers_read_rate_and_step(twins, name):
    """Arrays, not numbers: what they hold when the kernels run counts."""
    (flat, table), lr, step = flat_buffer(), np.zeros((), np.float32), np.zeros((), np.uint32)
    by_array, by_number = flat.copy(), flat.copy()
    states = [optim.OPTIMIZERS[name].init(flat, table) for _ in range(2)]
    update = getattr(twins, f"{name}_update")
    for lr[...], step[...] in ((0.01, 0), (0.02, 7)):
        grads = normal(flat.size, seed=int(step) + 1)
        update(by_array, grads, states[0], table, lr, step, weight_decay=0.1)
        update(by_number, grads, states[1], table, float(lr), int(step), weight_decay=0.1)
        assert np.array_equal(by_array, by_number) and (by_array != flat).any()


@pytest.mark.parametrize("size", [1, 1023, 70001])
def test_global_norm(twins, size):
    x = normal(size)
    assert_close(twins.global_norm(x), np.linalg.norm(x.astype(np.float64)))
    x[size // 2] = np.nan
    assert np.isnan(twins.global_norm(x))


def test_adamw_of_a_long_leaf(twins):
    table = [Leaf("w", (150001,), 0, 150001)]
    w = normal(150001)
    truth = w.astype(np.float64)
    states = [optim.adamw_init(x, table) for x in (w, truth)]
    update = getattr(optim.adamw_update, "reference", optim.adamw_update)
    update(truth, w.astype(np.float64), states[1], table, 0.01, 0)
    twins.adamw_update(w, w.copy(), states[0], table, 0.01, 0)
    assert_close(w, truth)


def test_optimizer_sees_leaves_that_move(twins):
    """Tables are kept on the device: another table must not meet the old one."""
    flat, table = flat_buffer()
    for leaves in (table, table[:2]):
        w = flat[: leaves[-1].stop].copy()
        state = optim.adamw_init(w, leaves)
        twins.adamw_update(w, np.ones_like(w), state, leaves, 0.01, 0)
        assert (w != flat[: w.size]).all()


# -------------------------------------------------------------------------------- the whole model

def use_twins(monkeypatch):
    """Let every module of the package call the twins instead of the plain functions."""
    for name, twin in cuda.TWINS.items():
        monkeypatch.setitem(dispatch.twins[name], "numpy", (twin, cuda.supports))


def watch_kernels(monkeypatch):
    """The names of the kernels that are started from now on, a set that grows."""
    started, compiled = set(), launch.compiled
    monkeypatch.setattr(launch, "compiled", lambda instance: (
        started.add(instance.partition("<")[0]), compiled(instance))[1])
    return started


@pytest.mark.parametrize("mode", ["causal", "topk"])
def test_model_on_kernels(on_cpu, monkeypatch, mode):
    """Loss, gradients and routes of a small model: float32 on kernels against plain float64."""
    cfg = config.ModelConfig(
        vocab_size=17, seq_len=48, n_layers=2, width=32, ffn_width=24, n_clusters=3, window=8,
        block=8, routing=mode, attention_dropout=0.1, ffn_dropout=0.1, residual_dropout=0.1)
    ids = np.random.default_rng(0).integers(0, 17, (2, 48))
    results, launched = [], set()
    for dtype in (np.float64, np.float32):
        if dtype == np.float32:
            use_twins(monkeypatch)
            launched = watch_kernels(monkeypatch)
        flat, table = init_parameters(cfg, np, np.float64, 0)
        flat = flat.astype(dtype)
        grads = np.zeros_like(flat)
        centroids = init_centroids(cfg, np, dtype, 0)
        weights = np.full(ids.shape, 1 / ids.size, dtype)
        (nats, commitment), cache, report = model.loss(
            views(flat, table), centroids, cfg, ids, weights, noise=model.Noise(1, 2, 3))
        model.loss_backward(1.0, 1e-4, cache, views(grads, table))
        results.append((nats, commitment, grads, report))
    for kernel in ("layer_norm_backward", "geglu_backward", "attention_softmax_backward",
                   "gather_rows", "cross_entropy", "dropout", "segment_finish", "cluster_sums",
                   "top_members" if mode == "topk" else "cluster_positions"):
        assert kernel in launched
    (nats, commitment, grads, report), (*got, got_grads, got_report) = results
    for i, route in report.routes.items():
        own = got_report.routes[i]
        for a, b in ((own.winner, route.winner), (own.order, route.order),
                     (own.members, route.members)):
            assert (a is None and b is None) or np.array_equal(a, b)
        assert_close(got_report.memberships[i].sums, report.memberships[i].sums, dtype="float16")
    np.testing.assert_allclose(got, (nats, commitment), rtol=1e-5)
    np.testing.assert_allclose(got_grads, grads, rtol=0, atol=1e-5 * np.abs(grads).max())


# --------------------------------------------------------------------------------------- launcher

def test_launch_refuses_what_cupy_would_misread(on_cpu):
    x, y = np.ones(8, np.float32), np.empty(8, np.float32)
    arguments = [y, x, 8, 1.0]
    launch.launch("relu_backward", (1,), (32,), *arguments)
    for at, wrong, message in [(1, x.astype(np.float16), "d_n is float16"),
                               (0, np.ones(16, np.float32)[::2], "dd_n is not contiguous"),
                               (0, np.ones(8, np.float64), "dd_n is float64"),
                               (2, np.array(8), "size is an array")]:
        bad = [*arguments]
        bad[at] = wrong
        with pytest.raises(TypeError, match=message):
            launch.launch("relu_backward", (1,), (32,), *bad)
    with pytest.raises(TypeError, match="takes 4 arguments"):
        launch.launch("relu_backward", (1,), (32,), y, x, 8)


def test_every_kernel_is_launched():
    """No kernel without a launcher, hence none without a test."""
    text = "".join(path.read_text() for path in Path(cuda.__file__).parent.glob("*.py"))
    assert len(launch.kernels()) > 15
    for name in launch.kernels():
        assert f'"{name}"' in text, name


def test_every_kernel_is_declared_as_the_launcher_reads_it():
    for file in FILES:
        assert launch.source(file).count("__global__") == len(launch.declarations(file)), file


# ------------------------------------------------------------------------------------------- GEMM

Q, K = normal(2, 3, 5, 4), normal(2, 3, 7, 4, seed=1)
TALL = normal(2, 5, 3, 4, seed=2)  # (B, T, H, D)
PRODUCTS = {
    "batches": (Q, np.ascontiguousarray(K.swapaxes(-1, -2))),
    "b transposed": (Q, K.swapaxes(-1, -2)),
    "a transposed": (Q.swapaxes(-1, -2), Q),
    "both transposed": (Q[..., :4, :].swapaxes(-1, -2), K[..., :4].swapaxes(-1, -2)[..., :4, :]),
    "one matrix for all": (Q, normal(4, 6)),
    "one transposed for all": (Q, normal(6, 4).T),
    "one left for all": (normal(6, 5), Q),
    "column slices": (Q[..., :2], K[..., 2:].swapaxes(-1, -2)),
    "heads between tokens": (TALL[0].swapaxes(0, 1), TALL[0].transpose(1, 2, 0)),
    "broadcast view": (Q, np.broadcast_to(normal(4, 6), (2, 3, 4, 6))),
    "two-dimensional": (normal(5, 4), normal(4, 6)),
    "rows": (normal(1, 4), normal(4, 1)),
    "outer": (normal(5, 1), normal(1, 6)),
    "a column of a matrix": (normal(5, 4)[:, 1:2], normal(1, 6)),
    "one by one": (normal(2, 1, 1), normal(2, 1, 1)),
    "every other batch, one matrix": (Q.reshape(6, 5, 4)[::2], normal(4, 6)),
    "every other batch": (Q.reshape(6, 5, 4)[::2], K.reshape(6, 7, 4)[1::2].swapaxes(-1, -2)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_gemm_plan(name):
    """No product here needs a copy, and cuBLAS would compute it."""
    a, b = PRODUCTS[name]
    expected = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    if name == "both transposed":
        assert gemm.plan(a, b, expected)[:2] == (gemm.TRANSPOSED, gemm.TRANSPOSED)
    c = np.full(expected.shape, np.nan, np.float32)
    run_on_cpu.cublas(gemm.plan(a, b, c), a, b, c, 1.0, 0.0)
    np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-6, equal_nan=False)


def test_gemm_folds_a_shared_matrix_into_one_product():
    assert gemm.plan(Q, normal(4, 6), np.empty((2, 3, 5, 6), np.float32)).batch == 1


@pytest.mark.parametrize("a, b, c", [
    (TALL.swapaxes(1, 2), TALL.transpose(0, 2, 3, 1), np.empty((2, 3, 5, 5))),  # two strides
    (Q[..., ::2], K[..., ::2].swapaxes(-1, -2), np.empty((2, 3, 5, 7))),        # neither contiguous
    (Q, K, np.empty((2, 3, 5, 7))),                                            # shapes
    (Q, K.swapaxes(-1, -2), np.empty((2, 3, 7, 5)).swapaxes(-1, -2)),          # columns of c
    (Q, K[:1, :2].swapaxes(-1, -2), np.empty((2, 3, 5, 7))),                   # batches
    (Q, K.swapaxes(-1, -2), np.broadcast_to(np.empty((5, 7)), (2, 3, 5, 7))),  # one c for all
])
def test_gemm_plan_refuses(a, b, c):
    with pytest.raises(ValueError):
        gemm.plan(a, b, c)


@each_dtype
def test_matmul(twins, dtype):
    a, b = TALL.astype(dtype).swapaxes(1, 2), TALL.astype(dtype).transpose(0, 2, 3, 1)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    got = twins.matmul(a, b)  # two strides: copied first
    assert got.dtype == a.dtype
    assert_close(got, expected)
    out = np.ones(expected.shape, np.float32)
    assert twins.matmul(a, b, out=out, alpha=2.0, beta=-1.0) is out
    assert_close(out, 2 * expected - 1, working=(2 * expected - 1) * (1 + 1e-6), dtype="float32")
    assert twins.matmul(a, b, dtype=np.float32).dtype == np.float32


def test_matmul_of_nothing(twins):
    assert twins.matmul(np.ones((3, 0), np.float32), np.ones((0, 2), np.float32),
                       out=np.ones((3, 2), np.float32), beta=0.5).tolist() == [[0.5, 0.5]] * 3
    assert twins.matmul(np.ones((0, 3), np.float32), np.ones((3, 2), np.float32)).shape == (0, 2)
    fresh = twins.matmul(np.ones((3, 0), np.float32), np.ones((0, 2), np.float32))
    assert fresh.tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("a, b, out", [("float64", "float64", "float64"),
                                       ("float32", "float16", "float32"),
                                       ("float32", "float32", "float16")])
def test_matmul_refuses_other_types(a, b, out):
    with pytest.raises(TypeError, match="matrix product"):
        gemm.matmul(np.ones((2, 2), a), np.ones((2, 2), b), out=np.ones((2, 2), out))


# ---------------------------------------------------------------------- compiled for real GPUs

@pytest.fixture(scope="session")
def nvrtc():
    reason = nvrtc_check.missing()
    if reason:
        pytest.skip(reason)


REGISTERS = 64  # per thread; four blocks of 256 threads fit on a multiprocessor


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", FILES)
def test_compiles_within_budget(nvrtc, file, architecture):
    used = nvrtc_check.compile_file(file, architecture)
    assert len(used) >= len(launch.declarations(file))
    for name, usage in used.items():
        assert usage.registers <= REGISTERS, f"{name}: {usage}"
        assert usage.spilled == 0, f"{name}: {usage}"
        assert usage.shared <= 48 << 10, f"{name}: {usage}"


def test_compile_check_sees_errors_and_spills(nvrtc):
    with pytest.raises(RuntimeError, match="INFINITY"):
        nvrtc_check.compile_text("__global__ void f(float* x) { *x = INFINITY; }", ["f"])
    greedy = """__global__ void __launch_bounds__(1024, 2) f(float* x) {
      float v[64];
      for (int i = 0; i < 64; i++) v[i] = x[i * threadIdx.x];
      for (int r = 0; r < 64; r++)
        for (int i = 0; i < 64; i++) v[i] += v[(i * 7 + 1) % 64] * x[r];
      for (int i = 0; i < 64; i++) x[i * threadIdx.x] = v[i];
    }"""
    assert nvrtc_check.compile_text(greedy, ["f"])["f"].spilled > 0


# ------------------------------------------------------------------------- missing barriers

def sanitized(file, without=None):
    """Exit code and output of a run of the file's kernels under ThreadSanitizer."""
    script = Path(__file__).parent / "cuda" / "sanitize.py"
    command = [sys.executable, str(script), file] + ([str(without)] if without is not None else [])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr or "no ThreadSanitizer" in done.stderr:
        pytest.skip("ThreadSanitizer does not run here")
    return done.returncode, done.stderr


@HAVE_COMPILER
@pytest.mark.parametrize("file", ["top_members.cu", "rows.cu", "by_cluster.cu", "optim.cu",
                                  "centroids.cu", "kmeans.cu"])
def test_no_race(file):
    code, text = sanitized(file)
    assert code == 0, text[-3000:]


@HAVE_COMPILER
def test_missing_barrier_is_a_race():
    code, text = sanitized("top_members.cu", without=2)
    assert code == 66 and "data race" in text, text[-3000:]


# ------------------------------------------------------------------------------- the whole model

def whole(cfg, dtype, fixed=None, loss_scale=1.0):
    """(nats, gradient, routes) of one step of a small model."""
    m = setup(cfg, dtype="float32")
    grads = np.empty_like(m.flat)
    if fixed is not None:
        plain_loss = step_module.loss
        step_module.loss = lambda *args, **options: plain_loss(*args, fixed=fixed, **options)
    try:
        result = step_module.gradients(
            m.state(scale=LossScale(loss_scale, 0)), grads, m.parts(), cfg,
            config.TrainConfig(), dtype)
    finally:
        if fixed is not None:
            step_module.loss = plain_loss
    return float(result.nats), grads, result.reports[0].routes


@pytest.mark.parametrize("changes", [
    {}, {"norm": "post"}, {"routing": "topk"}, {"share_qk": False, "norm": "post", "ffn": "relu"},
    {"n_probes": 2}, {"n_probes": 2, "share_qk": False}, {"shift_keys": True},
    {"timing_signal": True, "tie_embedding": True, "attention_dropout": 0.2, "ffn_dropout": 0.2},
    {"kind": "image", "image_size": 3, "seq_len": 27, "vocab_size": 256, "n_classes": 2},
], ids=str)
@each_dtype
def test_whole_model(on_cpu, monkeypatch, changes, dtype):
    """Forward and backward with every twin at once against the plain functions in float32."""
    cfg = config.ModelConfig(**dict(
        vocab_size=11, seq_len=23, n_layers=2, width=24, ffn_width=16, n_local_heads=1,
        n_routing_heads=2, n_clusters=3, window=6, block=4, lookback=2, local_max_distance=3,
        routing_max_distance=2, commitment=0.1) | changes).validate()
    nats, grads, routes = whole(cfg, None)
    use_twins(monkeypatch)
    used = watch_kernels(monkeypatch)
    exact = np.dtype(dtype) == np.float32
    own_nats, own, _ = whole(cfg, None if exact else dtype, routes, 1.0 if exact else 8.0)
    tolerance = 2e-5 if exact else 40 * epsilon(dtype)
    assert own.dtype == np.float32
    assert abs(own_nats - nats) < tolerance * nats
    assert np.linalg.norm(own - grads) < tolerance * np.linalg.norm(grads)
    assert {"layer_norm", "attention_softmax", "cross_entropy_backward"} <= used
    assert exact or "round_matrices" in used


@each_dtype
def test_sums_of_gradients_are_not_rounded(on_cpu, monkeypatch, dtype):
    """Whatever the network computes in, what is summed for the parameters is summed in float32.

    Matrices are products with a float32 result; here the others: LayerNorm, biases, tokens,
    relative positions. Of rounded sums no entry would change by rounding.
    """
    use_twins(monkeypatch)
    cfg = dataclasses.replace(SMALL, width=24, ffn="relu")
    m = setup(cfg, dtype="float32")
    grads = np.empty_like(m.flat)
    step_module.gradients(m.state(), grads, m.parts(), cfg, config.TrainConfig(), dtype)
    half = "float16" if np.dtype(dtype) == np.float32 else dtype
    for leaf in m.table:
        own = grads[leaf.start : leaf.stop]
        assert (own != own.astype(half)).mean() > 0.5 * (own != 0).mean() > 0, leaf.name
