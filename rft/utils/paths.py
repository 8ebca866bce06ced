"""Expand `~` and environment variables in user-supplied paths."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand(path: str) -> str:
    """Replace `~`, `$NAME` and `${NAME}` in a path. Raises ValueError for an unset variable or an unknown
    user."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} in {path!r} is not set")
        return os.environ[name]

    expanded = _VARIABLE.sub(value, path)
    if not expanded.startswith("~"):
        return expanded
    try:
        return str(Path(expanded).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{path!r} cannot be resolved: {error}") from None


def path_argument(text: str) -> str:
    """`expand` as an argparse type: argparse prints the message and ends with exit code 2."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


PathText = Annotated[str, AfterValidator(expand)]
"""A config field that holds a path, or a name that may be a path."""


def absolute_if_local(path: str) -> str:
    """Make a folder's path absolute, for processes with another working folder; keep a hub name unchanged."""
    local = path.startswith((".", "/")) or Path(path).exists()
    return str(Path(path).absolute()) if local else path


def not_writable(key: str, folder: Path, error: OSError) -> str:
    """Return an error message: the folder cannot be written, and the remedy."""
    return (
        f"{key}: {folder} cannot be written ({error.strerror}): write {key}=FOLDER with a folder that this "
        "user may write and that has space"
    )
