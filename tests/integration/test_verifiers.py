"""SingleAgentEnv of verifiers in its own Python, the endpoint, vLLM and the learner: exact tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rft.algorithms.base import Rollout
from rft.batch import Batch, Group, Prompt
from rft.config.data import DataConfig
from rft.config.environment import EnvironmentConfig
from rft.config.metrics import TrackingConfig
from rft.config.rollout import SamplingConfig
from rft.data.chat import Renderer
from rft.environments.runner import EnvironmentRunner
from rft.metrics import RunLog
from rft.metrics.log import read_jsonl
from rft.rollout.engine import Sampling
from rft.rollout.episodes import EpisodeSampler, Played, check_batch
from rft.rollout.sample import scored_group
from rft.rollout.session import Budget
from tests.integration.conftest import Stage, raise_stage
from tests.specs import needs_smollm2
from tests.venvs import VERIFIERS, python_with

TASKSET = Path(__file__).parents[1] / "endpoint" / "countdown.py"
TURNS, LENGTH = 3, 12
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_smollm2]


@pytest.fixture(scope="module")
def stage(ray_here: None) -> Iterator[Stage]:
    environment = {"kind": "command", "command": "true", "max_turns": TURNS}
    more: dict[str, Any] = {"environment": environment, "learner": {"learning_rate": 1e-5, "threads": 1}}
    stage = raise_stage(Path("smollm2"), "vllm", more=more)
    yield stage
    stage.run(stage.pool.close())


@asynccontextmanager
async def sampler(stage: Stage, folder: Path) -> AsyncIterator[EpisodeSampler]:
    config = EnvironmentConfig(
        kind="verifiers",
        path=str(TASKSET),
        python=python_with("RFT_VERIFIERS_PYTHON", *VERIFIERS),
        max_turns=TURNS,
        max_tokens_per_turn=LENGTH,
        max_retries=0,
        setup_timeout_s=200,
    )
    budget = Budget.of(config, SamplingConfig(max_prompt_length=400, max_completion_length=48))
    log = RunLog(folder, 1, TrackingConfig(trackers=()))
    async with EnvironmentRunner(config, folder) as runner:
        render = Renderer(DataConfig(), stage.plan.tokenizer)
        yield EpisodeSampler(runner, stage.pool.generate, render, config, budget, None, log)
    log.close()


async def group(episodes: EpisodeSampler, played: Played) -> tuple[Group, Batch]:
    """Build a batch: raises unless each sampled token follows the ids that the engine was given."""
    made = scored_group(await episodes.judge(played, None), [True] * len(played.completions))
    made = replace(
        made, completions=tuple(replace(c, reward=float(i)) for i, c in enumerate(made.completions))
    )
    batch = Batch.build([made])
    check_batch([made], batch)
    return made, batch


def test_every_sampled_token_is_trained_once(stage: Stage, tmp_path: Path) -> None:
    """Three episodes each with canonical ids (greedy), with drifting ones (hot), and as in a run.

    A renderer that encodes the history again returns canonical ids unchanged; others start a branch.
    """

    async def body() -> None:
        async with sampler(stage, tmp_path) as episodes:
            for name, temperature in (("canonical", 0.0), ("drift", 8.0), ("run", 1.0)):
                prompt = Prompt(0, tuple(episodes.render.prompt("-")[1]), "-", {"task": 1})
                sampling = Sampling(1, LENGTH, temperature=temperature, seed=3)
                played = await episodes.sample(name, prompt, [Rollout()] * 3, sampling)
                metrics = episodes.take_metrics()
                faults = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"].startswith("fault")]
                assert len(played.completions) == 3, faults
                assert metrics["session/ending/finished"] == 1 and metrics["session/turns"] == TURNS
                made, batch = await group(episodes, played)
                sampled = sum(turn.end - turn.start for c in made.completions for turn in c.turns)
                assert sampled == 3 * metrics["session/tokens"] == int(batch.mask.sum())
                assert sampled == sum(c.num_sampled for c in made.completions) > 9
                print(f"\n{name}: {sampled} tokens, {metrics['session/branches']:.2f} branches")
                if name == "canonical":
                    assert metrics["session/branches"] == 1
                if name == "drift":
                    assert metrics["session/branches"] > 2
                if name == "run":
                    batches.append(batch)
                first = made.completions[0]
                assert [m["role"] for m in first.messages][::2] == ["assistant"] * TURNS
                assert first.scores["environment/known"].value == 0.5
            assert metrics["environment/endpoint/calls"] == 27
            assert metrics["environment/endpoint/errors"] == metrics["environment/endpoint/refused"] == 0

    batches: list[Batch] = []
    stage.run(body())
    trained = stage.run(stage.learner.step(batches[0], 0))
    for turn in range(1, TURNS + 1):
        assert 0 <= trained[f"session/logp_gap/{turn}"] < 0.1
