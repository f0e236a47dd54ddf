"""Several processes: the same numbers as one, one run folder, one line where something goes wrong.

Most of it needs the extra `mpi`: pip install -e '.[mpi]'.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.parallel_worker import CASES

from rt_scratch import parallel
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint

ROOT = Path(__file__).parent.parent
ENV = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI"))}
ENV |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OPENBLAS_NUM_THREADS": "1"}
TINY = ("--device cpu --precision float64 --seq-len 16 --n-layers 2 --width 16 --ffn-width 8 "
        "--window 4 --block 4 --n-clusters 3 --local-max-distance 3 --routing-max-distance 3 "
        "--batch 3 --parts 3 --warmup 2 --eval-windows 5 --log-every 1 --steps 9 --eval-every 3 "
        "--ffn-dropout 0.1").split()
FAULTY = """
import os, sys, numpy as np
{before}
import train
from rt_scratch.console import script
real = train.train_step
def train_step(state, grads, parts, model, recipe, dtype, world):
    state, told = real(state, grads, parts, model, recipe, dtype, world)
    if world.rank == 1 and state.step == 5:
        {fault}
    return state, told
train.train_step = train_step
script(train.main)
"""


def mpiexec():
    """The one beside this Python, as its wheel brings it, or the system's."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


try:
    import mpi4py
except ImportError:
    mpi4py = None
needs_mpi = pytest.mark.skipif(not (mpi4py and mpiexec()), reason="the extra mpi is not installed")


def launch(n, *command, **options):
    """The processes, started; n = 0: one without mpiexec."""
    start = [mpiexec(), "-n", str(n)] if n else []
    return subprocess.Popen([*start, sys.executable, *map(str, command)], env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, **options)


def run(n, *command, code=0):
    """stdout, or with another exit code than 0 the lines of stderr that are not mpiexec's own."""
    process = launch(n, *command)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return [line for line in err.splitlines() if line.strip()] if code else out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox, number {i * i % 97}\n"
                            for i in range(120)))
    return path


# ------------------------------------------------------------------------------ the same numbers

@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(processes, parts): (what they told, {case: final arrays})}"""
    found = {}
    for n, parts in ((0, 2), (0, 3), (2, 2), (3, 3)):
        folder = tmp_path_factory.mktemp(f"world-{n}-{parts}")
        run(n, "-m", "helpers.parallel_worker", folder, parts)
        arrays = {}
        for case in CASES:
            with np.load(folder / f"{case}.npz") as file:
                arrays[case] = list(file.values())
        found[n, parts] = json.loads((folder / "told.json").read_text()), arrays
    return found


@needs_mpi
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [2, 3])
def test_losses_and_arrays_are_those_of_one_process(results, n, case):
    """After 20 steps: to the bit where two gradients are added, else but for rounding."""
    (one, arrays), (several, got) = results[0, n], results[n, n]
    assert one["size"] == 1 and several["size"] == n
    a, b = np.array(one["losses"][case]), np.array(several["losses"][case])
    assert len(a) == 20 and np.isfinite(a).all()
    tolerance = 1e-6 if case == "float32" else 1e-11
    np.testing.assert_allclose(b, a, rtol=tolerance)
    exact = n == 2 and "accumulate" not in case  # there two sums of several parts are added
    if exact:
        np.testing.assert_array_equal(b, a)
    for x, y in zip(arrays[case], got[case], strict=True):
        assert x.dtype == y.dtype
        if exact:
            np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(y, x, rtol=0, atol=100 * tolerance * np.abs(x).max())


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_the_score_is_that_of_one_process(results, n):
    (one, _), (several, _) = results[0, n], results[n, n]
    a, b = np.array(one["scores"]), np.array(several["scores"])
    assert len(a) == 3 and np.isfinite(a).all()
    np.testing.assert_allclose(b, a, rtol=1e-10)


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_operations(results, n):
    told = results[n, n][0]
    assert told["turns"] == [str(i) for i in range(n)] or told["turns"][0] == "0"
    assert sorted(told["turns"]) == [str(i) for i in range(n)]
    assert told["any"] == [False, True] and told["same"] is None
    who = f"process {n - 1} on " if n == 3 else "process "
    assert told["differs"].startswith(who) and "its y:" in told["differs"]


def test_checksum_sees_one_bit():
    arrays = [np.random.default_rng(0).normal(size=(5, 7)), np.ones(3, np.float32)]
    before = parallel.checksum(arrays)
    assert before == parallel.checksum([a.copy() for a in arrays])
    for array in arrays:
        bits = array.reshape(-1).view(np.uint32)
        bits[3 % bits.size] ^= 1
        assert parallel.checksum(arrays) != before
        bits[3 % bits.size] ^= 1


# --------------------------------------------------------------------------------- one run folder

@needs_mpi
def test_resume_with_another_number_of_processes(text, tmp_path):
    """1, then 2, then 3 processes: the log and the arrays of one alone; and the same score."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(0, "train.py", text, "--out", whole, *TINY)
    run(0, "train.py", text, "--out", cut, *TINY, "--stop-after", 3)
    run(2, "train.py", "--resume", "--out", cut, "--device", "cpu", "--stop-after", 6)
    told = run(3, "train.py", "--resume", "--out", cut, "--device", "cpu")
    assert told.count("done: ") == told.count("device: ") == 1  # one of them speaks
    (a, meta), (b, _) = (checkpoint.load(folder / "last.npz") for folder in (whole, cut))
    assert meta["step"] == 9 and set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(b[name], a[name], rtol=0, atol=1e-11, err_msg=name)
    logs = [[line.split(",")[:3] for line in (folder / "log.csv").read_text().splitlines()[1:]]
            for folder in (whole, cut)]
    assert [r[:2] for r in logs[0]] == [r[:2] for r in logs[1]] and len(logs[0]) == 12
    np.testing.assert_allclose(*([float(r[2]) for r in rows] for rows in logs), rtol=1e-11)
    lines = [run(n, "train.py", "--evaluate", "test", "--evaluate-causally", "--out", whole,
                 "--device", "cpu").splitlines()[-2:] for n in (0, 2, 3)]
    assert "by incremental decoding" in lines[0][1] and lines[0] == lines[1] == lines[2]


