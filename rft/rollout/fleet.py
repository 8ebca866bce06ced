"""Fault-tolerant view of the replicas for the loop: retried requests, pushes with recovery, health checks.

`gate`: one task at a time may use the learner and the weight channel, for a training step, a push, or
rebuilding lost replicas. So a rebuilt engine never gets weights of a half-finished step, and two
recoveries never interfere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rft.config.rollout import RolloutConfig
from rft.errors import EngineError, ReplicasLost
from rft.metrics import Progress, RunLog
from rft.rollout.engine import Aborted, Generated, Request
from rft.rollout.pool import ReplicaDied, RolloutPool
from rft.sync.channel import PushReport, WeightChannel
from rft.sync.proof import Proof

HEALTH_LOGGED_EVERY = 60.0  # minimum seconds between two health events of a replica in events.jsonl


@dataclass
class Fleet:
    """The replicas of a run. `version`: target policy version; `held`: newest version acknowledged by all
    replicas."""

    pool: RolloutPool
    channel: WeightChannel
    config: RolloutConfig
    log: RunLog
    progress: Progress
    version: int = 0
    held: int = 0
    restarts: int = 0
    requeued: int = 0
    proof: Proof | None = None  # of the version at the start of the last step
    gate: asyncio.Lock = field(default_factory=asyncio.Lock)
    _failure: BaseException | None = None  # of a recovery that possibly no task awaited
    _recovering: set[asyncio.Task[None]] = field(default_factory=set)
    _in_a_row: int = 0  # rebuilds since the last finished step
    _first: tuple[str, EngineError] | None = None  # first fault since then
    _changing: bool = False  # a weight update is in progress
    _logged: dict[int, float] = field(default_factory=dict)

    async def open(self, version: int) -> None:
        """Connect and push `version`. The push is never skipped: an engine loads from disk, and the learner
        may have been restored from a checkpoint."""
        async with self.gate:
            self.version = version
            begin = time.perf_counter()
            try:
                await self.channel.connect()
            except EngineError as error:
                await self._recover(self._lost(error), "the weight channel did not form", error)
            else:
                await self.push(version)
            self.held = version
            for index, member in sorted(self.pool.members.items()):
                seconds = time.perf_counter() - begin
                self.log.event(
                    "engine/started", engine=index, version=version, node=member.node, seconds=seconds
                )

    async def generate(self, request: Request) -> list[Generated]:
        """Complete a request; retry it on another replica if one dies, or after a push aborted it."""
        attempt = 0
        while True:
            name = request.id if attempt == 0 else f"{request.id}-again-{attempt}"
            try:
                return await self.pool.generate(replace(request, id=name))
            except ReplicaDied as error:
                reason = error.why
                await self._replace(error)
            except Aborted:
                reason = "aborted by a push"
            attempt += 1
            self.requeued += 1
            self.log.event("group/requeued", request=request.id, reason=reason)

    async def push(self, version: int) -> PushReport:
        """Push a version to every engine. Call with the gate held. After a partially failed push, the lost
        replicas are rebuilt, then the push is repeated to all."""
        self.version = version
        self._changing = True
        try:
            report = await self.channel.push(version)
        except EngineError as error:  # other errors come from the learner, or are bugs
            report = await self._recover(self._lost(error), f"pushing version {version} failed", error)
        finally:
            self._changing = False
        self.held = version
        self.log.event("version/pushed", version=report.version, seconds=report.seconds, bytes=report.bytes)
        return report

    async def prove(self) -> None:
        """Wait for the proof of the last push, if one is due. Call with the gate held. Raises LogpGapError if
        a replica computes with weights that differ from the learner's."""
        while True:
            try:
                self.proof = await self.channel.proved()
                break
            except ReplicaDied as died:  # the rebuilt replica is proven instead
                self.pool.discard(died)
                await self._recover([died.index], "an engine was lost", died)
        if self.proof is not None:
            gaps = {str(index): gap.largest for index, gap in sorted(self.proof.gaps.items())}
            self.log.event("version/proved", version=self.proof.version, tokens=self.proof.tokens, gaps=gaps)

    async def before_step(self) -> None:
        """Wait for the proof of the last push, and free the learner's device. Call with the gate held."""
        await self.prove()
        try:
            await self.channel.before_step()
        except EngineError as error:
            await self._recover(self.pool.indices, "the engines did not make room for the learner", error)
            await self.channel.before_step()

    def progressed(self) -> None:
        """Reset the count of consecutive rebuilds: a step was finished."""
        self._in_a_row, self._first = 0, None

    async def close(self) -> None:
        """Cancel all recoveries."""
        recovering = list(self._recovering)
        for task in recovering:
            task.cancel()
        await asyncio.gather(*recovering, return_exceptions=True)

    # -- recovery ------------------------------------------------------------------------------------

    def _lost(self, error: EngineError) -> Iterable[int]:
        """Return the replicas that an error names as lost, or all of them if it names none."""
        return error.lost if isinstance(error, ReplicasLost) else self.pool.indices

    async def _replace(self, died: ReplicaDied) -> None:
        """Rebuild a dead replica once, however many of its requests failed. The rebuild continues if the
        request that noticed is cancelled: others need the replica too."""

        async def rebuild() -> None:
            self.pool.discard(died)
            async with self.gate:
                if self.pool.is_lost(died):
                    await self._recover([died.index], "an engine was lost", died)

        def done(task: asyncio.Task[None]) -> None:
            self._recovering.discard(task)
            if not task.cancelled() and task.exception() is not None:
                self._failure = task.exception()

        task = asyncio.create_task(rebuild())
        self._recovering.add(task)
        task.add_done_callback(done)
        await asyncio.shield(task)

    async def _recover(self, lost: Iterable[int], what: str, error: EngineError) -> PushReport:
        """Rebuild only the lost replicas, and push the current version to all. `what` failed with `error`.
        Raises EngineError, caused by the first such error, after more than `max_restarts` rebuilds without a
        finished step."""
        limit = self.config.max_restarts
        while True:
            why = f"{what}: {error}"
            self._first = self._first or (why, error)
            indices = sorted({*lost, *(i for i in self.pool.indices if i not in self.pool.members)})
            self._in_a_row += 1
            if self._in_a_row > limit:
                first, cause = self._first
                last = "" if first == why else f"; the last one: {why}"
                raise EngineError(
                    f"rollout: {first}. That was the first fault{last}. Engines were rebuilt {limit} times "
                    "since the last finished step (rollout.max_restarts): giving up"
                ) from cause
            names = "replica " + ", ".join(map(str, indices))
            self.progress.note(f"{why}; rebuilding {names} ({self._in_a_row} of {limit} in a row)")
            for index in indices:
                self.log.event("engine/lost", engine=index, reason=why, held=self.pool.load(index))
            begin = time.perf_counter()
            self._changing = True
            try:
                await self.channel.before_start()
                await self.pool.rebuild_all(indices)
                await self.channel.connect()
                report = await self.channel.push(self.version)
            except EngineError as again:
                lost, what, error = self._lost(again), "rebuilding failed", again
                continue
            finally:
                self._changing = False
            self.restarts += len(indices)
            for index in indices:
                seconds = time.perf_counter() - begin
                self.log.event("engine/rebuilt", engine=index, version=self.version, seconds=seconds)
            return report

    # -- health ------------------------------------------------------------------------------------

    async def watch_health(self) -> None:
        """Check every replica's health until cancelled; kill and rebuild those that do not answer. Raises the
        error of a failed recovery."""
        while True:
            await asyncio.sleep(self.config.health_every_s)
            if self._failure is not None:
                raise self._failure
            await asyncio.gather(*(self._check_health(i) for i in sorted(self.pool.members)))

    async def _check_health(self, index: int) -> None:
        changing = self._changing  # an engine may not answer while its weights change, but its actor does
        member = self.pool.members.get(index)
        if member is None or (changing and not member.serving):
            return  # it is being built, which has its own deadline
        try:
            load = await self.pool.health(index, self.config.health_timeout_s, engine=not changing)
        except ReplicaDied as died:
            await self._replace(died)
            return
        now = time.monotonic()
        if now - self._logged.get(index, -HEALTH_LOGGED_EVERY) >= HEALTH_LOGGED_EVERY:
            self._logged[index] = now
            self.log.event("engine/health", engine=index, version=self.version, inflight=load)

    def metrics(self) -> dict[str, float]:
        """Return `engine/...`: replicas alive, their versions, and the seconds since their last answers."""
        now, members = time.monotonic(), sorted(self.pool.members.items())
        metrics = {
            "engine/alive": float(sum(m.serving for _, m in members)),
            "engine/restarts": float(self.restarts),
            "rollout/requeued": float(self.requeued),
            **({} if self.proof is None else self.proof.metrics),
        }
        for index, member in members:
            metrics[f"engine/{index}/version"] = float(member.version)
            metrics[f"engine/{index}/silence"] = now - member.last_answer
        return metrics
