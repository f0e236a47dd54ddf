"""A run is never lost: signals, streams, the log, the clock, the folder, one writer at a time."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import train
from faults.runs import ROOT, SMALL, end, environment, logged, start, step_of, write_text
from rt_scratch import console
from rt_scratch.errors import UserError
from rt_scratch.run import checkpoint, folder, log
from rt_scratch.run.folder import RunFolder


def wait_for(condition, process=None, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def names(path):
    return sorted(os.listdir(path)) if path.is_dir() else []


# ---------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_step_and_saves(text, tmp_path, name):
    out = tmp_path / "a run"
    process = start("train.py", text, "--out", out, *SMALL, "--steps", 5000, "--eval-every", 0)
    wait_for(lambda: len(logged(out)) > 2, process)
    process.send_signal(getattr(signal, name))
    if name != "SIGINT":
        process.send_signal(getattr(signal, name))  # a closed terminal sends several
    code, _, err = end(process)
    assert code == 2 and len(err) == 1
    assert err[0].startswith("error: interrupted and saved after step")
    assert f"python train.py --resume --out '{out}'" in err[0]
    assert step_of(out) == logged(out)[-1] > 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_scoring_ends_it_at_once(tmp_path, name):
    """All is saved before; --resume begins with the score that is missing."""
    text, out = write_text(tmp_path / "text.txt", 60_000), tmp_path / "run"
    flags = [*SMALL, "--steps", 4, "--eval-every", 2, "--eval-windows", 0]
    process = start("train.py", text, "--out", out, *flags)
    wait_for(lambda: (out / "last.npz").exists(), process)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    code, _, err = end(process)
    assert time.monotonic() - began < 2
    assert code == 2 and err[0].startswith("error: interrupted and saved after step 2")
    assert step_of(out) == 2 and logged(out) == [1, 2] and not logged(out, "valid")
    train.main(["--resume", "--out", str(out), "--device", "cpu", "--eval-windows", "3"])
    assert logged(out, "valid") == [2, 4] and logged(out) == [1, 2, 3, 4]


def test_an_ignored_signal_stays_ignored(text, tmp_path):
    """nohup."""
    out = tmp_path / "run"
    process = start("train.py", text, "--out", out, *SMALL, "--steps", 60, "--eval-every", 0,
                    before="trap '' HUP;")
    wait_for(lambda: len(logged(out)) > 2, process)
    process.send_signal(signal.SIGHUP)
    assert end(process).code == 0 and step_of(out) == 60


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(name, *rest):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
runpy.run_path(sys.argv[2], run_name="__main__")
"""


@pytest.mark.parametrize("script, module", [
    ("train.py", "numpy"), ("train.py", "numpy.linalg"), ("train.py", "rt_scratch.step"),
    ("sample.py", "tqdm")])
def test_ctrl_c_during_imports(script, module):
    result = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT, module, ROOT / script],
                            capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "interrupted\n")


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, OSError])
def test_ctrl_c_that_becomes_another_error(error, capsys):
    """As in a `finally` that the interrupted code had not prepared yet."""
    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        finally:
            raise error("no such attribute")

    with pytest.raises(SystemExit) as ended:
        console.script(work)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(AttributeError):
        console.script(lambda: 1 .missing)


LATE = """
import os, signal, threading, time
from rt_scratch.console import script

def late():
    threading.main_thread().join(0.3)  # it waits for this thread then, with nothing left to do
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)

script(lambda: threading.Thread(target=late).start())
"""


def test_ctrl_c_at_the_very_end():
    result = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_in_a_thread(text, tmp_path):
    """Where Python takes no handlers, none are set, and the run goes through."""
    raised = []

    def work():
        try:
            train.main([str(text), "--out", str(tmp_path / "run"), *SMALL])
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not raised and step_of(tmp_path / "run") == 6


# ------------------------------------------------------------------------------ streams, pictures

PRINTING = {  # name: (redirection, before, environment, lines on stderr)
    "stdout full": ("> /dev/full", "", {}, 1),
    "stdout closed": (">&-", "", {}, 0),
    "stderr full": ("2> /dev/full", "", {}, 0),
    "stderr closed": ("2>&-", "", {}, 0),
    "all closed": (">&- 2>&- <&-", "", {}, 0),
    "a backend of another environment": ("", "", {"MPLBACKEND": "module://not.here"}, 0),
    "no backend by that name": ("", "", {"MPLBACKEND": "nonsense"}, 0),
    "an ascii terminal": ("", "", {"PYTHONIOENCODING": "ascii"}, 0),
    "no home": ("", "", {"HOME": None, "MPLCONFIGDIR": "/nowhere"}, None),
}


