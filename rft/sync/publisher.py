"""The learner's side of every push: wire precision, one sender, and what a push changed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from rft.rollout.engine import Link
from rft.sync.broadcast import Manifest
from rft.sync.changes import ChangeMeter, change_metrics
from rft.sync.sender import Sender, SparseSender, open_sender
from rft.sync.spec import ChannelSpec, Named, Sent, Update


class Publisher:
    """Announces a version, then sends it. `early` says which of the two reads the weights: the ranks of
    a sharded learner have to read along in the same call."""

    def __init__(self, spec: ChannelSpec) -> None:
        self.spec = spec
        self.wire_dtype: torch.dtype = getattr(torch, spec.wire_dtype)
        self.sender: Sender | None = None
        self.meter: ChangeMeter | None = None
        self.tensors = 0
        self.meter_seconds = 0.0

    def open(self, link: Link) -> None:
        """Open the sending end; replaces an earlier one. The next push is a full one."""
        self.close()
        self.sender = open_sender(self.spec, link)
        counted = isinstance(self.sender, SparseSender) and self.wire_dtype == torch.bfloat16
        self.meter = None if counted or self.spec.measure == "off" else ChangeMeter()

    @property
    def early(self) -> bool:
        return self._open_sender().early

    def wire_manifest(self, manifest: Manifest) -> Manifest:
        """The manifest in wire precision."""
        return [(name, self.spec.wire_dtype, shape) for name, _, shape in manifest]

    def announce(self, version: int, manifest: Manifest, weights: Named) -> Update:
        """What is about to arrive; `weights` is read here where the sender is early, else left alone."""
        self.tensors, self.meter_seconds = len(manifest), 0.0
        return self._open_sender().announce(version, self.wire_manifest(manifest), self._on_wire(weights))

    def send(self, weights: Named) -> Sent:
        """Move the bytes. `weights` is read here where the sender is not early."""
        total = self._open_sender().send(self._on_wire(weights))
        return Sent(total, self.tensors, self._changes())

    def _on_wire(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            wire = tensor.detach().to(self.wire_dtype)
            if self.meter is not None:
                begin = time.perf_counter()
                self.meter.observe(name, wire)
                self.meter_seconds += time.perf_counter() - begin
            yield name, wire

    def _changes(self) -> dict[str, float]:
        if self.meter is not None:
            found = change_metrics(*self.meter.take(), self.spec.measure)
            return {**found, "time/sync_measure": self.meter_seconds} if found else {}
        if isinstance(self.sender, SparseSender):  # it has compared the same bits already
            sizes = {name: tensor.numel() for name, tensor in self.sender.known.items()}
            return change_metrics(self.sender.changes, sizes, self.spec.measure)
        return {}

    def _open_sender(self) -> Sender:
        assert self.sender is not None, "open comes first"
        return self.sender

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
            self.sender = None
