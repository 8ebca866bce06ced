"""The learner's end of the weight channel, one class per transport.

A push has two parts. `announce` says, in plain data, what is about to arrive, while engines still
sample; `send` moves the bytes, while engines stand still and receive. A sender that is `early` reads the
weights in `announce`, the others stream them in `send`: they are read once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rft.contrib.sparse_sync.delta import Delta, digest, make_delta
from rft.sync import broadcast, files
from rft.sync.broadcast import Manifest, manifest_of
from rft.sync.link import Link
from rft.sync.spec import ChannelSpec, Named, Update


class Sender(Protocol):
    """Brings named tensors, in manifest order, to every engine."""

    early: bool

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update: ...

    def send(self, named: Named) -> int: ...

    def close(self) -> None: ...


def as_update(manifest: Manifest) -> Update:
    """A manifest as the three lists that vLLM's transfer engines take."""
    return {
        "names": [name for name, _, _ in manifest],
        "dtype_names": [dtype for _, dtype, _ in manifest],
        "shapes": [list(shape) for _, _, shape in manifest],
    }


class GlooSender:
    """Tensors packed into buckets, over gloo."""

    early = False

    def __init__(self, link: Link) -> None:
        self.group: Any = broadcast.open_group(link.host, link.port, 0, link.world_size, link.timeout_s)
        self.manifest: Manifest = []

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        self.manifest = manifest
        return as_update(manifest)

    def send(self, named: Named) -> int:
        return broadcast.send(self.group, self.manifest, named)

    def close(self) -> None:
        self.group = None


class AdapterSender(GlooSender):
    """An adapter's tensors over gloo. They are few: taken in `announce`, sent in `send`."""

    early = True

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        self.payload = dict(named)
        return super().announce(version, manifest, ())

    def send(self, named: Named) -> int:
        return super().send(self.payload.items())


class FileSender:
    """One safetensors file per version in a folder that every engine can read.

    The file appears by a rename, so that no engine reads half of one. The version before is kept until
    the next push: an engine may still have it mapped.
    """

    early = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = 0
        folder.mkdir(parents=True, exist_ok=True)
        files.clear(folder, keep=0)  # what a run left that was killed

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        files.clear(self.folder, keep=1)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named}
        self.written = sum(tensor.nbytes for tensor in tensors.values())
        path = self.folder / f"version-{version:08d}-{os.urandom(4).hex()}.safetensors"
        files.write(path, tensors, version)
        return {**as_update(manifest), "path": str(path), "digest": digest("", tensors.values())}

    def send(self, named: Named) -> int:
        return self.written

    def close(self) -> None:
        files.clear(self.folder, keep=0)


class SparseState(Sender):
    """What the engines hold, and when they get all of it again: at first and every n-th time."""

    def __init__(self, full_every: int) -> None:
        self.full_every = full_every
        self.known: dict[str, Tensor] = {}  # in wire precision
        self.changes: dict[str, int] = {}  # changed elements by name, where something was known before
        self.deltas = 0  # since the last full push

    def everything_is_due(self) -> bool:
        """Whether this push is a full one. Asked once per push, before `known` is brought up to it."""
        full = not self.known or self.deltas + 1 >= self.full_every
        self.deltas = 0 if full else self.deltas + 1
        return full


class SparseSender(SparseState):
    """Only what changed since the last push, over gloo or files; everything at first and every n-th time.

    `known` is a copy of its own, on the CPU.
    """

    early = True

    def __init__(self, carrier: Sender, full_every: int) -> None:
        super().__init__(full_every)
        self.carrier = carrier
        self.state = ""
        self.payload: dict[str, Tensor] = {}

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        everything = self.everything_is_due()
        delta = self._changed(named) if self.known else self._first(named)
        if everything:
            base, self.payload, counts = "", self.known, None
        else:
            base, self.payload, counts = self.state, delta.payload, delta.counts
            manifest = manifest_of(self.payload.items())
        self.state = digest(base, self.payload.values())
        update = self.carrier.announce(version, manifest, self.payload.items())
        return {**update, "delta": counts, "base": base, "state": self.state}

    def _changed(self, named: Named) -> Delta:
        delta, self.changes = make_delta(self.known, named)
        return delta

    def _first(self, named: Named) -> Delta:
        """Take a copy of its own, also where the learner already holds wire precision on the CPU."""
        self.known = {n: tensor.detach().to("cpu", copy=True).contiguous() for n, tensor in named}
        nothing = torch.empty(0)
        return Delta({}, nothing, nothing)

    def send(self, named: Named) -> int:
        return self.carrier.send(self.payload.items())

    def close(self) -> None:
        self.carrier.close()


def open_sender(spec: ChannelSpec, link: Link) -> Sender:
    """The sender of a transport."""
    if spec.transport == "nccl":
        from rft.sync.nccl import NcclSender

        return NcclSender(link)
    if spec.transport == "sparse_nccl":
        from rft.contrib.sparse_sync.sparse_nccl import SparseNcclSender

        return SparseNcclSender(link, spec.full_every)
    if spec.transport == "ipc":
        from rft.sync.ipc import IpcSender

        return IpcSender()
    if spec.transport == "adapter":
        return AdapterSender(link)
    carrier: Sender
    if spec.folder and spec.transport in ("file", "sparse"):
        carrier = FileSender(Path(spec.folder))
    else:
        carrier = GlooSender(link)
    return SparseSender(carrier, spec.full_every) if spec.transport == "sparse" else carrier
