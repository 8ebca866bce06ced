"""A replica for a real actor whose engine is slow and needs no model. In a module of the package `tests`, so
that the actor's process finds it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from rft.rollout.engine import Generated, Request
from rft.rollout.pool import Replica

DONE = Generated((1,), (-1.0,), "stop", ((0, 0, 1),))


class SlowEngine:
    """As an engine: `slots` requests at once, a fifth of a second each."""

    def __init__(self, slots: int) -> None:
        self.slots = asyncio.Semaphore(slots)

    async def start(self) -> None: ...

    async def generate(self, request: Request) -> list[Generated]:
        async with self.slots:
            await asyncio.sleep(0.2)
            return [DONE] * request.sampling.n

    async def version(self) -> int:
        return 0

    async def close(self) -> None: ...


class SlowReplica(Replica):
    def __init__(self, spec: Any, index: int) -> None:
        super().__init__(replace(spec, model="no path"), index)
        self.engine = SlowEngine(spec.config.max_num_seqs)  # type: ignore[assignment]
