"""How the C library and Linux hand out the memory of arrays; for computation on a CPU."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed arrays instead of giving their pages back to the system.

    A fresh page costs as much as several passes over it. False where malloc is not glibc's.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    return all([mallopt(arena_max, 1), mallopt(mmap_threshold, 32 << 20),
                mallopt(trim_threshold, 2**31 - 1)])


def use_huge_pages(size: int = 256 << 20) -> bool:
    """Ask Linux for pages of 2 MiB instead of 4 KiB in the next `size` bytes of glibc's heap.

    Passes over arrays then wait less often for the address of a page. Memory is taken only once an
    array is written there; after `keep_freed_memory` it is kept. False where the heap cannot grow
    so far or the system knows no such pages.
    """
    top_pad, default, advise_huge = -2, 128 << 10, 14
    try:
        library = ctypes.CDLL(None)
        library.malloc.restype = ctypes.c_void_p
        library.mallopt(top_pad, size)
        begin = library.malloc(ctypes.c_size_t(16 << 20))            # the heap grows
        library.mallopt(top_pad, default)
        maps = Path("/proc/self/maps").read_text().splitlines()
        library.free(ctypes.c_void_p(begin))
    except (AttributeError, OSError, TypeError):
        return False
    begin = -(-(begin or 0) // mmap.PAGESIZE) * mmap.PAGESIZE
    for line in maps:
        first, end = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= begin < end - size:
            return library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin),
                                   advise_huge) == 0
    return False
