"""What both ends of a weight channel agree on before anything is sent."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rft.config.sync import Measure
from rft.sync.link import Link

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
    timeout_s: float = 120.0  # for a push, a rendezvous, or a switch of the device

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


class WeightSource(Protocol):
    """The learner as a weight channel sees it. A call is submitted at once, in the order of the calls, and
    has a deadline; awaiting it raises the learner's own error, Overdue or ActorDied."""

    def reserve_address(self) -> Awaitable[tuple[str, int]]:
        """Return an address of the learner's machine and a free port, for the group's rendezvous."""

    def open_channel(self, link: Link) -> Awaitable[None]:
        """Open the sending end of the channel that engines join; replaces an earlier one."""

    def announce(self, version: int) -> Awaitable[Update]:
        """Describe what `send_weights` is about to bring to the engines."""

    def send_weights(self) -> Awaitable[Sent]:
        """Send what was announced. Raises TransferError where the engines do not take it."""

    def score_tokens(self, tokens: Sequence[int]) -> Awaitable[list[float]]:
        """Score `tokens[1:]` at temperature 1, each after those before it."""

    def offload(self) -> Awaitable[None]:
        """Move all that the learner holds on its device to host memory; waits for the learner to load."""

    def reload(self) -> Awaitable[None]:
        """Move the learner back to its device."""

    def device_memory(self) -> Awaitable[float]:
        """Return the bytes in use on the device, by whatever process."""

    def peak_memory(self) -> Awaitable[float]:
        """Return the most bytes that the learner held on its device since the last call."""
