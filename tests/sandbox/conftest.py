"""The sandbox with each backend that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sandbox_backends import open_sandbox

from rft.sandbox import Sandbox, SandboxError


@pytest.fixture(scope="module", params=["bubblewrap", "native", "landlock"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with open_sandbox(request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def best() -> Iterator[Sandbox]:
    """The backend that this machine takes by itself."""
    try:
        with Sandbox() as opened:
            yield opened
    except SandboxError as error:
        pytest.skip(f"this machine cannot sandbox: {error}")
