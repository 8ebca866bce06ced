"""Pythons with packages that do not install beside rft: virtual environments that pip makes.

They are made once a session of tests, or once for all in the folder that RFT_TEST_VENVS names. A variable
such as RFT_VERIFIERS_PYTHON names a Python that is used instead, one such as RFT_RENDERERS_PATH a folder.
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
RENDERERS = ("renderers==0.1.12", "prime-pydantic-config==0.4.3")
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
    folder = _place(requirements)
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=120)
        _install(variable, python, *requirements)
        ready.touch()
    return str(python)


@cache
def folder_with(variable: str, *requirements: str) -> Path:
    """Return a folder for `sys.path` that has the packages, without their dependencies. Skips likewise."""
    if given := os.environ.get(variable):
        return Path(given)
    folder = _place(requirements)
    if not (folder / "ready").exists():
        _install(variable, sys.executable, "--no-deps", "--upgrade", "--target", str(folder), *requirements)
        (folder / "ready").touch()
    return folder


def _place(requirements: tuple[str, ...]) -> Path:
    return _folder() / hashlib.sha256(" ".join(requirements).encode()).hexdigest()[:12]


def _install(variable: str, python: str | Path, *arguments: str) -> None:
    install = [str(python), "-m", "pip", "install", "-q", "--no-input", "--retries", "1", *arguments]
    done = subprocess.run(install, capture_output=True, text=True, timeout=900)
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        pytest.skip(f"needs {', '.join(arguments)}: set {variable}")
    assert done.returncode == 0, done.stderr[-2000:]
