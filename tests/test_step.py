"""One optimizer step: parts of a batch, accumulation, centroids, threads."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.models import SMALL, setup

from rt_scratch import step, threads
from rt_scratch.config import TrainConfig


def run(m, parts, together=None):
    """(gradient, Gradients) of the batch cut into parts of these sizes, `together` at once."""
    grads = np.full_like(m.flat, np.nan)
    cuts = np.split(m.ids, np.cumsum(parts)[:-1])
    result = step.gradients(m.state(step=3), grads, [(c, None) for c in cuts], m.cfg,
                            TrainConfig(parts=together or len(parts)))
    return grads, result


@pytest.mark.parametrize("routing", ["causal", "topk", "random"])
@pytest.mark.parametrize("parts", [(3, 3), (2, 2, 2), (1,) * 6, (4, 2)])
def test_parts_are_one_large_batch(routing, parts):
    """Accumulation over parts = one batch: loss, gradients, and the centroids' one update.

    With padding, so that the parts do not have equally many targets.
    """
    m = setup(dataclasses.replace(SMALL, routing=routing, commitment=0.3, pad_id=0), batch=6)
    m.ids[4:, 3:15] = 0
    whole, together = run(m, (6,))
    grads, result = run(m, parts)
    np.testing.assert_allclose(result.nats, together.nats, rtol=1e-12)
    np.testing.assert_allclose(grads, whole, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.commitment, together.commitment, rtol=1e-12)
    for i, merged in result.memberships.items():
        np.testing.assert_allclose(merged.several, together.memberships[i].several, atol=1e-12)
    a, b = (step.move_centroids(m.centroids, r.memberships, m.cfg) for r in (result, together))
    for i in a:
        for x, y in zip(a[i], b[i], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11)


def test_random_keeps_its_centroids():
    m = setup(dataclasses.replace(SMALL, routing="random"))
    _, result = run(m, (2,))
    assert step.move_centroids(m.centroids, result.memberships, m.cfg) is m.centroids


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


def test_parts_draw_different_dropout():
    """Two parts with the same tokens must not share their masks."""
    m = setup(dataclasses.replace(SMALL, residual_dropout=0.5), batch=2)
    m.ids[1] = m.ids[0]
    nats = [float(r.nats) for r in (run(m, (1, 1))[1], run(m, (2,))[1])]
    assert nats[0] != nats[1]
    half = [run(m._replace(ids=m.ids[i : i + 1]), (1,))[1].nats for i in (0, 1)]
    assert half[0] == half[1]  # part 0 both times
    assert nats[0] != pytest.approx(float(half[0]), rel=1e-9)


def test_an_error_in_a_part_is_raised():
    """Not swallowed by the threads."""
    m = setup(SMALL, batch=2)
    m.ids[1, 3] = SMALL.vocab_size + 5
    with pytest.raises(IndexError):
        run(m, (1, 1))
