"""Runs the kernels of one file under ThreadSanitizer, every CUDA thread a thread of its own.

    python sanitize.py top_members.cu       exit code 0, or 66 after a report of a data race
    python sanitize.py top_members.cu 2     the same with __syncthreads number 2 taken out
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import run_on_cpu  # noqa: E402

from rt_scratch.kernels import cuda, launch  # noqa: E402
from rt_scratch.kmeans import Centroids  # noqa: E402

BARRIER = "__syncthreads();"


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def exercise(file):
    """Small calls of the launchers that reach every block barrier of the file."""
    if file == "top_members.cu":
        cuda.routing.top_members(numbers(1, 2000), 300)
    elif file == "cross_entropy.cu":
        launch.launch("cross_entropy", (2,), (64,), numbers(2, 100), numbers(100),
                      np.array([3, 99], np.int32), numbers(2), numbers(2), numbers(2), 100, 100)
    elif file == "layer_norm.cu":
        y, cache = cuda.layers.layer_norm(numbers(20, 33), numbers(33), numbers(33))
        cuda.layers.layer_norm_backward(y, cache)
    elif file == "columns.cu":
        launch.launch("column_sum", (2, 1), (32, 8), numbers(20, 33), numbers(1, 33), 20, 33, 20,
                      33)
        launch.launch("sum_all", (1,), (256,), numbers(600), numbers(1), 600, 1.0)
    elif file == "by_cluster.cu":
        counts = np.ones((1, 600), np.int32)
        launch.launch("cluster_starts", (1,), (256,), counts, 600)
    elif file == "rows.cu":
        cuda.routing.coverage(np.ones((1, 1, 600, 1), np.float32))
    elif file == "optim.cu":
        cuda.optim.global_norm(numbers(5000))
    elif file in ("kmeans.cu", "centroids.cu"):
        x, winner = numbers(1, 1, 40, 70), np.arange(40).reshape(1, 1, 40) % 7
        if file == "kmeans.cu":
            cuda.kmeans.compare(x, numbers(1, 7, 70))
            cuda.kmeans.commitment(x, numbers(1, 7, 70), winner)
        counts, sums = cuda.kmeans.cluster_statistics(x, winner, 7)
        state = Centroids(sums.copy(), counts + 1, sums.copy())
        cuda.kmeans.replace_centroids(state, counts, sums, 0.9)
    else:
        raise SystemExit(f"{file} has no block barrier")


def without(text, number):
    """The text with one of its barriers taken out."""
    parts = text.split(BARRIER)
    return BARRIER.join(parts[: number + 1]) + ";" + BARRIER.join(parts[number + 1 :])


def main(file, number=None):
    runtime = subprocess.run([run_on_cpu.compiler(), "-print-file-name=libtsan.so"],
                             capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        raise SystemExit("no ThreadSanitizer: g++ has no libtsan")
    text = run_on_cpu.translation(file)
    if number is not None:
        text = without(text, int(number))
    with tempfile.TemporaryDirectory() as folder:
        library = run_on_cpu.build(text, Path(folder) / "kernels.so", "-shared", "-fPIC",
                                   *run_on_cpu.SANITIZE)
        fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
        command = [*fixed, sys.executable, __file__, file, "--library", str(library)]
        environment = {**os.environ, "LD_PRELOAD": runtime, "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    if "--library" in sys.argv:
        library = run_on_cpu.ctypes.CDLL(sys.argv[-1])
        loaded = run_on_cpu.library
        run_on_cpu.library = lambda file: library if file == sys.argv[1] else loaded(file)
        launch.compiled = functools.partial(run_on_cpu.started)
        exercise(sys.argv[1])
    else:
        sys.exit(main(*sys.argv[1:]))
