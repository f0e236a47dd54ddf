"""`stdlib`: the bytes of the Python standard library's own .py files, which every machine has.

Files are joined in the order of their path, with a newline between two. Whole files are held out,
chosen by a hash of the path alone, so that the same file falls in the same split everywhere. The
text itself differs between Python versions: the protocol names version and checksum.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from pathlib import Path

from rt_scratch.data.dataset import Dataset
from rt_scratch.data.files import bucket
from rt_scratch.data.text import whole_files
from rt_scratch.errors import UserError

# Not the library (packages), not code a person wrote (generated tables and help texts), or tests.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
           "encodings", "pydoc_data"}
MIN_FILES = 50  # a full library has more than 500


def load(folder: Path | None = None, root: Path | None = None) -> Dataset:
    """Splits train / valid / test of about 90 / 5 / 5 % of the files of a standard library.

    It is the one in `root`, by default that of this Python; `folder`, where other datasets have
    their files, is not used. UserError when Python keeps no sources on disk (zipped, embedded).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    parts = {"train": [], "valid": [], "test": []}
    paths = source_files(root)
    if len(paths) < MIN_FILES:
        raise UserError(f"{root}: only {len(paths)} .py files of the standard library (a zipped or "
                        "embedded Python?); give a text file instead: train.py FILE")
    for path in paths:
        parts[split_of(path)].append(path)
    return whole_files("stdlib", root, parts,
                       f"the Python {platform.python_version()} standard library")


def source_files(root: Path) -> list[str]:
    """Relative paths, with /, of the .py files under root, sorted."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [d for d in below if d not in SKIPPED and not d.startswith("config-")]
        found += [(Path(folder) / f).relative_to(root).as_posix() for f in files
                  if f.endswith(".py") and not f.startswith("_sysconfigdata")]
    return sorted(found)


def split_of(path: str) -> str:
    """'valid' for 5 % of all paths, 'test' for 5 %, else 'train'."""
    return {0: "valid", 1: "test"}.get(bucket(path, 20), "train")
