"""Forked processes that compute parts of a batch: the same bits as threads, and how they end."""

import contextlib
import dataclasses
import os
import signal
import sys
import time

import numpy as np
import pytest
from faults.runs import SMALL as FLAGS
from faults.runs import end, logged, start, step_of, write_text
from helpers.models import SMALL, setup

from rt_scratch import step, workers
from rt_scratch.config import TrainConfig
from rt_scratch.parallel import SINGLE, World
from rt_scratch.step import cut, train_step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads do the work there")


@pytest.fixture
def three_cores(monkeypatch):
    monkeypatch.setattr(workers, "n_threads", lambda: 3)


def fresh(m, train):
    state = step.new_state(m.cfg, train, np)
    assert state.flat.shape == m.flat.shape
    return state, np.empty_like(state.flat)


def steps(m, train, n, step_once, state, grads):
    """(state, [(nats, norm, memberships of each layer)]) after n steps on the same windows."""
    told = []
    for _ in range(n):
        parts = cut(m.ids, m.labels, m.cfg, train, np)
        state, result = step_once(state, grads, parts, m.cfg, train)
        told.append((result.nats, result.norm, result.memberships))
    return state, told


@pytest.mark.parametrize("routing", ["causal", "topk"])
@pytest.mark.parametrize("batch, accumulate, parts", [
    (2, 1, 2), (6, 1, 3), (5, 1, 4), (2, 3, 2), (1, 5, 2), (7, 1, 2)])