@pytest.mark.parametrize("name", PRINTING)
def test_what_fails_to_print_costs_nothing_else(text, tmp_path, name):
    redirect, before, changes, lines = PRINTING[name]
    out = tmp_path / "run"
    code, _, err = end(start("train.py", text, "--out", out, *SMALL, redirect=redirect,
                             before=before, env=environment(**changes)))
    assert code == 0 and step_of(out) == 6 and logged(out, "valid") == [3, 6]
    assert lines is None or len(err) == lines, err
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    assert (out / "loss.png").stat().st_size > 1000


def test_few_file_descriptors(text, tmp_path):
    """Enough of them: a run. Too few: one line."""
    for n in (6, 12):
        out = tmp_path / str(n)
        code, _, err = end(start("train.py", text, "--out", out, *SMALL, before=f"ulimit -n {n};"))
        if code == 0:
            assert step_of(out) == 6
        else:
            assert err[-1].startswith(("error: ", "Fatal Python error", "ImportError",
                                       "ModuleNotFoundError", "OSError")), err


@pytest.mark.parametrize("name", ["loss.png", "log.csv"])
def test_a_folder_in_the_place_of(text, tmp_path, capsys, name):
    if name == "loss.png":
        pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    (out / name).mkdir(parents=True)
    train.main([str(text), "--out", str(out), *SMALL])
    assert step_of(out) == 6
    assert f"note: {out / name} is left out: Is a directory" in capsys.readouterr().err


def test_a_folder_in_the_place_of_the_checkpoint(text, tmp_path):
    out = tmp_path / "run"
    (out / "last.npz").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run already"):
        train.main([str(text), "--out", str(out), *SMALL])


def test_the_disk_of_the_log_is_full(text, tmp_path, monkeypatch, capsys):
    def full(rows, header, columns):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log, "_csv", full)
    train.main([str(text), "--out", str(tmp_path / "run"), *SMALL])
    assert step_of(tmp_path / "run") == 6
    assert capsys.readouterr().err.count("log.csv is left out: No space left") == 1


def test_streams_of_a_notebook(monkeypatch):
    """Without `reconfigure`, without a file descriptor, or None."""
    written = []
    stream = SimpleNamespace(write=written.append, flush=lambda: None, isatty=lambda: False)
    for streams in ((stream, stream), (None, None), (stream, None)):
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        console.script(lambda: console.say("hello"))
        with pytest.raises(SystemExit) as ended:
            console.script(lambda: open("/not/here"))
        assert ended.value.code == 2
    assert "hello" in written and any("/not/here: No such file" in text for text in written)


