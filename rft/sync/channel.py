"""The weight channel: pushes policy version v from the learner to every engine.

    announce   the learner describes the tensors, while engines still sample
    pause      engines stop sampling
    receive    the learner sends, engines load
    finish     each engine reports the version that it now holds
    resume     engines sample; they and the learner score the same fixed tokens, which proves the push

Two invariants: no engine samples between `begin_update` and `finish_update`, and `push` returns only
when every live engine reports the version that was sent. The proof verifies that the *numbers* arrived:
`proved` compares the log-probs of both sides before the learner's next update.

    channel = WeightChannel(learner, engines, spec, "keep")
    await channel.connect()          # again after a replica was rebuilt
    report = await channel.push(7)
    proof = await channel.proved()   # before the learner's next update

One class serves all transports: they differ in the learner's sender (`publisher.py`) and the engines'
receiver (`gloo.py`, `vllm_worker.py`), which share the announcement format.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol, TypeVar

from rft.config.rollout import InFlight
from rft.errors import EngineError, ReplicasLost, TransferError
from rft.sync import files, gloo
from rft.sync.proof import Gap, Proof, ProofSpec
from rft.sync.spec import GRACE_S, ChannelSpec, Link, Update, WeightSource
from rft.utils.deadlines import Overdue

R = TypeVar("R")


class Engines(Protocol):
    """All replicas, as used by a weight channel. Each call goes to all; the calls of a push raise
    ReplicasLost once all replicas have ended their part."""

    @property
    def workers(self) -> Sequence[int]:
        """Number of workers of each replica that receive weights."""

    async def join(self, links: list[Link]) -> None: ...

    async def begin_update(self, in_flight: InFlight) -> None: ...

    async def receive(self, update: Update) -> None: ...

    async def finish_update(self, version: int) -> None: ...

    async def score(self, tokens: tuple[int, ...]) -> dict[int, list[float]]: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...


@dataclass(frozen=True)
class PushReport:
    """The cost of a push: bytes sent to each engine, total seconds, seconds before the engines were paused,
    and the learner's measurements."""

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


