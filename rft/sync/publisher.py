"""The learner's side of every push: wire precision, one sender, and what a push changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rft.contrib.sparse_sync.changes import ChangeMeter, change_metrics
from rft.errors import BrokenWeights
from rft.sync.broadcast import Manifest, manifest_of
from rft.sync.link import Link
from rft.sync.sender import AdapterSender, Sender, SparseState, open_sender
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
        counted = isinstance(self.sender, SparseState) and self.wire_dtype == torch.bfloat16
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

    def announce_adapter(self, version: int, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Update:
        """What is about to arrive where the policy is an adapter: its tensors, and peft's config of it."""
        payload = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        broken = [name for name, tensor in payload.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise BrokenWeights(f"the adapter of version {version} is not finite, first {broken[0]}")
        self.tensors, sender = len(payload), self._open_sender()
        assert isinstance(sender, AdapterSender)
        update = sender.announce(version, manifest_of(payload.items()), payload.items())
        return {**update, "adapter": as_json(settings), "version": version}

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
        if isinstance(self.sender, SparseState):  # it has compared the same bits already
            sizes = {name: tensor.numel() for name, tensor in self.sender.known.items()}
            return change_metrics(self.sender.changes, sizes, self.spec.measure)
        return {}

    def _open_sender(self) -> Sender:
        assert self.sender is not None, "open comes first"
        return self.sender

    def release(self) -> None:
        """Give up what engines that share the device have read from it."""
        if self.spec.transport == "ipc" and self.sender is not None:
            self.sender.close()

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
            self.sender = None


def as_json(value: Any) -> Any:
    """Plain data: peft's configs hold sets and enumerations, which do not travel to vLLM's workers."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, str) or not isinstance(value, bool | int | float | None):
        return str(getattr(value, "value", value))
    return value
