"""--init-from: a new run with the parameters of another one, centroids redrawn where K changed."""

import numpy as np
import pytest
from helpers import strictxp
from test_train import TINY, fails, rows, text  # noqa: F401

import train
from rt_scratch import model
from rt_scratch.data.batches import random_windows
from rt_scratch.errors import UserError
from rt_scratch.kmeans import nearest
from rt_scratch.layers import layer_norm, normalize, shift_right
from rt_scratch.model import embed, project
from rt_scratch.parameters import views
from rt_scratch.run import initial, options
from rt_scratch.run.checkpoint import read_state, restore
from rt_scratch.run.initial import initial_state
from rt_scratch.run.options import plan_run

OWN_KEYS = ["--no-share-qk"]


@pytest.fixture
def source(text, tmp_path):  # noqa: F811
    """A run with one cluster, four steps long."""
    out = tmp_path / "source"
    train.main([str(text), "--out", str(out), *TINY, *OWN_KEYS, "--n-clusters", "1", "--steps", "4",
                "--eval-every", "2"])
    return out


def started(argv, xp=np):
    """(Plan, State) of flags, before the first step."""
    plan = plan_run(train.parse([str(a) for a in argv]))
    state, progress = initial_state(plan, xp, for_training=False)
    assert state.step == 0 and progress.drawn == 0
    return plan, state


def test_everything_is_taken_over_but_the_optimizer(source, text, tmp_path, capsys):  # noqa: F811
    plan, state = started([text, "--init-from", source, "--out", tmp_path / "b", "--optimizer",
                           "adamw"])
    saved = np.load(source / "best.npz")
    np.testing.assert_array_equal(state.flat, saved["params"])
    np.testing.assert_array_equal(state.centroids[1].total, saved["centroids.1.total"])
    assert not state.optimizer["m"].any() and np.load(source / "last.npz")["opt.m"].any()
    assert plan.model == read_state(source / "best.npz").model
    told = capsys.readouterr().out
    assert "best.npz, step" in told and "k-means" not in told


def test_only_centroids_that_learn_are_taken_over_or_drawn(source, text, tmp_path,  # noqa: F811
                                                           capsys):
    """Those of random heads have not; random heads need none."""
    flags = [text, "--out", tmp_path / "b", "--batch", "2", "--init-from"]
    _, state = started([*flags, source, "--routing", "random", "--n-clusters", "3"])
    assert "k-means" not in capsys.readouterr().out and (state.centroids[0].count == 1).all()
    train.main([str(text), "--out", str(tmp_path / "random"), *TINY, *OWN_KEYS, "--routing",
                "random", "--steps", "2"])
    capsys.readouterr()
    _, state = started([*flags, tmp_path / "random", "--routing", "causal"])
    assert "centroids of layers 0, 1: the best of 16 draws" in capsys.readouterr().out
    np.testing.assert_array_equal(state.centroids[0].count.sum(-1), 2 * 2 * 16)


def test_text_does_not_begin_a_model_of_images(source, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="a model of text, and cifar10 is images"):
        plan_run(train.parse(["cifar10", "--dry-run", "--data-dir", str(tmp_path / "nothing"),
                              "--init-from", str(source)]))


@pytest.mark.parametrize("flags", [[], ["--share-qk"]])
def test_centroids_are_drawn_where_k_changes(source, text, tmp_path, capsys, flags):  # noqa: F811
    """From queries and keys of the first batch, in the model with one cluster; means of theirs."""
    argv = [text, "--init-from", source, "--out", tmp_path / "b", "--n-clusters", "3", "--batch",
            "8", "--checkpoint", "last"]
    if flags:
        (source / "best.npz").unlink()
        assert "w_k" in fails(*argv, *flags)
        return
    plan, state = started(argv)
    told = capsys.readouterr().out
    assert "last.npz, step 4; centroids of layers 0, 1: the best of 16 draws of k-means" in told
    params = views(np.load(source / "last.npz")["params"], state.table)
    assert plan.model.n_clusters == 3 and plan.model.window == 4
    for centroids in state.centroids.values():
        assert centroids.mu.shape == (2, 3, 4) and np.isfinite(centroids.mu).all()
        np.testing.assert_array_equal(centroids.count.sum(-1), 2 * 8 * 16)
        won = centroids.count > 0
        np.testing.assert_allclose(
            centroids.mu[won], (centroids.total / np.maximum(centroids.count, 1)[..., None])[won],
            rtol=1e-5)
    ids = random_windows(plan.dataset.splits["train"], 16, 8, 0, 0)
    x, _ = embed(params, plan.model, shift_right(ids), 0)
    layer = params["layers"][0]
    (q, k, _), _ = project(layer_norm(x, **layer["norm_attention"])[0], layer["attention"],
                           plan.model)
    both = np.concatenate([normalize(q[:, :2])[0], normalize(k[:, :2])[0]])
    total = both.sum((0, 2))
    np.testing.assert_allclose(state.centroids[0].total.sum(1), total, rtol=1e-4, atol=1e-3)
    assert len(np.unique(nearest(both, state.centroids[0].mu, equal_length=True))) == 3


