"""The rollout replicas as one: least-loaded dispatch, deadlines, rebuilding the dead."""

from __future__ import annotations

import asyncio
import heapq
import time
from dataclasses import dataclass
from itertools import count
from typing import Any

import ray

from rft.errors import EngineError
from rft.remote import ActorDied, Overdue, call, kill_actor
from rft.rollout.engine import EngineSpec, Generated, InFlight, Request
from rft.rollout.replica import Replica
from rft.sync.link import Link


class ReplicaDied(EngineError):
    """A replica is gone or its engine is. `index` says which; `serial` which of those that had this
    index (-1: none is there)."""

    def __init__(self, index: int, why: str, serial: int = -1) -> None:
        super().__init__(f"rollout replica {index} died: {why}")
        self.index, self.why, self.serial = index, why, serial


@dataclass
class _Member:
    actor: Any
    serial: int
    node: str = ""
    pid: int = 0
    load: int = 0
    serving: bool = False  # it may sample: it holds weights that the run knows
    version: int = -1
    last_sign: float = 0.0  # monotonic


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
        self._serials = count()
        self._serving = asyncio.Event()  # some replica may sample
        # A heap of (load, index, serial), so that the least loaded of thousands is found at once. What an
        # entry says may have changed since: then a newer entry says so too, and this one is skipped.
        self._queue: list[tuple[int, int, int]] = []

    @property
    def world_size(self) -> int:
        """Ranks in the weight group: the sender and every worker of every replica."""
        return 1 + sum(spec.tensor_parallel for spec in self.specs)

    async def start(self) -> None:
        """Start all replicas, side by side."""
        await asyncio.gather(*(self._start(i) for i in range(len(self.specs))))
        self._serve()

    async def _start(self, index: int) -> None:
        remote = ray.remote(Replica).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_concurrency=1024,
            max_restarts=0,
            scheduling_strategy="SPREAD",  # over the nodes of a cluster
            memory=2**20,  # Ray places an actor that asks for nothing at random, whatever the strategy
        )
        member = _Member(remote.remote(self.specs[index], index), next(self._serials))
        self.members[index] = member
        member.node, member.pid = await self._ask(index, "whereabouts", seconds=self.start_timeout_s)
        await self._ask(index, "start", seconds=self.start_timeout_s)

    def _serve(self) -> None:
        """All members may sample now."""
        for member in self.members.values():
            member.serving = True
        self._line_up()
        self._serving.set()

    def _line_up(self) -> None:
        self._queue = [(m.load, index, m.serial) for index, m in self.members.items()]
        heapq.heapify(self._queue)

    def _add_load(self, index: int, member: _Member, change: int) -> None:
        member.load += change
        heapq.heappush(self._queue, (member.load, index, member.serial))
        if len(self._queue) > 8 * len(self.members) + 64:  # mostly entries that say nothing any more
            self._line_up()

    async def generate(self, request: Request) -> list[Generated]:
        """Complete a prompt on the replica with the least work; waits while none serves."""
        index, member = await self._least_loaded()
        self._add_load(index, member, request.sampling.n)
        try:
            result: list[Generated] = await self._ask(
                index, "generate", request, seconds=self.generate_timeout_s
            )
        except asyncio.CancelledError:
            member.actor.cancel.remote(request.id)  # nobody waits for it any more
            raise
        finally:
            self._add_load(index, member, -request.sampling.n)
        return result

    async def _least_loaded(self) -> tuple[int, _Member]:
        while True:
            while self._queue:
                load, index, serial = self._queue[0]
                member = self.members.get(index)
                if member is not None and member.serving and (member.load, member.serial) == (load, serial):
                    return index, member
                heapq.heappop(self._queue)
            self._serving.clear()
            await self._serving.wait()

    async def score(self, tokens: tuple[int, ...]) -> dict[int, list[float]]:
        """The log-probs of `tokens[1:]`, each after those before it, by every replica with the weights that
        it holds."""
        indices = sorted(self.members)
        found = await self._all("score", tokens, seconds=self.generate_timeout_s)
        return dict(zip(indices, found, strict=True))

    def is_lost(self, died: ReplicaDied) -> bool:
        """False where the replica that died was replaced in the meantime."""
        return died.index not in self.members or self.members[died.index].serial == died.serial

    def discard(self, died: ReplicaDied) -> None:
        """Kill what is left of a replica that died, so that nothing waits for it any longer."""
        member = self.members.get(died.index)
        if member is not None and member.serial == died.serial:
            self.kill(died.index)

    def load(self, index: int) -> int:
        """Completions that a replica works on, by the pool's books; 0 where there is none."""
        return self.members[index].load if index in self.members else 0

    async def rebuild(self, index: int) -> None:
        """Replace a replica. The new one has the weights from disk and serves once it was pushed to."""
        self.kill(index)
        await self._start(index)

    def kill(self, index: int) -> None:
        """Kill a replica's actor and whatever processes it started, frozen ones too."""
        member = self.members.pop(index, None)
        if member is not None:
            kill_actor(member.actor, member.node, member.pid)

    async def health(self, index: int, timeout_s: float, *, engine: bool = True) -> int:
        """Have a replica answer, with its `engine` or for itself; returns the completions that it works on.
        Raises ReplicaDied."""
        load: int = await self._ask(index, "health", engine, seconds=timeout_s)
        return load

    # -- weights: the same call on every replica, all acknowledged ------------------------------------

    async def join(self, links: list[Link]) -> None:
        await asyncio.gather(*(self._ask(i, "join", link) for i, link in enumerate(links)))

    async def begin_update(self, in_flight: InFlight) -> None:
        drains = in_flight == "wait"  # completions in flight may take as long as any
        await self._all("begin_update", in_flight, seconds=self.generate_timeout_s if drains else None)

    async def receive(self, update: dict[str, Any]) -> None:
        await self._all("receive", update)

    async def finish_update(self, version: int) -> None:
        """Raises EngineError when a replica reports another version than `version`."""
        indices = sorted(self.members)
        for index, reported in zip(indices, await self._all("finish_update", version), strict=True):
            if reported != version:
                raise EngineError(
                    f"rollout replica {index} reports version {reported} after a push of {version}"
                )
            self.members[index].version = version
        self._serve()

    async def sleep(self) -> None:
        """Have engines leave the device that they share with the learner."""
        await self._all("sleep")

    async def wake(self) -> None:
        """Have them take it back."""
        await self._all("wake")

    async def call_workers(self, method: str, *args: Any) -> None:
        """Call a method of rft's worker extension on all replicas (vLLM only)."""
        await self._all("call_workers", method, args)

    async def close(self) -> None:
        """Stop every engine; what does not stop in time is killed with its processes, and what has not
        started yet at once."""
        for index, member in list(self.members.items()):
            if not member.serving:
                self.kill(index)
                continue
            try:
                await self._ask(index, "close", seconds=10)
            except EngineError:
                self.kill(index)
            else:
                ray.kill(self.members.pop(index).actor)

    async def _all(self, method: str, *args: Any, seconds: float | None = None) -> list[Any]:
        calls = (self._ask(i, method, *args, seconds=seconds) for i in sorted(self.members))
        return list(await asyncio.gather(*calls))

    async def _ask(self, index: int, method: str, *args: Any, seconds: float | None = None) -> Any:
        member = self.members.get(index)
        if member is None:
            raise ReplicaDied(index, "it is not running")
        what = f"{method} on rollout replica {index}"
        try:
            answer = getattr(member.actor, method).remote(*args)
            result = await call(answer, seconds or self.control_timeout_s, what)
        except (ActorDied, Overdue) as error:  # a replica that does not answer is as good as dead
            raise ReplicaDied(index, str(error), member.serial) from error
        except Exception as error:
            if type(error).__name__ in ("EngineDeadError", "EngineGenerateError"):
                raise ReplicaDied(index, f"{what}: {error}", member.serial) from error
            raise
        member.last_sign = time.monotonic()
        return result
