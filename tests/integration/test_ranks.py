"""Several learner ranks as Ray actors: whole runs, resumption by another number of ranks, and faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from rft.batch import Batch
from rft.errors import TransferError
from rft.learner.workers import LearnerGroup
from rft.sync.gloo import Receiver
from rft.sync.spec import ChannelSpec, Link
from rft.utils.actors import ActorDied
from tests.integration.conftest import rft
from tests.parallel_ranks import spec

TWO = ["learner.parallel=fsdp2", "learner.ranks=2", "learner.threads=1"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_on_two_ranks_and_its_resumption_by_one(tmp_path: Path) -> None:
    args = [
        "train",
        "examples/arithmetic.yaml",
        f"output_dir={tmp_path}",
        "name=ranks",
        "warm_start=null",
        "rollout.engine=hf",
        "rollout.threads=1",
        "eval.every=0",
        "train.batch_size=4",
        "train.num_generations=4",
        "rollout.sampling.max_completion_length=8",
        "checkpoint.every=1",
        "data.options={min_operands: 2, max_operands: 2, largest: 9}",
    ]
    rft(*args, *TWO, "train.steps=2")
    done = rft(*args, "learner.parallel=single", "learner.ranks=1", "learner.threads=1", "train.steps=3")
    assert "resumed at step 2" in done.stderr
    lines = [json.loads(row) for row in (tmp_path / "ranks/metrics.jsonl").read_text().splitlines()]
    trained = [row for row in lines if "train/loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3]
    # Fresh samples of every version fit the learner: what two ranks hold in shards is what was pushed.
    assert max(row["sync/logp_gap"] for row in trained) < 1e-3
    assert trained[-1]["sync/version"] == 3


@pytest.fixture
def pair(ray_here: None, tiny_folder: Path) -> Any:
    """A group of two ranks that has taken a step."""
    own = spec(tiny_folder, parallel="fsdp2", ranks=2)
    group = LearnerGroup(own, ChannelSpec("gloo", "float32"))
    yield group
    group.kill()


def run(awaitable: Any) -> Any:
    return asyncio.run(awaitable)


async def step(group: LearnerGroup, batch: Batch, number: int) -> dict[str, float]:
    return await group.step(batch, number)


async def awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def inside(group: LearnerGroup, rank: int, work: Any) -> Any:
    """Run `work(actor)` in a rank's process."""
    import ray

    return ray.get(group._actors[rank].__ray_call__.remote(work))


@pytest.mark.timeout(300)
def test_a_killed_rank_ends_the_group_at_once_and_is_named(pair: LearnerGroup, make_groups: Any) -> None:
    batch = Batch.build(make_groups(groups=4))
    assert run(step(pair, batch, 0))["train/updates"] == 1
    pids = [inside(pair, rank, lambda actor: os.getpid()) for rank in range(2)]
    large = Batch.build(make_groups(groups=64, size=8, longest=200))

    async def killed() -> None:
        running = asyncio.ensure_future(step(pair, large, 1))
        await asyncio.sleep(1.0)
        assert not running.done()
        os.kill(pids[1], signal.SIGKILL)
        await running

    begin = time.monotonic()
    with pytest.raises(ActorDied, match=r"learner rank 1 of 2 died .* in step; all its ranks were ended"):
        run(killed())
    assert time.monotonic() - begin < 15
    with pytest.raises(ActorDied, match="learner rank 1 of 2 died"):
        run(step(pair, batch, 1))
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pids[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{pids[0]}").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_exception_on_one_rank_ends_the_group_with_its_traceback(
    pair: LearnerGroup, make_groups: Any
) -> None:
    batch = Batch.build(make_groups(groups=4))
    run(step(pair, batch, 0))

    def break_it(actor: Any) -> None:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            raise FloatingPointError("this rank's device is broken")

        actor.learner.policy.run = wrong

    inside(pair, 1, break_it)
    begin = time.monotonic()
    with pytest.raises(FloatingPointError, match="this rank's device is broken") as caught:
        run(step(pair, batch, 1))
    assert time.monotonic() - begin < 20
    assert "raised on learner rank 1 of 2" in caught.value.__notes__
    assert "in wrong" in str(caught.value.__cause__)
    with pytest.raises(ActorDied, match="learner rank 1 of 2 failed"):
        run(step(pair, batch, 1))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_engine_that_leaves_a_push_leaves_the_ranks_whole(pair: LearnerGroup, make_groups: Any) -> None:
    """They end the call together, and the next group gets everything."""
    batch = Batch.build(make_groups(groups=4))
    assert run(step(pair, batch, 0))["train/updates"] == 1
    leaving = connected(pair)
    run(awaited(pair.announce(1)))
    leaving.close()
    with pytest.raises(TransferError, match=r"(?i)connection|closed|reset|peer"):
        run(awaited(pair.send_weights()))
    assert run(step(pair, batch, 1))["train/updates"] == 1
    staying = connected(pair)
    update = run(awaited(pair.announce(2)))

    async def push() -> dict[str, Any]:
        sending = asyncio.ensure_future(pair.send_weights())
        got = await asyncio.to_thread(lambda: dict(staying.receive(update)))
        await sending
        return got

    got = run(push())
    assert len(got) == len(update["names"]) > 10 and all(bool(t.isfinite().all()) for t in got.values())


def connected(group: LearnerGroup) -> Receiver:
    """An engine's end of a channel that the ranks have opened."""

    async def both() -> Receiver:
        host, port = await group.reserve_address()
        opening = asyncio.ensure_future(group.open_channel(Link(host, port, 0, 2, 30)))
        receiver = await asyncio.to_thread(Receiver, Link(host, port, 1, 2, 30))
        await opening
        return receiver

    return run(both())
