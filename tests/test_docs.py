"""The documents: the walkthrough runs and prints what it says; equations that are cited exist."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

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


def test_evidence_exists():
    """Every test that a document names is there."""
    named = [name for page in DOCS.glob("*.md")
             for name in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text("utf-8"))]
    assert len(named) > 20
    for file, function in named:
        source = (ROOT / "tests" / file).read_text("utf-8")
        assert f"def {function}(" in source, f"{file}::{function}"


def slug(heading):
    """The anchor of a heading: its text without links and punctuation, dashes for spaces."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [
    *ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "benchmarks" / "results").rglob("*.md")],
    ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """To a file, and where there is an anchor to a heading in it."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", place.read_text("utf-8"), re.M)
            assert anchor in map(slug, heads), target


# ------------------------------------------------------------------------------- derivations

SOURCES = [p for p in sorted((ROOT / "rt_scratch").rglob("*.py")) if "data" not in p.parts]


def bare(line):
    """A line of code without its comment and without spaces."""
    return re.sub(r"\s+", "", line.partition("  #")[0])


def test_code_quoted_in_derivations_is_the_code():
    lines = {bare(line) for path in SOURCES for line in path.read_text("utf-8").splitlines()}
    text = (DOCS / "derivations.md").read_text("utf-8")
    quoted = [line for language, block in BLOCK.findall(text) if language == "python"
              for line in block.splitlines()]
    assert len(quoted) > 20
    for line in quoted:
        assert bare(line) in lines, line


def equations():
    """Numbers of the equations in derivations.md, in the order in which they stand there."""
    text = (DOCS / "derivations.md").read_text("utf-8")
    return [int(n) for n in re.findall(r"\\tag\{(\d+)\}", text)]


def test_equations_are_numbered_in_order():
    assert equations() == list(range(1, len(equations()) + 1))


# --------------------------------------------------------------------------------- docstrings

CITATION = re.compile(r"docs/derivations\.md((?:\s*(?:,|to)?\s*\(\d+\))+)")


def docstrings():
    """(module, function, docstring) of every public function of the mathematics."""
    for path in sorted((ROOT / "rt_scratch").glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield path.stem, node.name, ast.get_docstring(node) or ""


def test_every_number_cited_exists():
    known, cited = set(equations()), set()
    for module, name, text in docstrings():
        for numbers in CITATION.findall(text):
            found = {int(n) for n in re.findall(r"\d+", numbers)}
            assert found <= known, (module, name, found - known)
            cited |= found
        assert text.count("derivations.md") == len(CITATION.findall(text)), (module, name)
    assert len(cited) > 40
    for page in ("walkthrough.md", "differences.md", "derivations.md"):
        text = re.sub(r"\$[^$]*\$", "", BLOCK.sub("", (DOCS / page).read_text("utf-8")))
        assert {int(n) for n in re.findall(r"\((\d+)\)", text)} <= known, page


def test_every_public_backward_cites_an_equation():
    backwards = [(module, name, text) for module, name, text in docstrings()
                 if name.endswith("_backward")]
    assert len(backwards) > 20
    for module, name, text in backwards:
        assert CITATION.search(text), f"{module}.{name} cites no equation of docs/derivations.md"


# ------------------------------------------------------------------------------------ figures

def test_figures(tmp_path):
    """The script draws what needs no training."""
    pytest.importorskip("matplotlib")
    from benchmarks import figures

    for name, draw in (("skew", figures.draw_skew), ("cost", figures.draw_cost)):
        draw(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
