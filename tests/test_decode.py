"""Incremental decoding equals the full forward pass; sampling draws what it should."""

import dataclasses

import numpy as np
import pytest
from helpers.models import SMALL, check_decoding, setup
from helpers.strategies import configs, seeds
from hypothesis import given
from hypothesis import strategies as st

from rt_scratch import decode

EXACT = dict(rtol=0, atol=1e-10)


@given(configs(routings=("causal", "random"), dropout=False), seeds,
       st.sampled_from([0, 1, 5]))
def test_decoding_is_the_forward_pass(cfg, seed, prompt):
    """After prompts of several lengths; batch 2."""
    check_decoding(setup(cfg, seed), prompt)


@pytest.mark.parametrize("changes", [
    dict(shift_keys=True), dict(share_qk=False), dict(shift_keys=True, share_qk=False),
    dict(shift_keys=True, n_probes=2), dict(routing="random", shift_keys=True),
    dict(routing="random", share_qk=False)], ids=str)
def test_keys_that_are_not_the_queries(changes):
    """A prompt's keys are kept in the clusters of the keys."""
    check_decoding(setup(dataclasses.replace(SMALL, **changes)), 8)


def test_centroids_of_several_lengths():
    m = setup(SMALL)
    for i, c in m.centroids.items():
        m.centroids[i] = c._replace(mu=c.mu * np.array([0.2, 1, 5])[:, None])
    check_decoding(m, 5)


@given(configs(routings=("topk",), dropout=False), seeds, st.sampled_from([0, 1, 5]))
def test_topk_decodes_by_the_prefix(cfg, seed, prompt):
    """With one layer a token's output is that of the forward pass over the prefix alone.

    The timing signal keeps repeated tokens apart: equal scores would be ordered by rounding.
    """
    cfg = dataclasses.replace(cfg, n_layers=1, routing_layers=(), full_layers=(),
                              timing_signal=cfg.kind == "text")
    m = setup(cfg, seed)
    prompt = min(prompt, cfg.seq_len - 1)
    logits, memory = decode.prefill(m.params, m.centroids, cfg, m.ids[:, :prompt], cfg.seq_len,
                                   m.labels)
    for t in range(prompt, cfg.seq_len):
        np.testing.assert_allclose(logits, m.logits(m.ids[:, : t + 1])[:, -1], **EXACT)
        if t + 1 < cfg.seq_len:
            logits = decode.step(m.params, m.centroids, cfg, memory, m.ids[:, t])


@pytest.mark.parametrize("routing", ["causal", "random", "topk"])
def test_memory_does_not_grow_with_the_text(routing):
    """Such heads and local ones keep as much of a short text as of a long one."""
    m = setup(dataclasses.replace(SMALL, routing=routing))
    sizes = []
    for capacity in (100, 100_000):
        memory = decode.Memory(m.params, m.cfg, 1, capacity)
        sizes.append(sum(a.size for layer in memory.stores for store in layer for a in store.seen
                         if a is not None))
    assert sizes[0] == sizes[1]


def test_beyond_the_training_length():
    """A text longer than seq_len goes on, and equals the forward pass over all of it."""
    m = setup(SMALL)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (1, 3 * SMALL.seq_len))
    check_decoding(m, 40, ids)


# ------------------------------------------------------------------------------------- choosing

def draws(logits, n=4000, **options):
    rng = np.random.default_rng(0)
    rows = np.broadcast_to(logits, (n, len(logits)))
    return np.bincount(decode.choose(rows, rng, **options), minlength=len(logits)) / n


def test_choose_follows_the_probabilities():
    logits = np.log([0.5, 0.2, 0.3])
    np.testing.assert_allclose(draws(logits), [0.5, 0.2, 0.3], atol=0.03)
    sharp = np.array([0.5, 0.2, 0.3]) ** 2
    np.testing.assert_allclose(draws(logits, temperature=0.5), sharp / sharp.sum(), atol=0.03)


def test_choose_greedily():
    logits = np.array([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]])
    assert list(decode.choose(logits, None, temperature=0)) == [1, 0]


def test_top_k_and_top_p():
    logits = np.log([0.5, 0.2, 0.3])
    np.testing.assert_allclose(draws(logits, top_k=2), [0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(draws(logits, top_p=0.6), [0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(draws(logits, top_p=0.4), [1, 0, 0])
    np.testing.assert_allclose(draws(logits, top_k=9, top_p=1.0), [0.5, 0.2, 0.3], atol=0.03)
    assert draws(np.array([0.0, -800.0, 1.0]))[1] == 0  # nothing overflows


@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_generate(routing):
    """Greedy generation picks the argmax of the forward pass over what it has written."""
    m = setup(dataclasses.replace(SMALL, routing=routing, n_layers=1, timing_signal=True))
    prompt = m.ids[:, :6]
    tokens = list(decode.generate(m.params, m.centroids, m.cfg, 9, rng=None, prompt=prompt,
                                  temperature=0))
    text = prompt
    for chosen in tokens:
        best = m.logits(text_and_one_more(text))[:, -1].argmax(-1)
        np.testing.assert_array_equal(chosen, best)
        text = np.concatenate([text, chosen[:, None]], axis=1)
    assert len(tokens) == 9


def text_and_one_more(text):
    """logits[:, -1] then predicts what follows the text (the last id is not looked at)."""
    return np.concatenate([text, np.zeros((len(text), 1), text.dtype)], axis=1)


def test_generation_repeats_with_its_seed():
    m = setup(SMALL)
    runs = [np.array(list(decode.generate(m.params, m.centroids, SMALL, 20, batch=3,
                                          rng=np.random.default_rng(seed))))
            for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
    assert runs[0].shape == (20, 3) and (runs[0][:, 0] != runs[0][:, 1]).any()
