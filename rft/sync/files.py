"""Weights as files: one safetensors file per version in a folder that every engine can read."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from rft.errors import TransferError
from rft.sync.changes import bits
from rft.sync.publisher import Sender
from rft.sync.spec import ChannelSpec, Link, Manifest, Named, Update, as_update
from rft.utils.files import UNFINISHED, write_atomic


def digest(base: str, tensors: Iterable[Tensor]) -> str:
    """Return the hex digest of `base` and the bytes of CPU tensors, in order."""
    hashed = hashlib.blake2b(base.encode(), digest_size=16)
    for tensor in tensors:
        hashed.update(bits(tensor.contiguous()).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


class FileSender(Sender):
    """Write the file in `announce`, renamed into place, so that no engine reads an incomplete file. The
    previous version is kept until the next push: an engine may still have it mapped."""

    reads_at_announce: ClassVar[bool] = True

    def __init__(self, spec: ChannelSpec, link: Link) -> None:
        assert spec.folder is not None
        self.folder = Path(spec.folder)
        self.written = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        clear(self.folder, keep=0)  # remains of a killed run

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        clear(self.folder, keep=1)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named}
        self.written = sum(tensor.nbytes for tensor in tensors.values())
        path = self.folder / f"version-{version:08d}-{os.urandom(4).hex()}.safetensors"
        write(path, tensors, version)
        return {**as_update(manifest), "path": str(path), "digest": digest("", tensors.values())}

    def send(self, named: Named) -> int:
        return self.written

    def close(self) -> None:
        clear(self.folder, keep=0)


def write(path: Path, tensors: dict[str, Tensor], version: int) -> None:
    """Write a safetensors file, atomically. Raises OSError."""
    from safetensors.torch import save_file

    with write_atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"version": str(version)})


def read_update(update: Update) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an announced file, in order, without a copy. Raises TransferError if the file is
    missing or broken, or if its bytes do not match the digest."""
    from safetensors import SafetensorError, safe_open

    path = update["path"]
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in update["names"]}
    except (OSError, SafetensorError) as error:
        raise TransferError(
            f"the weights at {path} cannot be read on {os.uname().nodename}: {error}. Every node with an "
            "engine has to see sync.folder under the same path"
        ) from error
    actual = digest("", tensors.values())
    if actual != update["digest"]:
        raise TransferError(f"{path} has the checksum {actual[:8]}, but {update['digest'][:8]} was written")
    yield from tensors.items()


def clear(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest versions, and unfinished files."""
    for unfinished in folder.glob(f"version-*{UNFINISHED}"):
        unfinished.unlink(missing_ok=True)
    versions = sorted(folder.glob("version-*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    for path in versions[: len(versions) - keep]:
        path.unlink(missing_ok=True)


def remove(folder: str | None) -> None:
    """Remove a run's folder of weight files; None or a missing folder is not an error."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
