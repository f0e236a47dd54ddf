"""How many kernels and array operations a training step starts on a GPU: a budget per preset.

Python starts them one by one, so their number is the host's time. Here the GPU's twins run on the
strict stand-in for CuPy arrays with a compiler that computes nothing: every kernel, every matrix
product and every operation on an array is counted. Presets are narrowed by 16 along every axis but
layers, heads, blocks and clusters, and so are the chunks of wide intermediates, so that the count
is that of the real size. A count on real CuPy: benchmarks/results/gpu-launches.md.
"""

import collections

import numpy as np
import pytest
from helpers import strictxp

from rt_scratch import dispatch
from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.kernels import cuda, gemm, launch
from rt_scratch.presets import preset
from rt_scratch.step import cut, new_state, train_step

NARROWER = 16
VOCABULARY = {"wikitext103": 267_735, "pg19": 98_304}


def narrowed(dataset: str, **changes):
    """(ModelConfig, TrainConfig) of the released preset with all sizes divided by 16."""
    values = preset(dataset, "released") | changes
    for name in ("seq_len", "window", "block"):
        values[name] //= NARROWER
    heads = values["n_local_heads"] + values["n_routing_heads"]
    odd = dataset == "pg19"  # whose heads have 129 columns
    values |= dict(width=(8 + odd) * heads, ffn_width=16,
                   embed_width=8 if "embed_width" in values else 0,
                   vocab_size=max(256, -(-VOCABULARY.get(dataset, 0) // NARROWER)))
    for name in ("local_max_distance", "routing_max_distance"):
        if values.get(name, 1):
            values[name] = values.get(name, 0) // NARROWER + 1
    if dataset == "imagenet64":
        values |= dict(kind="image", image_size=64 // 4)
    fields = ModelConfig.__dataclass_fields__
    model = {k: v for k, v in values.items() if k in fields}
    train = {k: v for k, v in values.items() if k not in fields}
    return ModelConfig(**model).validate(), TrainConfig(**train, precision="bf16").validate()


@pytest.fixture
def counts(monkeypatch):
    """Counter of kernels and products by name; array operations are in strictxp.operations."""
    counted = collections.Counter()

    def compiled(instance):
        def start(grid, block, arguments):
            counted[instance.partition("<")[0]] += 1
            across, *others = grid
            assert 0 < across < 2**31 and all(0 < n < 2**16 for n in others), (instance, grid)
        return start

    def product(p, a, b, c, *_):
        counted["product"] += 1
        assert gemm.aligned(p, a, b, c), p
        assert 0 < p.batch and min(p.m, p.n, p.k) > 0

    def address(x):
        return x._host.ctypes.data

    monkeypatch.setattr(launch, "compiled", compiled)
    monkeypatch.setattr(gemm, "_call", product)
    for module in (gemm, cuda.arrays):
        monkeypatch.setattr(module, "address", address)
    for name, zeros in (("empty", np.zeros), ("empty_like", np.zeros_like)):
        def cleared(x, *args, zeros=zeros, **options):  # what no kernel writes is 0, a valid index
            x = x._host if isinstance(x, strictxp.ndarray) else x
            return strictxp.ndarray(zeros(x, *args, **options))

        monkeypatch.setattr(strictxp, name, cleared, raising=False)
    monkeypatch.setattr(cuda.sizes, "CHUNK_ENTRIES", cuda.sizes.CHUNK_ENTRIES // NARROWER**2)
    for name, twin in cuda.TWINS.items():
        monkeypatch.setitem(dispatch.twins[name], strictxp.__name__, (twin, cuda.supports))
    return counted


BUDGET = {  # about 2 % above the counts
    ("enwik8", "topk", False): 1300, ("enwik8", "causal", False): 1380,
    ("enwik8", "causal", True): 1850, ("enwik8", "random", True): 1510,
    ("pg19", "topk", False): 1560, ("wikitext103", "topk", False): 1630,
    ("imagenet64", "topk", False): 2340,
}


@pytest.mark.parametrize("dataset, routing, shift_keys", BUDGET)
def test_step_stays_within_its_budget(counts, dataset, routing, shift_keys):
    model, train = narrowed(dataset, routing=routing, shift_keys=shift_keys)
    state = new_state(model, train, strictxp)
    grads = strictxp.zeros(state.flat.shape, "float32")
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, model.seq_len))
    for _ in range(2):  # tables of constants are made in the first
        counts.clear()
        strictxp.operations.clear()
        with np.errstate(all="ignore"):
            parts = cut(ids, None, model, train, strictxp)
            state, _ = train_step(state, grads, parts, model, train, np.dtype("float16"))
    total = sum(counts.values()) + sum(strictxp.operations.values())
    assert total <= BUDGET[dataset, routing, shift_keys], (total, counts, strictxp.operations)
    assert counts["product"] > 0.3 * total and counts["attention_softmax"] >= model.n_layers