def test_the_same_bits_as_threads(three_cores, routing, batch, accumulate, parts):
    """More parts than processes, groups of parts one after another, dropout, centroids."""
    m = setup(dataclasses.replace(SMALL, routing=routing, commitment=0.3, ffn_dropout=0.2,
                                  centroid_decay=0.5), batch=batch * accumulate)
    train = TrainConfig(batch=batch, accumulate=accumulate, parts=parts, lr=0.01)
    state, told = steps(m, train, 3, train_step, *fresh(m, train))
    first, grads = fresh(m, train)
    with workers.start_workers(train_step, first, m.cfg, train, np, SINGLE) as (own, step_once):
        assert step_once is not train_step
        after, same = steps(m, train, 3, step_once, own, grads)
    for a, b in zip(state.arrays, after.arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(told, same, strict=True):
        assert a[:2] == b[:2]
        for layer, membership in a[2].items():
            for x, y in zip(membership, b[2][layer], strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("why, changes, world, cores", [
    ("one part", dict(parts=1), SINGLE, 3), ("one window", dict(batch=1), SINGLE, 3),
    ("one core", {}, SINGLE, 1), ("several processes", {}, None, 3)])
def test_threads_where_processes_are_of_no_use(monkeypatch, why, changes, world, cores):
    monkeypatch.setattr(workers, "n_threads", lambda: cores)
    several = World()
    several.size = 2
    train = dataclasses.replace(TrainConfig(), **changes)
    state = step.new_state(SMALL, train, np)
    with workers.start_workers(train_step, state, SMALL, train, np, world or several) as found:
        assert found[0] is state and found[1] is train_step


def test_threads_for_a_large_model(three_cores, monkeypatch):
    train = TrainConfig()
    state = step.new_state(SMALL, train, np)
    monkeypatch.setattr(workers, "MOST", state.flat.size - 1)
    with workers.start_workers(train_step, state, SMALL, train, np, SINGLE) as found:
        assert found[0] is state and found[1] is train_step


def test_threads_where_the_system_has_no_process_left(three_cores, monkeypatch):
    """The second fork fails: the first worker is not left behind."""
    forks, fork, before = [], os.fork, children(os.getpid())

    def limited():
        if forks:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        forks.append(fork())
        return forks[0]

    monkeypatch.setattr(os, "fork", limited)
    train = TrainConfig(batch=3, parts=3)
    state = step.new_state(SMALL, train, np)
    with workers.start_workers(train_step, state, SMALL, train, np, SINGLE) as found:
        assert found[0] is state and found[1] is train_step
        assert children(os.getpid()) == before
    assert forks[0] > 0


def test_an_error_there_is_raised_here_and_all_processes_end(three_cores, monkeypatch):
    here, before = os.getpid(), step.part_gradient

    def part_gradient(*args):
        if os.getpid() != here:
            raise MemoryError("17 GiB")
        return before(*args)

    monkeypatch.setattr(workers, "part_gradient", part_gradient)
    m, train = setup(SMALL, batch=3), TrainConfig(batch=3, parts=3)
    state, grads = fresh(m, train)
    with pytest.raises(MemoryError, match="17 GiB"), \
            workers.start_workers(train_step, state, m.cfg, train, np, SINGLE) as found:
        state, step_once = found
        pids = children(here)
        assert len(pids) == 2
        steps(m, train, 1, step_once, state, grads)
    assert not children(here) & pids


def test_parts_and_results_that_no_pipe_holds(three_cores, monkeypatch):
    """More parts than processes, and both sides send a megabyte: neither waits for the other."""
    large = np.zeros(1 << 18, np.float32)
    monkeypatch.setattr(workers, "part_gradient",
                        lambda params, state, part, *_: (part, 0.0, step.Report({}, {})))

    def too_long(*_):
        raise AssertionError("they wait for each other")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    try:
        train = TrainConfig(batch=7, parts=7)
        crew = workers.Workers(step.new_state(SMALL, train, np), SMALL, train, 3)
        with contextlib.closing(crew):
            parts = [large + i for i in range(7)]
            found = crew.run(None, crew.state, parts, crew.spare(None, 7), SMALL, train)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert [part[0] for part, *_ in found] == list(range(7))


def test_no_more_buffers_than_windows(three_cores):
    train = TrainConfig(batch=2, accumulate=2, parts=400)
    with contextlib.closing(workers.Workers(step.new_state(SMALL, train, np), SMALL, train,
                                            2)) as crew:
        assert len(crew.spare(None, 400)) == 4


def children(pid):
    found = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found |= {int(child) for child in file.read().split()}
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.01)


@pytest.fixture
def training(tmp_path):
    """(process, its worker, run folder) of a training that goes on and on."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    out = tmp_path / "run"
    process = start("train.py", write_text(tmp_path / "text.txt", 2000), "--out", out, *FLAGS,
                    "--steps", 100_000, "--eval-every", 0, "--seq-len", 1024, "--width", 64,
                    start_new_session=True)  # nearly all time is spent in the parts of a step
    wait_for(lambda: len(logged(out)) > 2 if (out / "log.csv").exists() else False)
    worker, = children(process.pid)
    yield process, worker, out
    process.kill()


def test_without_a_killed_worker_the_run_goes_on(training):
    process, worker, out = training
    os.kill(worker, signal.SIGKILL)
    before = logged(out)[-1]
    wait_for(lambda: logged(out)[-1] > before + 3)
    process.terminate()
    code, _, err = end(process)
    assert code == 2 and len(err) == 2
    assert "a process with a part of the batch was killed; threads go on" in err[0]
    assert "interrupted and saved after step" in err[1] and step_of(out) == logged(out)[-1]


def test_the_same_bits_when_a_worker_is_killed(three_cores):
    m, train = setup(SMALL, batch=3), TrainConfig(batch=3, parts=3, lr=0.01)
    state, told = steps(m, train, 3, train_step, *fresh(m, train))
    first, grads = fresh(m, train)
    with workers.start_workers(train_step, first, m.cfg, train, np, SINGLE) as (own, step_once):
        own, one = steps(m, train, 1, step_once, own, grads)
        os.kill(step_once.keywords["crew"].pids[-1], signal.SIGKILL)
        own, more = steps(m, train, 2, step_once, own, grads)
    for a, b in zip(state.arrays, own.arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [t[:2] for t in told] == [t[:2] for t in one + more]


def test_a_killed_run_leaves_no_worker(training):
    process, worker, _ = training
    process.kill()
    end(process)
    wait_for(lambda: not alive(worker))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_all_of_them_is_answered_once(training, name):
    """As Ctrl-C in a terminal, a batch system's end of a job, a closed terminal."""
    process, worker, out = training
    os.killpg(process.pid, getattr(signal, name))
    code, _, err = end(process)
    assert code == 2 and len(err) == 1 and "interrupted and saved after step" in err[0]
    assert step_of(out) == logged(out)[-1]
    wait_for(lambda: not alive(worker))
