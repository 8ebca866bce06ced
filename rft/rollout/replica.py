"""A rollout replica: one engine behind a Ray actor."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

from rft.errors import EngineError
from rft.remote import require_here
from rft.rollout.engine import EngineSpec, Generated, Request, RolloutEngine
from rft.sync.link import Link
from rft.utils.cores import parse_cores


def build_engine(spec: EngineSpec) -> RolloutEngine:
    """The engine that `spec.kind` names."""
    if spec.kind == "vllm" and spec.transport == "adapter":
        from rft.rollout.vllm_adapter import VLLMAdapterEngine

        return VLLMAdapterEngine(spec)
    if spec.kind == "vllm" and spec.sleeps:
        from rft.rollout.vllm_sleeping import VLLMSleepingEngine

        return VLLMSleepingEngine(spec)
    if spec.kind == "vllm":
        from rft.rollout.vllm_engine import VLLMEngine

        return VLLMEngine(spec)
    from rft.rollout.hf_engine import HFEngine

    return HFEngine(spec)


class Replica:
    """The actor's class: `ray.remote(Replica)`. All methods are async, so they run on one loop."""

    def __init__(self, spec: EngineSpec, index: int) -> None:
        self.name = f"rollout replica {index}"
        self.spec = spec
        if spec.cores:
            os.sched_setaffinity(0, parse_cores(spec.cores))
        self.engine = build_engine(spec)
        self.load = 0
        self.running: dict[str, asyncio.Future[list[Generated]]] = {}  # by request id

    async def whereabouts(self) -> tuple[str, int]:
        """This process's node and id."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def start(self) -> None:
        """Start the engine."""
        require_here(self.spec.model, "the policy that model.path names")
        try:
            await self.engine.start()
        except Exception as error:
            raise EngineError(f"{self.name} could not start its engine: {error}") from error
        gc.collect()
        gc.freeze()  # requests are many objects: spare the collector going through the libraries' as well

    async def generate(self, request: Request) -> list[Generated]:
        """Complete one prompt."""
        self.load += request.sampling.n
        self.running[request.id] = asyncio.ensure_future(self.engine.generate(request))
        try:
            return await self.running[request.id]
        except asyncio.CancelledError:
            return []  # nobody reads it: see `cancel`
        finally:
            del self.running[request.id]
            self.load -= request.sampling.n

    async def score(self, tokens: tuple[int, ...]) -> list[float]:
        """The log-probs of `tokens[1:]` under the weights that the engine holds."""
        return await self.engine.score(tokens)

    async def cancel(self, request_id: str) -> None:
        """End a request that nobody waits for; one that is not running has ended already."""
        if request_id in self.running:
            self.running[request_id].cancel()

    async def health(self, engine: bool) -> int:
        """Answer, after the engine did if it is asked too; returns the completions that it works on."""
        if engine:
            await self.engine.version()
        return self.load

    async def join(self, link: Link) -> None:
        await self.engine.join(link)

    async def begin_update(self, in_flight: Any) -> None:
        await self.engine.begin_update(in_flight)

    async def receive(self, update: dict[str, Any]) -> None:
        await self.engine.receive(update)

    async def finish_update(self, version: int) -> int:
        """Take the new weights into use; returns the version that the engine reports. It is asked while it
        stands still: once it samples, an answer takes as long as a step of its own."""
        await self.engine.finish_update(version)
        reported = await self.engine.version()
        await self.engine.resume()
        return reported

    async def version(self) -> int:
        return await self.engine.version()

    async def sleep(self) -> None:
        """Leave the device to the learner; for engines whose spec says that they sleep, as `wake`."""
        await self.engine.sleep()  # type: ignore[attr-defined]

    async def wake(self) -> None:
        """Take the device back."""
        await self.engine.wake()  # type: ignore[attr-defined]

    async def call_workers(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """Call a method of rft's extension on the engine's workers (vLLM only)."""
        from rft.rollout.vllm_engine import VLLMEngine

        if not isinstance(self.engine, VLLMEngine):
            raise EngineError(f"{self.name} runs no vLLM; it has no workers to call")
        return await self.engine.collective_rpc(method, args)

    async def close(self) -> None:
        await self.engine.close()
