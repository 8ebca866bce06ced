"""The sandbox with each backend that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rft.sandbox import PROTECTIONS, Sandbox, SandboxError


def open_sandbox(backend: Any) -> Sandbox:
    """A sandbox with this backend; the test is skipped, by name, where the machine does not have it."""
    require = [] if backend == "landlock" else PROTECTIONS
    try:
        sandbox = Sandbox(backend=backend, require=require)
    except SandboxError as error:
        pytest.skip(f"{backend}: {error}")
    if backend == "landlock" and not sandbox.protections["files"]:
        sandbox.close()
        pytest.skip("landlock: this kernel has no Landlock")
    return sandbox


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
