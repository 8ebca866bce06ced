"""A rollout replica: one engine behind a Ray actor."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from rft.errors import EngineError, TransferError, is_engine_fault
from rft.rollout.engine import EngineSpec, Generated, Request, RolloutEngine
from rft.sync.link import Link
from rft.utils.actors import require_here
from rft.utils.cores import parse_cores

CONTROL = "control"


def build_engine(spec: EngineSpec) -> RolloutEngine:
    """The engine that `spec.kind` names."""
    if spec.kind == "vllm" and spec.transport == "adapter":
        from rft.rollout.vllm_adapter import VLLMAdapterEngine

        return VLLMAdapterEngine(spec)
    if spec.kind == "vllm" and spec.sleeps:
        from rft.rollout.vllm_sleeping import VLLMSleepingEngine

        return VLLMSleepingEngine(spec)
    if spec.kind == "vllm":
        from rft.rollout.vllm import VLLMEngine

        return VLLMEngine(spec)
    from rft.rollout.hf import HFEngine

    return HFEngine(spec)


control = ray.method(concurrency_group=CONTROL)


class Replica:
    """The actor's class: `ray.remote(Replica)`. Ray runs the calls of a concurrency group in order of
    arrival, so many at a time, on a loop of the group. Control calls have a group, so that none waits behind
    queued completions, and the engine lives on that group's loop: `generate` passes requests on to it."""

    def __init__(self, spec: EngineSpec, index: int) -> None:
        self.name = f"rollout replica {index}"
        self.spec = spec
        if spec.cores:
            os.sched_setaffinity(0, parse_cores(spec.cores))
        self.engine = build_engine(spec)
        self.load = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.running: dict[str, asyncio.Future[list[Generated]]] = {}  # by request id

    @control
    async def whereabouts(self) -> tuple[str, int]:
        """This process's node and id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    @control
    async def start(self) -> None:
        """Start the engine."""
        self.loop = asyncio.get_running_loop()
        require_here(self.spec.model, "the policy that model.path names")
        try:
            await self.engine.start()
        except Exception as error:
            raise EngineError(f"{self.name} could not start its engine: {error}") from error
        gc.collect()
        gc.freeze()  # requests are many objects: spare the collector going through the libraries' as well

    async def generate(self, request: Request) -> list[Generated]:
        """Complete one prompt."""
        assert self.loop is not None, "start comes first"
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._generate(request), self.loop))

    async def _generate(self, request: Request) -> list[Generated]:
        self.load += request.sampling.n
        self.running[request.id] = asyncio.ensure_future(self.engine.generate(request))
        try:
            return await self.running[request.id]
        except asyncio.CancelledError:
            return []  # nobody reads it: see `cancel`
        finally:
            del self.running[request.id]
            self.load -= request.sampling.n

    @control
    async def score(self, tokens: tuple[int, ...]) -> list[float]:
        """The log-probs of `tokens[1:]` under the weights that the engine holds."""
        return await self.engine.score(tokens)

    @control
    async def cancel(self, request_id: str) -> None:
        """End a request that nobody waits for; one that is not running has ended already."""
        if request_id in self.running:
            self.running[request_id].cancel()

    @control
    async def health(self, engine: bool) -> int:
        """Answer, after the engine did if it is asked too; returns the completions that it works on."""
        if engine:
            await self.engine.version()
        return self.load

    @control
    async def join(self, link: Link) -> None:
        with self._engine_to_blame("joining the weight channel"):
            await self.engine.join(link)

    @control
    async def begin_update(self, in_flight: Any) -> None:
        with self._engine_to_blame("pausing for a push"):
            await self.engine.begin_update(in_flight)

    @control
    async def receive(self, update: dict[str, Any]) -> None:
        with self._engine_to_blame("receiving weights"):
            await self.engine.receive(update)

    @contextmanager
    def _engine_to_blame(self, what: str) -> Iterator[None]:
        """Raise EngineError for what is the engine's or its machine's fault, and a mistake as it is."""
        try:
            yield
        except TransferError as error:
            raise EngineError(f"{self.name}, {what}: {error}") from error
        except Exception as error:
            if not is_engine_fault(error):
                raise
            raise EngineError(f"{self.name}, {what}: {type(error).__name__}: {error}") from error

    @control
    async def finish_update(self, version: int) -> int:
        """Take the new weights into use; returns the version that the engine reports. It is asked while it
        stands still: once it samples, an answer takes as long as a step of its own."""
        with self._engine_to_blame("taking new weights into use"):
            await self.engine.finish_update(version)
            reported = await self.engine.version()
            await self.engine.resume()
        return reported

    @control
    async def version(self) -> int:
        return await self.engine.version()

    @control
    async def sleep(self) -> None:
        """Leave the device to the learner; for engines whose spec says that they sleep, as `wake`."""
        await self.engine.sleep()  # type: ignore[attr-defined]

    @control
    async def wake(self) -> None:
        """Take the device back."""
        await self.engine.wake()  # type: ignore[attr-defined]

    @control
    async def call_workers(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """Call a method of rft's extension on the engine's workers (vLLM only)."""
        from rft.rollout.vllm import VLLMEngine

        if not isinstance(self.engine, VLLMEngine):
            raise EngineError(f"{self.name} runs no vLLM; it has no workers to call")
        return await self.engine.collective_rpc(method, args)

    @control
    async def close(self) -> None:
        await self.engine.close()
