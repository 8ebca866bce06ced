"""The rollout replicas: `Replica` is an engine in a Ray actor, `RolloutPool` the driver's handle for all of
them: FIFO dispatch to the least loaded replica, deadlines, and the calls of a weight push."""

from __future__ import annotations

import asyncio
import gc
import heapq
import math
import os
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar, TypeVarTuple

import ray

from rft.config.rollout import InFlight
from rft.errors import EngineError, ReplicasLost, TransferError, is_engine_fault
from rft.rollout.engine import EngineSpec, Generated, Request, RolloutEngine
from rft.rollout.hf import HFEngine
from rft.rollout.vllm import VLLMAdapterEngine, VLLMEngine, VLLMSleepingEngine
from rft.sync.spec import GRACE_S, Link, Update
from rft.utils.actors import ActorDied, call, kill_actor, require_here
from rft.utils.cores import parse_cores
from rft.utils.deadlines import Deadline, Overdue

QUEUED = 2  # replicas get up to this many times the requests that they decode at once: the rest wait there
REMEMBERED = 65_536  # sessions whose replica is known, the last ones used
CONTROL = "control"
CONTROL_CALLS = 1000  # concurrent ones; they are short, except for those of a push

R = TypeVar("R")
Ts = TypeVarTuple("Ts")
Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


class ReplicaDied(ReplicasLost):
    """A replica or its engine is gone. `index`: the replica; `serial`: which of the actors with this index
    (-1: none)."""

    def __init__(self, index: int, why: str, serial: int = -1) -> None:
        super().__init__({index: f"rollout replica {index} died: {why}"})
        self.index, self.why, self.serial = index, why, serial


# -- in the actor ------------------------------------------------------------------------------------------


def build_engine(spec: EngineSpec) -> RolloutEngine:
    """Build the engine of a spec, without starting it."""
    if spec.kind == "hf":
        return HFEngine(spec)
    if spec.transport == "adapter":
        return VLLMAdapterEngine(spec)
    return VLLMSleepingEngine(spec) if spec.sleeps else VLLMEngine(spec)


def control(method: Method) -> Method:
    """Run a method in Ray's concurrency group for control calls."""
    marked: Method = ray.method(concurrency_group=CONTROL)(method)
    return marked


