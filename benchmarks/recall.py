"""Can a head find, by content alone, the one earlier token that it needs?

    python benchmarks/recall.py                    every piece of PIECES that is not in OUT yet
    python benchmarks/recall.py --only shifted     those whose names begin so
    python benchmarks/recall.py --seed 1 --out runs/recall

Multi-query associative recall (Arora et al. 2023): n pairs `key value`, then filler in which each
key stands once more, followed by its value. Those values alone are scored; guessing among the
values of the sequence gives 1 / n. Two layers of one local and one routing head, or of two heads
without routing; C 64, V 32. Every piece is trained from scratch on one length, and scored on others
too. "Shifted": with --shift-keys. Each piece adds a line to OUT/results.jsonl. Stop it whenever you
like: the next call begins the piece that it was at again.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from rt_scratch import (
    ModelConfig,
    TrainConfig,
    UserError,
    logits,
    new_state,
    select_device,
    train_step,
)
from rt_scratch.console import Parser, number, script
from rt_scratch.step import Part
from rt_scratch.threads import limit

VOCAB = 32
MODEL = ModelConfig(
    vocab_size=VOCAB, n_layers=2, width=64, ffn_width=64, n_local_heads=1, n_routing_heads=1,
    block=8, lookback=1, routing_max_distance=0, init_out_scale=1.0, seq_len=64, n_clusters=4,
    window=16)
TRAIN = TrainConfig(optimizer="adamw", lr=3e-3, schedule="cosine", warmup=50, parts=1)
LONG = {256: dict(seq_len=256, n_clusters=16), 1024: dict(seq_len=1024, n_clusters=16, window=64)}
PIECES = {  # name: (fields of the model, pairs, steps, batch)
    "local": (dict(attention="local"), 8, 1000, 32),
    **{f"{shifted}{name}": (changes | dict(shift_keys=bool(shifted)), 8, 1000, 32)
       for shifted in ("", "shifted ") for name, changes in {
           "full": dict(attention="full"), "causal": {}, "causal, two probes": dict(n_probes=2),
           "causal, own keys": dict(share_qk=False, n_probes=2),
           "topk": dict(routing="topk"), "random": dict(routing="random")}.items()},
    **{f"shifted causal, {r} probe{'s' * (r > 1)}, T {t}": (
        LONG[t] | dict(shift_keys=True, n_probes=r), 14, 1000, 2048 // t)
       for t in LONG for r in (1, 2)},
}


def sequences(rng, n: int, t: int, pairs: int):
    """ids (n, T), positions of the answers (n, pairs), their distances from the values (n, pairs).

    Keys are ids below V / 2, values the others; filler is any id but the keys of the sequence. The
    answer at position a is predicted where the input is ids[a - 1], the key, and must look to where
    the input is the value: one position after the value's own.
    """
    half, row = VOCAB // 2, np.arange(n)[:, None]
    keys = rng.permuted(np.tile(np.arange(half), (n, 1)), axis=1)
    values = half + rng.integers(0, half, (n, pairs))
    filler = np.concatenate([keys[:, pairs:], np.tile(np.arange(half, VOCAB), (n, 1))], axis=1)
    ids = filler[row, rng.integers(0, filler.shape[1], (n, t))]
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys[:, :pairs], values
    gaps = np.tile(np.arange(pairs, t // 2), (n, 1))
    asked = 2 * rng.permuted(gaps, axis=1)[:, :pairs]
    ids[row, asked], ids[row, asked + 1] = keys[:, :pairs], values
    return ids, asked + 1, asked - 1 - 2 * np.arange(pairs)


def batch_of(rng, n: int, t: int, pairs: int):
    """ids (n, T) and the weights of their targets (n, T): those of the answers add up to 1."""
    ids, answers, _ = sequences(rng, n, t, pairs)
    weights = np.zeros(ids.shape, "float32")
    np.put_along_axis(weights, answers, 1 / answers.size, axis=1)
    return ids, weights


def accuracy(state, model: ModelConfig, pairs: int, seed: int = 10 ** 6):
    """Share of right answers on some 16,384 tokens, and for each quarter of the distances."""
    ids, answers, distance = sequences(
        np.random.default_rng(seed), max(8, 16384 // model.seq_len), model.seq_len, pairs)
    row = np.arange(len(ids))[:, None]
    z = logits(state.params, state.centroids, model, ids)
    hit = z[row, answers].argmax(-1) == ids[row, answers]
    quarter = 4 * distance // model.seq_len
    return round(float(hit.mean()), 3), [
        round(float(hit[quarter == i].mean()), 3) if (quarter == i).any() else None
        for i in range(4)]


def piece(name: str, seed: int) -> dict:
    """Train and score one row of PIECES."""
    changes, pairs, steps, batch = PIECES[name]
    model = replace(MODEL, **changes).validate()
    train = replace(TRAIN, steps=steps, batch=batch, seed=seed).validate()
    rng, started, losses = np.random.default_rng([seed, 1]), time.time(), []
    state = new_state(model, train, np)
    grads = np.empty_like(state.flat)
    for i in range(1, steps + 1):
        ids, weights = batch_of(rng, batch, model.seq_len, pairs)
        state, result = train_step(state, grads, [Part(ids, None, weights, 0, 1.0)], model, train)
        losses.append(float(result.nats))
        if i % 50 == 0:
            print(f"  step {i}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    right, by_distance = accuracy(state, model, pairs)
    return {"name": name, "seed": seed, "T": model.seq_len, "K": model.n_clusters,
            "W": model.window, "pairs": pairs, "loss": float(np.mean(losses[-50:])),
            "accuracy": right, "by distance": by_distance,
            "other pairs": {n: accuracy(state, model, n)[0] for n in (4, 8, 15)
                            if n != pairs and 4 * n <= model.seq_len},
            "other T": {t: accuracy(state, replace(model, seq_len=t, window=max(
                1, model.window * t // model.seq_len)), min(pairs, t // 4))[0]  # the same K W / T
                for t in (64, 256, 1024) if t != model.seq_len},
            "seconds": round(time.time() - started)}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", help="pieces whose names begin so")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"))
    args = parser.parse_args()
    if not any(name.startswith(args.only) for name in PIECES):
        raise UserError(f"--only {args.only}: no piece begins so; there are {', '.join(PIECES)}")
    select_device("cpu")
    limit(1)  # the arrays are so small that threads cost more than they bring
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    text = file.read_text() if file.exists() else ""
    if not text.endswith("\n"):  # a line that was being written when the run was stopped
        text = text[: text.rfind("\n") + 1]
        file.write_text(text)
    done = [json.loads(line) for line in text.splitlines()]
    done = {(row["name"], row["seed"]) for row in done}
    for name in PIECES:
        if name.startswith(args.only) and (name, args.seed) not in done:
            print(f"{name}, seed {args.seed}", flush=True)
            row = piece(name, args.seed)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(f"  {row}", flush=True)


if __name__ == "__main__":
    script(main)
