"""Sessions with real engines, worker processes and learner: pushes, kills and resumes between turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from rft.algorithms.base import Rollout
from rft.batch import Batch, Group, Prompt
from rft.cli import main
from rft.config.data import DataConfig
from rft.config.environment import EnvironmentConfig
from rft.config.metrics import TrackingConfig
from rft.config.rollout import InFlight, SamplingConfig
from rft.data.chat import Renderer
from rft.environments.runner import EnvironmentRunner
from rft.metrics import Progress, RunLog
from rft.metrics.log import read_jsonl
from rft.rollout.engine import Generate, Generated, Request, Sampling
from rft.rollout.episodes import EpisodeSampler, Played, check_batch
from rft.rollout.fleet import Fleet
from rft.rollout.sample import scored_group
from rft.rollout.session import Budget
from tests.integration.conftest import Stage, raise_stage, rft
from tests.specs import session_metrics

PLAY = '''
import asyncio, os
async def play(row, session, turns=3, rewrite=False, gate=None):
    """Ask `turns` times. rewrite: each answer is summed up, so that the next prompt is another one."""
    messages = [{"role": "user", "content": row["prompt"]}]
    for turn in range(turns):
        reply = await session.chat(messages)
        answer = {"role": "assistant", "content": "some"} if rewrite else reply.message()
        messages += [answer, {"role": "user", "content": f"again {turn} {row['prompt']}"}]
        if gate is not None and turn == 0:
            open(f"{gate}/asked", "a").write("x")
            while not os.path.exists(f"{gate}/open"):
                await asyncio.sleep(0.02)
    return float(len(reply.content) % 3)

async def over_http(data, base_url, api_key, http_client):
    "Ask four times through the endpoint."
    messages = [{"role": "user", "content": data["prompt"]}]
    for turn in range(4):
        headers, body = {"Authorization": f"Bearer {api_key}"}, {"messages": messages}
        answer = await http_client.post(f"{base_url}/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        open(f"{os.path.dirname(__file__)}/begun", "w").close()
        message = answer.json()["choices"][0]["message"]
        messages += [message, {"role": "user", "content": f"again {turn} {data['prompt']}"}]
    return float(len(message["content"]) % 3)
'''
BLOCK = 32  # tokens that vLLM caches as one
QUESTION = "what is the sum of three and four and five? " * 2


@asynccontextmanager
async def sampler(
    stage: Stage, folder: Path, generate: Generate, function: str = "play", **options: Any
) -> AsyncIterator[EpisodeSampler]:
    (folder / "env.py").write_text(PLAY)
    config = EnvironmentConfig(kind="function", path=f"{folder}/env.py:{function}", options=options)
    render = Renderer(DataConfig(), stage.plan.tokenizer)
    budget = Budget.of(config, SamplingConfig(max_prompt_length=400, max_completion_length=48))
    async with EnvironmentRunner(config, folder) as runner:
        yield EpisodeSampler(runner, generate, render, config, replace(budget, tokens_per_turn=24), None)


async def play(episodes: EpisodeSampler, samples: int = 4) -> Played:
    tokens = tuple(episodes.render.prompt(QUESTION)[1])
    prompt = Prompt(0, tokens, QUESTION)
    return await episodes.sample("t", prompt, [Rollout()] * samples, Sampling(1, 24, seed=3))


async def group_of(episodes: EpisodeSampler, played: Played) -> Group:
    group = scored_group(await episodes.judge(played, None), [True] * len(played.completions))
    return replace(
        group, completions=tuple(replace(c, reward=float(i % 2)) for i, c in enumerate(group.completions))
    )


@pytest.mark.parametrize("rewrite", [False, True])
def test_every_turn_is_trained_in_its_context(vllm_stage: Stage, tmp_path: Path, rewrite: bool) -> None:
    """The learner's log-probs of all turns are the engine's, with and without branches, with a shared prefix
    and without; later turns find the earlier ones in the engine's cache."""

    calls: list[tuple[Request, Generated]] = []

    async def generate(request: Request) -> list[Generated]:
        (answer,) = await vllm_stage.pool.generate(request)
        calls.append((request, answer))
        return [answer]

    async def body() -> tuple[Group, dict[str, float]]:
        async with sampler(vllm_stage, tmp_path, generate, rewrite=rewrite) as episodes:
            group = await group_of(episodes, await play(episodes))
            return group, session_metrics(episodes)

    group, metrics = vllm_stage.run(body())
    assert metrics["session/turns"] == 3 and metrics["session/branches"] == (3 if rewrite else 1)
    assert metrics["session/retokenised"] == 0  # a summary is no earlier turn
    read = {(*request.tokens, *answer.tokens) for request, answer in calls}
    for request, answer in calls:  # the engine computes what follows the last whole block of the turn before
        known = max((len(ids) - 1 for ids in read if request.tokens[: len(ids)] == ids), default=0)
        assert answer.cached >= known // BLOCK * BLOCK
        assert bool(known) == (not rewrite and not request.id.endswith("-0"))
    assert metrics["session/cached"] == sum(answer.cached for _, answer in calls) / 4 > 2 * BLOCK
    for share in (False, True):
        batch = Batch.build([group], share_prefix=share)
        check_batch([group], batch)
        version = vllm_stage.run(vllm_stage.learner.describe()).version
        trained = vllm_stage.run(vllm_stage.learner.step(batch, 0))
        for turn in (1, 2, 3):
            assert 0 < trained[f"session/logp_gap/{turn}"] < 1e-3
        vllm_stage.run(vllm_stage.channel.push(version + 1))
        group = vllm_stage.run(body())[0]


