"""Memory of this machine: how much a process may use, and how freed memory is returned to it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from rft.utils.control_groups import limit_folders, read_limit

_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")  # of control groups v2 and v1


def machine_memory(root: Path = Path("/")) -> int:
    """Return the bytes of RAM that this process and its children may use together: the machine's, or the
    smallest limit of the control groups (v1 and v2) above this process.

    root: the folder that holds /proc and the mount points.
    """
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in limit_folders(root, "memory"):
        limits = (read_limit(folder / name) for name in _LIMIT_FILES)
        sizes += [int(limit) for limit in limits if limit is not None and limit.isdecimal()]
    return min(sizes)


def return_freed_memory() -> None:
    """Return freed heap pages to the operating system; does nothing without glibc.

    glibc keeps a freed block that lies below a used one. Gradients allocated during a backward pass lie among
    the freed activations, whose pages would stay with the process for the rest of the step.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache
def _malloc_trim() -> Callable[[int], int] | None:
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
