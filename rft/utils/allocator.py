"""Settings of the C library's memory allocator for processes that compute on CPU."""

from __future__ import annotations

import os

# By default glibc returns large freed blocks to the system, and every new activation or logits tensor is
# paged in again, 4 KiB at a time. On a virtual machine that took longer than many operations on them.
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),  # the largest that glibc accepts
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),  # bytes of free memory that the process keeps
}


def allocator_environment() -> dict[str, str]:
    """Return environment variables for a process that computes on CPU; those that are set are left out."""
    return {name: value for name, value in _SETTINGS.items() if name not in os.environ}
