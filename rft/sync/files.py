"""Weights as files: written whole or not at all, read without a copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from rft.errors import TransferError
from rft.utils.files import UNFINISHED, write_atomic


def write(path: Path, tensors: dict[str, Tensor], version: int) -> None:
    """Write a safetensors file, atomically. Raises OSError."""
    from safetensors.torch import save_file

    with write_atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"version": str(version)})


def read(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors, in order. Raises TransferError where the file is missing or broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise TransferError(
            f"the weights at {path} cannot be read on {os.uname().nodename}: {error}. Every node with an "
            "engine has to see sync.folder under the same path"
        ) from error


def clear(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest versions, and what was never finished."""
    for unfinished in folder.glob(f"version-*{UNFINISHED}"):
        unfinished.unlink(missing_ok=True)
    found = sorted(folder.glob("version-*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    for path in found[: len(found) - keep]:
        path.unlink(missing_ok=True)


def remove(folder: str | None) -> None:
    """Remove a run's folder of weight files; None and a folder that is not there are no error."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
