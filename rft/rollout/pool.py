"""The rollout replicas as one: least-loaded dispatch, deadlines, rebuilding the dead."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

import ray

from rft.remote import ActorDied, Overdue, call, descendants, kill
from rft.rollout.engine import EngineError, EngineSpec, Generated, Link, Request
from rft.rollout.replica import Replica
from rft.sync.broadcast import Manifest


class ReplicaDied(EngineError):
    """A replica is gone or its engine is; `index` says which."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(f"rollout replica {index} died: {why}")
        self.index = index


@dataclass
class _Member:
    actor: Any
    node: str = ""
    pid: int = 0
    load: int = 0


class RolloutPool:
    """k replicas. Calls on a replica that died raise ReplicaDied; `rebuild` replaces it."""

    def __init__(
        self,
        specs: list[EngineSpec],
        *,
        cpus: float,
        gpus: float,
        start_timeout_s: float,
        generate_timeout_s: float,
    ) -> None:
        self.specs = specs
        self.cpus, self.gpus = cpus, gpus
        self.start_timeout_s, self.generate_timeout_s = start_timeout_s, generate_timeout_s
        self.control_timeout_s = specs[0].control_timeout_s
        self.members: dict[int, _Member] = {}
        self.generation = 0  # rises with every rebuild

    @property
    def world_size(self) -> int:
        """Ranks in the weight group: the sender and every worker of every replica."""
        return 1 + sum(spec.tensor_parallel for spec in self.specs)

    async def start(self) -> None:
        """Start all replicas, side by side."""
        await asyncio.gather(*(self._start(i) for i in range(len(self.specs))))

    async def _start(self, index: int) -> None:
        remote = ray.remote(Replica).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_concurrency=1024, max_restarts=0
        )
        member = _Member(remote.remote(self.specs[index], index))
        self.members[index] = member
        member.node, member.pid = await self._ask(index, "start", seconds=self.start_timeout_s)

    async def generate(self, request: Request) -> list[Generated]:
        """Complete a prompt on the replica with the least work."""
        index = min(self.members, key=lambda i: (self.members[i].load, i))
        member = self.members[index]
        member.load += request.sampling.n
        try:
            result: list[Generated] = await self._ask(
                index, "generate", request, seconds=self.generate_timeout_s
            )
        finally:
            member.load -= request.sampling.n
        return result

    async def rebuild(self, index: int) -> None:
        """Replace a replica. The new one has the weights from disk: connect and push to it next."""
        self.kill(index)
        await self._start(index)
        self.generation += 1

    def kill(self, index: int) -> None:
        """Kill a replica's actor and whatever processes it started."""
        member = self.members.pop(index, None)
        if member is None:
            return
        here = member.node == ray.get_runtime_context().get_node_id()
        children = descendants(member.pid) if here else []  # elsewhere they follow their parent
        ray.kill(member.actor)
        for process in children:
            kill(process)

    # -- weights: the same call on every replica, all acknowledged ------------------------------------

    async def join(self, links: list[Link]) -> None:
        await asyncio.gather(*(self._ask(i, "join", link) for i, link in enumerate(links)))

    async def begin_update(self, in_flight: Literal["keep", "wait", "abort"]) -> None:
        await self._all("begin_update", in_flight)

    async def receive(self, update: dict[str, Any]) -> None:
        await self._all("receive", update)

    async def finish_update(self, version: int) -> None:
        """Raises EngineError when a replica reports another version than `version`."""
        for index, reported in enumerate(await self._all("finish_update", version)):
            if reported != version:
                raise EngineError(
                    f"rollout replica {index} reports version {reported} after a push of {version}"
                )

    async def call_workers(self, method: str, *args: Any) -> None:
        """Call a method of rft's worker extension on all replicas (vLLM only)."""
        await self._all("call_workers", method, args)

    async def close(self) -> None:
        """Stop every engine; what does not stop in time is killed with its processes."""
        for index in list(self.members):
            try:
                await self._ask(index, "close", seconds=10)
            except EngineError:
                continue  # killed next, whatever state it is in
            finally:
                self.kill(index)

    async def _all(self, method: str, *args: Any) -> list[Any]:
        return list(await asyncio.gather(*(self._ask(i, method, *args) for i in sorted(self.members))))

    async def _ask(self, index: int, method: str, *args: Any, seconds: float | None = None) -> Any:
        member = self.members.get(index)
        if member is None:
            raise ReplicaDied(index, "it is not running")
        what = f"{method} on rollout replica {index}"
        try:
            answer = getattr(member.actor, method).remote(*args)
            return await call(answer, seconds or self.control_timeout_s, what)
        except (ActorDied, Overdue) as error:  # a replica that does not answer is as good as dead
            raise ReplicaDied(index, str(error)) from error
        except Exception as error:
            if type(error).__name__ in ("EngineDeadError", "EngineGenerateError"):
                raise ReplicaDied(index, f"{what}: {error}") from error
            raise