def test_one_line_whatever_the_name(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        console.script(lambda: open("/not\nhere\x1b[2J"))
    assert capsys.readouterr().err == "error: /not\\nhere\\x1b[2J: No such file or directory\n"


@pytest.mark.parametrize("clock", ["stands still", "jumps back"])
def test_the_clock(text, tmp_path, monkeypatch, clock):
    """Set back by an hour, the system's clock changes nothing; one that does not move is no 0 to
    divide by."""
    start = time.time()
    if clock == "jumps back":
        calls = iter(range(10 ** 9))
        monkeypatch.setattr(time, "time", lambda: start - 3600 * (next(calls) > 10))
    else:
        monkeypatch.setattr(time, "time", lambda: start)
        monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    train.main([str(text), "--out", str(tmp_path / "run"), *SMALL])
    seconds = [float(row["seconds"]) for row in log.read_log(tmp_path / "run")]
    assert seconds == sorted(seconds) and 0 <= seconds[-1] < 60
    assert 0 <= checkpoint.load(tmp_path / "run" / "last.npz")[1]["seconds"] < 60


# ------------------------------------------------------------------------------------- the folder

def at_step(monkeypatch, number, what):
    """what() happens after the step `number`."""
    real = train.train_step

    def step(state, *rest, **options):
        result = real(state, *rest, **options)
        if result[0].step == number:
            what()
        return result

    monkeypatch.setattr(train, "train_step", step)


def test_the_folder_is_deleted(text, tmp_path, monkeypatch):
    """It is made again, with all that a resume and a sample need."""
    out = tmp_path / "runs" / "run"
    at_step(monkeypatch, 5, lambda: shutil.rmtree(out.parent))
    train.main([str(text), "--out", str(out), *SMALL])
    assert step_of(out) == step_of(out, "best.npz") == 6
    assert {"config.json", "log.csv"} <= set(names(out)) and "lock" not in names(out)
    train.main(["--resume", "--out", str(out), "--device", "cpu", "--steps", "7"])


def test_the_folder_cannot_be_made_again(text, tmp_path, monkeypatch):
    out = tmp_path / "runs" / "run"

    def replace():
        shutil.rmtree(out.parent)
        out.parent.write_text("a file")

    at_step(monkeypatch, 5, replace)
    with pytest.raises(UserError, match=f"{out}: a file is in the way"):
        train.main([str(text), "--out", str(out), *SMALL])


def test_out_of_memory_after_a_checkpoint(text, tmp_path, monkeypatch):
    def fail():
        raise MemoryError("Unable to allocate 9 GiB")

    at_step(monkeypatch, 5, fail)
    with pytest.raises(UserError, match=r"out of memory .*last.npz, is kept"):
        train.main([str(text), "--out", str(tmp_path / "run"), *SMALL])
    assert step_of(tmp_path / "run") == 3


def test_out_of_memory_in_a_sample(text, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(train, "show_sample", fail)
    train.main([str(text), "--out", str(tmp_path / "run"), *SMALL])
    assert "the sample is left out: Unable to allocate" in capsys.readouterr().err


def test_a_loss_that_diverges_leaves_the_best(text, tmp_path, monkeypatch):
    """Finite parameters, a validation loss that is not: --resume goes on from the best."""
    out = tmp_path / "run"
    real = train.evaluate

    def diverged(state, *rest, **options):
        score = real(state, *rest, **options)
        return score if state.step < 6 else score._replace(nats=np.inf)

    monkeypatch.setattr(train, "evaluate", diverged)
    with pytest.raises(UserError, match=r"validation loss is not finite .*best.npz, is kept"):
        train.main([str(text), "--out", str(out), *SMALL])
    monkeypatch.setattr(train, "evaluate", real)
    train.main(["--resume", "--out", str(out), "--device", "cpu"])
    assert step_of(out) == 6 and logged(out) == [1, 2, 3, 4, 5, 6]


# --------------------------------------------------------------------------------- one at a time

def test_two_trainings_into_one_folder(text, tmp_path):
    out = tmp_path / "run"
    process = start("train.py", text, "--out", out, *SMALL, "--steps", 99999, "--eval-every", 0)
    wait_for(lambda: len(logged(out)) > 2, process)
    with pytest.raises(UserError, match=rf"process {process.pid} on .* is training into it"):
        train.main([str(text), "--out", str(out), *SMALL])
    process.send_signal(signal.SIGKILL)
    process.wait()
    train.main([str(text), "--out", str(out), *SMALL])  # a crash locks nobody out
    assert step_of(out) == 6 and "lock" not in names(out)


def test_two_trainings_in_one_process(tmp_path):
    with RunFolder(tmp_path / "run", {}, None):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            RunFolder(tmp_path / "run", {}, None)
    RunFolder(tmp_path / "run", {}, None).close()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt])
def test_a_folder_that_cannot_be_filled_is_not_kept_locked(tmp_path, monkeypatch, error):
    def fail(handle):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            RunFolder(tmp_path / "run", {}, None)
        assert names(tmp_path / "run") == []
    RunFolder(tmp_path / "run", {}, None).close()


def test_simultaneous_saves(tmp_path):
    """40 pairs of writers of one file: it is whole, and of one of them."""
    path = tmp_path / "last.npz"
    for pair in range(40):
        threads = [threading.Thread(target=checkpoint.save, args=(
            path, {"a": np.full(5000, 2 * pair + i)}, {"writer": 2 * pair + i})) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arrays, meta = checkpoint.load(path)
        assert meta["writer"] // 2 == pair and (arrays["a"] == meta["writer"]).all()
    assert names(tmp_path) == ["last.npz"]


def test_a_link_in_the_place_of_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.secrets, "token_hex", lambda n: "0" * 16)
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f"last.npz.{os.getpid()}-{'0' * 16}.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"cannot write .*last.npz: File exists"):
        checkpoint.save(tmp_path / "last.npz", {}, {})
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_a_killed_run_left_is_removed(run):
    for name in (f"last.npz.999-{'a1' * 8}.tmp", "last.npz.tmp", "log.csv.tmp", "notes.tmp"):
        (run / name).write_text("x")
    train.main(["--resume", "--out", str(run), "--device", "cpu", "--steps", "7"])
    assert [name for name in names(run) if "tmp" in name] == ["notes.tmp"]


