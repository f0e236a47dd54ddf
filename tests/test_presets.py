"""Every preset of every dataset: what it asks for without data, and one real step, narrowed."""

import dataclasses

import numpy as np
import pytest

import train
from rt_scratch.config import ModelConfig, TrainConfig
from rt_scratch.errors import UserError
from rt_scratch.presets import PRESETS, preset
from rt_scratch.run.costs import n_parameters
from rt_scratch.run.options import plan_run
from rt_scratch.step import cut, new_state, train_step

ALL = [(dataset, name) for dataset, names in PRESETS.items() for name in names]


def planned(dataset, name, tmp_path):
    flags = [dataset, "--preset", name, "--dry-run", "--data-dir", tmp_path / "nothing"]
    plan = plan_run(train.parse([str(flag) for flag in flags]))
    return plan.model, plan.train


@pytest.mark.parametrize("dataset, name", ALL)
def test_two_steps(dataset, name, tmp_path):
    """Two, as a block that begins as the identity sends nothing back through itself in the first.

    Heads, routing, norms, dropouts and optimizer as they are; width, length and V small.
    """
    model, recipe = planned(dataset, name, tmp_path)
    shorter = model.seq_len // 192
    model = dataclasses.replace(
        model, vocab_size=256, width=8 * model.n_heads, ffn_width=24, n_layers=3,
        embed_width=8 if model.embed_width else 0, seq_len=192,
        routing_layers=tuple(i for i in model.routing_layers if i >= -3),
        image_size=8 if model.image_size else 0, window=max(model.window // shorter, 1),
        block=max(model.block // shorter, 1)).validate()
    ids = np.random.default_rng(0).integers(0, 256, (2, 192))
    recipe = dataclasses.replace(recipe, batch=2, accumulate=1)
    parts = cut(ids, None, model, recipe, np)
    start = new_state(model, recipe, np)
    before, mu = start.flat.copy(), {i: c.mu.copy() for i, c in start.centroids.items()}
    state, _ = train_step(start, np.empty_like(before), parts, model, recipe)
    state, result = train_step(state, np.empty_like(before), parts, model, recipe)
    assert np.isfinite(result.nats) and np.isfinite(state.flat).all() and state.step == 2
    assert all((state.flat != before)[leaf.start : leaf.stop].any() for leaf in state.table)
    assert set(mu) == {i for i in range(model.n_layers) if model.routing_heads(i)}
    assert bool(mu) == (name not in ("released-local", "paper-local", "paper-full"))
    learns = model.routing != "random"
    assert all((state.centroids[i].mu != mu[i]).any() == learns for i in mu)


@pytest.mark.parametrize("dataset, millions", [
    ("enwik8", 165), ("wikitext103", 325), ("pg19", 583), ("imagenet64", 197), ("cifar10", 96)])
def test_size_of_the_released_recipes(dataset, millions, tmp_path):
    model, _ = planned(dataset, "released", tmp_path)
    assert round(n_parameters(model) / 1e6) == millions


def test_where_the_paper_differs():
    def changed(dataset):
        a, b = preset(dataset, "released"), preset(dataset, "paper")
        return {k: v for k, v in b.items() if a.get(k) != v}

    assert changed("enwik8") == {"n_clusters": 32, "window": 256}
    assert changed("wikitext103") == {"n_layers": 10, "n_clusters": 16, "window": 256}
    assert changed("pg19") == {"routing_layers": (-2, -1)}
    with pytest.raises(UserError, match="pg19 has released, small, released-local, paper"):
        preset("pg19", "large")
    assert preset("some.txt", "small") == preset("stdlib", "small") == {
        "input_tokens": 3, "ngram_rows": 6763, "shift_keys": True}


def test_a_plan_leaves_the_presets_alone(tmp_path):
    before = {dataset: {n: dict(v) for n, v in names.items()} for dataset, names in PRESETS.items()}
    plan_run(train.parse(["enwik8", "--attention", "full", "--dry-run", "--data-dir",
                          str(tmp_path / "nothing")]))
    assert before == PRESETS


def test_classes_are_checked_without_the_files(tmp_path):
    flags = ["cifar10", "--dry-run", "--data-dir", str(tmp_path / "nothing"), "--n-classes"]
    assert plan_run(train.parse([*flags, "10"])).model.n_classes == 10
    with pytest.raises(UserError, match="--n-classes 7: cifar10 has 10 classes"):
        plan_run(train.parse([*flags, "7"]))


def test_rows_of_the_papers_table_of_images(tmp_path):
    """Table 1: H routing heads of 8 in the last L of 12 layers, elsewhere local; its controls."""
    for h in (2, 4, 8):
        for n in (2, 4, 8, 12):
            model, _ = planned("cifar10", f"paper-{h}x{n}", tmp_path)
            local = (("local", 8 - h),) if h < 8 else ()
            for i in range(12):
                assert model.layer_heads(i) == ((("topk", h), *local) if i >= 12 - n
                                                else (("local", 8),))
            assert (model.n_clusters * model.window, model.head_width) == (3072, 128)
    random, _ = planned("cifar10", "paper-random", tmp_path)
    assert [random.routing_heads(i) for i in range(12)] == [0] * 4 + [4] * 8
    assert random.kinds() == {"random", "local"}
    for kind in ("local", "full"):
        assert planned("cifar10", f"paper-{kind}", tmp_path)[0].kinds() == {kind}


DROPOUTS = ("embed_dropout", "attention_dropout", "ffn_dropout", "residual_dropout",
            "target_dropout")


@pytest.mark.parametrize("dataset, name, length, layers, heads, clusters, dropouts", [
    ("enwik8", "released", 8192, 12, (4, 4), 16, (0, 0, 0, 0.1, 0)),
    ("enwik8", "released-12k", 12288, 12, (4, 4), 48, (0, 0, 0, 0.1, 0)),
    ("enwik8", "released-local", 8192, 22, (8, 0), None, (0, 0.4, 0.4, 0.1, 0)),
    ("wikitext103", "released", 4096, 14, (8, 8), 8, (0.4, 0.4, 0.4, 0.1, 0.25)),
    ("wikitext103", "released-1k", 1024, 20, (8, 8), 2, (0.4, 0.4, 0.4, 0.1, 0.2)),
    ("wikitext103", "released-local", 4096, 14, (16, 0), None, (0.4, 0.4, 0.4, 0.1, 0.25)),
    ("pg19", "released", 8192, 22, (6, 2), 16, (0, 0, 0, 0.1, 0)),
    ("pg19", "released-local", 8192, 24, (8, 0), None, (0, 0, 0, 0.1, 0))])
def test_released_text_recipes(dataset, name, length, layers, heads, clusters, dropouts, tmp_path):
    model, recipe = planned(dataset, name, tmp_path)
    fields = {f.name: getattr(c, f.name) for c in (model, recipe) for f in dataclasses.fields(c)}
    assert (model.seq_len, model.n_layers) == (length, layers)
    assert (model.n_local_heads, model.n_routing_heads) == heads
    assert clusters in (None, model.n_clusters)
    assert tuple(fields[f] for f in DROPOUTS) == dropouts
    assert fields["weight_decay"] == (2e-5 if dataset == "wikitext103" else 0)


def test_fields_exist():
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    known |= {f.name for f in dataclasses.fields(TrainConfig)}
    for dataset, name in ALL:
        assert set(PRESETS[dataset][name]) <= known
