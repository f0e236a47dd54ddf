"""Our gradients against torch's autograd, where torch is installed."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import torch_twin  # noqa: E402


@pytest.mark.parametrize("name", torch_twin.cases())
def test_logits_and_gradients(name):
    assert max(torch_twin.compare(torch_twin.cases()[name])) < 1e-11
