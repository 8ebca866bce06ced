"""The pool on simulated and on real actors: what is sent at once, what waits, and which time counts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rft.config.load import parse_config
from rft.loops.evaluate import evaluate
from rft.plan import make_plan
from rft.rollout import pool as pool_module
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.pool import ReplicaDied, RolloutPool
from tests.simulated import SimPool, SimReplica, SimRewards
from tests.slow_replica import DONE, SlowReplica
from tests.specs import engine_spec


def request(name: object, n: int = 1) -> Request:
    return Request(str(name), (5, 6), Sampling(n, 4))


class Held(SimReplica):
    """An engine that answers when it is told to."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.asked: dict[str, asyncio.Future[None]] = {}
        self.cancelled: list[str] = []

    async def generate(self, request: Request) -> list[Generated]:
        self.asked[request.id] = asyncio.get_running_loop().create_future()
        await self.asked[request.id]
        return [DONE] * request.sampling.n

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


class Pool(SimPool):
    """Keeps its engines at hand."""

    replica = Held

    async def _start(self, index: int) -> None:
        await super()._start(index)
        self.engines = getattr(self, "engines", {}) | {index: self.members[index].actor._target}


async def started(folder: Path, timeout_s: float = 60, kind: Any = "vllm", **changes: Any) -> Any:
    config = {"max_num_seqs": 4, "generate_timeout_s": timeout_s, **changes}
    pool = Pool(replace(engine_spec(folder, **config), kind=kind))
    await pool.start()
    return pool


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_replica_gets_twice_what_it_decodes_and_the_rest_in_order(tmp_path: Path) -> None:
    pool = await started(tmp_path)
    running = [asyncio.ensure_future(pool.generate(request(i, n=2))) for i in range(12)]
    await settled()
    engine = pool.engines[0]
    assert list(engine.asked) == ["0", "1", "2", "3"] and pool.load(0) == 8
    running[5].cancel()  # waits: its place in the line is gone, and the engine never hears of it
    running[1].cancel()  # runs: the engine is told, and the next one comes
    await settled()
    assert list(engine.asked) == ["0", "1", "2", "3", "4"] and engine.cancelled == ["1"]
    for name in ("0", "2"):
        engine.asked[name].set_result(None)
    await settled()
    assert list(engine.asked)[5:] == ["6", "7"] and pool.load(0) == 8
    while not all(task.done() for task in running):
        for future in engine.asked.values():
            if not future.done():
                future.set_result(None)
        await settled()
    assert pool.load(0) == 0 and not pool.members[0].dispatched
    assert [len(task.result()) for i, task in enumerate(running) if i not in (1, 5)] == [2] * 10


async def test_the_turns_of_a_session_go_to_the_replica_that_has_the_earlier_ones(tmp_path: Path) -> None:
    """Unless it has a round of completions (4) more to do than another, or was lost."""
    pool = await started(tmp_path, replicas=2)

    async def turn(name: str) -> int:
        before = [set(engine.asked) for engine in pool.engines.values()]
        task = asyncio.ensure_future(pool.generate(replace(request(name), session="s")))
        await settled()
        (index,) = (i for i, engine in pool.engines.items() if set(engine.asked) - before[i])
        pool.engines[index].asked[name].set_result(None)
        await task
        return int(index)

    async def busy(n: int) -> asyncio.Task[list[Generated]]:
        """Keep replica 0, the first of equals, busy with `n` completions."""
        task = asyncio.create_task(pool.generate(request(f"busy-{n}", n=n)))
        await settled()
        assert (pool.load(0), pool.load(1)) == (n, 0)
        return task

    assert await turn("a") == 0
    task = await busy(3)
    assert await turn("b") == 0
    pool.engines[0].asked["busy-3"].set_result(None)
    await task
    task = await busy(4)
    assert await turn("c") == 1
    pool.engines[0].asked["busy-4"].set_result(None)
    await task
    assert await turn("d") == 1
    pool.kill(1)
    assert await turn("e") == 0


async def test_a_request_larger_than_the_room_is_sent_to_an_idle_replica(tmp_path: Path) -> None:
    pool = await started(tmp_path)
    running = [asyncio.ensure_future(pool.generate(request(i, n=n))) for i, n in enumerate((50, 1))]
    await settled()
    engine = pool.engines[0]
    assert list(engine.asked) == ["0"], "the other one waits, though small: first come, first served"
    engine.asked["0"].set_result(None)
    await settled()
    engine.asked["1"].set_result(None)
    assert [len(part) for part in await asyncio.gather(*running)] == [50, 1]


async def test_one_cancelled_in_the_moment_that_it_gets_its_place_gives_it_back(tmp_path: Path) -> None:
    pool = await started(tmp_path)
    pool.members[0].serving = False
    waits = asyncio.ensure_future(pool.generate(request("a")))
    await settled()
    pool.members[0].serving = True
    pool._reorder()
    pool._dispatch_waiting()
    waits.cancel()
    await settled()
    assert waits.cancelled() and pool.load(0) == 0 and not pool.members[0].dispatched


