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
from rt_scratch.run.checkpoint import load_model, read_state, restore
from rt_scratch.run.initial import initial_state
from rt_scratch.run.options import plan_run

OWN_KEYS = ["--routing", "multiprobe", "--no-share-qk"]


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


DENSE = ["--n-clusters", "3", "--dense-steps", "3", "--log-every", "1"]


def dense_start(text, out, *flags):  # noqa: F811
    train.main([str(text), "--out", str(out), *TINY, *OWN_KEYS, *DENSE, "--steps", "6", *flags])


def test_a_dense_start(text, tmp_path, capsys):  # noqa: F811
    """The steps before its end are those of dense heads; then centroids are drawn; the best score
    is one of the model that routes; and a run stopped before or after goes on exactly."""
    dense_start(text, tmp_path / "whole")
    told = capsys.readouterr().out
    assert "dense for the first 3 steps" in told
    assert "step 3: routing heads are multiprobe from here on; centroids: the best of 16" in told
    train.main([str(text), "--out", str(tmp_path / "dense"), *TINY, *OWN_KEYS, "--n-clusters", "3",
                "--routing", "dense", "--log-every", "1", "--steps", "6"])
    logs = [[row["nats"] for row in rows(tmp_path / name)
             if row["split"] == "train"] for name in ("whole", "dense")]
    assert logs[0][:3] == logs[1][:3] and logs[0][3:] != logs[1][3:]
    for stop in ("2", "3", "4"):
        out = tmp_path / stop
        dense_start(text, out, "--stop-after", stop)
        drawn = np.load(out / "last.npz")["centroids.0.count"].sum(-1)
        assert (np.isclose(drawn, 2 * 2 * 16) == (stop != "2")).all()
        train.main(["--resume", "--out", str(out), "--device", "cpu"])
        a, b = (np.load(folder / "last.npz") for folder in (tmp_path / "whole", out))
        for name in ("params", "centroids.0.mu", "centroids.1.count"):
            np.testing.assert_array_equal(a[name], b[name], f"{stop} {name}")


def test_scores_of_a_dense_start_are_not_those_of_the_run(text, tmp_path, capsys):  # noqa: F811
    """However low they are: the checkpoint that counts is of the model that was asked for. One from
    before the end of the start is dense, whoever reads it."""
    flags = ["--eval-every", "1", "--eval-windows", "2", "--lr", "1e-9"]
    dense_start(text, tmp_path / "a", *flags, "--stop-after", "2")
    saved = read_state(tmp_path / "a" / "best.npz")
    assert saved.model.routing == "multiprobe" and saved.progress.best < np.inf
    assert load_model(tmp_path / "a", np).model.routing == "dense"
    capsys.readouterr()
    train.main(["--out", str(tmp_path / "a"), "--evaluate", "valid", "--eval-windows", "2"])
    assert "routing dense" in capsys.readouterr().out
    train.main(["--resume", "--out", str(tmp_path / "a"), "--device", "cpu"])
    best = read_state(tmp_path / "a" / "best.npz")
    scores = {int(r["step"]): float(r["nats"]) for r in rows(tmp_path / "a")
              if r["split"] == "valid"}
    assert best.step >= 3 and best.progress.best == min(scores[i] for i in (3, 4, 5, 6))
    assert load_model(tmp_path / "a", np).model.routing == "multiprobe"


def test_from_a_dense_start(text, tmp_path, capsys):  # noqa: F811
    """--init-from draws the centroids, which that run has not, unless it begins dense itself."""
    dense_start(text, tmp_path / "a", "--stop-after", "2")
    flags = [text, "--init-from", tmp_path / "a", "--out", tmp_path / "b", "--batch", "2"]
    _, state = started(flags)
    assert "centroids of layers 0, 1: the best of 16 draws" in capsys.readouterr().out
    np.testing.assert_array_equal(state.centroids[0].count.sum(-1), 2 * 2 * 16)
    started([*flags, "--dense-steps", "2"])
    assert "k-means" not in capsys.readouterr().out


def test_random_clusters_are_not_drawn_by_k_means(text, tmp_path, capsys):  # noqa: F811
    train.main([str(text), "--out", str(tmp_path / "a"), *TINY, "--routing", "random", *DENSE,
                "--steps", "6"])
    assert "step 3: routing heads are random from here on\n" in capsys.readouterr().out


def test_a_dense_start_longer_than_the_run(text, tmp_path):  # noqa: F811
    assert "--dense-steps 7: more than --steps 6" in fails(
        text, "--out", tmp_path / "a", *TINY, "--dense-steps", "7", "--steps", "6")


@pytest.mark.parametrize("stop, dense, wrong", [
    (2, 2, True), (2, 4, False), (3, 4, True), (4, 3, False), (4, 1, False), (4, 5, True)])
def test_another_dense_start_on_the_way(text, tmp_path, stop, dense, wrong):  # noqa: F811
    """Can be had while the steps done so far would have been the same."""
    dense_start(text, tmp_path / "a", "--stop-after", str(stop))
    flags = ["--resume", "--device", "cpu", "--out", str(tmp_path / "a"), "--dense-steps",
             str(dense)]
    if wrong:
        assert f"--dense-steps {dense}: after step {stop} it is too late" in fails(*flags)
    else:
        train.main(flags)


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
