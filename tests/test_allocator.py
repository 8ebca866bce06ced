"""Settings of the memory allocator of processes that compute on CPU."""

from __future__ import annotations

import pytest

from rft.utils.allocator import allocator_environment


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert list(allocator_environment()) == ["MALLOC_MMAP_THRESHOLD_"]
