"""Finding and reading the official files."""

from __future__ import annotations

import hashlib
from pathlib import Path

CHUNK = 1 << 20  # bytes read at a time: enough to keep a disk busy, nothing to memory


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
