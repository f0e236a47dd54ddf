"""Any file as text: its bytes, cut into the first 90 %, the next 5 % and the last 5 %."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rt_scratch.data.dataset import Dataset, byte_dataset
from rt_scratch.data.files import digest_of
from rt_scratch.errors import UserError

MIN_BYTES = 100  # below this the 5 % splits hold next to nothing


def load(path: str | Path) -> Dataset:
    """Memory-mapped bytes of the file; UserError when it is unreadable, a folder or too short."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder; give one text file")
    try:
        n = path.stat().st_size
        if n < MIN_BYTES:
            raise UserError(f"{path}: {n} bytes; at least {MIN_BYTES} are needed for three splits")
        data = np.memmap(path, np.uint8, "r")
        digest = digest_of(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    cut, last = n * 9 // 10, n - n // 20
    splits = {"train": data[:cut], "valid": data[cut:last], "test": data[last:]}
    protocol = (f"bits per byte on a text file: first {cut:,} bytes train, next {last - cut:,} "
                f"valid, last {n - last:,} test; sha256 {digest[:12]}")
    return byte_dataset(path.name, splits, protocol)
