"""The default run's heads against their settings: K, W, routing layers, routing heads, the keys.

One seed each, equal steps, the rest of the default recipe: which way it leans, not a difference
(the spread over the seeds of one setting is in worth.md).
"""

from common import table

from studies import RUN_COLUMNS, score, trained

COLUMNS = (*RUN_COLUMNS, "changed")
CHANGES = {  # label: flags; four layers of four heads, half of them local, unless changed
    "nothing": [],
    "K / 4": ["--n-clusters", 1 / 4], "K / 2": ["--n-clusters", 1 / 2],
    "2 K": ["--n-clusters", 2], "4 K": ["--n-clusters", 4],
    "W / 4": ["--window", 1 / 4], "W / 2": ["--window", 1 / 2],
    "2 W": ["--window", 2], "4 W": ["--window", 4],
    "routing in the last layer": ["--routing-layers=-1"],
    "routing in the last 2 layers": ["--routing-layers=-2,-1"],
    "routing in the first layer": ["--routing-layers=0"],
    "1 routing head of 4": ["--n-routing-heads", 1, "--n-local-heads", 3],
    "3 routing heads of 4": ["--n-routing-heads", 3, "--n-local-heads", 1],
    "4 routing heads of 4": ["--n-routing-heads", 4, "--n-local-heads", 0],
    "keys not shifted": ["--no-shift-keys"],
    "2 probes": ["--n-probes", 2],
    "keys of their own": ["--no-share-qk"],
}


def flags_of(base, change):
    """The flags of a change; K and W are multiplied."""
    if change and change[0] in ("--n-clusters", "--window"):
        value = base[base.index(change[0]) + 1] if change[0] in base else 64
        return [*base, change[0], max(1, round(value * change[1]))]
    return [*base, *change]


def run(study):
    """ablation.csv and ablation.md."""
    log, base = study.log("ablation", COLUMNS), [*study.flags(), "--shift-keys"]
    for label, change in CHANGES.items():
        name = f"{study.dataset}-{study.steps}-{label.replace(' ', '').replace('/', 'by')}"
        flags = [study.text, *flags_of(base, change), "--steps", study.steps, "--eval-every", 0,
                 "--eval-windows", 16]
        log.row(name, lambda name=name, label=label, flags=flags: {
            "dataset": study.dataset, "kind": "causal, shifted keys", "steps": study.steps,
            "seed": 0, "changed": label} | score(study, trained(study, name, flags)))
    text = [f"# Ablation\n\n{study.head}\n{__doc__}"]
    for dataset, steps in dict.fromkeys((r["dataset"], r["steps"]) for r in log.rows):
        own = [r for r in log.rows if (r["dataset"], r["steps"]) == (dataset, steps)]
        same = next((r["score"] for r in own if r["changed"] == "nothing"), None)
        text += [f"## {dataset}, {steps:,} steps\n", table(
            ["changed", own[0]["unit"], "minus unchanged", "tokens/s"],
            [[r["changed"], f"{r['score']:.4f}",
              "" if same is None else f"{r['score'] - same:+.4f}",
              f"{r['tokens_per_s']:,.0f}"] for r in own])]
    study.report("ablation", "\n".join(text))
