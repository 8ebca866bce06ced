"""Worker process of one session at a time: run an environment's operations for the controller.

Messages are length-prefixed. From the controller: pickles `("call", operation, arguments)` and `("reply", id,
status, value)`. To the controller: JSON `["result", value]`, `["failed", text]`, `["limit", name]`, and from
an environment that owns its loop `["ask", id, method, arguments]`, which the controller's session answers.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import pickle
import random
import socket
import sys
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from rft.environments.rewards import UnusableReward
from rft.environments.types import ContextFull, PolicyLimit, Reply, TurnLimit
from rft.rewards.load import describe_error, finite_number
from rft.rewards.worker import HEADER, Surroundings, open_streams, out_of_the_way
from rft.utils.process import descendants
from rft.utils.stack import WHERE

LIMITS: dict[str, type[PolicyLimit]] = {"context_full": ContextFull, "turn_limit": TurnLimit}


class Channel:
    """The worker's end of the socket: blocking reads between operations, asynchronous ones during them."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()

    def send(self, *message: Any) -> None:
        data = json.dumps(message, default=plain).encode()
        self.sock.sendall(HEADER.pack(len(data)) + data)

    def receive(self) -> tuple[Any, ...]:
        """Return the next message. Raises EOFError if the controller has closed."""
        while (message := self._take()) is None:
            self._read(0)
        return message

    async def receive_async(self) -> tuple[Any, ...]:
        loop = asyncio.get_running_loop()
        while (message := self._take()) is None:
            readable: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self.sock, _set, readable)
            try:
                await readable
            finally:
                loop.remove_reader(self.sock)
            self._read(socket.MSG_DONTWAIT)
        return message

    def _read(self, flags: int) -> None:
        try:
            data = self.sock.recv(1 << 20, flags)
        except BlockingIOError:
            return
        if not data:
            raise EOFError
        self._buffer += data

    def _take(self) -> tuple[Any, ...] | None:
        if len(self._buffer) < HEADER.size:
            return None
        (size,) = HEADER.unpack_from(self._buffer)
        end = HEADER.size + size
        if len(self._buffer) < end:
            return None
        message: tuple[Any, ...] = pickle.loads(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        return message


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def plain(value: Any) -> Any:
    """Convert numbers and arrays of numpy and torch for JSON. Raises TypeError for other objects."""
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"a {type(value).__name__} cannot be sent as JSON: {value!r:.100}")


class RemoteCall:
    """A model call as seen from the worker: token ids, log-probs, and how it ended."""

    def __init__(self, index: int, prompt: list[int], sampled: list[int], logps: list[float], finish: Any):
        self.index, self.prompt, self.sampled, self.logps, self.finish = index, prompt, sampled, logps, finish


class RemoteSession:
    """The session of this episode: the same interface as in the controller, answered over the socket."""

    def __init__(self, channel: Channel, seed: int | None) -> None:
        self.seed = seed
        self._channel = channel
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        trained: bool = True,
    ) -> Reply:
        """Return the policy's answer to the messages. Raises ContextFull, TurnLimit."""
        arguments = {
            "messages": list(messages),
            "tools": tools,
            "max_tokens": max_tokens,
            "stop": list(stop),
            "trained": trained,
        }
        reply: Reply = await self._ask("chat", arguments)
        return reply

    async def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        trained: bool = True,
    ) -> RemoteCall:
        """Return the policy's continuation of the tokens. Raises ContextFull, TurnLimit."""
        arguments = {
            "tokens": list(tokens),
            "max_tokens": max_tokens,
            "stop": list(stop),
            "stop_token_ids": list(stop_token_ids),
            "trained": trained,
        }
        return RemoteCall(*await self._ask("generate", arguments))

    def reward(self, value: float, *, name: str = "reward", call: int | None = None) -> None:
        """Record a reward: of the turn `call` (an index), or of the whole session under a name."""
        if finite_number(value) is None:
            raise ValueError(f"a reward must be a finite number, not {value!r:.100}")
        self._channel.send("ask", -1, "reward", {"value": value, "name": name, "call": call})

    async def _ask(self, method: str, arguments: dict[str, Any]) -> Any:
        self._asked += 1
        number, future = self._asked, asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._channel.send("ask", number, method, arguments)
            return await future
        finally:
            del self._waiting[number]

    async def pump(self) -> None:
        """Pass the controller's answers to the calls that wait for them."""
        while True:
            _, number, status, value = await self._channel.receive_async()
            future = self._waiting.get(number)
            if future is None or future.done():
                continue  # the environment has given up waiting
            if status == "ok":
                future.set_result(value)
            elif status in LIMITS:
                future.set_exception(LIMITS[status](value))
            else:
                future.set_exception(ValueError(value))


def serve(host: Any, sock: socket.socket, where: int) -> None:
    """Run operations of `host` until the controller closes the socket. Called in a new process.

    host: an object whose methods are the operations of its kind; coroutines are awaited. `host.session` is
    the session of the current episode.
    """
    open_streams()
    sock, where = socket.socket(fileno=out_of_the_way(sock.detach())), out_of_the_way(where)
    faulthandler.enable(where, all_threads=False)
    faulthandler.register(WHERE, where, all_threads=False)
    channel, loop = Channel(sock), asyncio.new_event_loop()
    surroundings, threads, pid = Surroundings(), threading.active_count(), os.getpid()

    def begin(seed: int | None) -> None:
        surroundings.restore()
        host.session = RemoteSession(channel, seed)
        if seed is not None:
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed % 2**32)

    def end() -> bool:
        """Close the episode; return whether the process may serve another one."""
        if hasattr(host, "end"):
            run(host.end)
        if threading.active_count() > threads:
            return False
        try:  # as a subreaper it has a child as long as any process below it lives
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        left = descendants(pid)
        for kept in host.kept() if hasattr(host, "kept") else ():
            left -= {kept} | descendants(kept)
        return not left

    def run(operation: Any, *arguments: Any) -> Any:
        try:
            result = operation(*arguments)
            if asyncio.iscoroutine(result):
                result = loop.run_until_complete(_answered(result, host.session))
            return result
        finally:
            if os.getpid() != pid:  # a child forked by the environment returned from it
                os._exit(0)

    try:
        while True:
            kind, *rest = channel.receive()
            if kind != "call":  # an answer that came too late
                continue
            name, arguments = rest
            operation = {"begin": begin, "end": end}.get(name) or getattr(host, name)
            try:
                channel.send("result", run(operation, *arguments))
            except PolicyLimit as limit:
                ending = next(key for key, value in LIMITS.items() if isinstance(limit, value))
                channel.send("limit", ending)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except UnusableReward as error:
                channel.send("unusable", str(error))
            except BaseException as error:  # SystemExit and similar must not end a worker
                channel.send("failed", describe_error(error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the controller is gone, or has ended this worker


async def _answered(operation: Coroutine[Any, Any, Any], session: RemoteSession) -> Any:
    """Await an operation while the controller's answers are passed to its session."""
    pump = asyncio.ensure_future(session.pump())
    work = asyncio.ensure_future(operation)
    try:
        await asyncio.wait({work, pump}, return_when="FIRST_COMPLETED")
        if not work.done():
            pump.result()  # raises: the controller is gone
        return work.result()
    finally:
        for task in (pump, work):
            task.cancel()
        await asyncio.gather(pump, work, return_exceptions=True)
