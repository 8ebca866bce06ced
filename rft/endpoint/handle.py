"""The controller's side of the endpoint: start the actor, open and close sessions, answer their calls."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from ipaddress import ip_address
from itertools import count
from typing import Any

from rft.endpoint.types import Answer, Ask, Refused, SetReward
from rft.environments.types import EnvironmentFault, OperationFailed
from rft.utils.actors import ActorDied, call, kill_actor
from rft.utils.deadlines import Overdue

START_S = 60.0
CONTROL_S = 60.0
CLOSE_S = 5.0
REMEDY = "the endpoint needs aiohttp, which is not installed: pip install 'rft[agents]'"

Reply = Callable[[Ask | SetReward], Awaitable[Answer | None]]
"""Answer a call of a session. Raises Refused."""
GONE = Refused(401, "invalid_api_key", "the session has ended")


@dataclass(frozen=True)
class Access:
    """Where an open session is reached. url: of the server, without `/v1`."""

    url: str
    key: str

    def variables(self) -> dict[str, str]:
        """Return the environment variables by which clients find the session."""
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_BASE": f"{self.url}/v1",  # litellm's name
            "OPENAI_API_KEY": self.key,
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": self.key,
        }


@dataclass(eq=False)
class _Opened:
    """An open session: the function that answers its calls, the actor that it is open in (None: any), and the
    tasks of the answers."""

    reply: Reply
    actor: Any = None
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)


@dataclass
class Endpoint:
    """The endpoint of a run. It starts with its first session, and again if its actor has died.

    `counts`: calls, refused keys, busy answers and errors so far.
    """

    host: str = "127.0.0.1"
    port: int = 0  # any
    shared: Any = None  # rft.endpoint.server.Open: a session that is always open
    counts: dict[str, int] = field(default_factory=dict)
    _actor: Any = None
    _pid: int = 0
    _url: str = ""
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _pumping: asyncio.Task[None] | None = None
    _opened: dict[str, _Opened] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=count)
    _outbox: list[tuple[int, Answer | Refused | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not ip_address(self.host).is_loopback and not (self.shared and self.shared.secret):
            raise ValueError(f"an endpoint on {self.host}, beyond this machine, needs a key")

    async def start(self) -> str:
        """Start the actor unless it runs; return the URL. Raises EnvironmentFault."""
        async with self._starting:
            if self._actor is None:
                await self._start()
        return self._url

    async def _start(self) -> None:
        if find_spec("aiohttp") is None:
            raise EnvironmentFault(REMEDY)
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from rft.endpoint.actor import EndpointActor

        here = ray.get_runtime_context().get_node_id()
        remote: Any = ray.remote(EndpointActor)
        actor = remote.options(
            num_cpus=0,
            max_restarts=0,
            max_concurrency=10_000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),  # loopback
        ).remote()
        try:
            starting = actor.start.remote(self.host, self.port, self.shared)
            port, self._pid = await call(starting, START_S, "start of the endpoint")
        except (ActorDied, Overdue, OSError) as error:
            ray.kill(actor)
            raise EnvironmentFault(f"the endpoint did not start: {error}") from error
        host = f"[{self.host}]" if ":" in self.host else self.host
        self._actor, self._url = actor, f"http://{host}:{port}"
        if self.shared is not None:  # its clients expect it there, also after a restart
            self.port = port
        self._pumping = asyncio.create_task(self._pump(actor))

    async def died(self) -> None:
        """Wait until the actor has ended. The next `start` starts another one."""
        assert self._pumping is not None, "start comes first"
        await asyncio.wait({self._pumping})

    async def close(self) -> None:
        """Stop the actor."""
        if self._pumping is not None:
            self._pumping.cancel()
            await asyncio.gather(self._pumping, return_exceptions=True)
        actor, self._actor = self._actor, None
        if actor is not None:
            import ray

            try:
                await call(actor.close.remote(), CLOSE_S, "close of the endpoint")
                ray.kill(actor)
            except (ActorDied, Overdue):
                kill_actor(actor, ray.get_runtime_context().get_node_id(), self._pid)

    @asynccontextmanager
    async def session(self, label: str, context: int, reply: Reply) -> AsyncIterator[Access]:
        """Open a session for the length of a block. context: the most tokens of one call. Raises
        EnvironmentFault if the endpoint cannot be started, OperationFailed if it has died or hangs.

        At the end its key is no longer valid, and the calls in flight are cancelled.
        """
        await self.start()
        name = f"{''.join(c if c.isalnum() and c.isascii() else '.' for c in label)}-{next(self._numbers)}"
        actor = self._actor
        opened = self._opened[name] = _Opened(reply, actor)
        try:
            yield Access(self._url, await self._key(actor, name, context))
        finally:
            with suppress(ActorDied, Overdue):
                self.counts = await call(actor.end.remote(name), CONTROL_S, "a session at the endpoint")
            del self._opened[name]
            for task in opened.tasks.values():
                task.cancel()
            await asyncio.gather(*opened.tasks.values(), return_exceptions=True)

    async def _key(self, actor: Any, name: str, context: int) -> str:
        """Open a session in the actor; return its key. Raises OperationFailed: the episode is played again,
        with another actor."""
        try:
            key: str = await call(actor.open.remote(name, context), CONTROL_S, "a session at the endpoint")
        except ActorDied as error:
            raise OperationFailed(f"the endpoint died: {error}") from error
        except Overdue as error:
            if self._actor is actor:
                import ray

                kill_actor(actor, ray.get_runtime_context().get_node_id(), self._pid)
                self._actor = None
            raise OperationFailed(f"the endpoint hangs, and is started again: {error}") from error
        return key

    def share(self, name: str, reply: Reply) -> None:
        """Answer the calls of the session that is always open."""
        self._opened[name] = _Opened(reply)

    # -- calls ---------------------------------------------------------------------------------------------

    async def _pump(self, actor: Any) -> None:
        """Start the calls that arrive, until the actor ends."""
        from ray.exceptions import RayActorError

        try:
            while True:
                for item in await actor.take.remote():
                    number, name, ask = pickle.loads(item)
                    opened = self._opened.get(name)
                    if ask is None:
                        task = None if opened is None else opened.tasks.get(number)
                        if task is not None:
                            task.cancel()
                    elif opened is None:
                        self._give(number, GONE)
                    else:
                        opened.tasks[number] = asyncio.create_task(self._answer(opened, number, ask))
        except RayActorError:
            if self._actor is actor:
                self._actor = None  # the next session starts another one; the agents of these fail
            for opened in self._opened.values():
                for task in opened.tasks.values() if opened.actor in (None, actor) else ():
                    task.cancel()

    async def _answer(self, opened: _Opened, number: int, ask: Ask | SetReward) -> None:
        answer: Answer | Refused | None = GONE
        try:
            answer = await opened.reply(ask)
        except Refused as problem:
            answer = problem
        except Exception as error:  # of the engine: any caller that can reply has it too
            answer = Refused(500, "engine_error", f"{type(error).__name__}: {error}")
        finally:
            del opened.tasks[number]
            self._give(number, answer)

    def _give(self, number: int, answer: Answer | Refused | None) -> None:
        """Send an answer, together with the others of this turn of the event loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append((number, answer))

    def _flush(self) -> None:
        given, self._outbox = self._outbox, []
        if self._actor is not None:
            self._actor.give.remote(given)
