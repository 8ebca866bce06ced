"""Types shared by both ends of a weight channel: transport, addresses, and messages."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypedDict

import torch

from rft.config.sync import SyncConfig

GRACE_S = 30.0  # for the other engines to end their part of a push after one failed

Named: TypeAlias = "Iterable[tuple[str, torch.Tensor]]"
Manifest = list[tuple[str, str, tuple[int, ...]]]  # (name, dtype without "torch.", shape)


def manifest_of(named: Named) -> Manifest:
    """Return names, dtypes and shapes of the given tensors, in order."""
    return [(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in named]


class Update(TypedDict, total=False):
    """An announcement of the coming tensors: plain data, as vLLM's `update_weights` takes it. The first three
    keys are a manifest in vLLM's format; each other key belongs to one transport."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    # file
    path: str
    digest: str
    # sparse: changed elements by name (None: everything is sent), and the states before and after
    delta: dict[str, int] | None
    base: str
    state: str
    # sparse_nccl: updates that are sent one after the other
    parts: list[Update]
    num_updates_list: list[int]
    # ipc
    ipc_handles_pickled: str
    # adapter: peft's config, and the policy version
    adapter: dict[str, Any]
    version: int


def as_update(manifest: Manifest) -> Update:
    """Convert a manifest to the three lists that vLLM's transfer engines take."""
    return {
        "names": [name for name, _, _ in manifest],
        "dtype_names": [dtype for _, dtype, _ in manifest],
        "shapes": [list(shape) for _, _, shape in manifest],
    }


@dataclass(frozen=True)
class Link:
    """The address at which the sender of weights listens, and the engine's (first) rank in the group.

    `host` is empty if weights are sent without a process group.
    """

    host: str
    port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass(frozen=True)
class ChannelSpec:
    """How weights are sent: the config section and the resolved plan.

    `transport` is one of `sync.transport`'s, or `sparse_nccl`: `sparse` between GPUs. `folder` is the output
    folder of `file`, and of `sparse` if given; otherwise `sparse` uses the process group.
    """

    transport: str
    wire_dtype: str
    folder: str | None = None
    config: SyncConfig = field(default_factory=SyncConfig)

    @property
    def colocated(self) -> bool:
        """True if the learner and an engine take turns on one device."""
        return self.transport == "ipc"

    @property
    def gpu_share(self) -> float:
        """The GPU share that Ray reserves for the learner and for each engine device: halves if they share
        one GPU, so that Ray places both on the same one."""
        return 0.5 if self.colocated else 1.0

    @property
    def grouped(self) -> bool:
        """True if learner and engines form a process group."""
        return self.transport not in ("file", "ipc") and not (self.transport == "sparse" and self.folder)


@dataclass(frozen=True)
class Sent:
    """One push from the learner's side: bytes and tensors per engine, and its measurements."""

    bytes: int
    tensors: int
    metrics: dict[str, float]


class WeightSource(Protocol):
    """The learner, as used by a weight channel. A call is submitted at once, in call order, and has a
    deadline; awaiting it raises the learner's error, Overdue or ActorDied."""

    def reserve_address(self) -> Awaitable[tuple[str, int]]:
        """Return an address of the learner's machine and a free port, for the group's rendezvous."""

    def open_channel(self, link: Link) -> Awaitable[None]:
        """Open the sending end of the channel that engines join, replacing an earlier one."""

    def announce(self, version: int) -> Awaitable[Update]:
        """Describe the tensors that `send_weights` will send."""

    def send_weights(self) -> Awaitable[Sent]:
        """Send the announced weights. Raises TransferError if the engines do not accept them."""

    def score_tokens(self, tokens: Sequence[int]) -> Awaitable[list[float]]:
        """Score `tokens[1:]` at temperature 1, each given its predecessors."""

    def offload(self) -> Awaitable[None]:
        """Move all learner state on the device to host memory; waits for the learner to load."""

    def reload(self) -> Awaitable[None]:
        """Move the learner back to its device."""

    def device_memory(self) -> Awaitable[float]:
        """Return the bytes in use on the device, by all processes."""

    def peak_memory(self) -> Awaitable[float]:
        """Return the learner's peak bytes on its device since the last call."""
