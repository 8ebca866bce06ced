"""The engines as the loop sees them: requests that outlive an engine, pushes that come through, health.

One task at a time may have to do with the learner and the weight channel (`gate`): a training step, a
push, or the mending of lost replicas. So a rebuilt engine is never given weights of a version that is
only half trained, and two recoveries never get into each other's way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rft.config.rollout import RolloutConfig
from rft.errors import EngineError
from rft.metrics import Progress, RunLog
from rft.rollout.engine import Aborted, Generated, Request
from rft.rollout.pool import ReplicaDied, ReplicasLost, RolloutPool
from rft.sync.channel import PushReport, WeightChannel
from rft.sync.proof import Proof

HEALTH_TOLD_EVERY = 60.0  # seconds between two signs of life in events.jsonl


@dataclass
class Fleet:
    """The replicas of a run. `version` is the one that they hold, or are about to; `held` is the newest that
    all of them hold."""

    pool: RolloutPool
    channel: WeightChannel
    config: RolloutConfig
    log: RunLog
    progress: Progress
    version: int = 0
    held: int = 0
    restarts: int = 0
    requeued: int = 0
    proof: Proof | None = None  # of the version that the last step began with
    gate: asyncio.Lock = field(default_factory=asyncio.Lock)
    _failure: BaseException | None = None  # of a recovery that nobody may have waited for
    _recovering: set[asyncio.Task[None]] = field(default_factory=set)
    _in_a_row: int = 0
    _first: tuple[str, EngineError] | None = None  # of the faults since the last finished step
    _changing: bool = False
    _told: dict[int, float] = field(default_factory=dict)

    async def open(self, version: int) -> None:
        """Connect and push `version`: always, since an engine loads from disk and the learner may have
        been restored."""
        async with self.gate:
            self.version = version
            begin = time.perf_counter()
            try:
                await self.channel.connect()
            except EngineError as error:
                await self._mend(self._lost(error), "the weight channel did not form", error)
            else:
                await self.push(version)
            self.held = version
            for index, member in sorted(self.pool.members.items()):
                found = {"version": version, "node": member.node, "seconds": _since(begin)}
                self.log.event("engine/started", engine=index, **found)

    async def generate(self, request: Request) -> list[Generated]:
        """Complete a request: on another replica where one dies, again where a push cut it off."""
        attempt = 0
        while True:
            name = request.id if attempt == 0 else f"{request.id}-again-{attempt}"
            try:
                return await self.pool.generate(replace(request, id=name))
            except ReplicaDied as error:
                reason = error.why
                await self._recover(error)
            except Aborted:
                reason = "aborted by a push"
            attempt += 1
            self.requeued += 1
            self.log.event("group/requeued", request=request.id, reason=reason)

    async def push(self, version: int) -> PushReport:
        """Push a version to every engine. Call it with the gate held. After a push that failed half-way
        the replicas that it has lost are rebuilt, then all are pushed to again."""
        self.version = version
        self._changing = True
        try:
            report = await self.channel.push(version)
        except EngineError as error:  # all else is the learner's trouble, or a mistake
            report = await self._mend(self._lost(error), f"pushing version {version} failed", error)
        finally:
            self._changing = False
        self.held = version
        self.log.event("version/pushed", version=report.version, seconds=report.seconds, bytes=report.bytes)
        return report

    async def prove(self) -> None:
        """Wait for the proof of the last push, where one is due. Call it with the gate held.

        Raises LogpGapError where a replica computes with other weights than the learner.
        """
        while True:
            try:
                self.proof = await self.channel.proved()
                break
            except ReplicaDied as died:  # its successor is proven instead
                self.pool.discard(died)
                await self._mend([died.index], "an engine was lost", died)
        if self.proof is not None:
            gaps = {str(index): gap.largest for index, gap in sorted(self.proof.gaps.items())}
            self.log.event("version/proved", version=self.proof.version, tokens=self.proof.tokens, gaps=gaps)

    async def before_step(self) -> None:
        """Have the last push proven, and the learner's device free for it. Call it with the gate held."""
        await self.prove()
        try:
            await self.channel.before_step()
        except EngineError as error:
            await self._mend(self._everyone(), "the engines did not make room for the learner", error)
            await self.channel.before_step()

    def progressed(self) -> None:
        """A step was finished: the engines work, and the count of rebuilds in a row starts anew."""
        self._in_a_row, self._first = 0, None

    async def close(self) -> None:
        """Mend nothing any more."""
        recovering = list(self._recovering)
        for task in recovering:
            task.cancel()
        await asyncio.gather(*recovering, return_exceptions=True)

    def _lost(self, error: EngineError) -> list[int]:
        """The replicas that an error says are lost; all of them where it cannot say."""
        return sorted(error.lost) if isinstance(error, ReplicasLost) else self._everyone()

    def _everyone(self) -> list[int]:
        return list(range(len(self.pool.specs)))

    async def _recover(self, died: ReplicaDied) -> None:
        """Rebuild a replica that died, once, however many requests it took with it. That goes on where the
        request that noticed is cancelled meanwhile: the others need the replica too."""
        task = asyncio.create_task(self._replace(died))
        self._recovering.add(task)
        task.add_done_callback(self._recovered)
        await asyncio.shield(task)

    def _recovered(self, task: asyncio.Task[None]) -> None:
        self._recovering.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()

    async def _replace(self, died: ReplicaDied) -> None:
        self.pool.discard(died)
        async with self.gate:
            if self.pool.is_lost(died):
                await self._mend([died.index], "an engine was lost", died)

    async def _mend(self, lost: Iterable[int], what: str, error: EngineError) -> PushReport:
        """Rebuild replicas and give all of them the current version. `what` happened, and the error that said
        so. Raises EngineError, from the first of these errors, once that was needed more than
        `max_restarts` times without a finished step."""
        limit = self.config.max_restarts
        while True:
            why = f"{what}: {error}"
            self._first = self._first or (why, error)
            lost = sorted({*lost, *(i for i in self._everyone() if i not in self.pool.members)})
            self._in_a_row += 1
            if self._in_a_row > limit:
                first, cause = self._first
                last = "" if first == why else f"; the last one: {why}"
                raise EngineError(
                    f"rollout: {first}. That was the first fault{last}. Engines were rebuilt {limit} times "
                    "since the last finished step (rollout.max_restarts): giving up"
                ) from cause
            names = "replica " + ", ".join(map(str, lost))
            self.progress.note(f"{why}; building {names} anew ({self._in_a_row} of {limit} in a row)")
            for index in lost:
                self.log.event("engine/lost", engine=index, reason=why, held=self.pool.load(index))
            begin = time.perf_counter()
            try:
                return await self._rebuild(lost, begin)
            except EngineError as again:
                lost, what, error = self._lost(again), "rebuilding failed", again

    async def _rebuild(self, lost: list[int], begin: float) -> PushReport:
        self._changing = True
        try:
            await self.channel.before_start()
            await self.pool.rebuild_all(lost)
            await self.channel.connect()
            report = await self.channel.push(self.version)
        finally:
            self._changing = False
        self.restarts += len(lost)
        for index in lost:
            self.log.event("engine/rebuilt", engine=index, version=self.version, seconds=_since(begin))
        return report

    # -- health ------------------------------------------------------------------------------------

    async def watch_health(self) -> None:
        """Ask every replica for a sign of life, for ever; what does not answer is killed and rebuilt. Raises
        what a recovery failed with."""
        while True:
            await asyncio.sleep(self.config.health_every_s)
            if self._failure is not None:
                raise self._failure
            await asyncio.gather(*(self._ask_health(i) for i in sorted(self.pool.members)))

    async def _ask_health(self, index: int) -> None:
        changing = self._changing  # an engine may be deaf while it takes weights in; its actor is not
        member = self.pool.members.get(index)
        if member is None or (changing and not member.serving):
            return  # it is being built, with a deadline of its own
        try:
            load = await self.pool.health(index, self.config.health_timeout_s, engine=not changing)
        except ReplicaDied as died:
            await self._recover(died)
            return
        now = time.monotonic()
        if now - self._told.get(index, -HEALTH_TOLD_EVERY) >= HEALTH_TOLD_EVERY:
            self._told[index] = now
            self.log.event("engine/health", engine=index, version=self.version, inflight=load)

    def metrics(self) -> dict[str, float]:
        """`engine/...`: who is alive, with which version, silent for how long."""
        now, members = time.monotonic(), sorted(self.pool.members.items())
        found = {
            "engine/alive": float(sum(m.serving for _, m in members)),
            "engine/restarts": float(self.restarts),
            "rollout/requeued": float(self.requeued),
            **({} if self.proof is None else self.proof.metrics),
        }
        for index, member in members:
            found[f"engine/{index}/version"] = float(member.version)
            found[f"engine/{index}/silence"] = now - member.last_sign
        return found


def _since(begin: float) -> float:
    return time.perf_counter() - begin
