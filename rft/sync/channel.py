"""The weight channel: pushes policy version v from the learner to every engine.

Two invariants: no engine samples between `begin_update` and `finish_update`, and `push` returns only
when every live engine reports the version that was sent. That the *numbers* arrived is proven by the
learner, which compares the log-probs of the next fresh samples with its own.

    channel = BroadcastChannel(learner, pool, config)
    await channel.connect()          # again after a replica was rebuilt
    report = await channel.push(7)
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rft.remote import call, within
from rft.rollout.engine import Link
from rft.rollout.pool import RolloutPool
from rft.sync.broadcast import Manifest


@dataclass(frozen=True)
class PushReport:
    """What a push took: bytes sent to each engine, and seconds during which engines stood still."""

    version: int
    bytes: int
    seconds: float


class WeightChannel(Protocol):
    """Callers never branch on the transport."""

    async def connect(self) -> None: ...

    async def push(self, version: int) -> PushReport: ...


class BroadcastChannel:
    """One broadcast from learner rank 0 to all workers of all replicas, over gloo or NCCL."""

    def __init__(
        self, learner: Any, pool: RolloutPool, in_flight: Literal["keep", "wait", "abort"], timeout_s: float
    ) -> None:
        self.learner = learner
        self.pool = pool
        self.in_flight: Literal["keep", "wait", "abort"] = in_flight
        self.timeout_s = timeout_s
        self.manifest: Manifest = []

    async def connect(self) -> None:
        """Form the group anew: learner rank 0, then each replica's workers."""
        host, port = await self._learner("reserve_address")
        world = self.pool.world_size
        links, offset = [], 1
        for spec in self.pool.specs:
            links.append(Link(host, port, offset, world, self.timeout_s))
            offset += spec.tensor_parallel
        joined = asyncio.gather(
            self.learner.open_channel.remote(Link(host, port, 0, world, self.timeout_s)),
            self.pool.join(links),
        )
        await within(self.timeout_s + 5, "forming the weight channel", joined)
        self.manifest = await self.learner.manifest.remote()

    async def push(self, version: int) -> PushReport:
        start = time.perf_counter()
        await self.pool.begin_update(self.in_flight)
        sent, _ = await within(
            self.timeout_s,
            f"pushing policy version {version}",
            asyncio.gather(self._learner("send_weights"), self.pool.receive(self.manifest)),
        )
        await self.pool.finish_update(version)
        return PushReport(version, sent, time.perf_counter() - start)

    async def _learner(self, method: str, *args: Any) -> Any:
        return await call(
            getattr(self.learner, method).remote(*args), self.timeout_s, f"{method} on the learner"
        )
