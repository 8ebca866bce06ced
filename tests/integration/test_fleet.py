"""Pushes and recoveries on real actors: interrupted, at the same time, with weights that are no numbers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rft.config.metrics import TrackingConfig
from rft.errors import EngineError, LearnerError
from rft.learner.workers import LearnerActor
from rft.metrics import Progress, RunLog
from rft.metrics.log import read_jsonl
from rft.rollout.engine import Request, Sampling
from rft.rollout.fleet import Fleet
from tests.integration.conftest import Stage, raise_stage
from tests.integration.live import is_gone

PROMPT = (9, 10, 11)


@pytest.fixture(scope="module")
def stage(ray_here: None, tiny_folder: Path) -> Iterator[Stage]:
    stage = raise_stage(tiny_folder, "hf", replicas=2)
    yield stage
    stage.run(stage.pool.close())


@pytest.fixture
def fleet(stage: Stage, tmp_path: Path) -> Iterator[Fleet]:
    log = RunLog(tmp_path, 1, TrackingConfig(trackers=()))
    config = stage.plan.config.rollout.model_copy(update={"health_every_s": 0.2, "health_timeout_s": 2})
    yield Fleet(stage.pool, stage.channel, config, log, Progress(1, "test", display="off"))
    log.close()


def kinds(fleet: Fleet) -> list[str]:
    return [e["kind"] for e in read_jsonl(fleet.log.run_dir / "events.jsonl")]


def requests(count: int) -> list[Request]:
    return [Request(f"r{i}", PROMPT, Sampling(2, 8, seed=i)) for i in range(count)]


async def push(fleet: Fleet, version: int) -> None:
    async with fleet.gate:
        await fleet.push(version)


def test_a_push_interrupted_half_way(stage: Stage, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica dies after the engines were paused, before the weights are there: it is built anew, the
    other one is not, and the version arrives at both in the end."""
    receive, pids = stage.pool.receive, [m.pid for _, m in sorted(stage.pool.members.items())]

    async def dying(update: object) -> None:
        monkeypatch.setattr(stage.pool, "receive", receive)
        psutil.Process(pids[1]).kill()
        await receive(update)

    monkeypatch.setattr(stage.pool, "receive", dying)
    stage.run(push(fleet, 1))
    assert [m.version for m in stage.pool.members.values()] == [1, 1]
    assert stage.pool.members[0].pid == pids[0] and stage.pool.members[1].pid != pids[1]
    lost = [e for e in read_jsonl(fleet.log.run_dir / "events.jsonl") if e["kind"] == "engine/lost"]
    assert [e["engine"] for e in lost] == [1] and "rollout replica 1 died" in lost[0]["reason"]
    assert kinds(fleet).count("engine/rebuilt") == 1
    done = stage.run(asyncio.wait_for(answered_by_both(fleet), 60))
    assert {v for part in done for g in part for v, _, _ in g.versions} == {1}


async def answered_by_both(fleet: Fleet) -> list[list[Any]]:
    """Two requests at once: the pool gives them to different replicas."""
    return await asyncio.gather(*(fleet.generate(r) for r in requests(2)))