# ----------------------------------------------------------------------------------------- faults

@needs_mpi
def test_a_wrong_flag_is_said_once(text, tmp_path):
    for flags, word in ((["--wdith", "3"], "--wdith"), (["--width", "130"], "multiple of the 4"),
                        (["--batch", "1"], "need at least one window")):
        lines = run(3, "train.py", text, "--out", tmp_path / "run", *TINY, *flags, code=2)
        assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], lines


@needs_mpi
@pytest.mark.parametrize("fault, code, line", [
    ("os.kill(os.getpid(), 9)", 9, None),  # mpiexec speaks of it
    ("raise MemoryError('planted')", 2, "error: out of memory at --batch 3 x 16 tokens"),
    ("state.flat[7] += 1e-15; raise_nothing = 0", 2, "error: process "),
])
def test_a_process_that_fails_ends_all(text, tmp_path, fault, code, line):
    """Killed, out of memory, or with other bits: one line, the checkpoint of step 3 is whole."""
    out = tmp_path / "run"
    started = time.monotonic()
    lines = run(3, "-c", FAULTY.format(before="", fault=fault), text, "--out", out, *TINY,
                code=code)
    assert time.monotonic() - started < 10 + 20  # from its start
    if line:
        assert len(lines) == 1 and lines[0].startswith(line), lines
    if "state" in fault:
        assert "process 1 on " in lines[0] and "state after step 6" in lines[0]
    assert checkpoint.load(out / "last.npz")[1]["step"] == 3
    run(2, "train.py", "--resume", "--out", out, "--device", "cpu", "--stop-after", 4)


@needs_mpi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop(text, tmp_path, number):
    """Ctrl-C or SIGTERM to mpiexec: saved after a step that all have done, one line."""
    out = tmp_path / "run"
    process = launch(2, "train.py", text, "--out", out, *TINY, "--steps", 100000,
                     "--eval-every", 0)
    while not (out / "log.csv").exists() or (out / "log.csv").read_text().count("\n") < 4:
        time.sleep(0.05)
        assert process.poll() is None
    started = time.monotonic()
    process.send_signal(number)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert time.monotonic() - started < 10 and process.returncode == 2
    lines = [line for line in lines if not line.startswith("[mpiexec@")]
    assert len(lines) == 1 and "interrupted and saved after step" in lines[0], lines
    step = checkpoint.load(out / "last.npz")[1]["step"]
    assert f"step {step};" in lines[0]


@needs_mpi
def test_unequal_processes_are_found_at_the_start(text, tmp_path):
    """Other software in one of three processes, another flag in one of two."""
    before = "if os.environ['PMI_RANK'] == '1': np.__version__ = '1.0'"
    lines = run(3, "-c", FAULTY.format(before=before, fault="pass"), text, "--out",
                tmp_path / "run", *TINY, code=2)
    assert len(lines) == 1 and "process 1 on" in lines[0] and "its numpy: 1.0" in lines[0], lines
    command = ["train.py", text, "--out", tmp_path / "run", *TINY, "--lr"]
    lines = run(1, *command, "0.1", ":", "-n", "1", sys.executable, *command, "0.2", code=2)
    assert len(lines) == 1 and "differs from the others in its lr" in lines[0], lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank, size", parallel.LAUNCHERS)
def test_launched(monkeypatch, rank, size):
    for name in (name for pair in parallel.LAUNCHERS for name in pair):
        monkeypatch.delenv(name, raising=False)
    assert parallel.launched() == (0, 1)
    monkeypatch.setenv(rank, "2")
    assert parallel.launched() == (0, 1)
    monkeypatch.setenv(size, "4")
    assert parallel.launched() == (2, 4)
    monkeypatch.setenv(rank, "")
    assert parallel.launched() == (0, 1)


