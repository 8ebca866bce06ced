"""What both ends of a weight channel agree on before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rft.config.sync import Measure

Named = Iterable[tuple[str, Tensor]]
Update = dict[str, Any]  # what is about to arrive: plain data, as vLLM's `update_weights` takes it


@dataclass(frozen=True)
class ChannelSpec:
    """How weights travel; plain data, so that it travels too.

    `transport` is one of `sync.transport`'s, or `sparse_nccl`: what `sparse` is between GPUs. `folder` is
    where `file` writes; `sparse` writes there as well where it is given, and otherwise goes over the process
    group.
    """

    transport: str
    wire_dtype: str
    folder: str | None = None
    full_every: int = 20
    measure: Measure = "off"

    @property
    def colocated(self) -> bool:
        """True where the learner and an engine take turns on one device."""
        return self.transport == "ipc"

    @property
    def gpu_share(self) -> float:
        """What Ray reserves of a GPU for the learner and for a device of an engine: halves, where one GPU is
        both; it puts them on the same one."""
        return 0.5 if self.colocated else 1.0

    @property
    def grouped(self) -> bool:
        """True where learner and engines form a process group."""
        return self.transport not in ("file", "ipc") and not (self.transport == "sparse" and self.folder)


@dataclass(frozen=True)
class Sent:
    """One push as the learner saw it: bytes and tensors for each engine, and what it measured."""

    bytes: int
    tensors: int
    metrics: dict[str, float]
