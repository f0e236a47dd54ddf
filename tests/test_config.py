"""Configurations: what cannot run is refused in one line; JSON round trip; presets."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from rt_scratch import dispatch
from rt_scratch.config import ModelConfig, TrainConfig, from_json, to_json
from rt_scratch.device import select_device, select_precision
from rt_scratch.errors import UserError

IMAGE = dict(kind="image", image_size=2, seq_len=12)


@pytest.mark.parametrize("change, word", [
    (dict(width=130), "multiple of the 4 heads"),
    (dict(n_local_heads=0, n_routing_heads=0), "at least one head"),
    (dict(routing="topk", window=513), "larger than --seq-len"),
    (dict(routing="topk", n_probes=2), "--n-probes 2: is for causal heads"),
    (dict(routing_layers=(4,)), "layers are 0 to 3"),
    (dict(routing_layers=(-5,)), "layers are 0 to 3"),
    (dict(full_layers=(4,)), "--full-layers 4: the layers are 0 to 3"),
    (dict(full_layers=(-1, 0), routing_layers=(3,)), "--full-layers 3: is among --routing-layers"),
    (dict(window=0), "--window 0: must be at least 1"),
    (dict(lookback=-1), "--lookback -1: must be at least 0"),
    (dict(n_clusters=1025), "at most 1024"),
    (dict(ffn_dropout=1.0), "--ffn-dropout 1.0: must be at most 0.999"),
    (dict(routing="nearest"), "choose from causal, topk, random"),
    (dict(centroid_decay=1.5), "--centroid-decay 1.5: must be at most 1"),
    (dict(n_classes=3), "for images"),
    (dict(**IMAGE, embed_width=5), "are for text"),
    (dict(**IMAGE, input_tokens=3), "are for text"),
    (dict(**IMAGE, ngram_rows=3), "are for text"),
    (dict(kind="image", image_size=3), "--seq-len must be 3 x size x size = 27"),
])
def test_impossible_models(change, word):
    with pytest.raises(UserError, match=word) as error:
        ModelConfig(**change).validate()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    dict(batch=0), dict(steps=0), dict(lr=0.0), dict(lr=float("nan")), dict(optimizer="sgd"),
    dict(clip=-1.0), dict(accumulate=0), dict(seed=-1)])
def test_impossible_training(change):
    with pytest.raises(UserError):
        TrainConfig(**change).validate()


def test_good_configurations():
    ModelConfig().validate()
    TrainConfig().validate()
    ModelConfig(**IMAGE).validate()
    # a window beyond the text is no trouble for causal routing, nor topk where nothing is routed
    ModelConfig(window=513).validate()
    ModelConfig(window=513, routing="topk", attention="local").validate()


def test_json_round_trip():
    cfg = ModelConfig(routing_layers=(1, -1))
    assert from_json(ModelConfig, json.loads(json.dumps(to_json(cfg)))) == cfg
    with pytest.raises(UserError, match="unknown fields"):
        from_json(ModelConfig, {"wdith": 3})


def test_configurations_from_before_probes():
    """Whatever they say of probes, which only `multiprobe` heads had then, causal ones had one."""
    before = to_json(ModelConfig(n_probes=2))
    del before["shift_keys"]
    assert from_json(ModelConfig, before) == ModelConfig()
    with pytest.raises(UserError, match="keys of their own as an earlier version"):
        from_json(ModelConfig, before | {"share_qk": False})
    with pytest.raises(UserError, match="routing multiprobe: choose from"):
        from_json(ModelConfig, before | {"routing": "multiprobe"})


def test_every_field_is_explained():
    for cls in (ModelConfig, TrainConfig):
        assert all(f.metadata["help"] for f in dataclasses.fields(cls))


def test_heads_of_layers():
    """Routing heads first; negative numbers count from the end; other layers have local heads."""
    cfg = ModelConfig(n_layers=3, n_local_heads=1, n_routing_heads=2, routing_layers=(-1,), width=6)
    local, mixed = (("local", 3),), (("causal", 2), ("local", 1))
    assert [cfg.layer_heads(i) for i in range(3)] == [local, local, mixed]
    assert [cfg.routing_heads(i) for i in range(3)] == [0, 0, 2]
    hybrid = dataclasses.replace(cfg, routing_layers=(), full_layers=(0, -1), routing="topk")
    full = (("full", 3),)
    assert [hybrid.layer_heads(i) for i in range(3)] == [full, (("topk", 2), ("local", 1)), full]
    assert hybrid.kinds() == {"full", "topk", "local"}
    both = dataclasses.replace(cfg, full_layers=(0,)).validate()
    assert [both.layer_heads(i) for i in range(3)] == [full, local, mixed]
    assert ModelConfig(attention="local").layer_heads(0) == (("local", 4),)
    assert ModelConfig(n_local_heads=0).layer_heads(0) == (("causal", 2),)
    assert ModelConfig(n_routing_heads=0).layer_heads(0) == (("local", 2),)


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16"])
def test_half_precision_is_for_gpus(name):
    with pytest.raises(UserError, match="for GPUs"):
        select_precision(name, np)


def test_precision_of_a_cpu():
    assert select_precision("auto", np) == ("float32", None)
    assert select_precision("float64", np) == ("float64", None)


class FakeGPU:
    """As much of CuPy as the choice of a precision asks."""

    __name__ = "cupy"

    def __init__(self, capability):
        self.cuda = self
        self.Device = lambda: self
        self.compute_capability = capability


def test_precision_of_a_gpu():
    assert select_precision("fp16", FakeGPU("75")) == ("fp16", "float16")
    assert select_precision("auto", FakeGPU("75")) == ("float32", None)
    with pytest.raises(UserError, match="does not have it"):
        select_precision("bf16", FakeGPU("75"))
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert select_precision("auto", FakeGPU("90")) == ("bf16", ml_dtypes.bfloat16)


def test_a_gpu_works_on_a_stream_of_its_own(monkeypatch):
    """Not on the default one, which no CUDA graph records."""
    used = []

    class Stream:
        def __init__(self, non_blocking):
            self.non_blocking = non_blocking

        def use(self):
            used.append(self.non_blocking)

    runtime = SimpleNamespace(getDeviceProperties=lambda number: {"name": b"One"})
    fake = SimpleNamespace(__name__="cupy", __version__="14", is_available=lambda: True,
                           ones=np.ones, float32=np.float32,
                           cuda=SimpleNamespace(runtime=runtime, Stream=Stream))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    for twins in dispatch.twins.values():
        monkeypatch.setitem(twins, "cupy", None)  # what is registered is undone afterwards
    assert select_device("cuda") == (fake, "cuda: One, CuPy 14, one stream") and used == [True]


@pytest.mark.parametrize("missing", ["ml_dtypes", "NumPy 2.1.2 or later, not 2.1.1"])
def test_without_bf16_auto_is_tf32(monkeypatch, capsys, missing):
    """With a line that says what is missing and how to get it; asked for by name it is an error."""
    if missing == "ml_dtypes":
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    else:
        monkeypatch.setattr(np, "__version__", "2.1.1")
    why = f"bf16 needs {missing}: pip install -e '.[cuda13]', for drivers before 580 '.[cuda12]'"
    assert select_precision("auto", FakeGPU("90")) == ("tf32", None)
    assert capsys.readouterr().out == f"note: --precision auto is tf32 here: {why}\n"
    assert select_precision("tf32", FakeGPU("90")) == ("tf32", None)
    assert select_precision("auto", FakeGPU("75")) == ("float32", None)
    assert select_precision("auto", np) == ("float32", None)
    assert not capsys.readouterr().out
    with pytest.raises(UserError) as error:
        select_precision("bf16", FakeGPU("90"))
    assert str(error.value) == f"--precision bf16: {why}"
