"""One optimizer step: parts of a batch, accumulation, centroids, threads."""

import copy
import dataclasses
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
from helpers import strictxp
from helpers.models import SMALL, setup

from rt_scratch import model, step, threads
from rt_scratch.config import TrainConfig
from rt_scratch.optim import OPTIMIZERS, LossScale
from rt_scratch.parallel import World


def run(m, parts, together=None):
    """(gradient, Gradients) of the batch cut into parts of these sizes, `together` at once."""
    grads = np.full_like(m.flat, np.nan)
    result = step.gradients(m.state(step=3), grads, m.parts(*parts), m.cfg,
                            TrainConfig(parts=together or len(parts)))
    return grads, result


@pytest.mark.parametrize("routing", ["causal", "topk", "random"])
@pytest.mark.parametrize("parts", [(3, 3), (2, 2, 2), (1,) * 6, (4, 2)])
def test_parts_are_one_large_batch(routing, parts):
    """Accumulation over parts = one batch: loss, gradients, and the centroids' one update.

    With padding, so that the parts do not have equally many targets, and every dropout.
    """
    rates = {f"{site}_dropout": 0.3
             for site in ("embed", "attention", "ffn", "residual", "target")}
    m = setup(dataclasses.replace(SMALL, routing=routing, commitment=0.3, pad_id=0, **rates),
              batch=6)
    m.ids[4:, 3:15] = 0
    weights = model.target_weights(m.cfg, m.ids, "float64")
    m = m._replace(weights=weights / weights.sum())
    whole, together = run(m, (6,))
    grads, result = run(m, parts)
    np.testing.assert_allclose(result.nats, together.nats, rtol=1e-12)
    np.testing.assert_allclose(grads, whole, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.commitment, together.commitment, rtol=1e-12)
    for i, merged in result.memberships.items():
        np.testing.assert_allclose(merged.several, together.memberships[i].several, atol=1e-12)
    a, b = (moved(m.centroids, r.memberships, m.cfg) for r in (result, together))
    for i in a:
        for x, y in zip(a[i], b[i], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11)


def moved(centroids, memberships, cfg):
    """The centroids after their step, those before it unchanged."""
    after = copy.deepcopy(centroids)
    assert step.move_centroids(after, memberships, cfg) is None
    return after


def test_random_keeps_its_centroids():
    m = setup(dataclasses.replace(SMALL, routing="random"))
    _, result = run(m, (2,))
    after = moved(m.centroids, result.memberships, m.cfg)
    for i, own in m.centroids.items():
        for a, b in zip(after[i], own, strict=True):
            np.testing.assert_array_equal(a, b)


