"""What the scripts share: signals, streams, one line and an exit code for whatever goes wrong."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path

from rt_scratch.errors import UserError

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows the docstring of a script as it is written.

    Its complaints are one line, like all others, not the usage.
    """

    def __init__(self, description: str, **options):
        super().__init__(description=description, **options,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        if message.endswith("expected one argument"):
            name = message.split()[1].rstrip(":")
            message += f" (one that begins with a dash is written {name}=VALUE)"
        raise UserError(f"{message}; see {self.prog} --help")


def a_text(text: str) -> str:
    """An argument that must not be empty, as a shell variable that is not set would make it."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def number(kind: type, least: float):
    """The type of arguments that are numbers of that kind, finite and at least so large."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be a number of at least {least}")
        return value
    return read


def a_path(text: str) -> Path:
    """A path among the arguments: an empty one would be the current folder."""
    return Path(a_text(text))


def script(main) -> None:
    """Run main() and exit: 0; 2 after one line on what the user can fix; 130 after Ctrl-C.

    SIGTERM and SIGHUP act like Ctrl-C, and main may turn all three into a line of its own, as
    training does. Text that the terminal's encoding lacks is shown as ?, and a reader that went
    away, such as `head`, ends the script with 1.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: the next file that is opened would get its place
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # those of a notebook have none
            stream.reconfigure(errors="replace")
    sys.unraisablehook, asked = _unraisable, []

    def interrupt(number, frame):
        asked.append(number)
        raise KeyboardInterrupt

    try:
        with answered(interrupt), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a loss that overflows is said so
            try:
                main()
            except Exception:
                if asked:  # code that was cleaning up failed in its turn
                    raise KeyboardInterrupt from None
                raise
        print(end="", flush=True)
    except UserError as error:
        _end(2, f"error: {error}")
    except BrokenPipeError:
        _end(1, "stopped: nobody reads the output any more")
    except OSError as error:  # a full disk, a folder that cannot be written
        where = f"{error.filename}: " if error.filename else ""
        _end(2, f"error: {where}{error.strerror or error}")
    except MemoryError as error:
        _end(2, f"error: out of memory ({error}); ask for less at a time")
    except KeyboardInterrupt:
        _end(130, "interrupted")


# ---------------------------------------------------------------------------------------- streams

def say(text: str, end: str = "\n") -> bool:
    """Print now; False where nobody reads the output any more.

    Where printing fails, nothing more is printed; there is no other consequence.
    """
    error = _put("stdout", _shown(text), end)
    if error and not isinstance(error, BrokenPipeError):
        warn(f"note: nothing more is printed to standard output ({error})")
    return not isinstance(error, BrokenPipeError)


def show(text: str, raw: bool = False) -> None:
    """Write to stdout what a model wrote; with `raw`, Latin-1 characters as the bytes they are."""
    if raw:
        sys.stdout.buffer.write(text.encode("latin-1"))
        sys.stdout.flush()
    else:
        print(_shown(text), end="", flush=True)


def warn(text: str) -> None:
    """A line on stderr."""
    _put("stderr", _line(text))


@contextlib.contextmanager
def harmless(what):
    """A failure inside `with` costs `what` alone; the first time, a line says so."""
    try:
        yield
    except Exception as error:  # a library that draws may raise anything
        _left_out(f"note: {what} is left out: {getattr(error, 'strerror', None) or error}")


@functools.cache
def _left_out(text):
    warn(text)


def visible(text: str) -> str:
    """The text with its control characters, except newline and tab, written like \\x1b.

    Sent as they are, they could move the cursor of a terminal, or worse.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", text)


def _shown(text):
    return visible(text) if sys.stdout and sys.stdout.isatty() else text


def _line(text):
    return visible(str(text).replace("\n", "\\n"))


def _put(name, text, end="\n"):
    """Print to sys.stdout or sys.stderr, which is silent from the first error on: that error."""
    stream = getattr(sys, name)
    if stream is None:
        return None
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError) as error:  # ValueError: closed
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError, AttributeError):  # a stream of Python's own
            setattr(sys, name, None)
        return error
    return None


def _unraisable(error):
    """As Python does, but not a word on Ctrl-C while it leaves."""
    if not issubclass(error.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(error)


def _end(code, line):
    _put("stdout", "", end="")  # what is left in it would fail once more after the exit
    _put("stderr", _line(line))
    sys.exit(code)


# ---------------------------------------------------------------------------------------- signals

@contextlib.contextmanager
def answered(handler):
    """Inside `with`, handler(number, frame) answers Ctrl-C, SIGTERM and SIGHUP.

    Signals that are ignored, as SIGHUP is under nohup, stay ignored. Outside the main thread, where
    Python takes no handlers, nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopRequest:
    """Inside `with`, a signal only sets `asked`, so that a loop can end after a whole step.

    A second Ctrl-C stops at once, as ever.
    """

    def __init__(self):
        self.asked, self._at_once = False, False

    def __enter__(self):
        self._answered = answered(self._ask)
        self._answered.__enter__()
        return self

    def __exit__(self, *error):
        return self._answered.__exit__(*error)

    @contextlib.contextmanager
    def at_once(self):
        """Inside this `with`, where nothing is at stake, the first signal ends the block."""
        with contextlib.suppress(KeyboardInterrupt):
            self._at_once = True
            try:
                yield
            finally:
                self._at_once = False

    def _ask(self, number, frame):
        again, self.asked = self.asked, True
        if self._at_once or again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if sys.stderr and sys.stderr.isatty():
            with contextlib.suppress(OSError):  # print may be what was interrupted
                os.write(2, b"\nstopping after this step; again: at once\n")
