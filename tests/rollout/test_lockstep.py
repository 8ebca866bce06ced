"""Lockstep: rounds hold the same calls in the same order, whatever takes how long, and none waits forever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from rft.config.load import parse_config
from rft.errors import ConfigError
from rft.plan import make_plan
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.lockstep import Lockstep
from tests.rollout.test_episodes import play as play_group
from tests.rollout.test_episodes import sampler

Delay = Callable[[str], float]


class Engine:
    """Notes the calls of each round: those that are in flight together."""

    def __init__(self, delay: Delay) -> None:
        self.delay, self.running = delay, 0
        self.rounds: list[list[str]] = []

    async def generate(self, request: Request) -> list[Generated]:
        if not self.running:
            self.rounds.append([])
        self.running += 1
        self.rounds[-1].append(request.id)
        try:
            await asyncio.sleep(self.delay("engine"))
            return [Generated((1,), (0.0,), "stop", ())]
        finally:
            self.running -= 1


def request(name: str) -> Request:
    return Request(name, (1,), Sampling(1, 1))


async def play(lockstep: Lockstep, delay: Delay, turns: dict[str, list[int]], again: str = "") -> None:
    """Groups of sessions with so many turns each; `a` is followed by the group `again` once it is scored."""

    async def session(group: str, place: int, count: int) -> None:
        with lockstep.session(group, place) as generate:
            for turn in range(count):
                await asyncio.sleep(delay("tool"))
                await generate(request(f"{group}{place}-{turn}"))
            await asyncio.sleep(delay("tool"))

    async def serve(group: str, counts: list[int]) -> None:
        await asyncio.sleep(delay("start"))
        await asyncio.gather(*(session(group, place, n) for place, n in enumerate(counts)))
        await asyncio.sleep(delay("reward"))
        if again and group == "a":
            lockstep.enter(again)
            tasks.append(asyncio.create_task(serve(again, [1, 2])))
        lockstep.leave(group)

    for group in turns:
        lockstep.enter(group)
    tasks = [asyncio.create_task(serve(group, counts)) for group, counts in turns.items()]
    while pending := [task for task in tasks if not task.done()]:
        await asyncio.gather(*pending)


def test_rounds_do_not_depend_on_how_long_anything_takes() -> None:
    """Sessions end early, and a group is replaced by another one once it is scored."""
    seen = []
    for seed in range(5):
        rng = random.Random(seed)

        def delay(what: str, rng: random.Random = rng) -> float:
            return rng.choice([0, 0, 0.002, 0.01])

        engine = Engine(delay)
        asyncio.run(
            asyncio.wait_for(play(Lockstep(engine.generate), delay, {"b": [4, 1], "a": [1, 2]}, "c"), 20)
        )
        seen.append(engine.rounds)
    assert all(rounds == seen[0] for rounds in seen)
    assert seen[0] == [
        ["b0-0", "b1-0", "a0-0", "a1-0"],
        ["b0-1", "a1-1"],
        ["b0-2", "c0-0", "c1-0"],
        ["b0-3", "c1-1"],
    ]


def test_a_cancelled_session_is_not_waited_for() -> None:
    """Before its round, while its call is in flight, and between: the others go on."""

    async def body() -> list[list[str]]:
        engine = Engine(lambda what: 0.01)
        lockstep = Lockstep(engine.generate)
        lockstep.enter("a")

        async def session(place: int, turns: int, tool: float = 0.0) -> None:
            with lockstep.session("a", place) as generate:
                for turn in range(turns):
                    await asyncio.sleep(tool)
                    await generate(request(f"{place}-{turn}"))

        waits, hangs, calls, stays = [
            asyncio.create_task(session(*given)) for given in ((0, 9), (1, 9, 3600.0), (2, 9), (3, 3))
        ]
        await asyncio.sleep(0.02)
        assert engine.rounds == [], "the hanging tool holds the round"
        waits.cancel()
        await asyncio.sleep(0)
        hangs.cancel()  # as its deadline does
        await asyncio.sleep(0.005)
        assert engine.rounds == [["2-0", "3-0"]]
        calls.cancel()  # in flight
        await asyncio.wait_for(stays, 10)
        for task in (waits, hangs, calls):
            with suppress(asyncio.CancelledError):
                await task
        lockstep.leave("a")
        lockstep.enter("b")
        with lockstep.session("b", 0) as generate:
            await asyncio.wait_for(generate(request("b")), 10)
        return engine.rounds

    assert asyncio.run(body()) == [["2-0", "3-0"], ["3-1"], ["3-2"], ["b"]]


def test_an_error_of_the_engine_ends_its_session_only() -> None:
    async def body() -> None:
        calls = 0

        async def fails(request: Request) -> list[Generated]:
            nonlocal calls
            calls += 1
            if request.id == "0":
                raise RuntimeError("the engine died")
            return [Generated((1,), (0.0,), "stop", ())]

        lockstep = Lockstep(fails)
        lockstep.enter("a")

        async def session(place: int) -> None:
            with lockstep.session("a", place) as generate:
                await generate(request(str(place)))
                await generate(request(f"{place} again"))

        ends = await asyncio.wait_for(
            asyncio.gather(session(0), session(1), return_exceptions=True), timeout=10
        )
        assert isinstance(ends[0], RuntimeError) and ends[1] is None and calls == 3

    asyncio.run(body())


@pytest.mark.parametrize("mode", ["hang", "dies"])
async def test_a_session_that_is_repeated_joins_the_next_round(tmp_path: Path, mode: str) -> None:
    """Two of four tools hang, or end their process, after the first turn: at their deadline the sessions
    begin again, fail again and leave; the others wait for them and are played to the end."""
    async with sampler(tmp_path, mode, step_timeout_s=1.0) as episodes:
        episodes.lockstep = Lockstep(episodes.generate)
        episodes.lockstep.enter("t")
        played = await asyncio.wait_for(play_group(episodes, tmp_path), 100)
        requests: list[Request] = episodes.generate.requests  # type: ignore[attr-defined]
    assert [c.text for c in played.completions] == ["even 1", "even 1"]
    first, second = ["t-0-0", "t-1-0", "t-2-0", "t-3-0"], ["t-0-1", "t-1-try-2-0", "t-2-1", "t-3-try-2-0"]
    assert [r.id for r in requests] == [*first, *second]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"environment": None}, "and the config has no environment"),
        ({"rollout": {"turns": "lockstep", "staleness": 1}}, "needs rollout.staleness 0, not 1"),
        ({"train": {"batch_size": 20, "num_generations": 4}}, "64, but .* the 80 sessions of a step"),
    ],
)
def test_what_lockstep_cannot_do_is_refused(more: dict[str, object], why: str) -> None:
    config = {
        "algorithm": "grpo",
        "data": {"kind": "arithmetic", "limit": 64},
        "environment": {"kind": "tools", "tools": ["calculator"]},
        "rewards": ["math"],
        "rollout": {"engine": "hf", "turns": "lockstep"},
        **more,
    }
    with pytest.raises(ConfigError, match=why):
        make_plan(parse_config(config), starts=False)
