"""The authors' PG-19 model at its real size: converting, scoring and sampling on the CPU.

    pip install -e '.[released]'
    python benchmarks/released.py --data data/pg19 --out benchmarks/results/released.md

The checkpoint is made here, with random weights in the shapes of `pg19 --preset released`, and its
optimizer slots; the authors' own is not needed. --data is a folder with PG-19's books, a few are
enough. Each row is the user's own command in a process of its own: seconds from start to end, and
the largest resident set. Takes about 10 GB in --work, and ten minutes.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCOPE = "sparse_transformer/body/"


def make_checkpoint(folder):
    """A random checkpoint with slots, and a vocabulary of as many subwords, in `folder`."""
    import tensorflow as tf

    from rt_scratch import released
    from rt_scratch.config import ModelConfig

    config = ModelConfig(**fields_of(ModelConfig), vocab_size=98_304)
    rng = np.random.default_rng(0)
    variables = {"global_step": np.int64(3_530_000)}
    for name, shape in released.released_shapes(config).items():
        value = rng.standard_normal(shape, "float32") * np.float32(0.02)
        variables[SCOPE + name] = value + np.float32(name.endswith(("scale", "ema_count")))
        for axis in range(min(value.ndim, 2)):
            slot = f"training/{SCOPE}{name}/Adafactor" + "_1" * axis
            variables[slot] = np.zeros(shape[-2:][axis], "float32")
    tf.raw_ops.SaveV2(prefix=str(folder / "ckpt-3530000"), tensor_names=list(variables),
                      shape_and_slices=[""] * len(variables), tensors=list(variables.values()))
    text = (ROOT / "tests" / "golden" / "T_subwords.subwords").read_text("utf-8")
    filling = "".join(f"'filling{i}_'\n" for i in range(config.vocab_size - text.count("\n")))
    (folder / "vocab.subwords").write_text(text + filling, "utf-8")


def fields_of(cls):
    import dataclasses

    from rt_scratch.presets import preset

    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in preset("pg19", "released").items() if k in names}


def measure(*command):
    """(seconds, peak GiB, stdout) of a Python process; SystemExit with its words if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                               text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    words = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{words}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20, words


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with books of PG-19")
    parser.add_argument("--work", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        table = rows(Path(folder), args.data.resolve())
    text = (f"# The authors' PG-19 model at its real size, random weights\n\n"
            f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, NumPy {np.__version__}, float32.\n\n"
            "| what | seconds | peak, GiB |\n|---|---|---|\n" + "\n".join(table) + "\n")
    print(text)
    if args.out:
        args.out.write_text(text)


def rows(folder, data):
    """The lines of the table."""
    if os.fork() == 0:  # so that TensorFlow and the weights are not in this process
        make_checkpoint(folder)
        os._exit(0)
    if os.wait()[1]:
        raise SystemExit("the checkpoint could not be made")
    run, lines = folder / "run", []

    def add(what, seconds, peak):
        lines.append(f"| {what} | {seconds:.1f} | {peak:.1f} |")
        print(lines[-1], file=sys.stderr, flush=True)

    add("convert the checkpoint", *measure("-m", "rt_scratch.released", folder, "--vocab",
                                            folder / "vocab.subwords", "--out", run)[:2])
    return lines


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
