"""The rollout replicas as one: least-loaded dispatch in order of arrival, a bound on what each is sent,
deadlines of work, rebuilding the dead."""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray

from rft.config.rollout import InFlight
from rft.errors import EngineError
from rft.rollout.engine import EngineSpec, Generated, Request
from rft.rollout.replica import CONTROL, Replica
from rft.sync.link import Link
from rft.utils.actors import ActorDied, call, kill_actor
from rft.utils.deadlines import Overdue

QUEUED = 2  # times what a replica decodes at once is sent to it, so that the next completions wait there
CONTROL_CALLS = 1000  # at once; they are short, but for those of a push
GRACE_S = 30.0  # for the other replicas to end their part of a push that one of them failed in


class ReplicasLost(EngineError):
    """What a push, or forming the channel, has lost: `lost` says which replicas, and why. The others hold the
    pushed version, or stand still and take the next push."""

    def __init__(self, lost: dict[int, str]) -> None:
        super().__init__("; ".join(lost.values()))
        self.lost = lost


class ReplicaDied(ReplicasLost):
    """A replica is gone or its engine is. `index` says which; `serial` which of those that had this
    index (-1: none is there)."""

    def __init__(self, index: int, why: str, serial: int = -1) -> None:
        super().__init__({index: f"rollout replica {index} died: {why}"})
        self.index, self.why, self.serial = index, why, serial


