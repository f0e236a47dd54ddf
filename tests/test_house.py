"""Imports run one way, also those inside functions, and no private name crosses a module.

Modules are read as text, never imported. To add a module, give it a floor below.
"""

import ast
import itertools
from pathlib import Path

import pytest

from rt_scratch.data import DATASETS

ROOT = Path(__file__).parent.parent
FLOORS = [floor.split() for floor in (  # a module imports from lower floors, or its own folder
    "errors",
    "console dispatch heap threads presets",
    "data dropout parallel",
    "layers optim",
    "attention kmeans",
    "routing",
    "multiprobe",
    "stores",
    "heads",
    "config",
    "parameters",
    "model",
    "step decode kernels tf_checkpoint",
    "device graph workers",
    "run",
    "released report",
    "__init__",
    "train sample",
)]
ALONE = {"kernels": "device"}  # a folder that one module alone may know


def name_of(path: Path) -> str:
    """rt_scratch/data/text.py -> data.text; the package itself -> __init__, train.py -> train."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "rt_scratch" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


PATHS = [*(ROOT / "rt_scratch").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]
SOURCES = {name_of(path): path.read_text() for path in PATHS}
FOLDERS = {name_of(path) for path in PATHS if path.name == "__init__.py"}


def imported(importer: str, text: str, modules) -> list[tuple[str, str | None, str]]:
    """(module, name or None for the module itself, what it is called here) of every import.

    Wherever it stands, in whatever form; of the package alone. `from rt_scratch import name` is
    the module of that name, or a name of the package itself.
    """
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, module = alias.name.partition(".")
                if top == "rt_scratch":
                    found.append((module or "__init__", None, alias.asname or alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: as many folders up
                parts = importer.split(".") if importer != "__init__" else []
                drop = node.level - (importer in FOLDERS)
                parts = parts[: len(parts) - drop]
                base = ".".join(["rt_scratch", *parts, *filter(None, [node.module])])
            top, _, module = base.partition(".")
            if top != "rt_scratch":
                continue
            for alias in node.names:
                inner = ".".join(filter(None, [module, alias.name]))
                if inner in modules:
                    found.append((inner, None, alias.asname or alias.name))
                else:
                    found.append((module or "__init__", alias.name, alias.asname or alias.name))
    return found


def arrows(sources) -> set[tuple[str, str]]:
    """(importer, imported) over all sources, and the datasets that their table loads by name."""
    found = {(name, module) for name, text in sources.items()
             for module, _, _ in imported(name, text, sources)}
    if "data.table" in sources:
        found |= {("data.table", f"data.{name}") for name in DATASETS}
    return {(a, b) for a, b in found if a != b}


def circle(edges) -> list[str] | None:
    """Modules that import each other in a circle, None if there are none."""
    below = {}
    for a, b in edges:
        below.setdefault(a, set()).add(b)
    done = set()

    def walk(module, trail):
        if module in trail:
            return [*trail[trail.index(module):], module]
        if module in done:
            return None
        for other in sorted(below.get(module, ())):
            if found := walk(other, [*trail, module]):
                return found
        done.add(module)
        return None

    return next((found for a in sorted(below) if (found := walk(a, []))), None)


def floor(module: str) -> int:
    top = module.partition(".")[0]
    floors = [i for i, names in enumerate(FLOORS) if top in names]
    assert floors, f"{module} stands on no floor: add it to FLOORS"
    return floors[0]


def upward(edges) -> list[str]:
    """Arrows that do not run down, and those to a folder that the importer must not know."""
    wrong = []
    for a, b in sorted(edges):
        folder_a, folder_b = (x.partition(".")[0] for x in (a, b))
        inside = folder_a == folder_b and folder_a in FOLDERS
        if not inside and floor(a) <= floor(b):
            wrong.append(f"{a} imports {b}")
        elif not inside and ALONE.get(folder_b, a) != a:
            wrong.append(f"{a} imports {b}, which is for {ALONE[folder_b]}")
    return wrong


def is_private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.startswith("__")


def dotted(node) -> str | None:
    """a.b.c of nested attributes, None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def trespasses(importer: str, text: str, modules) -> list[str]:
    """Private names of other modules that a text imports, or reaches as module._name."""
    found, known = [], set()
    for module, name, called in imported(importer, text, modules):
        if is_private(name) or any(map(is_private, module.split("."))):
            found.append(f"{importer} imports {module}.{name}")
        if name is None:
            known.add(called)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = dotted(node.value)
            if owner in known or owner and owner.startswith("rt_scratch"):
                found.append(f"{importer} uses {owner}.{node.attr}")
    return found


