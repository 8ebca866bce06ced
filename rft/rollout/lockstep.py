"""`rollout.turns: lockstep`: send the model calls of a turn together, in sample order.

A round begins once every session in progress waits for its next call, and every prompt in progress has
sessions: so it contains the same calls in the same order, however long environments and rewards take. A
session that ended early is no longer waited for; one that is repeated after a fault is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from rft.rollout.engine import Generate, Generated, Request

Waiting = list[asyncio.Future[None]]


class Lockstep:
    """The rounds of a run. A group is entered when its prompt is handed out, in the order of samples, and
    left when it is scored: until then, the others wait for the prompt that may take its place."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._groups: dict[str, dict[int, Waiting]] = {}  # of each session: its calls that wait
        self._in_flight = 0  # calls of the current round

    def enter(self, group: str) -> None:
        """Add a group: no round begins before it has sessions that wait."""
        self._groups[group] = {}

    def leave(self, group: str) -> None:
        """Remove a group, if present."""
        self._groups.pop(group, None)
        self._next_round()

    @contextmanager
    def session(self, group: str, place: int) -> Iterator[Generate]:
        """Add sample `place` of a group while the block lasts; yields the function for its calls."""
        waiting: Waiting = []
        self._groups[group][place] = waiting

        async def generate(request: Request) -> list[Generated]:
            loop = asyncio.get_running_loop()
            turn: asyncio.Future[None] = loop.create_future()
            waiting.append(turn)
            loop.call_soon(self._next_round)  # not at once: the last call would overtake those that wait
            try:
                await turn
                return await self._generate(request)
            finally:
                if turn in waiting:  # cancelled before its round began
                    waiting.remove(turn)
                else:
                    self._in_flight -= 1
                self._next_round()

        try:
            yield generate
        finally:
            self._groups.get(group, {}).pop(place, None)
            self._next_round()

    def _next_round(self) -> None:
        """Begin a round, unless a call is in flight or a session is not ready for its next one."""
        if self._in_flight or not all(self._groups.values()):
            return
        sessions = [waiting for group in self._groups.values() for _, waiting in sorted(group.items())]
        # One session has several calls if its environment asks several questions at once.
        ready = [[turn for turn in waiting if not turn.cancelled()] for waiting in sessions]
        if not all(ready):
            return
        for waiting, calls in zip(sessions, ready, strict=True):
            for turn in calls:
                waiting.remove(turn)
                turn.set_result(None)  # the calls go on in this order
            self._in_flight += len(calls)
