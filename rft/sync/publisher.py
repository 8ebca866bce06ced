"""The learner's end of a weight channel: cast weights to wire precision, send them, measure the changes.

A push has two parts. `announce` describes the coming tensors as plain data, while engines still sample;
`send` moves the bytes, while engines are paused and receive. A sender that `reads_at_announce` reads
the weights in `announce`, the others stream them in `send`: they are read once.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from rft.errors import BrokenWeights
from rft.sync.changes import ChangeMeter, Changes, change_metrics
from rft.sync.spec import ChannelSpec, Link, Manifest, Named, Sent, Update, manifest_of
from rft.utils.dotted import load_dotted

SENDERS = {  # by transport; constructed as Sender(spec, link)
    "gloo": "rft.sync.gloo.GlooSender",
    "adapter": "rft.sync.gloo.PayloadSender",
    "file": "rft.sync.files.FileSender",
    "nccl": "rft.sync.nccl.NcclSender",
    "ipc": "rft.sync.ipc.IpcSender",
    "sparse": "rft.contrib.sparse_sync.sender.SparseSender",
    "sparse_nccl": "rft.contrib.sparse_sync.sparse_nccl.SparseNcclSender",
}


class Sender(ABC):
    """Send named tensors, in manifest order, to every engine, over one transport."""

    reads_at_announce: ClassVar[bool] = False

    @abstractmethod
    def announce(self, version: int, manifest: Manifest, named: Named) -> Update: ...

    @abstractmethod
    def send(self, named: Named) -> int:
        """Move the bytes; return the number sent to each engine."""

    @abstractmethod
    def close(self) -> None: ...

    def changes(self) -> Changes | None:
        """Return the changes of the last push if the sender compares bits anyway, else None."""
        return None


class Publisher:
    """Announce a version, then send it. `reads_at_announce`: whether the first of the two calls reads the
    weights, or the second. All ranks of a sharded learner must take part in that call."""

    def __init__(self, spec: ChannelSpec) -> None:
        self.spec = spec
        self.wire_dtype: torch.dtype = getattr(torch, spec.wire_dtype)
        self.sender: Sender | None = None
        self.meter: ChangeMeter | None = None
        self.tensors = 0
        self.meter_seconds = 0.0

    def open(self, link: Link) -> None:
        """Open the sending end, replacing an earlier one. The next push is full."""
        self.close()
        self.sender = load_dotted(SENDERS[self.spec.transport])(self.spec, link)
        counted = self._open_sender().changes() is not None and self.wire_dtype == torch.bfloat16
        self.meter = None if counted or self.spec.config.measure_changes == "off" else ChangeMeter()

    @property
    def reads_at_announce(self) -> bool:
        return self._open_sender().reads_at_announce

    def announce(self, version: int, manifest: Manifest, weights: Named) -> Update:
        """Describe the coming tensors. Reads `weights` if the sender does so at the announcement."""
        self.tensors, self.meter_seconds = len(manifest), 0.0
        wire = [(name, self.spec.wire_dtype, shape) for name, _, shape in manifest]
        return self._open_sender().announce(version, wire, self._on_wire(weights))

    def announce_adapter(self, version: int, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Update:
        """Describe a policy that is an adapter: its tensors, and peft's config of it."""
        payload = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        not_finite = [name for name, tensor in payload.items() if not bool(torch.isfinite(tensor).all())]
        if not_finite:
            raise BrokenWeights(f"the adapter of version {version} is not finite, first {not_finite[0]}")
        self.tensors = len(payload)
        update = self._open_sender().announce(version, manifest_of(payload.items()), payload.items())
        return {**update, "adapter": as_json(settings), "version": version}

    def send(self, weights: Named) -> Sent:
        """Move the bytes. Reads `weights` unless `announce` has read them."""
        sender = self._open_sender()
        total, metrics = sender.send(self._on_wire(weights)), {}
        if self.meter is not None:
            metrics = change_metrics(*self.meter.take(), self.spec.config.measure_changes)
            metrics |= {"time/sync_measure": self.meter_seconds} if metrics else {}
        elif (changes := sender.changes()) is not None:
            metrics = change_metrics(*changes, self.spec.config.measure_changes)
        return Sent(total, self.tensors, metrics)

    def _on_wire(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            wire = tensor.detach().to(self.wire_dtype)
            if self.meter is not None:
                begin = time.perf_counter()
                self.meter.observe(name, wire)
                self.meter_seconds += time.perf_counter() - begin
            yield name, wire

    def _open_sender(self) -> Sender:
        assert self.sender is not None, "open comes first"
        return self.sender

    def release(self) -> None:
        """Free the weights that an engine on the same device has read."""
        if self.spec.transport == "ipc" and self.sender is not None:
            self.sender.close()

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
            self.sender = None


def as_json(value: Any) -> Any:
    """Convert to plain data: peft's configs hold sets and enums, which cannot be sent to vLLM's workers."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, str) or not isinstance(value, bool | int | float | None):
        return str(getattr(value, "value", value))
    return value
