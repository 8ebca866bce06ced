"""Types that both ends of a weight channel share: how weights travel, addresses, and messages."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

from torch import Tensor

from rft.config.sync import SyncConfig

GRACE_S = 30.0  # for the other engines to end their part of a push that one of them failed in

Named = Iterable[tuple[str, Tensor]]
Manifest = list[tuple[str, str, tuple[int, ...]]]  # (name, dtype without "torch.", shape)


def manifest_of(named: Named) -> Manifest:
    """Names, dtypes and shapes of the given tensors, in order."""
    return [(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in named]


class Update(TypedDict, total=False):
    """An announcement of the tensors that are about to arrive: plain data, as vLLM's `update_weights` takes
    it. The first three keys are a manifest as vLLM's lists; the others each belong to one transport."""

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
    """A manifest as the three lists that vLLM's transfer engines take."""
    return {
        "names": [name for name, _, _ in manifest],
        "dtype_names": [dtype for _, dtype, _ in manifest],
        "shapes": [list(shape) for _, _, shape in manifest],
    }


@dataclass(frozen=True)
class Link:
    """Where the sender of weights listens, and the engine's (first) rank in the group.

    `host` is empty where weights travel without a process group.
    """

    host: str
    port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass(frozen=True)
class ChannelSpec:
    """How weights travel: the config's section, and what the plan resolved.

    `transport` is one of `sync.transport`'s, or `sparse_nccl`: `sparse` between GPUs. `folder` is where
    `file` writes; `sparse` writes there too where it is given, and otherwise uses the process group.
    """

    transport: str
    wire_dtype: str
    folder: str | None = None
    config: SyncConfig = field(default_factory=SyncConfig)

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
    """One push as the learner saw it: bytes and tensors for each engine, and its measurements."""

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