class WeightChannel:
    """Push weights from learner rank 0 to all workers of all replicas. Callers never branch on the transport.
    If learner and engines share a device (`ColocatedChannel`), they take turns: the learner computes only
    after `before_step`, and an engine starts only after `before_start`."""

    def __init__(
        self,
        learner: WeightSource,
        engines: Engines,
        spec: ChannelSpec,
        in_flight: InFlight,
        proof: ProofSpec | None = None,
    ) -> None:
        self.learner = learner
        self.engines = engines
        self.spec = spec
        self.in_flight: InFlight = in_flight
        self.timeout_s = spec.config.timeout_s
        self.proof = proof
        self._unproven = True  # no push was proven since the engines joined
        self._proving: asyncio.Task[Proof] | None = None

    async def before_start(self) -> None:
        """No-op: learner and engines use separate devices."""

    async def before_step(self) -> None:
        """No-op: learner and engines use separate devices."""

    async def connect(self) -> None:
        """Form the group again: learner rank 0, then each replica's workers. The next push is full, and is
        proven."""
        self._drop_proof()
        self._unproven = True
        host, port = await self.learner.reserve_address() if self.spec.grouped else ("", 0)
        *offsets, world = accumulate(self.engines.workers, initial=1)  # each replica's first rank, all ranks
        links = [Link(host, port, offset, world, self.timeout_s) for offset in offsets]
        opened = asyncio.ensure_future(self.learner.open_channel(Link(host, port, 0, world, self.timeout_s)))
        opened.add_done_callback(lambda task: task.cancelled() or task.exception())  # `_both` raises it
        joined = self.engines.join(links)
        try:
            await self._both("forming the weight channel", asyncio.shield(opened), joined, self.timeout_s + 5)
        except Exception:
            if self.spec.grouped and not opened.done():  # the learner waits for engines that will not come
                await asyncio.to_thread(gloo.call_off, host, port)
            raise

    async def push(self, version: int) -> PushReport:
        """Push a version to all replicas. Raises ReplicasLost if some replicas failed: the others hold the
        version, or stay paused until the next push, before which `connect` must be called. Raises another
        EngineError if the failed replica is unknown, ActorDied when the learner is gone."""
        start = time.perf_counter()
        self._drop_proof()
        update = await self.learner.announce(version)
        announced = time.perf_counter() - start
        await self.engines.begin_update(self.in_flight)
        what = f"pushing policy version {version} over {self.spec.transport}"
        sending = self.learner.send_weights()
        try:
            sent = await self._both(what, sending, self.engines.receive(update), self.timeout_s)
        except ReplicasLost as failed:
            try:  # resume the replicas that received everything
                await self.engines.finish_update(version)
            except ReplicasLost as more:
                raise ReplicasLost({**failed.lost, **more.lost}) from failed
            raise
        await self.engines.finish_update(version)
        self._begin_proof(version)
        seconds = time.perf_counter() - start
        return PushReport(version, sent.bytes, seconds, announced, sent.tensors, sent.metrics)

    async def _both(self, what: str, learner: Awaitable[R], engines: Awaitable[None], limit_s: float) -> R:
        """Return the learner's answer once the engines have done their part too. If one side fails, the other
        fails with it, so the engines' error is raised first: it names the lost replicas. Programming errors
        are raised unchanged."""
        answer, part = asyncio.ensure_future(learner), asyncio.ensure_future(engines)
        try:
            await asyncio.wait((answer, part), timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION)
            failure = _error(answer)
            if failure is not None and not isinstance(failure, TransferError | Overdue | EngineError):
                raise failure
            if not part.done():  # the learner has failed: wait for the engines' error
                await asyncio.wait((part,), timeout=2 * GRACE_S)
            error = _error(part)
            if error is not None:
                raise error
            if failure is not None:
                raise EngineError(f"{what} failed: {type(failure).__name__}: {failure}") from failure
            if not (answer.done() and part.done()):
                raise EngineError(f"{what} did not finish within {limit_s:.0f} s (sync.timeout_s)")
            return answer.result()
        finally:
            answer.cancel()
            part.cancel()

    def _begin_proof(self, version: int) -> None:
        """Have both sides score the fixed tokens, while engines sample. The learner is called here, before
        any call that changes its weights or moves them off the device."""
        if self.proof is None or not (self._unproven or version % self.proof.every == 0):
            return
        scored = self.learner.score_tokens(self.proof.tokens)
        self._proving = asyncio.create_task(self._prove(self.proof, version, scored))
        # A dropped proof is not awaited: without this, asyncio logs its exception as unhandled.
        self._proving.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _prove(self, spec: ProofSpec, version: int, scored: Awaitable[list[float]]) -> Proof:
        begin = time.perf_counter()
        learner, engines = await asyncio.gather(scored, self.engines.score(spec.tokens))
        gaps = {index: Gap.between(learner, logps, rounded=spec.rounded) for index, logps in engines.items()}
        proof = Proof(version, len(learner), gaps, time.perf_counter() - begin)
        proof.check(spec)
        self._unproven = False
        return proof

    async def proved(self) -> Proof | None:
        """Return the proof of the last push, once; None if none was due. Raises LogpGapError if a replica's
        log-probs differ from the learner's, ReplicaDied if a replica died before it scored."""
        task, self._proving = self._proving, None
        return None if task is None else await task

    def _drop_proof(self) -> None:
        if self._proving is not None:
            self._proving.cancel()
            self._proving = None

    async def close(self) -> None:
        """Remove the files of the last versions."""
        self._drop_proof()
        files.remove(self.spec.folder)


def _error(task: asyncio.Future[Any]) -> BaseException | None:
    """Return the error that a task has raised; None while it runs."""
    return task.exception() if task.done() else None
