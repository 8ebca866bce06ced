"""Awaiting with a deadline, or until a stop is requested."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Self, TypeVar

from rft.errors import RunStopped
from rft.utils.signals import StopRequests

R = TypeVar("R")

ENGINES_END_S = 30.0  # to end the engines after a stop signal; then the process exits at once


class Overdue(RuntimeError):
    """A call did not finish in time; the message names it and its deadline."""


class Deadline(float):
    """Seconds allowed for a call, with the config key that sets them."""

    key: str

    def __new__(cls, seconds: float, key: str) -> Self:
        deadline = super().__new__(cls, seconds)
        deadline.key = key
        return deadline

    def __reduce__(self) -> tuple[type[Self], tuple[float, str]]:
        return type(self), (float(self), self.key)


async def within(seconds: float, what: str, awaitable: Awaitable[R]) -> R:
    """Await with a deadline. Raises Overdue, naming the config key of a `Deadline`."""
    try:
        async with asyncio.timeout(seconds):  # wait_for loses a cancellation that arrives with the answer
            return await awaitable
    except TimeoutError:
        key = f" ({seconds.key})" if isinstance(seconds, Deadline) else ""
        raise Overdue(f"{what} did not finish within {seconds:g} s{key}") from None


def stop_event(signals: StopRequests) -> asyncio.Event:
    """Return an event of the running loop that a stop request sets. The engines then have ENGINES_END_S."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def request(reason: str) -> float:
        with contextlib.suppress(RuntimeError):  # the loop is closed: only the cluster remains to be ended
            loop.call_soon_threadsafe(stop.set)
        return ENGINES_END_S

    signals.handle(request=request)
    return stop


async def unless_stopped(work: Awaitable[R], stop: asyncio.Event) -> R:
    """Await `work`, or raise RunStopped as soon as a stop is requested. For long work without results to
    save: a start, an evaluation, an export."""
    running, asked = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((running, asked), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set() and not running.done():
            raise RunStopped(None)
        return running.result()
    finally:
        asked.cancel()
        if not running.done():
            running.cancel()
            await asyncio.wait((asyncio.gather(running, return_exceptions=True),), timeout=5)
