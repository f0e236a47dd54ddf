"""What every kind of head is worth: the same model, data and seeds, at equal steps and equal time.

Equal time: a kind trains for as many steps as it takes in the time of the default run's heads,
`causal` with shifted keys, by the side-by-side speeds of throughput.csv, with a schedule of its own
length. Scores are of the validation split; `topk` is scored in one pass, which sees ahead, and
token by token, the same windows both times. A difference is called one only when the means are
farther apart than the larger of the two spreads (largest - smallest over the seeds); one seed
decides nothing.
"""

from common import table

from studies import RUN_COLUMNS, mean_spread, score, trained, verdict
from studies.lookahead import gap
from studies.throughput import SHIFTED, contenders, kind_flags, rates

COLUMNS = (*RUN_COLUMNS, "time", "recipe", "ahead", "ahead_error")
BASE = "causal" + SHIFTED  # the default run's
ADAMW = ["--optimizer", "adamw", "--lr", 3e-3, "--schedule", "cosine", "--warmup", 50,
         "--init-out-scale", 1]


def run(study):
    """worth.csv, worth.md: every seed of all kinds before the next seed."""
    log = study.log("worth", COLUMNS)
    for seed in range(study.seeds):
        for kind in contenders():
            one(study, log, kind, study.steps, seed, "steps")
        write(study, log.rows)
    for kind in contenders():  # so that nobody takes an optimizer's effect for routing's
        one(study, log, kind, study.steps, 0, "steps", "adamw")
    write(study, log.rows)
    speed = rates(study)
    for seed in range(study.seeds):
        for kind in contenders():
            if kind != BASE:
                steps = max(1, round(study.steps * speed[kind] / speed[BASE]))
                one(study, log, kind, steps, seed, "time")
        write(study, log.rows)


def one(study, log, kind, steps, seed, time, recipe="default"):
    """The row of one run."""
    label = kind.replace(SHIFTED, "+shift")
    name = f"{study.dataset}-{label}-{recipe}-{time}{steps}-seed{seed}"

    def measure():
        folder = trained(study, name, [
            study.text, *study.flags(), *kind_flags(kind), "--steps", steps, "--seed", seed,
            "--seed-random", seed, "--eval-every", 0, "--eval-windows", 16,
            *(ADAMW if recipe == "adamw" else [])])
        row = {"dataset": study.dataset, "kind": kind, "steps": steps, "seed": seed, "time": time,
               "recipe": recipe} | score(study, folder)
        if kind.startswith("topk"):
            row["ahead"], row["ahead_error"] = gap(study, folder)
        return row

    return log.row(name, measure)


def groups(rows, recipe, time):
    """{line of the table: scores by seed}. BASE's own steps are those of equal time too."""
    found = {}
    for r in rows:
        if r["recipe"] != recipe or r["time"] != time and not (
                time == "time" and r["kind"] == BASE):
            continue
        if r["kind"].startswith("topk"):
            found.setdefault(f"{r['kind']}, one pass (sees ahead)", []).append(r["score"])
            found.setdefault(f"{r['kind']}, token by token", []).append(r["score"] + r["ahead"])
        else:
            found.setdefault(r["kind"], []).append(r["score"])
    return found


def write(study, rows):
    """worth.md, with every text and length of the csv."""
    text = [f"# What the heads are worth\n\n{study.head}\n{__doc__}"]
    for dataset, steps in dict.fromkeys((r["dataset"], r["steps"]) for r in rows
                                        if r["time"] == "steps"):
        own = [r for r in rows if r["dataset"] == dataset]
        base = {r["steps"] for r in own if r["kind"] == BASE}
        own = [r for r in own if r["time"] == "time" and base == {steps} or r["steps"] == steps]
        for recipe, time in (("default", "steps"), ("default", "time"), ("adamw", "steps")):
            found = groups(own, recipe, time)
            if BASE not in found or len(found) < 2:
                continue
            unit = own[0]["unit"]
            text.append(f"## {dataset}, {steps:,} steps of {BASE}, equal {time}, "
                        f"{'the default recipe' if recipe == 'default' else 'AdamW'}\n")
            text.append(table(
                ["heads", f"{unit}, mean", "spread", "seeds", f"minus {BASE}"],
                [[kind, f"{mean_spread(values)[0]:.4f}",
                  f"{mean_spread(values)[1]:.4f}" if len(values) > 1 else "-", len(values),
                  "" if kind == BASE else verdict(values, found[BASE])]
                 for kind, values in sorted(found.items(), key=lambda x: mean_spread(x[1])[0])]))
    study.report("worth", "\n".join(text))
