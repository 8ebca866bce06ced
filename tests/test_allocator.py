"""Settings of the memory allocator of processes that compute on CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rft.utils.allocator import allocator_environment

# Page faults of a tensor of 24 MiB that is made and freed over and over.
FAULTS = """
import resource, torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(6 * 2**20), torch.ones(6 * 2**20)
before = faults()
for _ in range(10):
    torch.ones(6 * 2**20), torch.ones(6 * 2**20)
print(faults() - before)
"""


def test_freed_tensors_are_not_paged_in_again() -> None:
    command, env = [sys.executable, "-c", FAULTS], {**os.environ, **allocator_environment()}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 120,000 for fresh pages of 4 KiB


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert "MALLOC_TRIM_THRESHOLD_" not in allocator_environment()
