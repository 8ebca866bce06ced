"""Pythons with packages that do not install beside rft: virtual environments that pip makes.

They are made once a session of tests, or once for all in the folder that RFT_TEST_VENVS names. A variable
such as RFT_VERIFIERS_PYTHON names a Python that is used instead.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from atexit import register
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest

VERIFIERS = ("verifiers==0.4.0",)
VERIFIERS_V0 = ("verifiers==0.3.1",)
UNREACHABLE = ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError", "ProxyError")


@cache
def _folder() -> Path:
    if given := os.environ.get("RFT_TEST_VENVS"):
        return Path(given)
    made = Path(mkdtemp(prefix="rft-venvs-"))
    register(rmtree, made, ignore_errors=True)
    return made


@cache
def python_with(variable: str, *requirements: str) -> str:
    """Return a Python that has the packages. Skips the test where the package index cannot be reached."""
    if given := os.environ.get(variable):
        return given
    key = hashlib.sha256(" ".join(requirements).encode()).hexdigest()[:12]
    folder = _folder() / key
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=120)
        install = [str(python), "-m", "pip", "install", "-q", "--no-input", "--retries", "1", *requirements]
        done = subprocess.run(install, capture_output=True, text=True, timeout=900)
        if done.returncode and any(word in done.stderr for word in UNREACHABLE):
            pytest.skip(f"needs {', '.join(requirements)}: set {variable}")
        assert done.returncode == 0, done.stderr[-2000:]
        ready.touch()
    return str(python)
