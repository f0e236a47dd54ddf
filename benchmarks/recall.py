"""Can a head find, by content alone, the one earlier token that it needs?

    python benchmarks/recall.py                    every piece of PIECES that is not in OUT yet
    python benchmarks/recall.py --only multiprobe  those whose names begin so
    python benchmarks/recall.py --seed 1 --out runs/recall

Multi-query associative recall (Arora et al. 2023): n pairs `key value`, then filler in which each
key stands once more, followed by its value. Those values alone are scored; guessing among the
values of the sequence gives 1 / n. Two layers of one local and one routing head, or of two heads
without routing; C 64, V 32.

`multiprobe` is trained in three phases. With one cluster on sequences of 64 tokens, until it
recalls (mean loss of 50 steps below LEARNT), then on sequences of 256, so that attention finds the
key among more of them. Then k-means on queries and keys of one batch splits the cluster, and
training goes on with a fresh optimizer and a low rate at the length that is wanted. Each piece adds
a line to OUT/results.jsonl; the phases with one cluster are kept in OUT, for all pieces. Stop it
whenever you like: the next call begins the piece that it was at again.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from rt_scratch import ModelConfig, TrainConfig, logits, new_state, select_device, train_step
from rt_scratch.run.folder import whole
from rt_scratch.run.initial import drawn_centroids
from rt_scratch.step import Part
from rt_scratch.threads import limit

VOCAB, LEARNT = 32, 0.03
SHORT = dict(seq_len=64, n_clusters=4, window=16)
MODEL = ModelConfig(
    vocab_size=VOCAB, n_layers=2, width=64, ffn_width=64, n_local_heads=1, n_routing_heads=1,
    block=8, lookback=1, routing_max_distance=0, init_out_scale=1.0, **SHORT)
FIRST = TrainConfig(optimizer="adamw", lr=3e-3, schedule="constant", warmup=50, steps=1500,
                    batch=32, parts=1)
STRETCH = replace(FIRST, lr=1e-3, schedule="cosine", steps=120, batch=8)
LAST = replace(STRETCH, lr=1e-4)
STRETCHED = 256  # tokens
OWN = dict(routing="multiprobe", share_qk=False)
PIECES = {  # name: (fields of the model, pairs, steps of the last phase, batch)
    **{name: (changes, 8, 1000, 32) for name, changes in {  # from scratch
        "full": dict(attention="full"), "local": dict(attention="local"),
        "causal": dict(routing="causal"), "causal, own keys": dict(share_qk=False),
        "topk": dict(routing="topk"), "random": dict(routing="random"),
        "scratch multiprobe": OWN}.items()},
    "multiprobe, T 64": (OWN | dict(seq_len=64, n_clusters=8, window=8), 8, 120, 32),
    "multiprobe, T 256": (OWN | dict(seq_len=256, n_clusters=16, window=16), 14, 120, 8),
    "multiprobe, T 1024": (OWN | dict(seq_len=1024, n_clusters=16, window=64), 14, 60, 8),
    "one probe, T 256": (OWN | dict(seq_len=256, n_clusters=16, window=16, n_probes=1), 14, 120, 8),
    "one probe, W 32, T 256": (  # as many keys as two probes read with half the window
        OWN | dict(seq_len=256, n_clusters=16, window=32, n_probes=1), 14, 120, 8),
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


def fit(state, model, train, pairs, rng, learnt=0.0):
    """Train for train.steps steps, or until the mean loss of 50 is below `learnt` -> (state, loss).
    """
    grads, losses = np.empty_like(state.flat), []
    while len(losses) < train.steps and not (len(losses) >= 50 and np.mean(losses[-50:]) < learnt):
        ids, weights = batch_of(rng, train.batch, model.seq_len, pairs)
        state, told = train_step(state, grads, [Part(ids, None, weights, 0, 1.0)], model, train)
        losses.append(float(told.nats))
        if len(losses) % 50 == 0:
            print(f"  step {len(losses)}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    return state, float(np.mean(losses[-50:]))


def one_cluster(folder: Path, seed: int):
    """The model with one cluster after both of its phases and its state, trained now or earlier."""
    short = replace(MODEL, n_clusters=1, window=64, **OWN).validate()
    model = replace(short, seq_len=STRETCHED, window=STRETCHED).validate()
    rng, file = np.random.default_rng(seed), folder / f"one-cluster-{seed}.npy"
    train = replace(FIRST, seed=seed)
    state = new_state(short, train, np)
    if file.exists():
        state.flat[...] = np.load(file, allow_pickle=False)
        return model, state
    state, loss = fit(state, short, train, 8, rng, LEARNT)
    print(f"T {short.seq_len}: {state.step} steps, loss {loss:.3f}, accuracy and that of quarters: "
          f"{accuracy(state, short, 8)}", flush=True)
    train = replace(STRETCH, seed=seed)
    state = new_state(model, train, np)._replace(flat=state.flat)
    state, loss = fit(state, model, train, 14, rng)
    print(f"T {STRETCHED}: loss {loss:.3f}, accuracy and that of quarters: "
          f"{accuracy(state, model, 14)}", flush=True)
    with whole(file) as kept:
        np.save(kept, state.flat)
    return model, state


def piece(name: str, folder: Path, seed: int) -> dict:
    """Train and score one row of PIECES."""
    changes, pairs, steps, batch = PIECES[name]
    model = replace(MODEL, **changes).validate()
    rng, started = np.random.default_rng([seed, 1]), time.time()
    train = replace(LAST, steps=steps, batch=batch, seed=seed)
    told = {"name": name, "seed": seed, "T": model.seq_len, "K": model.n_clusters,
            "W": model.window, "pairs": pairs}
    if name.startswith(("multiprobe", "one probe")):
        before, first = one_cluster(folder, seed)
        told["one cluster"], _ = accuracy(first, replace(
            before, seq_len=model.seq_len, window=model.seq_len), pairs)
        state = new_state(model, train, np)
        state.flat[...] = first.flat
        ids, weights = batch_of(rng, 2 * STRETCH.batch, STRETCHED, pairs)
        state = state._replace(centroids=drawn_centroids(
            first, before, replace(model, seq_len=STRETCHED, window=(
                model.window * STRETCHED // model.seq_len)), ids, weights, seed))
        told["after the split"], _ = accuracy(state, model, pairs)
    else:
        train = replace(train, lr=FIRST.lr)
        state = new_state(model, train, np)
    state, told["loss"] = fit(state, model, train, pairs, rng)
    told["accuracy"], told["by distance"] = accuracy(state, model, pairs)
    told["other pairs"] = {n: accuracy(state, model, n)[0] for n in (4, 8, 15)
                           if n != pairs and 4 * n <= model.seq_len}
    told["other T"] = {t: accuracy(state, replace(model, seq_len=t, window=max(
        1, model.window * t // model.seq_len)), min(pairs, t // 4))[0]  # the same K W / T
        for t in (64, 256, 1024) if t != model.seq_len}
    return told | {"seconds": round(time.time() - started)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pieces whose names begin so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"))
    args = parser.parse_args()
    select_device("cpu")
    limit(1)  # the arrays are so small that threads cost more than they bring
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(told["name"], told["seed"]) for told in done}
    for name in PIECES:
        if name.startswith(args.only) and (name, args.seed) not in done:
            print(f"{name}, seed {args.seed}", flush=True)
            told = piece(name, args.out, args.seed)
            with file.open("a") as lines:
                lines.write(json.dumps(told) + "\n")
            print(f"  {told}", flush=True)


if __name__ == "__main__":
    main()
