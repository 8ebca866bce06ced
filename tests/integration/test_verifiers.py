"""SingleAgentEnv of verifiers in its own Python, the endpoint, vLLM and the learner: exact tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
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
from tests.specs import needs_smollm2, session_metrics
from tests.venvs import VERIFIERS, python_with

TASKSET = Path(__file__).parents[1] / "endpoint" / "countdown.py"
TURNS, LENGTH = 3, 12
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@contextmanager
def engine(model: Path | str) -> Iterator[Stage]:
    environment = {"kind": "command", "command": "true", "max_turns": TURNS}
    more: dict[str, Any] = {"environment": environment, "learner": {"learning_rate": 1e-5, "threads": 1}}
    stage = raise_stage(Path(model), "vllm", more=more)
    try:
        yield stage
    finally:
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


async def three_episodes(stage: Stage, folder: Path, temperature: float) -> tuple[Batch, dict[str, float]]:
    """Play a task three times; return the batch and the metrics. Every sampled token is trained once."""
    async with sampler(stage, folder) as episodes:
        prompt = Prompt(0, tuple(episodes.render.prompt("-")[1]), "-", {"task": 1})
        sampling = Sampling(1, LENGTH, temperature=temperature, seed=3)
        played = await episodes.sample("t", prompt, [Rollout()] * 3, sampling)
        metrics = session_metrics(episodes)
        faults = [e for e in read_jsonl(folder / "events.jsonl") if e["kind"].startswith("fault")]
        assert len(played.completions) == 3, faults
        assert metrics["session/ending/finished"] == 1 and metrics["session/turns"] == TURNS
        made, batch = await group(episodes, played)
    sampled = sum(turn.end - turn.start for c in made.completions for turn in c.turns)
    assert sampled == round(3 * metrics["session/tokens"]) == int(batch.mask.sum())
    assert sampled == sum(c.num_sampled for c in made.completions) > 3 * TURNS
    first = made.completions[0]
    assert [m["role"] for m in first.messages][::2] == ["assistant"] * TURNS
    assert first.scores["environment/known"].value == 0.5
    assert metrics["environment/endpoint/calls"] == 3 * TURNS
    assert metrics["environment/endpoint/errors"] == metrics["environment/endpoint/refused"] == 0
    return batch, metrics


@needs_smollm2
def test_canonical_ids_stay_one_branch(tmp_path: Path, ray_here: None) -> None:
    """The most likely text of a trained model is encoded as it was sampled."""
    with engine("smollm2") as stage:
        _, metrics = stage.run(three_episodes(stage, tmp_path, 0.0))
    assert metrics["session/branches"] == 1


def test_each_call_after_drifted_ids_is_a_branch(tmp_path: Path, ray_here: None, tiny_folder: Path) -> None:
    """The random bytes of an untrained model are encoded otherwise than they were sampled."""
    with engine(tiny_folder) as stage:
        batch, metrics = stage.run(three_episodes(stage, tmp_path, 1.0))
        trained = stage.run(stage.learner.step(batch, 0))
    assert metrics["session/branches"] == TURNS
    for turn in range(1, TURNS + 1):
        assert 0 < trained[f"session/logp_gap/{turn}"] < 1e-3
