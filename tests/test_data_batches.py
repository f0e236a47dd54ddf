"""Batches: pure functions of (seed, step); every token scored exactly once."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch.data.batches import (
    count_windows,
    eval_windows,
    random_windows,
    shuffled_images,
)
from rt_scratch.errors import UserError


def test_windows_are_pieces_of_the_text():
    text = np.arange(1000, dtype=np.uint16)
    windows = random_windows(text, 17, 64, seed=3, step=5)
    assert windows.shape == (64, 17)
    assert windows.dtype == np.int32
    assert (windows - windows[:, :1] == np.arange(17)).all()


def test_windows_depend_on_seed_and_step_alone():
    text = np.arange(100_000)
    a = random_windows(text, 4, 8, seed=0, step=7)
    random_windows(text, 4, 8, seed=0, step=8)
    assert (random_windows(text, 4, 8, seed=0, step=7) == a).all()
    starts = {(seed, step): tuple(random_windows(text, 4, 8, seed, step)[:, 0])
              for seed in range(5) for step in range(50)}
    assert len(set(starts.values())) == 250
    everything = np.concatenate(list(starts.values()))
    assert len(np.unique(everything)) > 0.98 * everything.size  # steps do not share their draws
    assert abs(everything.mean() - 50_000) < 3_000  # 29,000 / sqrt(2000) is 650


def test_steps_do_not_overlap_however_large_the_batch():
    """Two steps whose counters are neighbours would share all draws but the first few."""
    draws = [set(random_windows(range(2 ** 31 - 1), 1, 1000, seed=0, step=step)[:, 0].tolist())
             for step in (6, 7)]
    assert not draws[0] & draws[1]


def test_every_start_can_be_drawn_and_none_other():
    text = np.arange(12)
    starts = random_windows(text, 5, 2000, seed=1, step=0)[:, 0]
    assert sorted(set(starts)) == list(range(8))
    starts = random_windows(text, 5, 2000, seed=1, step=0, hop=3)[:, 0]
    assert sorted(set(starts)) == [0, 3, 6]
    assert set(random_windows(text, 12, 9, seed=1, step=0)[:, 0]) == {0}


def test_text_shorter_than_a_window():
    with pytest.raises(UserError, match="12 tokens, fewer than the 13"):
        random_windows(np.arange(12), 13, 1, seed=0, step=0)


@pytest.mark.parametrize("n, batch", [(10, 3), (7, 7), (5, 13), (1, 4), (64, 1)])
def test_each_image_once_per_epoch(n, batch):
    split = np.arange(n * 2, dtype=np.uint8).reshape(n, 2)
    order = []
    for step in range(-(-3 * n // batch)):
        tokens, index = shuffled_images(split, batch, seed=4, drawn=step * batch)
        assert (tokens == split[index]).all()
        assert tokens.dtype == np.int32
        order += index.tolist()
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    if n > 6:
        assert order[:n] != order[n : 2 * n]
        assert order[:n] != list(range(n))


def test_image_order_can_be_resumed():
    split = np.arange(40, dtype=np.uint8).reshape(20, 2)
    late = shuffled_images(split, 6, seed=1, drawn=6000)[1]
    shuffled_images(split, 6, seed=2, drawn=18)
    assert (shuffled_images(split, 6, seed=1, drawn=6000)[1] == late).all()


@given(n=st.integers(1, 60), t=st.integers(1, 20), batch=st.integers(1, 4), data=st.data())
def test_each_token_is_scored_once_with_its_context(n, t, batch, data):
    stride = data.draw(st.integers(0, t))
    text = np.arange(1, n + 1)  # distinct, so that a token tells its position; 0 is padding
    scored = []
    windows = 0
    for tokens, weights, index in eval_windows(text, t, batch, stride):
        alone = tokens.shape == (1, n - index[0] * (stride or t)) and tokens.shape[1] < t
        assert tokens.shape == weights.shape and (alone or tokens.shape == (batch, t))
        assert tokens.dtype == np.int32
        assert weights.dtype == np.float32
        assert set(np.unique(weights)) <= {0, 1}
        filled = tokens.any(1).nonzero()[0]
        assert index[filled].tolist() == list(range(windows, windows + len(filled)))
        windows += len(filled)
        for row, weight in zip(tokens, weights, strict=True):
            positions = np.flatnonzero(weight)
            scored += row[positions].tolist()
            for i in positions:
                assert row[i] > 0
                context = row[:i]
                assert (context == np.arange(row[i] - i, row[i])).all()
                if row[i] > t:
                    assert i >= t - (stride or t)
    assert scored == text.tolist()
    assert windows == count_windows(text, t, stride)


def test_some_windows_are_spread_evenly():
    text = np.arange(1, 101)
    tokens, weights, index = next(eval_windows(text, 10, 4, limit=3))
    assert tokens[:3, 0].tolist() == [1, 31, 61]
    assert index[:3].tolist() == [0, 3, 6]
    assert weights.sum() == 30
    index, scored = [], []  # window 0, whose first tokens have no context, is left out
    for tokens, weights, windows in eval_windows(text, 10, 4, stride=2, limit=3):
        index += windows[weights.any(1)].tolist()
        scored += tokens[weights > 0].tolist()
    assert index == [1, 16, 31]
    assert scored == [11, 12, 41, 42, 71, 72]
    for limit, n in ((0, 100), (46, 100), (45, 90), (1, 2)):
        assert sum(w.sum() for _, w, _ in eval_windows(text, 10, 4, 2, limit)) == n
    assert sum(w.sum() for _, w, _ in eval_windows(text, 10, 4, limit=1000)) == 100
    assert count_windows(text[:0], 10) == 0
    assert list(eval_windows(text[:0], 10, 2)) == []


def test_images_are_scored_once():
    split = np.arange(5 * 12, dtype=np.uint8).reshape(5, 12)
    batches = list(eval_windows(split, 12, 2))
    rows = np.concatenate([tokens for tokens, _, _ in batches])
    weights = np.concatenate([w for _, w, _ in batches])
    assert (rows[:5] == split).all()
    assert weights.sum() == split.size
    assert (weights[5] == 0).all()
    assert sum(w.sum() for _, w, _ in eval_windows(split, 12, 2, limit=3)) == 36


def test_impossible_strides_and_sizes():
    with pytest.raises(UserError, match="--stride 11"):
        next(eval_windows(np.arange(100), 10, 1, stride=11))
    with pytest.raises(UserError, match="--stride -1"):
        next(eval_windows(np.arange(100), 10, 1, stride=-1))
    with pytest.raises(UserError, match="12 values"):
        next(eval_windows(np.zeros((3, 12), np.uint8), 10, 1))


def test_memory_mapped_text_is_not_read_whole(tmp_path):
    """A window of a sparse file of 300 MB takes next to no memory."""
    path = tmp_path / "big"
    n = 300_000_000
    with open(path, "wb") as f:
        f.truncate(n)
        f.seek(n - 5)
        f.write(b"abcde")
    text = np.memmap(path, np.uint8, "r")
    tracemalloc.start()
    assert random_windows(text, 100, 2, seed=0, step=0).shape == (2, 100)
    _, weights, _ = next(eval_windows(text, 8, 1, limit=2))
    assert tracemalloc.get_traced_memory()[1] < 10 ** 6
    tracemalloc.stop()
    assert weights.sum() == 8
    assert count_windows(text, 1000) == 300_000
