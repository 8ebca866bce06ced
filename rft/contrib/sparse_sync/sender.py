"""The sending end of sparse updates."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rft.contrib.sparse_sync.delta import Delta, make_delta
from rft.sync.changes import Changes
from rft.sync.files import FileSender, digest
from rft.sync.gloo import GlooSender
from rft.sync.publisher import Sender
from rft.sync.spec import ChannelSpec, Link, Manifest, Named, Update, manifest_of


class SparseState(Sender):
    """The engines' known weights, and the schedule of full pushes: the first and every n-th one."""

    reads_at_announce: ClassVar[bool] = True

    def __init__(self, spec: ChannelSpec) -> None:
        self.full_every = spec.config.full_every
        self.known: dict[str, Tensor] = {}  # in wire precision
        self.changed: dict[str, int] = {}  # changed elements by name, for tensors known before
        self.deltas = 0  # since the last full push

    def full_push(self) -> bool:
        """Whether this push is a full one. Called once per push, before `known` is updated."""
        full = not self.known or self.deltas + 1 >= self.full_every
        self.deltas = 0 if full else self.deltas + 1
        return full

    def changes(self) -> Changes:
        return self.changed, {name: tensor.numel() for name, tensor in self.known.items()}


class SparseSender(SparseState):
    """Send the elements that changed since the last push, over gloo or files. `known` is a CPU copy."""

    def __init__(self, spec: ChannelSpec, link: Link) -> None:
        super().__init__(spec)
        self.carrier: Sender = FileSender(spec, link) if spec.folder else GlooSender(spec, link)
        self.state = ""
        self.payload: dict[str, Tensor] = {}

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        full = self.full_push()
        if self.known:
            delta, self.changed = make_delta(self.known, named)
        else:  # copy even if the learner already has wire precision on the CPU
            self.known = {n: tensor.detach().to("cpu", copy=True).contiguous() for n, tensor in named}
            delta = Delta({}, torch.empty(0), torch.empty(0))
        if full:
            base, self.payload, counts = "", self.known, None
        else:
            base, self.payload, counts = self.state, delta.payload, delta.counts
            manifest = manifest_of(self.payload.items())
        self.state = digest(base, self.payload.values())
        update = self.carrier.announce(version, manifest, self.payload.items())
        return {**update, "delta": counts, "base": base, "state": self.state}

    def send(self, named: Named) -> int:
        return self.carrier.send(self.payload.items())

    def close(self) -> None:
        self.carrier.close()