def test_mpiexec_without_mpi4py(tmp_path):
    """One line, of process 0; the same where mpi4py does not belong to mpiexec."""
    rank, size = parallel.LAUNCHERS[0]
    for module, word in (("raise ImportError('No module named mpi4py')", "No module named mpi4py"),
                         ("class MPI:\n    class COMM_WORLD:\n        size = 1",
                          "it sees 1 of 3 processes")):
        (tmp_path / "mpi4py.py").write_text(module)
        for number, lines in (("0", 1), ("2", 0)):
            env = ENV | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", rank: number, size: "3"}
            result = subprocess.run([sys.executable, ROOT / "train.py", "--wdith"], env=env,
                                    capture_output=True, text=True)
            assert result.returncode == 2 and len(result.stderr.splitlines()) == lines
            assert lines == 0 or word in result.stderr and "pip install" in result.stderr


def test_nothing_is_imported_without_mpiexec(monkeypatch):
    for name in (name for pair in parallel.LAUNCHERS for name in pair):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it would fail
    assert parallel.start() is parallel.SINGLE
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert parallel.start() is parallel.SINGLE


# ------------------------------------------------------------------------------------------- GPUs

class FakeCommunicator:
    """Stands for NCCL between processes that all hold the same: a sum is `size` times an array."""

    calls, arrays = [], {}

    def __init__(self, size, own, rank):
        self.calls.append(("connect", size, own, rank))
        self.size = size

    def allReduce(self, source, target, count, kind, operation, stream):  # noqa: N802
        self.calls.append(("allReduce", source, target, count, kind, operation, stream))
        self.arrays[source].base_array[...] *= self.size


class GpuArray(np.ndarray):
    """A NumPy array that says it is CuPy's."""

    @property
    def data(self):
        FakeCommunicator.arrays[id(self)] = self
        return SimpleNamespace(ptr=id(self))

    @property
    def base_array(self):
        return self.view(np.ndarray)


@pytest.fixture
def gpus(monkeypatch):
    """A world of three processes on GPUs, this one number 1."""
    nccl = SimpleNamespace(available=True, NCCL_FLOAT32=7, NCCL_FLOAT64=8, NCCL_SUM=0,
                           NcclCommunicator=FakeCommunicator, get_unique_id=None)
    cuda = SimpleNamespace(nccl=nccl, get_current_stream=lambda: SimpleNamespace(ptr=77))
    cupy = SimpleNamespace(__name__="cupy", cuda=cuda,
                           concatenate=lambda rows: np.concatenate(rows).view(GpuArray),
                           asarray=lambda a, dtype: np.asarray(a, dtype).view(GpuArray))
    for name, module in (("cupy", cupy), ("cupy.cuda", cuda), ("cupy.cuda.nccl", nccl)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(parallel, "array_module", lambda x: cupy)
    monkeypatch.setattr(parallel, "is_host", lambda x: not isinstance(x, GpuArray))
    monkeypatch.setattr(FakeCommunicator, "calls", [])
    world = parallel.MpiWorld.__new__(parallel.MpiWorld)
    world.rank, world.size = 1, 3
    world._world = SimpleNamespace(bcast=lambda own: own or b"id of process 0")
    return world, cupy, nccl


def test_nccl_calls(gpus):
    """MPI passes the id; sums are in place, of the right type, on the current stream."""
    world, cupy, _ = gpus
    assert world.on(cupy) is world
    assert FakeCommunicator.calls == [("connect", 3, b"id of process 0", 1)]
    for dtype, kind in (("float32", 7), ("float64", 8)):
        grads = np.arange(5, dtype=dtype).view(GpuArray)
        world.sum(grads)
        assert FakeCommunicator.calls[-1] == ("allReduce", id(grads), id(grads), 5, kind, 0, 77)
        np.testing.assert_array_equal(grads, 3 * np.arange(5))
    with pytest.raises(KeyError):
        world.sum(np.ones(3, np.float16).view(GpuArray))


def test_small_sums_are_one_call(gpus):
    world, cupy, _ = gpus
    world.on(cupy)
    values = [np.float32(2).reshape(()).view(GpuArray), 0.5, np.ones((2, 3), np.float64)]
    nats, commitment, counts = world.totals(values, "float32")
    assert len(FakeCommunicator.calls) == 2 and FakeCommunicator.calls[1][3] == 8
    assert nats.shape == commitment.shape == () and counts.shape == (2, 3)
    assert (float(nats), float(commitment)) == (6, 1.5) and (counts == 3).all()
    assert nats.dtype == counts.dtype == "float32"


def test_gpus_without_nccl(gpus):
    world, cupy, nccl = gpus
    nccl.available = False
    with pytest.raises(UserError, match="pip install nvidia-nccl"):
        world.on(cupy)
