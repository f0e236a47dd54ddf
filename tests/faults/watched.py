"""Scripts that say what they are doing, forked from a process that has imported them already.

For many kills: a start takes a hundredth of the time that imports would. `Watched` is one such
process, and `python -m faults.watched` what runs in it: of each line of JSON, [folder, script,
arguments], it runs the script with output into `folder`, and writes its process and how that ended.
"""

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from faults.runs import ROOT, Ended

SECONDS = 60  # that no run takes


class Watched:
    """One script at a time, in a process of its own."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "faults.watched"], stdin=subprocess.PIPE, bufsize=0,
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}, start_new_session=True)
        assert self._read() == "ready"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait(SECONDS)

    def start(self, script, *arguments):
        for name in ("out", "err", "doing"):
            (self.folder / name).write_bytes(b"")
        line = json.dumps([str(self.folder), script, [str(a) for a in arguments]])
        self._server.stdin.write(line.encode() + b"\n")
        self.process = int(self._read())

    def doing(self):
        return (self.folder / "doing").read_text().strip()

    def signal(self, name):
        """Send it; what the script was doing then."""
        doing = self.doing()
        if doing != "leaving":
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.process, getattr(signal, name))
        return doing

    def end(self):
        """As `runs.end`."""
        code = int(self._read())
        out, err = ((self.folder / name).read_text(errors="replace") for name in ("out", "err"))
        assert "Traceback" not in err and "Exception ignored" not in err, err
        return Ended(code, out, err.strip().splitlines())

    def _read(self):
        if not select.select([self._server.stdout], [], [], SECONDS)[0]:
            self._server.kill()
            raise TimeoutError(f"more than {SECONDS} seconds, {self.doing()}")
        return self._server.stdout.readline().decode().strip()


def mark(now, file, what):
    """Say it; what was said before."""
    before, now[0] = now[0], what
    os.pwrite(file, what.ljust(30).encode(), 0)
    return before


def marked(function, say, what):
    @functools.wraps(function)
    def call(*arguments, **named):
        before = say(what)
        try:
            return function(*arguments, **named)
        finally:
            say(before)
    return call


def serve():
    from rt_scratch import console, decode, step
    from rt_scratch.data import cache, codecs, table
    from rt_scratch.run import checkpoint, evaluate, log, options, pictures, samples

    with contextlib.suppress(ImportError):
        import matplotlib.figure  # noqa: F401  so that every run need not
    samples.show_sample = functools.partial(samples.show_sample, n_tokens=20)
    now, to = ["between"], []
    for module, name, what in (
            (options, "plan_run", "reading settings"), (table, "load_text", "reading data"),
            (cache, "_make", "encoding"), (cache, "_lookup", "checking the encoded"),
            (codecs, "train_subwords", "training subwords"), (checkpoint, "load", "resuming"),
            (step, "train_step", "training"), (evaluate, "evaluate", "evaluating"),
            (samples, "show_sample", "sampling"), (decode, "prefill", "sampling"),
            (decode, "step", "sampling"), (checkpoint, "save", "saving"),
            (log, "append_log", "logging"), (log, "trim_log", "logging"),
            (pictures, "plot_loss", "drawing")):
        setattr(module, name, marked(getattr(module, name), lambda w: mark(now, to[0], w), what))
    import sample
    import train
    from rt_scratch.data import __main__ as encode
    scripts = {"train.py": train, "sample.py": sample, "data": encode}

    def run(main, arguments):
        mark(now, to[0], "between")
        main(arguments)
        mark(now, to[0], "leaving")

    print("ready", flush=True)
    for line in sys.stdin:
        folder, script, arguments = json.loads(line)
        process = os.fork()
        if not process:
            os.dup2(os.open(Path(folder, "out"), os.O_WRONLY), 1)
            os.dup2(os.open(Path(folder, "err"), os.O_WRONLY), 2)
            to.append(os.open(Path(folder, "doing"), os.O_WRONLY))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = 0
            try:
                console.script(functools.partial(run, scripts[script].main, arguments))
            except SystemExit as end:
                code = end.code
            os._exit(code)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
