"""What the scripts share: one line and an exit code for whatever goes wrong."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from rt_scratch.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, like all others, not the usage."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def script(main) -> None:
    """Run main() and exit: 0; 2 after one line on what the user can fix; 130 after Ctrl-C.

    main may turn Ctrl-C into a line of its own, as training does. Text that the terminal's encoding
    lacks is shown as ?, and a reader that went away, such as `head`, ends the script with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: closed by the caller
            stream.reconfigure(errors="replace")
    try:
        main()
        print(end="", flush=True)
    except UserError as error:
        _end(2, f"error: {error}")
    except BrokenPipeError:
        _silence()
        _end(1, "stopped: nobody reads the output any more")
    except OSError as error:  # a full disk, a folder that cannot be written
        _end(2, f"error: {error.filename or 'files'}: {error.strerror or error}")
    except MemoryError as error:
        _end(2, f"error: out of memory ({error}); ask for less at a time")
    except KeyboardInterrupt:
        _end(130, "interrupted")


def say(text: str) -> bool:
    """Print now; False, and silent from now on, where nobody reads the output any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _silence()
        return False
    return True


class StopRequest:
    """Inside `with`, Ctrl-C only sets `asked`, for a loop that ends where everything is whole.

    A second Ctrl-C stops at once, as ever.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _silence():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(code, line):
    print(line, file=sys.stderr)
    sys.exit(code)