class Replica:
    """The actor class: `ray.remote(Replica)`. Ray runs the calls of a concurrency group in order of arrival,
    up to a number at once, on the group's event loop. Control calls have a separate group, so that none waits
    behind queued completions. The engine runs on that group's loop; `generate` forwards requests to it."""

    def __init__(self, spec: EngineSpec, index: int) -> None:
        self.name = f"rollout replica {index}"
        self.spec = spec
        if spec.config.cores:
            os.sched_setaffinity(0, parse_cores(spec.config.cores))
        self.engine = build_engine(spec)
        self.load = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.running: dict[str, asyncio.Future[list[Generated]]] = {}  # by request id

    @control
    async def whereabouts(self) -> tuple[str, int]:
        """Return this process's node and pid."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    @control
    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        require_here(self.spec.model, "the policy that model.path names")
        try:
            await self.engine.start()
        except Exception as error:
            raise EngineError(f"{self.name} could not start its engine: {error}") from error
        gc.collect()
        gc.freeze()  # requests allocate many objects: keep the collector from also scanning the libraries'

    async def generate(self, request: Request) -> list[Generated]:
        assert self.loop is not None, "start comes first"
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._generate(request), self.loop))

    async def _generate(self, request: Request) -> list[Generated]:
        self.load += request.sampling.n
        self.running[request.id] = asyncio.ensure_future(self.engine.generate(request))
        try:
            return await self.running[request.id]
        except asyncio.CancelledError:
            return []  # the caller is gone: see `cancel`
        finally:
            del self.running[request.id]
            self.load -= request.sampling.n

    @control
    async def cancel(self, request_id: str) -> None:
        """Cancel a request whose caller is gone; a request that is not running has already ended."""
        if request_id in self.running:
            self.running[request_id].cancel()

    @control
    async def score(self, tokens: tuple[int, ...]) -> list[float]:
        return await self.engine.score(tokens)

    @control
    async def health(self, engine: bool) -> int:
        """Answer, after the engine's check if requested; return the number of completions in progress."""
        if engine:
            await self.engine.version()
        return self.load

    @control
    async def join(self, link: Link) -> None:
        with self._blame_engine("joining the weight channel"):
            await self.engine.join(link)

    @control
    async def begin_update(self, in_flight: InFlight) -> None:
        with self._blame_engine("pausing for a push"):
            await self.engine.begin_update(in_flight)

    @control
    async def receive(self, update: Update) -> None:
        with self._blame_engine("receiving weights"):
            await self.engine.receive(update)

    @control
    async def finish_update(self, version: int) -> int:
        """Sample from the new weights; return the version that the engine reports. It is queried before
        sampling resumes: while the engine samples, an answer takes as long as one of its steps."""
        with self._blame_engine("taking new weights into use"):
            await self.engine.finish_update(version)
            reported = await self.engine.version()
            await self.engine.resume()
        return reported

    @contextmanager
    def _blame_engine(self, what: str) -> Iterator[None]:
        """Raise EngineError for a fault of the engine or its machine, and other errors unchanged."""
        try:
            yield
        except Exception as error:
            if isinstance(error, TransferError):
                raise EngineError(f"{self.name}, {what}: {error}") from error
            if not is_engine_fault(error):
                raise
            raise EngineError(f"{self.name}, {what}: {type(error).__name__}: {error}") from error

    @control
    async def sleep(self) -> None:
        assert isinstance(self.engine, VLLMSleepingEngine)
        await self.engine.sleep()

    @control
    async def wake(self) -> None:
        assert isinstance(self.engine, VLLMSleepingEngine)
        await self.engine.wake()

    @control
    async def call_workers(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if not isinstance(self.engine, VLLMEngine):
            raise EngineError(f"{self.name} does not use vLLM; it has no workers to call")
        return await self.engine.collective_rpc(method, args)

    @control
    async def close(self) -> None:
        await self.engine.close()


# -- in the driver -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Dispatched:
    """A request sent to a replica. `began`: the replica's working time when the engine started on it; None
    while it is queued."""

    size: int  # completions
    began: float | None = None


@dataclass
class Member:
    """One replica of a pool."""

    actor: Any  # handle of a Replica
    serial: int
    node: str = ""
    pid: int = 0
    load: int = 0  # completions sent and not yet answered
    serving: bool = False  # may sample: it holds weights that the run knows
    version: int = -1
    last_answer: float = 0.0  # monotonic
    dispatched: dict[_Dispatched, None] = field(default_factory=dict)  # in order
    paused_since: float | None = None  # by a push
    paused_seconds: float = 0.0  # in earlier pauses
    received: bool = False  # all weights of the current push

    def working_time(self) -> float:
        """Return seconds on a clock that stops while the replica is paused."""
        now = asyncio.get_running_loop().time() if self.paused_since is None else self.paused_since
        return now - self.paused_seconds

    def pause(self) -> None:
        self.received = False
        if self.paused_since is None:
            self.paused_since = asyncio.get_running_loop().time()

    def resume(self) -> None:
        self.received = False
        if self.paused_since is not None:
            self.paused_seconds += asyncio.get_running_loop().time() - self.paused_since
            self.paused_since = None


class RolloutPool:
    """The `rollout.replicas` replicas of a spec. gpus: the GPUs that Ray reserves for each.

    Calls on a replica that died raise ReplicaDied; `rebuild` replaces it.
    """

    def __init__(self, spec: EngineSpec, gpus: float = 0) -> None:
        self.spec, self.gpus = spec, gpus
        self.config = spec.config
        self._start_deadline = Deadline(spec.config.start_timeout_s, "rollout.start_timeout_s")
        self._control_deadline = Deadline(spec.config.control_timeout_s, "rollout.control_timeout_s")
        self.members: dict[int, Member] = {}
        self._serials = count()
        self._waiting: deque[tuple[int, str, asyncio.Future[tuple[int, Member, _Dispatched]]]] = deque()
        self._homes: OrderedDict[str, tuple[int, int]] = OrderedDict()  # session -> replica, serial
        # A heap of (load, index, serial), so that the least loaded of thousands is found at once. Entries may
        # be outdated: such an entry is skipped, since a newer one has the replica's load.
        self._by_load: list[tuple[int, int, int]] = []

    @property
    def indices(self) -> range:
        """All replicas, including lost ones."""
        return range(self.config.replicas)

    @property
    def workers(self) -> list[int]:
        """Number of workers of each replica that receive weights."""
        return [self.config.tensor_parallel for _ in self.indices]

    async def start(self) -> None:
        """Start all replicas, in parallel."""
        await asyncio.gather(*map(self._start, self.indices))
        for member in self.members.values():
            member.serving = True
        self._reorder()
        self._dispatch_waiting()

    async def _start(self, index: int) -> None:
        grouped = ray.remote(concurrency_groups={CONTROL: CONTROL_CALLS})(Replica)  # type: ignore[call-overload]
        remote = grouped.options(
            num_cpus=0,
            num_gpus=self.gpus,
            max_concurrency=max(1024, 2 * self._room),  # of `generate`: cancelled calls may linger
            max_restarts=0,
            scheduling_strategy="SPREAD",  # across the nodes of a cluster
            memory=2**20,  # without a resource request, Ray ignores the strategy and places it at random
        )
        member = Member(remote.remote(self.spec, index), next(self._serials))
        self.members[index] = member
        member.node, member.pid = await self._ask(index, Replica.whereabouts, seconds=self._start_deadline)
        await self._ask(index, Replica.start, seconds=self._start_deadline)

    # -- dispatch ------------------------------------------------------------------------------------------

    @property
    def _decodes(self) -> int:
        """Completions that a replica decodes at once; the hf engine runs one request at a time."""
        return self.config.max_num_seqs if self.spec.kind == "vllm" else 1

    @property
    def _room(self) -> int:
        """The maximum number of completions sent to a replica at a time."""
        return QUEUED * self.config.max_num_seqs

    async def generate(self, request: Request) -> list[Generated]:
        """Complete a prompt on the least loaded replica, or on that of its session, in order of arrival; wait
        while none is serving or all are full. `generate_timeout_s` counts from when the engine starts on the
        request."""
        index, member, sent = await self._acquire(request.sampling.n, request.session)
        what = f"generate on rollout replica {index}"
        try:
            answer = self._within_work(member, sent, member.actor.generate.remote(request), what)
            return await self._answer(index, member, answer, math.inf, what)
        except asyncio.CancelledError:
            member.actor.cancel.remote(request.id)  # its caller is gone
            raise
        finally:
            self._release(index, member, sent)

    async def _within_work(
        self, member: Member, sent: _Dispatched, answer: Awaitable[list[Generated]], what: str
    ) -> list[Generated]:
        """Await an answer. Raises Overdue once the engine has worked `generate_timeout_s` on the request;
        time in a queue, or while the replica was paused for a push, does not count."""
        waiting, limit = asyncio.ensure_future(answer), self.config.generate_timeout_s
        try:
            while True:
                worked = 0.0 if sent.began is None else member.working_time() - sent.began
                if worked >= limit:
                    raise Overdue(
                        f"{what} did not finish within {limit:.0f} s of work (rollout.generate_timeout_s)"
                    )
                await asyncio.wait({waiting}, timeout=limit - worked)
                if waiting.done():
                    return waiting.result()
        finally:
            waiting.cancel()

    async def _acquire(self, size: int, session: str = "") -> tuple[int, Member, _Dispatched]:
        """Wait for a replica with room for `size` completions; `_release` returns the room."""
        place: asyncio.Future[tuple[int, Member, _Dispatched]] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, session, place))
        self._dispatch_waiting()
        try:
            return await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._dispatch_waiting()  # it may have been first in the queue, blocking the others
            else:
                self._release(*place.result())
            raise

    def _dispatch_waiting(self) -> None:
        """Dispatch waiting requests while there is room, in order of arrival."""
        while self._waiting:
            size, session, place = self._waiting[0]
            if not place.done():
                index = self._least_loaded()
                if index is None:
                    return
                if session:
                    index = self._home(session, index, size)
                member = self.members[index]
                if member.load and member.load + size > self._room:
                    return
                sent = _Dispatched(size)
                member.dispatched[sent] = None
                self._add_load(index, member, size)
                place.set_result((index, member, sent))
            self._waiting.popleft()

    def _home(self, session: str, least_loaded: int, size: int) -> int:
        """Return the replica that holds the keys and values of a session's earlier turns, unless it has a
        full round of completions more to do than the least loaded one, which then becomes the session's."""
        index, serial = self._homes.pop(session, (least_loaded, self.members[least_loaded].serial))
        member = self.members.get(index)
        if (
            member is None
            or (member.serial, member.serving) != (serial, True)
            or member.load >= self.members[least_loaded].load + self._decodes
            or member.load + size > self._room
        ):
            index = least_loaded
        self._homes[session] = (index, self.members[index].serial)
        if len(self._homes) > REMEMBERED:
            self._homes.popitem(last=False)
        return index

    def _release(self, index: int, member: Member, sent: _Dispatched) -> None:
        del member.dispatched[sent]
        self._add_load(index, member, -sent.size)
        self._dispatch_waiting()

    def _add_load(self, index: int, member: Member, change: int) -> None:
        member.load += change
        heapq.heappush(self._by_load, (member.load, index, member.serial))
        if len(self._by_load) > 8 * len(self.members) + 64:  # mostly outdated entries
            self._reorder()
        # Start the clocks of the requests that the engine has reached: it takes them in order, as many as it
        # decodes at once, and possibly more once earlier ones are partly done.
        busy = 0
        for sent in member.dispatched:
            busy += sent.size
            if busy > max(self._decodes, sent.size):
                return
            if sent.began is None:
                sent.began = member.working_time()

    def _reorder(self) -> None:
        self._by_load = [(member.load, index, member.serial) for index, member in self.members.items()]
        heapq.heapify(self._by_load)

    def _least_loaded(self) -> int | None:
        while self._by_load:
            load, index, serial = self._by_load[0]
            member = self.members.get(index)
            if member is not None and member.serving and (member.load, member.serial) == (load, serial):
                return index
            heapq.heappop(self._by_load)
        return None

    # -- losing and replacing replicas ---------------------------------------------------------------------

    def load(self, index: int) -> int:
        """Completions sent to a replica and not yet answered; 0 if there is no such replica."""
        return self.members[index].load if index in self.members else 0

    async def health(self, index: int, timeout_s: float, *, engine: bool = True) -> int:
        """Check that a replica answers, including its engine if `engine`; return the number of completions in
        progress. Raises ReplicaDied."""
        deadline = Deadline(timeout_s, "rollout.health_timeout_s")
        return await self._ask(index, Replica.health, engine, seconds=deadline)

    def is_lost(self, died: ReplicaDied) -> bool:
        """False if the dead replica was replaced in the meantime."""
        return died.index not in self.members or self.members[died.index].serial == died.serial

    def discard(self, died: ReplicaDied) -> None:
        """Kill the remains of a dead replica, so that no call waits for it any longer."""
        member = self.members.get(died.index)
        if member is not None and member.serial == died.serial:
            self.kill(died.index)

    async def rebuild(self, index: int) -> None:
        """Replace a replica. The new one loads weights from disk and serves after the next push."""
        self.kill(index)
        await self._start(index)

    async def rebuild_all(self, indices: Iterable[int]) -> None:
        """Replace replicas in parallel. Raises ReplicasLost at the end if some did not start."""
        _, lost = await self._each({index: self.rebuild(index) for index in indices})
        _raise_lost(lost)

    def kill(self, index: int) -> None:
        """Kill a replica's actor and its child processes, including frozen ones."""
        member = self.members.pop(index, None)
        if member is not None:
            kill_actor(member.actor, member.node, member.pid)

    async def close(self) -> None:
        """Stop every engine. A replica that does not stop in time is killed with its processes; one that has
        not started yet is killed at once."""
        for index, member in list(self.members.items()):
            if not member.serving:
                self.kill(index)
                continue
            try:
                await self._ask(index, Replica.close, seconds=10)
            except EngineError:
                self.kill(index)
            else:
                ray.kill(self.members.pop(index).actor)

    # -- weights: the same call on every replica, all acknowledged -----------------------------------------
    # Each raises ReplicasLost after all replicas have ended their part; errors that are not an engine's fault
    # are raised unchanged.

    async def join(self, links: list[Link]) -> None:
        asked = {i: self._ask(i, Replica.join, link) for i, link in enumerate(links)}
        _, lost = await self._each(asked, GRACE_S)
        _raise_lost(_dead(lost) or lost)  # if some died, the others only waited for them

    async def begin_update(self, in_flight: InFlight) -> None:
        """Pause sampling. Replicas still paused by an earlier failed push are skipped."""

        def seconds(index: int) -> float | None:
            if in_flight != "wait":
                return None
            rounds = math.ceil(self.load(index) / self._decodes)
            return self.config.generate_timeout_s * max(rounds, 1)  # the longest request in flight

        running = [i for i in self.indices if i not in self.members or self.members[i].paused_since is None]
        asked = {i: self._ask(i, Replica.begin_update, in_flight, seconds=seconds(i)) for i in running}
        answers, lost = await self._each(asked)
        for index in answers:
            if index in self.members:
                self.members[index].pause()
        _raise_lost(lost)

    async def receive(self, update: Update) -> None:
        asked = {i: self._ask(i, Replica.receive, update) for i in sorted(self.members)}
        answers, lost = await self._each(asked, GRACE_S)
        for index in answers:
            self.members[index].received = True
        if self.spec.kind == "hf":  # can take the next update; vLLM cannot restart one
            lost = _dead(lost) or lost
        _raise_lost(lost)

    async def finish_update(self, version: int) -> None:
        """Resume sampling on the replicas that received everything; one that then reports another version
        than `version` is lost."""
        ready = [i for i, member in sorted(self.members.items()) if member.received]
        answers, lost = await self._each({i: self._ask(i, Replica.finish_update, version) for i in ready})
        for index, reported in answers.items():
            if reported != version:
                what = f"rollout replica {index} reports version {reported} after a push of {version}"
                lost[index] = EngineError(what)
                continue
            member = self.members[index]
            member.resume()
            member.version, member.serving = version, True
        self._reorder()
        self._dispatch_waiting()
        _raise_lost(lost)

    async def score(self, tokens: tuple[int, ...]) -> dict[int, list[float]]:
        """Return each replica's log-probs of `tokens[1:]`, each given its predecessors, under its weights."""
        indices = sorted(self.members)
        deadline = Deadline(self.config.generate_timeout_s, "rollout.generate_timeout_s")
        scored = await self._all(Replica.score, tokens, seconds=deadline)
        return dict(zip(indices, scored, strict=True))

    async def sleep(self) -> None:
        """Free the device that the engines share with the learner."""
        await self._all(Replica.sleep)

    async def wake(self) -> None:
        """Reload onto the device, and resume sampling."""
        await self._all(Replica.wake)

    async def call_workers(self, method: str, *args: Any) -> None:
        """Call a method of rft's worker extension on all replicas (vLLM only)."""
        await self._all(Replica.call_workers, method, args)

    async def _all(
        self,
        method: Callable[[Replica, *Ts], Coroutine[Any, Any, R]],
        *args: *Ts,
        seconds: float | None = None,
    ) -> list[R]:
        calls = (self._ask(i, method, *args, seconds=seconds) for i in sorted(self.members))
        return list(await asyncio.gather(*calls))

    async def _each(
        self, calls: dict[int, Coroutine[Any, Any, R]], grace_s: float | None = None
    ) -> tuple[dict[int, R], dict[int, EngineError]]:
        """Return the answers by replica, and the errors of those that failed. After the first failure, the
        others get `grace_s` to end, since they may be waiting for it. Raises errors that are not an engine's
        fault."""
        tasks = {index: asyncio.ensure_future(coroutine) for index, coroutine in calls.items()}
        answers: dict[int, R] = {}
        lost: dict[int, EngineError] = {}
        try:
            if tasks:
                _, pending = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
                if pending:
                    await asyncio.wait(pending, timeout=grace_s)
            for index, task in tasks.items():
                error = (
                    task.exception()
                    if task.done()
                    else EngineError(f"rollout replica {index} did not end its part of a failed push")
                )
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

    async def _ask(
        self,
        index: int,
        method: Callable[[Replica, *Ts], Coroutine[Any, Any, R]],
        *args: *Ts,
        seconds: float | None = None,
    ) -> R:
        member, name = self.members.get(index), method.__name__
        if member is None:
            raise ReplicaDied(index, "it is not running")
        what = f"{name} on rollout replica {index}"
        answer = getattr(member.actor, name).remote(*args)
        return await self._answer(index, member, answer, seconds or self._control_deadline, what)

    async def _answer(self, index: int, member: Member, answer: Awaitable[R], seconds: float, what: str) -> R:
        """Await an answer. Raises ReplicaDied if the replica or its engine is gone, or does not answer."""
        try:
            result: R = await call(answer, seconds, what)
        except (ActorDied, Overdue) as error:  # a replica that does not answer is treated as dead
            raise ReplicaDied(index, str(error), member.serial) from error
        except Exception as error:
            if type(error).__name__ in ("EngineDeadError", "EngineGenerateError"):  # vLLM's error classes
                raise ReplicaDied(index, f"{what}: {error}", member.serial) from error
            raise
        member.last_answer = time.monotonic()
        return result


def _dead(lost: dict[int, EngineError]) -> dict[int, EngineError]:
    return {index: error for index, error in lost.items() if isinstance(error, ReplicaDied)}


def _raise_lost(lost: dict[int, EngineError]) -> None:
    """Raise the errors of single replicas as one ReplicasLost, if there are any."""
    first = next(iter(lost.values()), None)
    if len(lost) == 1 and isinstance(first, ReplicaDied):
        raise first
    if lost:
        raise ReplicasLost({index: str(error) for index, error in lost.items()})
