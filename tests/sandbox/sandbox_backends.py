"""Opening the sandbox with a named backend."""

from __future__ import annotations

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
