"""What tests/test_parallel.py runs in each process: python -m helpers.parallel_worker FOLDER PARTS

Trains every case of CASES; process 0 writes the losses, a score and the final arrays to FOLDER.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from helpers.models import SMALL
from rt_scratch import cut, new_state, select_device, train_step
from rt_scratch.config import TrainConfig
from rt_scratch.data.dataset import byte_dataset
from rt_scratch.errors import UserError
from rt_scratch.parallel import start
from rt_scratch.run.evaluate import evaluate, evaluate_causally

DROPOUT = {f"{site}_dropout": 0.2 for site in ("embed", "attention", "ffn", "residual")}
IMAGES = dict(kind="image", image_size=3, seq_len=27, n_classes=4, vocab_size=256)
RECIPE = TrainConfig(batch=6, precision="float64", steps=20, warmup=2, lr=1e-2)
CASES = {
    "adamw, causal, dropout, padding": (
        replace(SMALL, routing="causal", commitment=0.3, pad_id=0, target_dropout=0.2, **DROPOUT),
        RECIPE),
    "adafactor, topk, images with classes, accumulate": (
        replace(SMALL, routing="topk", **IMAGES, **DROPOUT),
        replace(RECIPE, batch=3, accumulate=2, optimizer="adafactor", schedule="rsqrt",
                weight_decay=0.01)),
    "float32": (replace(SMALL, routing="topk"), replace(RECIPE, precision="float32")),
}


def train(model, recipe, world):
    """(losses of 20 steps, state after them)."""
    state = new_state(model, recipe, np)
    grads, losses = np.empty_like(state.flat), []
    for i in range(20):
        rng = np.random.default_rng(i)
        ids = rng.integers(0, model.vocab_size, (6, model.seq_len))
        labels = rng.integers(0, model.n_classes, 6) if model.n_classes else None
        state, told = train_step(state, grads, cut(ids, labels, model, recipe, np, world), model,
                                 recipe, None, world)
        losses.append([float(told.nats), float(told.norm)])
    return losses, state


def refusal(world, facts):
    """What `check_same` says of facts that differ, in every process the same."""
    try:
        world.check_same(lambda: facts)
    except UserError as error:
        return str(error)


def main(folder, parts):
    world = start()
    select_device("cpu", world)
    folder = Path(folder)
    told = {"size": world.size, "losses": {}}
    for name, (model, recipe) in CASES.items():
        recipe = replace(recipe, parts=int(parts))
        told["losses"][name], state = train(model, recipe, world)
        if world.rank == 0:
            np.savez(folder / f"{name}.npz", *state.arrays)
        if name.startswith("adamw"):
            text = np.random.default_rng(0).integers(0, 11, 800, dtype=np.uint8)
            data = byte_dataset("x", {"train": text, "valid": text, "test": text}, "x")
            told["scores"] = [
                evaluate(state, data, model, "valid", 2, limit=limit, world=world)[:2]
                for limit in (0, 5)]
            told["scores"] += [
                evaluate_causally(state, data, model, "valid", 3, world=world)[:2]]

    def visit():  # not two at a time, and process 0 first
        (folder / "log").open("a").write(f"{world.rank}\n")
        return world.rank

    (folder / "log").unlink(missing_ok=True)
    world.barrier()
    assert world.in_turn(visit) == world.rank
    told["turns"] = (folder / "log").read_text().split()
    told["any"] = [world.any(False), world.any(world.rank == world.size - 1)]
    told["same"] = refusal(world, {"x": 3})
    told["differs"] = refusal(world, {"x": 3, "y": world.rank == world.size - 1})
    if world.rank == 0:
        (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
