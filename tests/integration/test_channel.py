"""Two replicas and a learner over every CPU transport: acknowledged by both, rebuilt, killed half-way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rft.errors import EngineError
from rft.rollout.pool import ReplicaDied
from rft.utils.actors import ActorDied
from tests.integration.conftest import Stage, raise_stage, with_transport
from tests.integration.test_sync import sample, step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def two_replicas(ray_here: None, tiny_folder: Path) -> Iterator[Stage]:
    stage = raise_stage(tiny_folder, "hf", replicas=2)
    yield stage
    stage.run(stage.pool.close())


def versions(stage: Stage) -> list[int]:
    """What the replicas reported at the end of the last push."""
    return [stage.pool.members[i].version for i in (0, 1)]


@pytest.mark.parametrize("transport", ["gloo", "sparse", "file"])
def test_both_replicas_hold_what_was_pushed(two_replicas: Stage, transport: str, tmp_path: Path) -> None:
    """Also after one of them was killed and built anew; a call on the dead one names it."""
    stage = with_transport(two_replicas, transport, str(tmp_path))
    stage.run(stage.channel.connect())
    stage.run(stage.channel.push(0))
    for version in (1, 2):
        step(stage, [sample(stage, length=6), sample(stage, length=7)])
        stage.run(stage.channel.push(version))
        assert versions(stage) == [version] * 2
    # sampled by one replica each: both computed with the learner's weights
    metrics = step(stage, [g for g in stage.run(both(stage))])
    assert metrics["sync/logp_gap"] < 1e-3
    import ray

    ray.kill(stage.pool.members[1].actor)
    with pytest.raises(ReplicaDied, match="rollout replica 1 died"):
        stage.run(stage.channel.push(3))
    for index in (0, 1):
        stage.run(stage.pool.rebuild(index))
    stage.run(stage.channel.connect())
    stage.run(stage.channel.push(3))
    assert versions(stage) == [3, 3]
    assert step(stage, stage.run(both(stage)))["sync/logp_gap"] < 1e-3
    stage.run(stage.channel.close())
    stage.learner.kill()


async def both(stage: Stage) -> list:
    """One group from each replica, sampled at the same time: the pool gives them to different ones."""
    import random

    from rft.batch import Completion, Group, Prompt
    from rft.rollout.engine import Request, Sampling

    requests = [Request(f"both-{random.random()}", (9, 10, 11 + i), Sampling(4, 24, seed=i)) for i in (0, 1)]
    answers = await asyncio.gather(*(stage.pool.generate(r) for r in requests))
    return [
        Group(
            Prompt(0, r.tokens, "p"),
            tuple(
                Completion(g.tokens, logps=g.logps, versions=g.versions, finish=g.finish, reward=float(k % 2))
                for k, g in enumerate(part)
            ),
        )
        for r, part in zip(requests, answers, strict=True)
    ]


@pytest.mark.parametrize("transport", ["gloo", "sparse"])
def test_a_learner_killed_half_way_ends_the_push(two_replicas: Stage, transport: str) -> None:
    """The engines stand still and wait for bytes when the learner dies: an error, and soon."""
    stage = with_transport(two_replicas, transport)
    stage.run(stage.channel.connect())
    stage.run(stage.channel.push(0))

    async def die_half_way() -> None:
        update = await stage.learner.announce(1)
        await stage.pool.begin_update("keep")
        receiving = asyncio.ensure_future(stage.pool.receive(update))
        await asyncio.sleep(0.5)
        stage.learner.kill()
        await receiving

    begin = time.monotonic()
    with pytest.raises((EngineError, ActorDied, RuntimeError)):
        stage.run(die_half_way())
    assert time.monotonic() - begin < 30
    for index in (0, 1):
        stage.run(stage.pool.rebuild(index))