# ---------------------------------------------------------------------------------- the package

def test_all_modules_are_read():
    assert {"__init__", "errors", "kernels.cpu", "data", "data.stdlib", "run.costs", "train",
            "sample"} <= set(SOURCES)
    edges = arrows(SOURCES)
    assert {("train", "step"), ("device", "kernels.cuda"), ("routing", "attention"),
            ("data.table", "data.pg19")} <= edges
    for module in set(itertools.chain(*edges)):
        assert module in SOURCES, f"{module} is imported and does not exist"


def test_lines_of_kernels_are_short():
    """As ruff wants those of Python."""
    long = [f"{path.name}:{i}" for path in (ROOT / "rt_scratch" / "kernels").glob("*.cu*")
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long


def test_no_circle():
    assert circle(arrows(SOURCES)) is None


def test_imports_run_down():
    assert upward(arrows(SOURCES)) == []


def test_no_private_name_crosses_a_module():
    assert [x for name, text in SOURCES.items() for x in trespasses(name, text, SOURCES)] == []


# ---------------------------------------------------------------------- what these tests would see

LATE = "def f():\n    "


@pytest.mark.parametrize("module, line", [
    ("dispatch", "from rt_scratch.layers import linear"),
    ("dispatch", LATE + "from rt_scratch.layers import linear"),
    ("errors", LATE + "from rt_scratch import model"),
    ("kmeans", "from .routing import gather"),
    ("data.files", "from . import cache"),
    ("data.codecs", "if True:\n    import rt_scratch.data.dataset"),
    ("data.text", "from rt_scratch.data.table import load"),
])
def test_a_circle_is_found(module, line):
    planted = SOURCES | {module: f"{SOURCES[module]}\n{line}\n"}
    assert module in circle(arrows(planted))


@pytest.mark.parametrize("module, line, wrong", [
    ("layers", "from rt_scratch import attention", "layers imports attention"),
    ("kmeans", "from rt_scratch.attention import attend", "kmeans imports attention"),  # same floor
    ("model", LATE + "from rt_scratch.kernels import cpu", "model imports kernels.cpu"),
    ("run.log", "from rt_scratch.kernels.cpu import TWINS",
     "run.log imports kernels.cpu, which is for device"),
    ("data.text", "import rt_scratch.optim", "data.text imports optim"),
    ("run.costs", "from rt_scratch import train_step", "run.costs imports __init__"),
    ("optim", "from .config import flag", "optim imports config"),
])
def test_an_arrow_that_runs_up_is_found(module, line, wrong):
    assert upward(arrows({**SOURCES, module: line})) == [wrong]


def test_a_module_without_a_floor_is_found():
    with pytest.raises(AssertionError, match="novelty stands on no floor"):
        upward(arrows({**SOURCES, "novelty": "from rt_scratch import errors"}))


@pytest.mark.parametrize("line, found", [
    ("from rt_scratch.attention import _logits", True),
    ("from .attention import attend, _logits as fine", True),
    ("from rt_scratch import attention\nattention._logits(1)", True),
    ("from rt_scratch import attention as a\ndef f():\n    return a._logits", True),
    ("import rt_scratch.attention\nrt_scratch.attention._logits", True),
    ("from rt_scratch.data import cache\ncache._x.y = 3", True),
    ("from rt_scratch import attention\nattention.attend._replace(x=1)", False),  # no module
    ("from rt_scratch.attention import attend\nattention.__doc__", False),
    ("import os\nos._exit(0)\nself._private = 1", False),  # none of the package's modules
])
def test_a_private_name_is_found(line, found):
    assert bool(trespasses("model", line, SOURCES)) == found
