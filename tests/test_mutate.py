"""The bugs of mutate.py can be planted: their texts are there, once, and leave valid Python."""

import ast

import mutate
import pytest


@pytest.mark.parametrize("module, old, new", mutate.BUGS)
def test_bug_can_be_planted(module, old, new):
    text = (mutate.ROOT / "rt_scratch" / f"{module}.py").read_text()
    assert text.count(old) == 1
    ast.parse(text.replace(old, new))
    for name in mutate.TESTS[module].split():
        assert (mutate.ROOT / "tests" / name).exists()