@pytest.mark.parametrize("kind", ["vllm", "hf"])
async def test_time_in_a_queue_is_no_time_of_work(tmp_path: Path, kind: str) -> None:
    """Requests answered one after another: all wait longer than the deadline, none is worked on that long."""
    pool = await started(tmp_path, timeout_s=0.5, kind=kind, max_num_seqs=1 if kind == "vllm" else 4)
    running = [asyncio.ensure_future(pool.generate(request(i))) for i in range(8)]
    for i in range(8):
        await asyncio.sleep(0.15)
        pool.engines[0].asked[str(i)].set_result(None)
    assert await asyncio.gather(*running) == [[DONE]] * 8


async def test_time_of_a_push_is_no_time_of_work(tmp_path: Path) -> None:
    pool = await started(tmp_path, timeout_s=0.3)
    running = asyncio.ensure_future(pool.generate(request("a")))
    await settled()
    await pool.begin_update("keep")
    await asyncio.sleep(0.6)
    await pool.receive({"version": 1})
    await pool.finish_update(1)
    pool.engines[0].asked["a"].set_result(None)
    assert await running == [DONE]


async def test_an_engine_that_works_too_long_on_a_request_counts_as_dead(tmp_path: Path) -> None:
    pool = await started(tmp_path, timeout_s=0.2)
    with pytest.raises(ReplicaDied, match="generate on rollout replica 0 did not finish within 0 s of work"):
        await asyncio.wait_for(pool.generate(request("a")), 10)


# -- real actors ---------------------------------------------------------------------------------------


@pytest.mark.timeout(200)
def test_control_calls_do_not_wait_behind_queued_completions(
    ray_here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two thousand calls, whoever sent them: health is answered at once, and a push would be."""
    monkeypatch.setattr(pool_module, "Replica", SlowReplica)
    pool = RolloutPool(engine_spec(tmp_path, max_num_seqs=4))

    async def body() -> tuple[float, int]:
        await pool.start()
        await pool.generate(request("warm"))
        actor = pool.members[0].actor
        behind = [actor.generate.remote(request(f"direct-{i}")) for i in range(1500)]
        sent = [asyncio.ensure_future(pool.generate(request(f"pool-{i}"))) for i in range(1000)]
        await asyncio.sleep(0.5)
        began = time.monotonic()
        load = await pool.health(0, 60)
        seconds = time.monotonic() - began
        for task in sent:
            task.cancel()
        await asyncio.wait(sent)
        await actor.cancel.remote("direct-0")
        assert pool.load(0) == 0 and len(behind) == 1500
        pool.kill(0)
        return seconds, load

    seconds, load = asyncio.run(body())
    assert seconds < 1 and load > 0


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_an_evaluation_as_large_as_gsm8k_lets_control_calls_pass(
    ray_here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path
) -> None:
    """1,319 problems, sampled and greedy, are 2,638 calls. A replica is sent twice what it decodes at
    once, and answers for its health meanwhile."""
    monkeypatch.setattr(pool_module, "Replica", SlowReplica)
    slots = 64
    plan = make_plan(
        parse_config(
            {
                "algorithm": "grpo",
                "model": {"path": str(tiny_folder)},
                "data": {"kind": "arithmetic", "limit": 64, "eval_limit": 1319},
                "rewards": [{"function": "math"}],
                "rollout": {"engine": "hf", "sampling": {"max_completion_length": 4}},
                "eval": {"problems": 1319, "samples": 1},
            }
        )
    )
    assert plan.eval_sets
    pool = RolloutPool(engine_spec(tmp_path, max_num_seqs=slots))
    rewards = SimRewards(plan.config.rewards, tmp_path)
    rewards.judge = lambda prompt, n: [1.0] * n

    async def body() -> tuple[dict[str, float], list[tuple[float, int]]]:
        await pool.start()
        evaluation = evaluate(
            pool.generate,
            rewards,
            plan.tokenizer,
            plan.eval_sets,
            plan.config,
            label="eval-0",
        )
        running, asked = asyncio.ensure_future(evaluation), []
        while not running.done():
            began = time.monotonic()
            load = await pool.health(0, 60)
            asked.append((time.monotonic() - began, load))
            await asyncio.sleep(0.2)
        metrics, _ = await running
        pool.kill(0)
        return metrics, asked

    metrics, asked = asyncio.run(body())
    assert metrics["eval/problems"] == 1319
    assert metrics["eval/accuracy"] == metrics["eval/greedy_accuracy"] == 1.0
    assert len(asked) > 5, "it took no time, so nothing was queued"
    assert max(seconds for seconds, _ in asked) < 2
    assert slots <= max(load for _, load in asked) <= pool_module.QUEUED * slots
