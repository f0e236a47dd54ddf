"""The paper's table 1, CIFAR-10, in small: which mix of local and routing heads models images best.

At full size every row is one command, `train.py cifar10 --preset paper-4x8`. Here each row has half
of its layers and heads, in the widths and the recipe of the `small` preset: of 6 layers of 4 heads,
H/2 routing heads in the last L/2 layers. Keys are the paper's, not shifted, unless a row says so.
Equal steps, one seed. The marginal histogram of the
values, which a model without any attention can learn, is the mark to beat.
"""

import math

import numpy as np
from common import table

from rt_scratch import UserError, data
from rt_scratch.presets import PRESETS
from studies import RUN_COLUMNS, score, trained
from studies.throughput import SHIFTED

COLUMNS = (*RUN_COLUMNS, "preset")
ROWS = [*(name for name in PRESETS["cifar10"] if name.startswith("paper-")),
        *(name + SHIFTED for name in ("paper-4x8", "paper-8x12", "paper-random"))]


def small_flags(name):
    """The row `name` of the table with half of its layers and heads, as flags of train.py."""
    full = PRESETS["cifar10"][name.removesuffix(SHIFTED)]
    keys = "--shift-keys" if name.endswith(SHIFTED) else "--no-shift-keys"
    flags = ["--preset", "small", keys, "--n-layers", full["n_layers"] // 2,
             "--n-local-heads", full["n_local_heads"] // 2,
             "--n-routing-heads", full["n_routing_heads"] // 2]
    if full.get("attention"):
        return [*flags, "--attention", full["attention"]]
    half = range(-len(full["routing_layers"]) // 2, 0)
    return [*flags, "--routing", full["routing"], f"--routing-layers={','.join(map(str, half))}"]


def run(study):
    """images.csv and images.md."""
    if study.cifar10 is None:
        raise UserError("images: give --cifar10 FOLDER, the folder with data_batch_1.bin ... and "
                        "test_batch.bin; see train.py cifar10 --download")
    log = study.log("images", COLUMNS)
    dataset = data.load("cifar10", study.cifar10)
    narrow = ["--width", 16, "--ffn-width", 16, "--batch", 1] if study.quick else []
    for preset in ROWS[:2] if study.quick else ROWS:
        name = f"cifar10-{preset.replace(SHIFTED, '+shift')}-{study.steps}"
        flags = ["cifar10", "--data-dir", study.cifar10, *small_flags(preset), *narrow,
                 "--steps", study.steps, "--eval-every", 0, "--eval-windows", study.windows or 16]
        log.row(name, lambda preset=preset, name=name, flags=flags: {
            "dataset": "cifar10", "preset": preset, "steps": study.steps, "seed": 0}
            | score(study, trained(study, name, flags)))
    bits = histogram_bits(*(dataset.splits[s] for s in ("train", "valid")))
    text = [f"# The paper's table 1 in small\n\n{study.head}\n{__doc__}",
            f"{dataset.protocol}. The histogram of the training values, one per colour, gives "
            f"{bits:.3f} bits per dimension.\n"]
    for steps in dict.fromkeys(r["steps"] for r in log.rows):
        own = sorted((r for r in log.rows if r["steps"] == steps), key=lambda r: r["score"])
        text += [f"## {steps:,} steps\n", table(
            ["preset", "bits/dim", "seconds", "tokens/s"],
            [[r["preset"], f"{r['score']:.3f}", f"{r['seconds']:.0f}",
              f"{r['tokens_per_s']:,.0f}"] for r in own])]
    study.report("images", "\n".join(text))


def histogram_bits(train, valid):
    """Bits per value of valid (N, T) by the histogram of train, one per colour, add-one."""
    total = 0.0
    for colour in range(3):
        counts = 1 + np.bincount(np.asarray(train[:, colour::3]).ravel(), minlength=256)
        seen = np.bincount(np.asarray(valid[:, colour::3]).ravel(), minlength=256)
        total -= float(seen @ np.log(counts / counts.sum()))
    return total / (np.asarray(valid).size * math.log(2))
