"""What README.md shows works: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import sample
import train
from rt_scratch import data, released, report
from rt_scratch.data import table

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ((ROOT / name).read_text(encoding="utf-8")
                        for name in ("README.md", "CONTRIBUTING.md"))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
PYTHON = re.findall(r"```python\n(.*?)```", README + CONTRIBUTING, re.S)
COMMANDS = [part.strip() for language, text in BLOCKS if not language
            for line in text.splitlines() for part in line.split("#")[0].split("&&")]


def test_python_interface():
    names = {}
    exec(PYTHON[0], names)
    assert names["z"].shape == (4, 28, 256)
    assert 5 < float(names["result"].nats) < 7 and names["grads"].any()
    assert np.isfinite(names["z"]).all()


def test_sixth_dataset(tmp_path, monkeypatch):
    names = {"__name__": "rt_scratch.data.mine"}
    exec(PYTHON[1], names)
    (tmp_path / "mine.bin").write_bytes(bytes(range(200)))
    line = re.search(r'`"mine": (Row\(.*?\))`', CONTRIBUTING).group(1)
    monkeypatch.setitem(data.DATASETS, "mine", eval(line, vars(table)))
    module = type(sys)("rt_scratch.data.mine")
    module.load = names["load"]
    monkeypatch.setitem(sys.modules, "rt_scratch.data.mine", module)
    loaded = data.load("mine", tmp_path)
    assert {name: len(split) for name, split in loaded.splits.items()} == {
        "train": 180, "valid": 10, "test": 10}
    assert loaded.codec.decode(loaded.splits["test"]) == bytes(range(190, 200))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_commands_parse(command):
    script, *flags = shlex.split(command.replace("-m rt_scratch.", ""))[1:]
    {"train.py": train, "sample.py": sample, "released": released,
     "report": report}[script].parse(flags)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170
