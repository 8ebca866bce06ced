"""Learner and engine in turn on one device: on CPU the turns alone, on a GPU memory and handles too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rft.config.metrics import TrackingConfig
from rft.metrics import Progress, RunLog
from rft.rollout.fleet import Fleet
from tests.integration.conftest import Stage, raise_stage
from tests.integration.test_sync import assert_proven, sample, step, train_and_push

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def in_turn(ray_here: None, tiny_folder: Path) -> Iterator[Stage]:
    sampling = {"max_prompt_length": 400, "max_completion_length": 48}
    rollout = {
        "engine": "vllm",
        "threads": 1,
        "kv_cache_gib": 0.1,
        "control_timeout_s": 20,
        "sampling": sampling,
    }
    stage = raise_stage(tiny_folder, "vllm", more={"rollout": rollout}, in_turn=True)
    yield stage
    stage.run(stage.pool.close())


def recorded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call on the engine and on the learner from now on, in order, by its name."""
    calls: list[str] = []
    ask, submit, generate = stage.pool._ask, stage.learner.submit, stage.pool.generate

    async def ask_to_generate(request: Any) -> Any:
        calls.append("engine generate")
        return await generate(request)

    async def ask_engine(index: int, method: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(f"engine {method.__name__}")
        return await ask(index, method, *args, **kwargs)

    def ask_learner(method: Any, *args: Any) -> Any:
        calls.append(f"learner {method.__name__}")
        return submit(method, *args)

    monkeypatch.setattr(stage.pool, "generate", ask_to_generate)
    monkeypatch.setattr(stage.pool, "_ask", ask_engine)
    monkeypatch.setattr(stage.learner, "submit", ask_learner)
    return calls


@pytest.mark.slow
def test_sleep_train_wake_push_generate(in_turn: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(in_turn, monkeypatch)
    trained, report = train_and_push(in_turn)
    pushed = report.metrics
    assert [name for name in calls if "_memory" not in name and "describe" not in name] == [
        "engine generate",
        "engine generate",
        "engine sleep",
        "learner reload",
        "learner step",
        "learner announce",
        "engine begin_update",  # its weights wake here
        "learner send_weights",
        "engine receive",
        "engine finish_update",
        "learner score_tokens",  # before it is offloaded
        "engine score",  # waits for the KV cache
        "learner offload",
        "engine wake",  # its KV cache, and requests again
    ]
    assert trained["sync/logp_gap"] < 1e-3
    assert_proven(in_turn, 1)
    figures = [f"memory/device/{turn}" for turn in ("train", "push", "rollout")]
    assert all(pushed[name] > 2**20 for name in (*figures, "memory/learner_peak"))
    assert 0 < pushed["time/switch"] < 60 and pushed["sync/version"] == 1
    calls.clear()
    trained, _ = train_and_push(in_turn)  # what was sampled after the turn came of the new weights
    assert 0 < trained["sync/logp_gap"] < 1e-3 and calls[0] == "engine generate"


@pytest.mark.slow
def test_requests_wait_while_the_engine_sleeps(in_turn: Stage) -> None:
    import asyncio

    from rft.rollout.engine import Request, Sampling

    async def asked_too_early() -> Any:
        await in_turn.channel.before_step()
        waiting = asyncio.ensure_future(in_turn.pool.generate(Request("early", (7, 8, 9), Sampling(2, 4))))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        await in_turn.channel.push(in_turn.pool.members[0].version)
        return await waiting

    assert len(in_turn.run(asked_too_early())) == 2


@pytest.mark.slow
def test_an_engine_that_dies_asleep_is_rebuilt_before_the_step(in_turn: Stage, tmp_path: Path) -> None:
    """vLLM leaves a call to a dead engine unanswered: the deadline of control calls finds it. The learner
    leaves the device for the new engine's start, and has it back for the step."""
    log = RunLog(tmp_path, 1, TrackingConfig(trackers=()))
    config = in_turn.plan.config.rollout
    fleet = Fleet(in_turn.pool, in_turn.channel, config, log, Progress(1, "test", display="off"))
    fleet.version = in_turn.pool.members[0].version
    groups = [sample(in_turn, length=6)]
    for child in psutil.Process(in_turn.pool.members[0].pid).children(recursive=True):
        child.kill()
    in_turn.run(fleet.before_step())
    assert fleet.restarts == 1 and in_turn.channel.learners_turn
    step(in_turn, groups)
    version = in_turn.run(in_turn.learner.describe()).version
    assert in_turn.run(in_turn.channel.push(version)).metrics["sync/version"] == version
    log.close()


@pytest.mark.gpu
def test_one_gpu_is_enough_for_both(ray_here: None, tiny_folder: Path) -> None:
    """The handles bring every bit, asleep means that the memory is free, and the reference comes along."""
    more = {
        "sync": {"transport": "ipc", "measure_changes": "off"},
        "algorithm": {"name": "grpo", "beta": 0.01},
        "rollout": {
            "engine": "vllm",
            "gpu_memory_utilization": 0.5,
            "sampling": {"max_prompt_length": 400, "max_completion_length": 48},
        },
    }
    stage = raise_stage(tiny_folder, "vllm", more=more)
    try:
        assert stage.plan.transport == "ipc"
        for _ in range(3):
            pushed = train_and_push(stage, bound=0.05)[1].metrics
            # Half of the GPU was the engine's: nearly all of that is free while the learner trains.
            assert pushed["memory/device/train"] < 0.5 * pushed["memory/device/rollout"]
            assert pushed["memory/device/push"] < pushed["memory/device/rollout"]
        assert sample(stage, length=9).completions
    finally:
        stage.run(stage.pool.close())
        stage.learner.kill()
