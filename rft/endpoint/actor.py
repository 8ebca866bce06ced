"""The endpoint's server in a Ray actor, which passes asks to the controller and answers back."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import time
from itertools import count

from rft.endpoint.dialect import invalid
from rft.endpoint.server import Open, Server
from rft.endpoint.types import Answer, Ask, Refused, SetReward

Item = tuple[int, str, Ask | SetReward | None]
"""(number, name of the session, the request); None: the client of an earlier number is gone."""
Given = tuple[int, Answer | Refused | None]


class EndpointActor:
    """The actor class: `ray.remote(EndpointActor)`. All of its methods run on one event loop."""

    def __init__(self) -> None:
        self._server: Server | None = None
        self._waiting: dict[int, asyncio.Future[Answer | None]] = {}
        self._numbers = count(time.monotonic_ns())  # others than those of an actor before this one
        self._items: list[bytes] = []  # pickled one by one, so that one that cannot be is refused alone
        self._filled = asyncio.Event()

    async def start(self, host: str, port: int, shared: Open | None) -> tuple[int, int]:
        """Listen; return the port and this process's id."""
        self._server = Server(self._ask, shared)
        port = await self._server.start(host, port)
        gc.collect()
        gc.freeze()
        return port, os.getpid()

    async def open(self, name: str, context: int) -> str:
        """Open a session; return its key."""
        assert self._server is not None, "start comes first"
        return self._server.open(name, context)

    async def end(self, name: str) -> dict[str, int]:
        """Close a session; return the server's counts so far."""
        assert self._server is not None
        self._server.end(name)
        return self._server.counts

    async def take(self) -> list[bytes]:
        """Wait for pickled Items, and return all that there are."""
        await self._filled.wait()
        self._filled.clear()
        items, self._items = self._items, []
        return items

    async def give(self, given: list[Given]) -> None:
        """Pass answers to the requests that wait for them."""
        for number, answer in given:
            future = self._waiting.get(number)
            if future is None or future.done():
                continue  # its client is gone
            if isinstance(answer, Refused):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()
        self._filled.set()  # ends `take`

    async def _ask(self, name: str, ask: Ask | SetReward) -> Answer | None:
        number = next(self._numbers)
        self._put(number, name, ask)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            return await future
        except asyncio.CancelledError:
            self._put(number, name, None)
            raise
        finally:
            del self._waiting[number]

    def _put(self, number: int, name: str, ask: Ask | SetReward | None) -> None:
        item: Item = (number, name, ask)
        try:
            self._items.append(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))
        except RecursionError:
            raise invalid("the request is nested too deeply") from None
        self._filled.set()
