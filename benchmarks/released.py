"""The authors' PG-19 model at its real size: converting, scoring and sampling on the CPU.

    pip install -e '.[released]'
    python benchmarks/released.py --data data/pg19 --out benchmarks/results/released.md

The checkpoint is made here, with random weights in the shapes of `pg19 --preset released`, and its
optimizer slots; the authors' own is not needed. --data is a folder with PG-19's books; a few of
test are enough. Each row is the user's own command in a process of its own, reading the run folder
included: seconds from start to end, those of all cores together (on a busy machine the better
measure), and the largest resident set. Then what the routing layer does for one token. Takes about
5 GB in --work, and six minutes on two free cores.
"""

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rt_scratch.console import Parser, script
from rt_scratch.errors import UserError

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
    """(seconds, of its cores, peak GiB) of a Python process; SystemExit with its words if it fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                               text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    words = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{words}")
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main():
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with books of PG-19")
    parser.add_argument("--work", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    args = parser.parse_args()
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError("TensorFlow makes the checkpoint: pip install -e '.[released]'")
    if not args.data.is_dir():
        raise UserError(f"--data {args.data}: no such folder")
    data, out = args.data.resolve(), args.out and args.out.resolve()
    work = args.work and args.work.resolve()
    os.chdir(ROOT)  # a folder of data that cannot be written has its cache below this one
    with tempfile.TemporaryDirectory(dir=work) as folder:
        table = rows(Path(folder), data)
    text = (f"# The authors' PG-19 model at its real size, random weights\n\n"
            f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, NumPy {np.__version__}, float32.\n\n"
            "| what | seconds | CPU seconds, all cores | peak, GiB |\n|---|---|---|---|\n"
            + "\n".join(table) + "\n")
    print(text)
    if out:
        out.write_text(text)


def rows(folder, data):
    """The lines of the table."""
    from rt_scratch.data.released_subwords import read_vocabulary

    if os.fork() == 0:  # so that TensorFlow and the weights are not in this process
        make_checkpoint(folder)
        os._exit(0)
    if os.wait()[1]:
        raise UserError("the checkpoint could not be made")
    run, lines = folder / "run", []

    def add(what, seconds, cores, peak):
        lines.append(f"| {what} | {seconds:.1f} | {cores:.1f} | {peak:.1f} |")
        print(lines[-1], file=sys.stderr, flush=True)

    vocabulary = folder / "vocab.subwords"
    add("convert the checkpoint", *measure(
        "-m", "rt_scratch.released", folder, "--vocab", vocabulary, "--out", run))
    books = encoded(data, vocabulary)
    add("score one window of 8,192 of the test split", *measure(
        "train.py", "--device", "cpu", "--out", run, "--data-dir", data, "--evaluate", "test",
        "--eval-windows", "1"))
    (folder / "prompt.txt").write_bytes(read_vocabulary(vocabulary).decode(books[:8000]))
    sample = ["sample.py", run, "--device", "cpu", "--prompt-file", folder / "prompt.txt",
              "--tokens"]
    first = measure(*sample, 1)
    add("sample 1 token after a prompt of 8,000", *first)
    more = measure(*sample, 101)
    add("sample 101 tokens after it", *more)
    lines.append(f"\nSampling one token at that length takes {(more[0] - first[0]) / 100:.2f} s, "
                 "of which the two topk heads of the last layer take "
                 f"{1000 * topk_step_seconds():.0f} ms to choose their members again and attend.")
    return lines


def encoded(data, vocabulary):
    """The first packed sequences of the test split, encoded once so that no row does it."""
    from rt_scratch.data import load, open_codec

    return load("pg19", data, 0, open_codec("tensor2tensor", vocabulary), 8192).splits["test"]


def topk_step_seconds(position=8100, steps=20):
    """Median seconds of `topk_step` for one token of the released routing layer."""
    from rt_scratch.config import ModelConfig
    from rt_scratch.heads import Context
    from rt_scratch.stores import topk_step, topk_store

    config = ModelConfig(**fields_of(ModelConfig))
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, "float32")

    heads, d = config.n_routing_heads, config.head_width
    store = topk_store(config, heads, 1, config.seq_len, np, "float32")
    for array in (store.members, store.rows_k, store.rows_v):
        array[...] = draw(*array.shape)
    window = store.scores.shape[1]  # a cluster has the best of so many tokens
    store.scores[...] = d ** 0.5 * np.sort(draw(len(store.scores), position))[:, -window:]
    context = Context(config, config.n_layers - 1, draw(heads, config.n_clusters, d))
    tables = {f"routing_rel_{x}": draw(2 * config.routing_max_distance + 1, d) for x in "kv"}
    seconds = []
    for i in range(steps):
        start = time.perf_counter()
        topk_step(draw(1, heads, d), None, draw(1, heads, d), tables, context, store, position + i)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[steps // 2]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    script(main)
