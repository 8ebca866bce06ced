"""OpenAI's client in programs, the endpoint, vLLM and the learner: exact tokens through all of them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rft.algorithms.base import Rollout
from rft.batch import Batch, Group, Prompt
from rft.config.data import DataConfig
from rft.config.environment import EnvironmentConfig
from rft.config.metrics import TrackingConfig
from rft.config.rollout import SamplingConfig
from rft.data.chat import Renderer
from rft.environments.runner import EnvironmentRunner
from rft.metrics import Progress, RunLog
from rft.metrics.log import read_jsonl
from rft.rollout.engine import Generate, Sampling
from rft.rollout.episodes import EpisodeSampler, check_batch
from rft.rollout.fleet import Fleet
from rft.rollout.sample import scored_group
from rft.rollout.session import Budget
from tests.integration.conftest import Stage, raise_stage
from tests.specs import session_metrics

AGENT = """
import json, os, time
from openai import OpenAI

row = json.load(open(os.environ["RFT_ROW"]))
client = OpenAI(max_retries=0)
parameters = {"type": "object", "properties": {}}
tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
messages = [{"role": "user", "content": row["prompt"]}]
length = 0
for turn in range(3):
    stream = client.chat.completions.create(
        model="m", messages=messages, tools=tools, stop=["zzz"], stream=True, max_tokens=12
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    length += len(text)
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"again {turn}"}]
    time.sleep(0.3)
title = [{"role": "user", "content": "title"}]
client.chat.completions.create(model="rft-untrained", messages=title, max_tokens=4)
client.completions.create(model="m", prompt="one two three", max_tokens=8)
print(float(length % 3))
"""


@pytest.fixture(scope="module")
def stage(ray_here: None, tiny_folder: Path) -> Iterator[Stage]:
    environment = {"kind": "command", "command": "true", "max_turns": 5}
    stage = raise_stage(tiny_folder, "vllm", more={"environment": environment})
    yield stage
    stage.run(stage.pool.close())


@asynccontextmanager
async def sampler(stage: Stage, folder: Path, generate: Generate) -> AsyncIterator[EpisodeSampler]:
    (folder / "agent.py").write_text(AGENT)
    config = EnvironmentConfig.model_validate(
        {"kind": "command", "command": [sys.executable, str(folder / "agent.py")], "max_retries": 0}
    )
    render = Renderer(DataConfig(), stage.plan.tokenizer)
    budget = Budget.of(config, SamplingConfig(max_prompt_length=400, max_completion_length=48))
    log = RunLog(folder, 1, TrackingConfig(trackers=()))
    async with EnvironmentRunner(config, folder) as runner:
        yield EpisodeSampler(
            runner, generate, render, config, replace(budget, tokens_per_turn=24), "json", log
        )
    log.close()


async def play(episodes: EpisodeSampler, samples: int) -> Group:
    question = "what is the sum of three and four?"
    prompt = Prompt(0, tuple(episodes.render.prompt(question)[1]), question)
    played = await episodes.sample("t", prompt, [Rollout()] * samples, Sampling(1, 24, seed=3))
    group = scored_group(await episodes.judge(played, None), [True] * len(played.completions))
    scored = (replace(c, reward=float(i % 2)) for i, c in enumerate(group.completions))
    return replace(group, completions=tuple(scored))


def test_every_sampled_token_is_trained_once(stage: Stage, tmp_path: Path) -> None:
    """Three streamed turns, a call for a title, and a text prompt; then the same while weights are pushed."""

    async def body() -> tuple[Group, dict[str, float]]:
        async with sampler(stage, tmp_path, stage.pool.generate) as episodes:
            return await play(episodes, 3), session_metrics(episodes)

    group, metrics = stage.run(body())
    faults = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"] == "fault/environment"]
    assert len(group.completions) == 3, faults
    assert metrics["session/turns"] == 5 and metrics["environment/endpoint/calls"] == 15
    assert metrics["environment/endpoint/errors"] == metrics["environment/endpoint/refused"] == 0
    batch = Batch.build([group])
    check_batch([group], batch)
    sampled = sum(turn.end - turn.start for c in group.completions for turn in c.turns)
    assert int(batch.mask.sum()) == sampled > 0
    trained = stage.run(stage.learner.step(batch, 0))
    for turn in (1, 2, 3):
        assert 0 < trained[f"session/logp_gap/{turn}"] < 1e-3


def test_a_push_pauses_calls_and_fails_none(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    log = RunLog(tmp_path / "log", 1, TrackingConfig(trackers=()))
    fleet = Fleet(stage.pool, stage.channel, stage.plan.config.rollout, log, Progress(1, "t", display="off"))
    before = fleet.version = fleet.held = stage.pool.members[0].version

    async def body() -> tuple[Group, dict[str, float]]:
        async with sampler(stage, tmp_path, fleet.generate) as episodes:
            running = asyncio.ensure_future(play(episodes, 4))
            version = before
            while not running.done():
                await asyncio.wait({running}, timeout=0.5)
                version += 1
                async with fleet.gate:
                    await fleet.push(version)
            return await running, session_metrics(episodes)

    group, metrics = stage.run(body())
    log.close()
    assert len(group.completions) == 4 and metrics["session/ending/finished"] == 1
    assert metrics["environment/endpoint/calls"] == 20 and metrics["environment/endpoint/errors"] == 0
    versions = {v for c in group.completions for v, _, _ in c.versions}
    assert len(versions) > 1
    check_batch([group], Batch.build([group]))
