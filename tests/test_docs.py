"""The documents: the walkthrough runs and prints what it says; equations that are cited exist."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def same_text(got: str, want: str):
    """Words alike, numbers with decimals equal up to one unit of the last digit shown."""
    shape = ["".join(NUMBER.sub("#", text).split()) for text in (got, want)]
    assert shape[0] == shape[1], got
    for a, b in zip(NUMBER.findall(got), NUMBER.findall(want), strict=True):
        digits = len(b.partition(".")[2]) if "e" not in b else None
        unit = 10.0 ** -digits if digits else 0
        assert abs(float(a) - float(b)) <= 1.01 * unit, f"{a} where {b} was promised in:\n{got}"


def test_walkthrough():
    """Each `text` block is what the `python` blocks since the last one print."""
    names, printed = {"__name__": "walkthrough"}, ""
    compared = 0
    for language, text in BLOCK.findall((DOCS / "walkthrough.md").read_text("utf-8")):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, "walkthrough.md", "exec"), names)
            printed += out.getvalue()
        elif language == "text":
            same_text(printed, text)
            printed, compared = "", compared + 1
    assert not printed and compared > 10
