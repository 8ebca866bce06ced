"""A publisher and its receivers in threads of one process: the real channel ends, no Ray and no engine."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rft.config.sync import SyncConfig
from rft.sync.gloo import Receiver
from rft.sync.publisher import Publisher
from rft.sync.spec import ChannelSpec, Link, Sent, manifest_of

HOST = "127.0.0.1"
TRANSPORTS = ("gloo", "sparse", "sparse over files", "file")
NCCL = ("nccl", "sparse_nccl")  # to vLLM's own engines, with gloo in NCCL's place: see nccl_on_cpu.py


def channel(transport: str, folder: Any, dtype: str = "bfloat16", **more: Any) -> ChannelSpec:
    """The spec of one of TRANSPORTS or NCCL."""
    files = transport in ("sparse over files", "file")
    return ChannelSpec(transport.split()[0], dtype, str(folder) if files else None, SyncConfig(**more))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass
class Wire:
    """One publisher, `size` receivers. `push` returns what each receiver got."""

    spec: ChannelSpec
    size: int = 2
    timeout_s: float = 30
    version: int = 0
    receivers: list[Any] = field(default_factory=list)
    publisher: Publisher = None  # type: ignore[assignment]  # one of its own

    def __post_init__(self) -> None:
        self.publisher = self.publisher or Publisher(self.spec)
        self.update: dict[str, Any] = {}
        self.connect()

    def connect(self, size: int | None = None) -> None:
        """Form the group anew, with more receivers if asked."""
        self.size = size or self.size
        host, port, world = (HOST, free_port(), 1 + self.size) if self.spec.grouped else ("", 0, 0)
        links = [Link(host, port, rank, world, self.timeout_s) for rank in range(1 + self.size)]
        ends = [*self.receivers, *[None] * (self.size - len(self.receivers))]
        opened = together(
            lambda: self.publisher.open(links[0]),
            *(
                lambda link=link, end=end: self.join(link, end)
                for link, end in zip(links[1:], ends, strict=True)
            ),
        )
        self.receivers = opened[1:]

    def join(self, link: Link, end: Any = None) -> Any:
        """A receiving end in the group: a new one, or `end` in a new group."""
        if self.spec.transport not in NCCL:
            if end is not None:
                end.close()
            return Receiver(link)
        from tests.sync.vllm_ends import VllmEnd

        if end is None:
            return VllmEnd(self.spec, link, forty_shapes())
        end.join(link)
        return end

    def announce(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        self.version += 1
        update = self.publisher.announce(
            self.version,
            manifest_of(weights.items()),
            weights.items() if self.publisher.reads_at_announce else (),
        )
        self.update = json.loads(json.dumps(update))  # it is plain data
        return self.update

    def push(self, weights: dict[str, Tensor]) -> tuple[list[dict[str, Tensor]], Sent]:
        update = self.announce(weights)

        def take(receiver: Receiver) -> dict[str, Tensor]:
            return {name: tensor.clone() for name, tensor in receiver.receive(update)}

        sent, *received = together(
            lambda: self.publisher.send(() if self.publisher.reads_at_announce else weights.items()),
            *(lambda r=r: take(r) for r in self.receivers),
        )
        return received, sent


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Run all at once; raises the first error, once all have ended."""
    with ThreadPoolExecutor(len(actions)) as threads:
        return [future.result() for future in [threads.submit(action) for action in actions]]


def forty_shapes(seed: int = 0) -> dict[str, Tensor]:
    """Float32 tensors of 40 different shapes, 0 to 4 dimensions, single elements and odd sizes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (1,), (1, 1), (2, 3, 5, 7), (3, 1, 2)] + [(2 * i + 1, i + 2) for i in range(30)]
    shapes += [(257,), (1031,), (128, 129), (64, 200), (4, 4, 4)]
    assert len(set(shapes)) == 40
    return {f"layer.{i}.weight": torch.randn(s, generator=generator) for i, s in enumerate(shapes)}


def nudge(weights: dict[str, Tensor], seed: int, share: float = 0.05) -> None:
    """Change about `share` of the elements, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.values():
        chosen = torch.rand(tensor.shape, generator=generator) < share
        tensor[chosen] += torch.randn(tensor.shape, generator=generator)[chosen]


def same_bits(received: dict[str, Tensor], weights: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """True where names, order, shapes and every bit in wire precision are equal."""
    from rft.sync.changes import bits

    return list(received) == list(weights) and all(
        received[n].dtype == dtype
        and received[n].shape == t.shape
        and torch.equal(bits(received[n]), bits(t.to(dtype)))
        for n, t in weights.items()
    )