def test_number_of_threads_changes_no_bit(monkeypatch):
    m = setup(dataclasses.replace(SMALL, attention_dropout=0.2), batch=4)
    results = []
    for n in (1, 2, 4):
        pool = ThreadPoolExecutor(n)
        monkeypatch.setattr(threads, "_pool", lambda pool=pool: pool)
        results.append(run(m, (1, 1, 1, 1))[0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("together", [1, 2, 4, 7])
def test_parts_at_once_change_no_bit(together):
    m = setup(dataclasses.replace(SMALL, attention_dropout=0.2), batch=5)
    one, some = run(m, (1,) * 5, 5)[0], run(m, (1,) * 5, together)[0]
    np.testing.assert_array_equal(one, some)


def test_windows_draw_different_dropout():
    """Two windows with the same tokens must not share their masks."""
    m = setup(dataclasses.replace(SMALL, residual_dropout=0.5), batch=2)
    m.ids[1] = m.ids[0]
    both = run(m, (1, 1))[1].nats
    half = run(m._replace(ids=m.ids[:1], weights=2 * m.weights[:1]), (1,))[1].nats
    assert both != pytest.approx(float(half), rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("accumulate, parts", [(1, 1), (1, 2), (3, 2)])
def test_cut_between_processes(size, accumulate, parts):
    """All processes together take every window once, in order, each about as many."""
    m = setup(dataclasses.replace(SMALL, pad_id=0), batch=8)
    m.ids[0, :9] = 0
    world, found = World(), []
    world.size = size
    for world.rank in range(size):
        own = step.cut(m.ids, np.arange(8), m.cfg,
                       TrainConfig(accumulate=accumulate, parts=parts), np, world)
        assert len(own) == -(-accumulate * parts // size)
        found += own
    ids, labels, weights, first, share = zip(*found, strict=True)
    np.testing.assert_array_equal(np.concatenate(ids), m.ids)
    np.testing.assert_array_equal(np.concatenate(labels), np.arange(8))
    np.testing.assert_allclose(np.concatenate(weights), (m.ids != 0) / (m.ids != 0).sum(), 1e-6)
    assert first == tuple(labels[i][0] for i in range(len(found)))
    assert sum(share) == pytest.approx(1) and {len(i) for i in ids} <= {1, 2, 3, 4, 8}


def test_what_nobody_waits_for_ends(monkeypatch):
    """After Ctrl-C: a process that exits waits for its threads."""
    began, ended = threading.Event(), threading.Event()

    def work(i):
        if not i:
            assert began.wait(10)
            raise KeyboardInterrupt
        began.set()
        try:
            for _ in range(2000):
                threads.parallel(time.sleep, [0.005])
        except CancelledError:
            ended.set()

    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(threads, "_pool", lambda: pool)
        monkeypatch.setattr(threads, "_most", 2)
        with pytest.raises(KeyboardInterrupt):
            threads.parallel(work, [0, 1])
        assert ended.wait(5)
        assert threads.parallel(str, [1, 2, 3]) == ["1", "2", "3"]


def test_an_error_in_a_part_is_raised():
    """Not swallowed by the threads."""
    m = setup(SMALL, batch=2)
    m.ids[1, 3] = SMALL.vocab_size + 5
    with pytest.raises(IndexError):
        run(m, (1, 1))


# ------------------------------------------------------------------------------- the whole step

RECIPE = TrainConfig(precision="float64", parts=2, steps=10, schedule="cosine", lr=3e-3, warmup=3,
                     clip=0.05, weight_decay=0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("routing", ["causal", "random"])
def test_train_step(routing, clip, optimizer):
    """Gradients, clipping, the rate of the step, the update, the centroids: each once, in order."""
    cfg = dataclasses.replace(SMALL, routing=routing)
    recipe = dataclasses.replace(RECIPE, clip=clip, optimizer=optimizer).validate()
    m = setup(cfg, batch=4)
    state = step.new_state(cfg, recipe, np)._replace(flat=m.flat.copy(), step=1)
    by_hand, expected = state.flat.copy(), OPTIMIZERS[optimizer].init(state.flat, state.table)
    parts, grads = step.cut(m.ids, None, cfg, recipe, np), np.empty_like(m.flat)
    counted = step.gradients(state, grads, parts, cfg, recipe)
    norm = np.sqrt((grads * grads).sum())
    assert norm > 0.05
    g = grads * (0.05 / norm if clip else 1)
    OPTIMIZERS[optimizer].update(by_hand, g, expected, state.table, 3e-3 * 2 / 3, 1,
                                 weight_decay=0.1)
    start = copy.deepcopy(state.centroids)
    after, result = step.train_step(state, grads, parts, cfg, recipe)
    np.testing.assert_allclose(after.flat, by_hand, rtol=1e-12)
    for name, value in expected.items():
        np.testing.assert_allclose(after.optimizer[name], value, rtol=1e-9, atol=1e-30)
    assert (after.step, after.scale, result.applied) == (2, state.scale, True)
    assert result.nats == counted.nats
    np.testing.assert_allclose([result.norm, result.lr], [norm, 2e-3])
    for i, c in moved(start, counted.memberships, cfg).items():
        for a, b, own, before in zip(after.centroids[i], c, state.centroids[i], start[i],
                                     strict=True):
            np.testing.assert_array_equal(a, b)
            assert (a != before).any() == (routing == "causal")
            assert a is own  # in place, as a CUDA graph needs it


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_overflow_leaves_the_step_out():
    """fp16: nothing moves but the count of steps, and the loss scale is halved; then it goes on."""
    recipe = dataclasses.replace(RECIPE, precision="fp16")
    state = step.new_state(SMALL, recipe, np)
    assert state.scale == (2.0**16, 0)
    m = setup(SMALL, batch=4)
    parts, grads = step.cut(m.ids, None, SMALL, recipe, np), np.empty_like(state.flat)
    before, bad = state.flat.copy(), state.flat.copy()
    bad[5], start = np.inf, copy.deepcopy(state.centroids)
    after, result = step.train_step(state._replace(flat=bad), grads, parts, SMALL, recipe)
    assert not result.applied and not np.isfinite(result.norm)
    assert after.scale == (2.0**15, 0) and after.step == 1
    for i, c in start.items():
        for a, b in zip(after.centroids[i], c, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not after.optimizer["m"].any()
    after, result = step.train_step(after._replace(flat=before.copy()), grads, parts, SMALL, recipe)
    assert result.applied and after.scale == (2.0**15, 1) and (after.flat != before).any()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_the_loss_scale_changes_no_bit(scale):
    """A power of two: gradients come back as they were, and the loss is that of no scale."""
    m = setup(dataclasses.replace(SMALL, commitment=0.25), dtype="float32")
    ends = []
    for value in (1.0, scale):
        grads = np.empty_like(m.flat)
        told = step.gradients(m.state(scale=LossScale(value, 0)), grads, m.parts(), m.cfg,
                              TrainConfig())
        ends.append((told.nats, grads))
    assert ends[0][0] == ends[1][0]
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("windows, accumulate, parts, sizes", [
    (8, 1, 2, [4, 4]), (8, 2, 2, [2] * 4), (7, 2, 2, [2, 2, 2, 1]), (1, 1, 4, [1]),
    (3, 1, 4, [1] * 3), (6, 3, 1, [2] * 3)])
def test_cut(windows, accumulate, parts, sizes):
    """In order, none twice, none left out; on a device --parts does not count."""
    ids, labels = np.arange(windows * 5).reshape(windows, 5), np.arange(windows)
    recipe = TrainConfig(accumulate=accumulate, parts=parts)
    cuts = step.cut(ids, labels, SMALL, recipe, np)
    assert [len(part.ids) for part in cuts] == [len(part.labels) for part in cuts] == sizes
    np.testing.assert_array_equal(np.concatenate([part.ids for part in cuts]), ids)
    np.testing.assert_array_equal(np.concatenate([part.labels for part in cuts]), labels)
    assert all(part.labels is None for part in step.cut(ids, None, SMALL, recipe, np))
    assert len(step.cut(ids, labels, SMALL, recipe, strictxp)) == min(windows, accumulate)
