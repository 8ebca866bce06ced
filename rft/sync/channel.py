"""The weight channel: pushes policy version v from the learner to every engine.

Two invariants: no engine samples between `begin_update` and `finish_update`, and `push` returns only
when every live engine reports the version that was sent. That the *numbers* arrived is proven while engines
sample again: every engine and the learner score the same fixed tokens with that version, and `proved`
compares them before the learner moves on.

    channel = PushChannel(learner, pool, spec, "keep")
    await channel.connect()          # again after a replica was rebuilt
    report = await channel.push(7)
    proof = await channel.proved()   # before the learner's next update

One class serves all transports: they differ in the learner's sender (`sender.py`) and the engines'
receiver (`receiver.py`, `vllm_worker.py`), which understand each other's announcements.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from rft.config.rollout import InFlight
from rft.errors import EngineError, TransferError
from rft.rollout.pool import GRACE_S, ReplicasLost, RolloutPool
from rft.sync import files
from rft.sync.link import Link
from rft.sync.proof import Gap, Proof, ProofSpec
from rft.sync.spec import ChannelSpec, WeightSource
from rft.utils.deadlines import Overdue

R = TypeVar("R")


@dataclass(frozen=True)
class PushReport:
    """What a push took: bytes sent to each engine; seconds in all, and of them those before the engines
    stood still; what the learner measured on the way."""

    version: int
    bytes: int
    seconds: float
    announce_seconds: float = 0.0
    tensors: int = 0
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "sync/version": float(self.version),
            "sync/bytes": float(self.bytes),
            "sync/tensors": float(self.tensors),
            "time/sync": self.seconds,
            "time/sync_announce": self.announce_seconds,
            **self.measured,
        }


class WeightChannel(Protocol):
    """Callers never branch on the transport. Where learner and engines share a device, they take turns: the
    learner computes only after `before_step`, and an engine starts only after `before_start`."""

    async def before_start(self) -> None: ...

    async def before_step(self) -> None: ...

    async def connect(self) -> None: ...

    async def push(self, version: int) -> PushReport: ...

    async def proved(self) -> Proof | None: ...

    async def close(self) -> None: ...


class PushChannel:
    """From learner rank 0 to all workers of all replicas."""

    def __init__(
        self,
        learner: WeightSource,
        pool: RolloutPool,
        spec: ChannelSpec,
        in_flight: InFlight,
        proof: ProofSpec | None = None,
    ) -> None:
        self.learner = learner
        self.pool = pool
        self.spec = spec
        self.in_flight: InFlight = in_flight
        self.timeout_s = spec.timeout_s
        self.proof = proof
        self._unproven = True  # nothing was proven since the engines joined
        self._proving: asyncio.Task[Proof] | None = None

    async def before_start(self) -> None:
        """Learner and engines have devices of their own."""

    async def before_step(self) -> None:
        """As `before_start`."""

    async def connect(self) -> None:
        """Form the group anew: learner rank 0, then each replica's workers. The next push is full, and
        proven."""
        self._drop_proof()
        self._unproven = True
        host, port = await self.learner.reserve_address() if self.spec.grouped else ("", 0)
        world = self.pool.world_size
        links, offset = [], 1
        for spec in self.pool.specs:
            links.append(Link(host, port, offset, world, self.timeout_s))
            offset += spec.tensor_parallel
        opened = self.learner.open_channel(Link(host, port, 0, world, self.timeout_s))
        await self._both("forming the weight channel", opened, self.pool.join(links), self.timeout_s + 5)

    async def push(self, version: int) -> PushReport:
        """Raises ReplicasLost where some replicas failed: the others hold the version, or stand still until
        the next push, before which the channel has to be formed anew. Raises another EngineError where nobody
        can say which, ActorDied when the learner is gone."""
        start = time.perf_counter()
        self._drop_proof()
        update = await self.learner.announce(version)
        announced = time.perf_counter() - start
        await self.pool.begin_update(self.in_flight)
        what = f"pushing policy version {version} over {self.spec.transport}"
        sending = self.learner.send_weights()
        try:
            sent = await self._both(what, sending, self.pool.receive(update), self.timeout_s)
        except ReplicasLost as error:
            await self._finish_others(version, error)
            raise
        await self.pool.finish_update(version)
        self._begin_proof(version)
        return PushReport(
            version, sent.bytes, time.perf_counter() - start, announced, sent.tensors, sent.metrics
        )

    async def _finish_others(self, version: int, failed: ReplicasLost) -> None:
        """Let the replicas go on that have all of a push in which others failed."""
        try:
            await self.pool.finish_update(version)
        except ReplicasLost as more:
            raise ReplicasLost({**failed.lost, **more.lost}) from failed

    async def _both(self, what: str, learner: Awaitable[R], engines: Awaitable[None], limit_s: float) -> R:
        """What the learner answers, once the engines have done their part too. An end that fails lets the
        other one fail, which then says who was lost; a mistake in the program is raised as it is."""
        answer, part = asyncio.ensure_future(_plain(learner)), asyncio.ensure_future(_plain(engines))
        try:
            await asyncio.wait((answer, part), timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION)
            failure = _error(answer)
            if failure is not None and not isinstance(failure, TransferError | Overdue | EngineError):
                raise failure
            if not part.done():  # the learner has failed, and the engines will say at whom
                await asyncio.wait((part,), timeout=2 * GRACE_S)
            error = _error(part)
            if error is not None:
                raise error
            if failure is not None:
                raise EngineError(f"{what} failed: {type(failure).__name__}: {failure}") from failure
            if not (answer.done() and part.done()):
                raise EngineError(f"{what} did not finish within {limit_s:.0f} s")
            return answer.result()
        finally:
            answer.cancel()
            part.cancel()

    def _begin_proof(self, version: int) -> None:
        """Have both sides score the fixed tokens, while engines sample.

        The learner is asked here, ahead of any call that changes its weights or moves them off the device.
        """
        if self.proof is None or not (self._unproven or version % self.proof.every == 0):
            return
        ours = self.learner.score_tokens(self.proof.tokens)
        self._proving = asyncio.create_task(self._prove(self.proof, version, ours))
        # A dropped proof is not awaited: without this, asyncio logs its exception as unhandled.
        self._proving.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _prove(self, spec: ProofSpec, version: int, ours: Awaitable[list[float]]) -> Proof:
        begin = time.perf_counter()
        learner, engines = await asyncio.gather(_plain(ours), self.pool.score(spec.tokens))
        gaps = {index: Gap.between(learner, logps) for index, logps in engines.items()}
        proof = Proof(version, len(learner), gaps, time.perf_counter() - begin)
        proof.check(spec)
        self._unproven = False
        return proof

    async def proved(self) -> Proof | None:
        """The proof of the last push, once; None where none was due. Raises LogpGapError where a replica's
        log-probs are not the learner's, ReplicaDied where a replica did not live to show them."""
        task, self._proving = self._proving, None
        return None if task is None else await task

    def _drop_proof(self) -> None:
        if self._proving is not None:
            self._proving.cancel()
            self._proving = None

    async def close(self) -> None:
        """Remove the files that the last versions are in."""
        self._drop_proof()
        files.remove(self.spec.folder)


async def _plain(answer: Awaitable[R]) -> R:
    return await answer


def _error(task: asyncio.Future[Any]) -> BaseException | None:
    """What a task has raised; None while it runs."""
    return task.exception() if task.done() else None