@pytest.mark.parametrize(
    ("in_flight", "function"),
    [(way, "play") for way in ("keep", "continue", "wait", "abort")] + [("keep", "over_http")],
)
def test_a_push_between_and_within_turns(
    vllm_stage: Stage, tmp_path: Path, in_flight: InFlight, function: str
) -> None:
    """It acts on the calls in flight; a session goes on with the next version in its next call. Those that
    come by HTTP wait, and none fails."""
    log = RunLog(tmp_path, 1, TrackingConfig(trackers=()))
    channel, before = vllm_stage.channel, vllm_stage.pool.members[0].version
    fleet = Fleet(
        vllm_stage.pool, channel, vllm_stage.plan.config.rollout, log, Progress(1, "t", display="off")
    )
    fleet.version = fleet.held = before

    async def body() -> Group:
        options = {"turns": 4} if function == "play" else {}
        async with sampler(vllm_stage, tmp_path, fleet.generate, function, **options) as episodes:
            running = asyncio.ensure_future(play(episodes, 8))
            while function == "over_http" and not (tmp_path / "begun").exists():  # its endpoint starts
                await asyncio.sleep(0.02)
            for version in (before + 1, before + 2):
                await asyncio.sleep(0.1)
                async with fleet.gate:
                    await fleet.push(version)
            return await group_of(episodes, await running)

    channel.in_flight = in_flight
    try:
        group = vllm_stage.run(body())
    finally:
        channel.in_flight = "keep"
        log.close()
    batch = Batch.build([group], share_prefix=True)
    check_batch([group], batch)
    versions = {v for c in group.completions for v, _, _ in c.versions}
    assert len(group.completions) == 8 and versions <= {before, before + 1, before + 2}
    # `abort` samples the calls in flight again: on a slow machine both pushes fall into the first calls.
    assert len(versions) > 1 or in_flight == "abort"
    for c in group.completions:
        assert [v for v, _, _ in c.versions] == sorted(v for v, _, _ in c.versions)
        spans = [{v for v, a, b in c.versions if a < t.end and b > t.start} for t in c.turns]
        if in_flight != "keep":
            assert all(len(span) == 1 for span in spans)


@pytest.fixture(scope="module")
def hf_stage(ray_here: None, tiny_folder: Path) -> Iterator[Stage]:
    stage = raise_stage(tiny_folder, "hf", replicas=2)
    yield stage
    stage.run(stage.pool.close())


def test_an_engine_killed_between_turns_changes_nothing(hf_stage: Stage, tmp_path: Path) -> None:
    """The session's ids are in the controller: its next call goes to another replica, with the same seeds."""
    log = RunLog(tmp_path, 1, TrackingConfig(trackers=()))
    fleet = Fleet(
        hf_stage.pool, hf_stage.channel, hf_stage.plan.config.rollout, log, Progress(1, "t", display="off")
    )

    async def body() -> tuple[Played, Played]:
        gate = tmp_path / "gate"
        gate.mkdir()
        async with sampler(hf_stage, tmp_path, fleet.generate, gate=str(gate)) as episodes:
            running = asyncio.ensure_future(play(episodes, 2))
            while not (gate / "asked").exists() or len((gate / "asked").read_text()) < 2:
                await asyncio.sleep(0.05)
            psutil.Process(hf_stage.pool.members[0].pid).kill()
            (gate / "open").touch()
            return await running, await play(episodes, 2)

    killed, whole = hf_stage.run(asyncio.wait_for(body(), 200))
    log.close()
    assert killed.completions == whole.completions
    kinds = [e["kind"] for e in read_jsonl(tmp_path / "events.jsonl")]
    assert "engine/rebuilt" in kinds and "fault/environment" not in kinds


CONFIG = """
algorithm: grpo
data: {{kind: arithmetic, limit: 64}}
rewards: [{{function: math}}]
environment: {{kind: function, path: "{folder}/env.py:play", options: {{turns: 2}}, max_tokens_per_turn: 12}}
train: {{steps: 6, batch_size: 2, num_generations: 4}}
rollout: {{engine: hf, threads: 1, sampling: {{max_prompt_length: 200, max_completion_length: 120}}}}
learner: {{threads: 1}}
eval: {{every: 3, problems: 4, samples: 2}}
checkpoint: {{every: 2}}
tracking: {{display: "off", trackers: []}}
"""


def test_a_run_in_an_environment(tmp_path: Path, ray_here: None) -> None:
    """Training, evaluation and the log: transcripts, and the metrics of sessions."""
    (tmp_path / "env.py").write_text(PLAY)
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    changes = [f"output_dir={tmp_path}", "train.steps=2", "rewards=[]", "eval.every=2"]
    assert main(["train", f"{tmp_path}/run.yaml", *changes]) == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["session/turns"] == 2.0 and rows[-1]["session/branches"] == 1.0
    assert rows[-1]["session/logp_gap/2"] < 1e-3 and rows[-1]["eval/session/turns"] == 2.0
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert all([m["role"] for m in s["messages"]][:2] == ["assistant", "user"] for s in samples)
    assert {s["split"] for s in samples} == {"train", "eval"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_and_resumed_is_the_run_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(PLAY)
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    done = rft(
        "verify-resume",
        f"{tmp_path}/run.yaml",
        "rollout.turns=lockstep",
        "--steps",
        "6",
        "--kill-at",
        "3",
        f"--out={tmp_path}/out",
        timeout=590,
    )
    assert "verdict: kept" in done.stdout and "differs" not in done.stdout.lower()
