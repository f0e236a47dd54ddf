"""A text, and a finished run on it that each test may break its own copy of."""

import contextlib
import io
import os
import shutil

import pytest

import train
from faults.runs import SMALL, write_text


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """The power stays on."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    text = write_text(folder / "text.txt")
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([str(text), "--out", str(folder / "run"), *SMALL])
    return folder / "run"


@pytest.fixture
def run(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "run")