@dataclass(eq=False)
class _Turn:
    """A request that was sent to a replica. `began`: by the replica's working time, when the engine came to
    it; None while it is queued."""

    size: int  # completions
    began: float | None = None


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
    turns: dict[_Turn, None] = field(default_factory=dict)  # of the requests sent, in order
    begun: bool = False  # it stands still for a push
    received: bool = False  # and has all weights of it
    still: float = 0.0  # seconds that it stood still so far
    still_since: float | None = None

    def working_time(self) -> float:
        """Seconds on a clock that stops while the replica stands still."""
        now = asyncio.get_running_loop().time()
        return (now if self.still_since is None else self.still_since) - self.still

    def stand_still(self) -> None:
        self.begun, self.received = True, False
        if self.still_since is None:
            self.still_since = asyncio.get_running_loop().time()

    def go_on(self) -> None:
        self.begun = self.received = False
        if self.still_since is not None:
            self.still += asyncio.get_running_loop().time() - self.still_since
            self.still_since = None


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
        self._waiting: deque[tuple[int, asyncio.Future[tuple[int, _Member, _Turn]]]] = deque()  # size, place
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
        for member in self.members.values():
            member.serving = True
        self._line_up()
        self._hand_on()

    def _decodes(self, index: int) -> int:
        """Completions that a replica works on at once; the plain engine takes one request after another."""
        spec = self.specs[index]
        return spec.max_num_seqs if spec.kind == "vllm" else 1

    def _room(self, index: int) -> int:
        """Completions that are sent to a replica at most."""
        return QUEUED * self.specs[index].max_num_seqs

    async def _start(self, index: int) -> None:
        grouped = ray.remote(concurrency_groups={CONTROL: CONTROL_CALLS})(Replica)  # type: ignore[call-overload]
        remote = grouped.options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_concurrency=max(1024, 2 * self._room(index)),  # of `generate`: cancelled ones may linger
            max_restarts=0,
            scheduling_strategy="SPREAD",  # over the nodes of a cluster
            memory=2**20,  # Ray places an actor that asks for nothing at random, whatever the strategy
        )
        member = _Member(remote.remote(self.specs[index], index), next(self._serials))
        self.members[index] = member
        member.node, member.pid = await self._ask(index, "whereabouts", seconds=self.start_timeout_s)
        await self._ask(index, "start", seconds=self.start_timeout_s)

    def _line_up(self) -> None:
        self._queue = [(m.load, index, m.serial) for index, m in self.members.items()]
        heapq.heapify(self._queue)

    def _add_load(self, index: int, member: _Member, change: int) -> None:
        member.load += change
        heapq.heappush(self._queue, (member.load, index, member.serial))
        if len(self._queue) > 8 * len(self.members) + 64:  # mostly entries that say nothing any more
            self._line_up()

    async def generate(self, request: Request) -> list[Generated]:
        """Complete a prompt on the replica with the least work, in order of arrival: waits while none serves,
        or all have as much as they may. `generate_timeout_s` counts from when the engine comes to it."""
        index, member, turn = await self._place(request.sampling.n)
        what = f"generate on rollout replica {index}"
        try:
            answer = member.actor.generate.remote(request)
            in_time = self._while_worked_on(member, turn, answer, what)
            result: list[Generated] = await self._answer(index, member, in_time, math.inf, what)
        except asyncio.CancelledError:
            member.actor.cancel.remote(request.id)  # nobody waits for it any more
            raise
        finally:
            self._leave(index, member, turn)
        return result

    async def _while_worked_on(self, member: _Member, turn: _Turn, answer: Any, what: str) -> Any:
        """Await an answer. Raises Overdue once the engine has worked `generate_timeout_s` on the request:
        time in a queue, and time in which the replica stood still for a push, do not count."""
        waiting = asyncio.ensure_future(_plain(answer))
        try:
            while True:
                worked = 0.0 if turn.began is None else member.working_time() - turn.began
                if worked >= self.generate_timeout_s:
                    raise Overdue(f"{what} did not finish within {self.generate_timeout_s:.0f} s of work")
                await asyncio.wait({waiting}, timeout=self.generate_timeout_s - worked)
                if waiting.done():
                    return waiting.result()
        finally:
            waiting.cancel()

    async def _place(self, size: int) -> tuple[int, _Member, _Turn]:
        """A place for a request of `size` completions; `_leave` gives it back."""
        place: asyncio.Future[tuple[int, _Member, _Turn]] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, place))
        self._hand_on()
        try:
            return await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._hand_on()  # it may have been the first in the line, which held up the others
            else:
                self._leave(*place.result())
            raise

    def _hand_on(self) -> None:
        """Give waiting requests their places, as far as there are any, first come, first served."""
        while self._waiting:
            size, place = self._waiting[0]
            if not place.done():
                index = self._least_loaded()
                if index is None:
                    return
                member = self.members[index]
                if member.load and member.load + size > self._room(index):
                    return
                turn = _Turn(size)
                member.turns[turn] = None
                self._add_load(index, member, size)
                self._begin_turns(index, member)
                place.set_result((index, member, turn))
            self._waiting.popleft()

    def _leave(self, index: int, member: _Member, turn: _Turn) -> None:
        del member.turns[turn]
        self._add_load(index, member, -turn.size)
        self._begin_turns(index, member)
        self._hand_on()

    def _begin_turns(self, index: int, member: _Member) -> None:
        """Start the clocks of the requests that the engine has come to. It takes them in order, as far as it
        decodes at once; of those that are half done it may have come further already."""
        busy = 0
        for turn in member.turns:
            busy += turn.size
            if busy > max(self._decodes(index), turn.size):
                return
            if turn.began is None:
                turn.began = member.working_time()

    def _least_loaded(self) -> int | None:
        while self._queue:
            load, index, serial = self._queue[0]
            member = self.members.get(index)
            if member is not None and member.serving and (member.load, member.serial) == (load, serial):
                return index
            heapq.heappop(self._queue)
        return None

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

    async def rebuild_all(self, indices: Iterable[int]) -> None:
        """Replace replicas side by side. Raises ReplicasLost in the end where some did not start."""
        wanted = list(indices)
        results = await asyncio.gather(*(self.rebuild(i) for i in wanted), return_exceptions=True)
        lost = {}
        for index, result in zip(wanted, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, EngineError):
                raise result
            if isinstance(result, EngineError):
                lost[index] = str(result)
        if lost:
            raise ReplicasLost(lost)

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

    # Each raises ReplicasLost after all replicas have ended their part, and what is no fault of an engine as
    # it is.

    async def join(self, links: list[Link]) -> None:
        asked = {i: self._ask(i, "join", link) for i, link in enumerate(links)}
        _, lost = await self._each(asked, GRACE_S)
        if lost:
            raise _loss(_culprits(lost))

    async def begin_update(self, in_flight: InFlight) -> None:
        """Replicas that stand still already, since a push before failed elsewhere, are left as they are."""

        def seconds(index: int) -> float | None:
            if in_flight != "wait":
                return None
            rounds = math.ceil(self.load(index) / self._decodes(index))
            return self.generate_timeout_s * max(rounds, 1)  # what is in flight may take as long as any

        still = {i for i, member in self.members.items() if member.begun}
        asked = {
            i: self._ask(i, "begin_update", in_flight, seconds=seconds(i))
            for i in range(len(self.specs))
            if i not in still
        }
        answers, lost = await self._each(asked)
        for index in answers:
            if index in self.members:
                self.members[index].stand_still()
        if lost:
            raise _loss(lost)

    async def receive(self, update: dict[str, Any]) -> None:
        asked = {i: self._ask(i, "receive", update) for i in sorted(self.members)}
        answers, lost = await self._each(asked, GRACE_S)
        for index in answers:
            self.members[index].received = True
        if lost:  # vLLM cannot begin an update anew; the plain engine's weights are overwritten by the next
            usable = {i for i in lost if self.specs[i].kind == "hf" and not isinstance(lost[i], ReplicaDied)}
            broken = {i: error for i, error in lost.items() if i not in usable}
            raise _loss(broken or lost)

    async def finish_update(self, version: int) -> None:
        """Let the replicas that received everything sample from it; one that then reports another version
        than `version` is lost."""
        ready = [i for i, member in sorted(self.members.items()) if member.received]
        answers, lost = await self._each({i: self._ask(i, "finish_update", version) for i in ready})
        for index, reported in answers.items():
            if reported != version:
                what = f"rollout replica {index} reports version {reported} after a push of {version}"
                lost[index] = EngineError(what)
                continue
            member = self.members[index]
            member.go_on()
            member.version, member.serving = version, True
        self._line_up()
        self._hand_on()
        if lost:
            raise _loss(lost)

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

    async def _each(
        self, calls: dict[int, Coroutine[Any, Any, Any]], grace_s: float | None = None
    ) -> tuple[dict[int, Any], dict[int, EngineError]]:
        """The answers by replica, and the errors of those that failed. Once one has, the others get
        `grace_s` to end, where they may wait for it. Raises what is no fault of an engine."""
        tasks = {index: asyncio.ensure_future(coroutine) for index, coroutine in calls.items()}
        answers: dict[int, Any] = {}
        lost: dict[int, EngineError] = {}
        try:
            if tasks:
                _, pending = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
                if pending:
                    await asyncio.wait(pending, timeout=grace_s)
            for index, task in tasks.items():
                if not task.done():
                    lost[index] = EngineError(
                        f"rollout replica {index} did not end its part of a failed push"
                    )
                    continue
                error = task.exception()
                if error is None:
                    answers[index] = task.result()
                elif isinstance(error, EngineError):
                    lost[index] = error
                else:
                    raise error
        finally:
            for task in tasks.values():
                task.cancel()
        return answers, lost

    async def _all(self, method: str, *args: Any, seconds: float | None = None) -> list[Any]:
        calls = (self._ask(i, method, *args, seconds=seconds) for i in sorted(self.members))
        return list(await asyncio.gather(*calls))

    async def _ask(self, index: int, method: str, *args: Any, seconds: float | None = None) -> Any:
        member = self.members.get(index)
        if member is None:
            raise ReplicaDied(index, "it is not running")
        what = f"{method} on rollout replica {index}"
        answer = getattr(member.actor, method).remote(*args)
        return await self._answer(index, member, answer, seconds or self.control_timeout_s, what)

    async def _answer(self, index: int, member: _Member, answer: Any, seconds: float, what: str) -> Any:
        """Await an answer. Raises ReplicaDied where the replica or its engine is gone, or does not answer."""
        try:
            result = await call(answer, seconds, what)
        except (ActorDied, Overdue) as error:  # a replica that does not answer is as good as dead
            raise ReplicaDied(index, str(error), member.serial) from error
        except Exception as error:
            if type(error).__name__ in ("EngineDeadError", "EngineGenerateError"):
                raise ReplicaDied(index, f"{what}: {error}", member.serial) from error
            raise
        member.last_sign = time.monotonic()
        return result


def _loss(lost: dict[int, EngineError]) -> ReplicasLost:
    """The error to raise for these of single replicas."""
    first = next(iter(lost.values()))
    if len(lost) == 1 and isinstance(first, ReplicaDied):
        return first
    return ReplicasLost({index: str(error) for index, error in lost.items()})


def _culprits(lost: dict[int, EngineError]) -> dict[int, EngineError]:
    """Those that died, where any did: the others have waited for them in vain."""
    return {index: error for index, error in lost.items() if isinstance(error, ReplicaDied)} or lost


async def _plain(answer: Any) -> Any:
    return await answer