def test_the_draw_with_the_lowest_loss(source, text, tmp_path, monkeypatch):  # noqa: F811
    """Is taken, also beside one that is NaN; layers that have centroids keep them."""
    plan, state = started([text, "--init-from", source, "--out", tmp_path / "b", "--n-clusters",
                           "3"])
    before, _ = restore(plan.source, np)
    ids = random_windows(plan.dataset.splits["train"], 16, 3, 0, 0).astype(int)
    weights = np.full(ids.shape, 1 / ids.size)
    tried = {}

    def told(params, centroids, *arguments, **more):
        found = model.loss(params, centroids, *arguments, **more)
        tried.setdefault(id(centroids), [centroids, 0])[1] += float(found[0][0])
        return ((np.nan, 0), *found[1:]) if len(tried) == 1 else found

    monkeypatch.setattr(initial, "loss", told)
    monkeypatch.setattr(initial, "DRAWS", 5)
    found = initial.drawn_centroids(before, plan.source.model, plan.model, ids, weights, 0,
                                    kept={0: state.centroids[0]})
    draws = list(tried.values())
    assert len({nats for _, nats in draws}) == len(draws) == 5
    assert found is min(draws[1:], key=lambda x: x[1])[0]
    assert all(centroids[0] is state.centroids[0] for centroids, _ in draws)


def test_on_a_device(source, text, tmp_path, monkeypatch):  # noqa: F811
    def read(nats):  # the only thing that waits for the device
        with strictxp.reading():
            return float(nats)

    argv = [text, "--init-from", source, "--out", tmp_path / "b", "--n-clusters", "3"]
    _, host = started(argv)
    monkeypatch.setattr(initial, "float", read, raising=False)
    _, device = started(argv, strictxp)
    with strictxp.reading():
        for a, b in zip(host.arrays, device.arrays, strict=True):
            np.testing.assert_allclose(b.get(), a, rtol=1e-5, atol=1e-5)


def test_it_goes_on_and_resumes(source, text, tmp_path):  # noqa: F811
    """The first loss is that of the trained model; a stopped run goes on exactly."""
    flags = [str(text), "--init-from", str(source), *TINY[:2], "--n-clusters", "3", "--steps", "4",
             "--log-every", "1", "--eval-every", "0", "--eval-windows", "2", "--batch", "2"]
    a, b = tmp_path / "a", tmp_path / "b"
    train.main([*flags, "--out", str(a)])
    train.main([*flags, "--out", str(b), "--stop-after", "2"])
    train.main(["--resume", "--device", "cpu", "--out", str(b)])
    x, y = (np.load(out / "last.npz") for out in (a, b))
    for name in ("params", "centroids.0.mu"):
        np.testing.assert_array_equal(x[name], y[name])
    assert "best.npz, step" in (b / "config.json").read_text()
    assert float(rows(a)[0]["nats"]) < float(rows(source)[0]["nats"]) - 0.01


def test_other_data(source, tmp_path):
    other = tmp_path / "other.txt"
    other.write_bytes(bytes(range(97, 117)) * 100)
    _, state = started([other, "--init-from", source, "--out", tmp_path / "b"])
    np.testing.assert_array_equal(state.flat, np.load(source / "best.npz")["params"])


def test_another_codec_is_refused(source, text, tmp_path, monkeypatch):  # noqa: F811
    """The same shapes, but ids that stand for other text."""
    saved = read_state(source / "best.npz")
    saved.config["codec_sha256"] = "0" * 64
    monkeypatch.setattr(options, "read_state", lambda path: saved)
    with pytest.raises(UserError, match="its codec is not that of"):
        started([text, "--init-from", source, "--out", tmp_path / "b"])


def test_one_clear_line(source, text, tmp_path):  # noqa: F811
    new = [text, "--out", tmp_path / "b", "--init-from"]
    for flags, words in (
            ([*new, source, "--width", "32"], "embed.table is (256, 16) in"),
            ([*new, source, "--n-layers", "3"], "layers.2.norm_attention.gain is missing in"),
            ([*new, source, "--n-layers", "1"], "(16,) in"),
            ([*new, source, "--no-tie-embedding", "--ffn", "relu"], "leave out the flag"),
            ([*new, tmp_path / "nothing"], "no checkpoint at"),
            ([*new, source, "--preset", "small"], "--preset: not used with --init-from"),
            ([*new, source, "--resume"], "--init-from: not used with --resume"),
            ([text, "--checkpoint", "best"], "--checkpoint: needs --evaluate or --init-from")):
        assert words in fails(*flags)
    (source / "best.npz").write_bytes((source / "best.npz").read_bytes()[:-100])
    assert "damaged" in fails(*new, source)