@pytest.mark.parametrize("phase", ["begin_update", "finish_update"])
def test_a_replica_dies_in_another_part_of_a_push(
    stage: Stage, fleet: Fleet, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pids = getattr(stage.pool, phase), [m.pid for _, m in sorted(stage.pool.members.items())]

    async def dying(*args: object) -> None:
        monkeypatch.setattr(stage.pool, phase, before)
        psutil.Process(pids[0]).kill()
        await before(*args)

    monkeypatch.setattr(stage.pool, phase, dying)
    stage.run(asyncio.wait_for(push(fleet, 1), 120))
    assert stage.pool.members[1].pid == pids[1] and stage.pool.members[0].pid != pids[0]
    assert [m.version for m in stage.pool.members.values()] == [1, 1]
    assert kinds(fleet).count("engine/lost") == kinds(fleet).count("engine/rebuilt") == 1
    stage.run(asyncio.wait_for(answered_by_both(fleet), 60))


@pytest.mark.parametrize(
    ("part", "error"), [("connect", RuntimeError("a bug")), ("push", TypeError("another bug"))]
)
def test_a_mistake_in_the_program_is_raised_at_once(
    stage: Stage, fleet: Fleet, part: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No engine is built anew for it."""

    async def wrong(*args: object) -> None:
        raise error

    monkeypatch.setattr(stage.pool, "receive" if part == "push" else "join", wrong)
    with pytest.raises(type(error), match=str(error)) as raised:
        stage.run(fleet.open(1))
    assert raised.value is error and "engine/lost" not in kinds(fleet)
    monkeypatch.undo()
    if part == "push":  # the learner sends until the engines end
        stage.run(stage.pool.rebuild_all((0, 1)))
    stage.run(asyncio.wait_for(fleet.open(1), 60))  # it does not go on waiting for the engines


def test_the_first_fault_is_named_when_it_gives_up(
    stage: Stage, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = iter(["the first one", "the second one"])

    async def failing(*args: object) -> None:
        raise EngineError(next(faults))

    async def rebuilt(indices: list[int]) -> None:
        assert indices == [0, 1]

    fleet.config = fleet.config.model_copy(update={"max_restarts": 1})
    monkeypatch.setattr(stage.pool, "rebuild_all", rebuilt)
    monkeypatch.setattr(fleet.channel, "push", failing)
    with pytest.raises(EngineError) as raised:
        stage.run(push(fleet, 1))
    told = str(raised.value)
    assert "the first one" in told and "the second one" in told and "rebuilt 1 times" in told
    assert str(raised.value.__cause__) == "the first one"
    monkeypatch.undo()
    fleet.progressed()
    stage.run(fleet.open(1))


def test_a_replica_dies_with_requests_while_pushes_go_on(stage: Stage, fleet: Fleet) -> None:
    """The race of asynchronous training: requests recover a replica while versions are pushed. Everything is
    answered, by engines that hold a version which was pushed."""

    async def all_at_once() -> list[list[int]]:
        running = [asyncio.ensure_future(fleet.generate(r)) for r in requests(24)]
        await asyncio.sleep(0.05)
        psutil.Process(stage.pool.members[0].pid).kill()
        for version in (2, 3, 4):
            await push(fleet, version)
            await asyncio.sleep(0.05)
        return [[v for g in part for v, _, _ in g.versions] for part in await asyncio.gather(*running)]

    stage.run(push(fleet, 1))
    versions = stage.run(all_at_once())
    assert len(versions) == 24 and set().union(*versions) <= {1, 2, 3, 4}
    assert {m.version for m in stage.pool.members.values()} == {4}
    assert fleet.requeued >= 1 and fleet.metrics()["engine/alive"] == 2


def test_what_nobody_waits_for_is_sampled_no_further(stage: Stage, fleet: Fleet) -> None:
    """Both replicas are given up in the middle of a long request, and free for a short one at once."""

    async def seconds(cancel: bool) -> float:
        began = time.monotonic()
        long = [Request(f"long-{i}-{cancel}", PROMPT, Sampling(4, 400, seed=i)) for i in (0, 1)]
        running = [asyncio.ensure_future(fleet.generate(r)) for r in long]
        if cancel:
            while not all([await stage.pool.health(i, 30) for i in (0, 1)]):
                await asyncio.sleep(0.01)
            began = time.monotonic()
            for task in running:
                task.cancel()
        await asyncio.wait(running)
        assert len(await fleet.generate(requests(1)[0])) == 2
        return time.monotonic() - began

    stage.run(push(fleet, 4))
    whole = stage.run(seconds(cancel=False))
    assert stage.run(seconds(cancel=True)) < whole / 2


async def cancelled_when(fleet: Fleet, kind: str) -> None:
    """Have a request find replica 0 dead, and cancel it once there was an event of this kind."""
    psutil.Process(fleet.pool.members[0].pid).kill()
    request = asyncio.ensure_future(fleet.generate(requests(1)[0]))  # the first of those without work gets it
    while kind not in kinds(fleet):
        await asyncio.sleep(0.01)
    request.cancel()
    await asyncio.wait([request])
    assert request.cancelled()


def test_a_recovery_outlives_the_request_that_noticed(stage: Stage, fleet: Fleet) -> None:
    async def recovered() -> None:
        await cancelled_when(fleet, "engine/lost")
        while "engine/rebuilt" not in kinds(fleet):
            await asyncio.sleep(0.05)

    stage.run(push(fleet, 5))
    stage.run(asyncio.wait_for(recovered(), 60))
    assert sorted(stage.pool.members) == [0, 1]
    assert {m.version for m in stage.pool.members.values()} == {5}


def test_a_recovery_that_failed_ends_the_watch(
    stage: Stage, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody waits for it any more: without the replica the run would wait for ever."""
    recover = fleet._recover

    async def give_up(lost: list[int], what: str, error: EngineError) -> None:
        fleet.log.event("engine/lost", engine=lost[0], reason=str(error), held=0)
        await asyncio.sleep(0.2)
        raise EngineError("giving up")

    monkeypatch.setattr(fleet, "_recover", give_up)
    stage.run(asyncio.wait_for(cancelled_when(fleet, "engine/lost"), 60))
    with pytest.raises(EngineError, match="giving up"):
        stage.run(asyncio.wait_for(fleet.watch_health(), 10))
    stage.run(recover([0], "the test is over", EngineError("given up")))


def test_until_a_push_has_ended_engines_hold_the_version_before(
    stage: Stage, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed out meanwhile may still be sampled by it."""
    finish, seen = stage.pool.finish_update, []

    async def finish_update(version: int) -> None:
        seen.append(fleet.held)
        await finish(version)

    stage.run(push(fleet, 5))
    monkeypatch.setattr(stage.pool, "finish_update", finish_update)
    stage.run(push(fleet, 6))
    assert seen == [5] and fleet.held == 6


def test_a_frozen_replica_is_found_by_its_health(stage: Stage, fleet: Fleet) -> None:
    victim = psutil.Process(stage.pool.members[0].pid)

    async def frozen() -> None:
        watching = asyncio.ensure_future(fleet.watch_health())
        victim.suspend()
        while "engine/rebuilt" not in kinds(fleet):
            await asyncio.sleep(0.05)
        watching.cancel()

    stage.run(push(fleet, 5))
    stage.run(asyncio.wait_for(frozen(), 60))
    assert is_gone(victim)
    assert {m.version for m in stage.pool.members.values()} == {5}


@pytest.mark.slow
def test_it_gives_up_after_as_many_rebuilds_as_it_may(stage: Stage, fleet: Fleet) -> None:
    fleet.config = fleet.config.model_copy(update={"max_restarts": 1})
    for allowed in (True, False):
        psutil.Process(stage.pool.members[1].pid).kill()
        if allowed:
            stage.run(push(fleet, 6))
        else:
            with pytest.raises(EngineError, match="rebuilt 1 times since the last finished step"):
                stage.run(push(fleet, 6))
    fleet.progressed()
    stage.run(push(fleet, 7))


def test_weights_that_are_no_numbers_are_not_pushed(stage: Stage, fleet: Fleet) -> None:
    """One infinite weight: told, and nothing is sent."""
    (actor,) = stage.learner._actors
    version = stage.run(stage.learner.describe()).version
    stage.run(push(fleet, 8))
    was = ray.get(actor.__ray_call__.remote(exchange_a_weight, math.inf))
    with pytest.raises(LearnerError, match=f"weights of version {version} are not finite"):
        stage.run(push(fleet, 9))
    assert "engine/lost" not in kinds(fleet)
    assert ray.get(actor.__ray_call__.remote(exchange_a_weight, was)) == math.inf


def exchange_a_weight(actor: LearnerActor, value: float) -> float:
    """Set the first weight; returns what it was."""
    _, tensor = next(actor.learner.weights())
    weight = tensor.detach().view(-1)
    was = float(weight[0])
    weight[0] = value
    return was
