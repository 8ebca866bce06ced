"""Scripts that need a process of their own: Triton reads TRITON_INTERPRET once, when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def answer(script: str, device: str, **env: str) -> Any:
    """What a script prints as JSON, given the device as its argument."""
    done = subprocess.run(
        [sys.executable, "-c", script, device],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
