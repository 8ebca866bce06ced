"""Episodes in real worker processes, with a policy whose answers are written in advance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
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
from rft.config.rewards import RewardsConfig
from rft.config.rollout import SamplingConfig
from rft.data.chat import Renderer
from rft.environments.runner import EnvironmentRunner
from rft.learner.objective import LogpGap
from rft.metrics import RunLog
from rft.metrics.log import read_jsonl
from rft.metrics.names import is_documented
from rft.rewards.runner import RewardRunner
from rft.rewards.types import SampleReward, Score, abstain, correct
from rft.rollout.calls import Call, lay_out
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.episodes import (
    EpisodeSampler,
    Played,
    RecordMismatch,
    _added,
    _common_start,
    check_batch,
    check_layout,
    check_versions,
    leaves,
)
from rft.rollout.sample import scored_group
from rft.rollout.session import Budget
from tests.cases.families import make_tokenizer
from tests.specs import session_metrics

END = "<|im_end|>"
PLAY = '''
import asyncio, os
async def play(row, session, mode="ok"):
    """Ask twice; the second answer pays if the policy is told so."""
    messages = [{"role": "user", "content": row["prompt"]}]
    reply = await session.chat(messages)
    if mode == "once" and not os.path.exists(row["flag"]):
        open(row["flag"], "w").close()
        raise RuntimeError("the database is away")
    if mode == "odd" and "odd" in reply.content:
        raise RuntimeError("never works")
    if mode == "hang" and "odd" in reply.content:
        await asyncio.sleep(1000)
    if mode == "dies" and "odd" in reply.content:
        os._exit(3)
    session.reward(0.25, call=reply.call)
    messages += [reply.message(), {"role": "user", "content": "again"}]
    while True:
        reply = await session.chat(messages)
        if mode != "forever":
            return {"reward": 1.0 + len(reply.content), "length": len(reply.content)}
        messages += [reply.message(), {"role": "user", "content": "again"}]
'''


class Policy:
    """Answers by the number of the sample and of the turn, which the request's name ends with."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.requests = tokenizer, list[Request]()

    async def __call__(self, request: Request) -> list[Generated]:
        self.requests.append(request)
        parts = request.id.split("-")
        sample, turn = int(parts[1]), int(parts[-1])
        text = f"{'odd' if sample % 2 else 'even'} {turn}{END}"
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [Generated(ids, (-1.0,) * len(ids), "stop", ((4, 0, len(ids)),))]


@asynccontextmanager
async def sampler(folder: Path, mode: str = "ok", **config: Any) -> AsyncIterator[EpisodeSampler]:
    (folder / "env.py").write_text(PLAY)
    settings = EnvironmentConfig(
        kind="function", path=f"{folder}/env.py:play", options={"mode": mode}, max_retries=1, **config
    )
    tokenizer = make_tokenizer()
    render, policy = Renderer(DataConfig(), tokenizer), Policy(tokenizer)
    log = RunLog(folder, 1, TrackingConfig(trackers=()))
    budget = Budget.of(settings, SamplingConfig())
    async with EnvironmentRunner(settings, folder) as runner:
        yield EpisodeSampler(runner, policy, render, settings, budget, None, log)
    log.close()


def prompt_of(episodes: EpisodeSampler, folder: Path) -> Prompt:
    tokens = tuple(episodes.render.prompt("hi")[1])
    return Prompt(3, tokens, "hi", {"flag": str(folder / "flag"), "answer": "x"})


PLAN = [Rollout()] * 4
SAMPLING = Sampling(4, 64, seed=5)


async def play(episodes: EpisodeSampler, folder: Path, plan: list[Rollout] = PLAN) -> Played:
    return await episodes.sample("t", prompt_of(episodes, folder), plan, SAMPLING, version=4)


async def test_one_session_per_planned_completion(tmp_path: Path) -> None:
    async with sampler(tmp_path) as episodes:
        played = await play(episodes, tmp_path, [Rollout()] * 3 + [Rollout(greedy=True, train=False)])
        policy = episodes.generate
        again = await play(episodes, tmp_path)
        judged = await episodes.judge(played, None)
    group = scored_group(judged, [r.train for r in played.plan])
    assert [c.reward for c in group.completions] == [7.0, 6.0, 7.0]  # 1 + the length of "even 1", "odd 1"
    assert {c.values["baseline"] for c in group.completions} == {6.0}
    assert played.prompt.tokens == again.prompt.tokens == prompt_of(episodes, tmp_path).tokens
    requests: list[Request] = policy.requests  # type: ignore[attr-defined]
    first, second = ({r.id: r.sampling for r in part} for part in (requests[:8], requests[8:]))
    assert {s.temperature for n, s in first.items() if n.startswith("t-3")} == {0.0}
    assert [first[n].seed for n in sorted(first)] == [second[n].seed for n in sorted(second)]
    assert len({s.seed for s in first.values()}) == 8 and {s.n for s in first.values()} == {1}
    completion = group.completions[0]
    assert [t.reward for t in completion.turns] == [0.25, None] and not completion.branches
    assert completion.text == "even 1" and [m["role"] for m in completion.messages] == [
        "assistant",
        "user",
        "assistant",
    ]
    assert completion.scores["environment/length"].value == 6.0
    assert completion.num_sampled == sum(turn.end - turn.start for turn in completion.turns)
    metrics = session_metrics(episodes)
    assert metrics["session/turns"] == 2 and metrics["session/branches"] == 1 and metrics["session/lost"] == 0
    assert metrics["session/ending/finished"] == 1 and metrics["session/score/length"] == 5.5
    assert metrics["session/turn_reward/1"] == 0.25 and "session/turn_reward/2" not in metrics
    assert metrics["session/tool_calls"] == 0
    assert all(is_documented(name) for name in metrics)
    assert "session/turns" not in session_metrics(episodes)


async def test_a_session_counts_in_the_step_in_which_it_ends(tmp_path: Path) -> None:
    """As in an asynchronous run: metrics are taken while sessions are in flight."""
    async with sampler(tmp_path, "odd") as episodes:
        policy = episodes.generate

        async def generate(request: Request) -> list[Generated]:
            if request.id.endswith("-1"):  # the second turn
                session_metrics(episodes)
            return await policy(request)

        episodes.generate = generate
        await play(episodes, tmp_path, [Rollout()])
        assert session_metrics(episodes)["session/turns"] == 2
        session_metrics(episodes)
        prompt = prompt_of(episodes, tmp_path)
        lost = asyncio.ensure_future(
            episodes.sample("t", prompt, [Rollout(), Rollout()], SAMPLING, version=4)
        )
        await asyncio.sleep(0.1)
        session_metrics(episodes)
        assert len((await lost).completions) == 1
        assert session_metrics(episodes)["session/lost"] == 1


async def test_a_fault_is_repeated_and_counts_for_nothing(tmp_path: Path) -> None:
    async with sampler(tmp_path, "once") as episodes:
        played = await play(episodes, tmp_path)
        metrics = session_metrics(episodes)
    assert len(played.completions) == 4 and all(len(c.turns) == 2 for c in played.completions)
    assert metrics["session/ending/environment_error"] > 0 and metrics["session/lost"] == 0
    events = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"] == "fault/environment"]
    assert events and "the database is away" in events[0]["what"] and "again" in events[0]["action"]


@pytest.mark.parametrize(
    ("mode", "ending"), [("odd", "environment_error"), ("hang", "timeout"), ("dies", "environment_error")]
)
async def test_a_sample_whose_environment_keeps_failing_leaves_its_group(
    tmp_path: Path, mode: str, ending: str
) -> None:
    async with sampler(tmp_path, mode, step_timeout_s=1.0, setup_timeout_s=20) as episodes:
        played = await play(episodes, tmp_path)
        judged = await episodes.judge(played, None)
        metrics = session_metrics(episodes)
    assert [c.text for c in played.completions] == ["even 1", "even 1"] and played.plan == [Rollout()] * 2
    assert [c.reward for c in scored_group(judged, [True] * 2).completions] == [7.0, 7.0]
    assert metrics["session/lost"] == 2 and metrics[f"session/ending/{ending}"] == 4 / 6
    events = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"] == "fault/environment"]
    assert len(events) == 4 and {e["outcome"] for e in events} == {ending}
    assert sum("leaves the group" in e["action"] for e in events) == 2


async def test_limits_are_results_of_the_policy(tmp_path: Path) -> None:
    async with sampler(tmp_path, "forever", max_turns=3) as episodes:
        played = await play(episodes, tmp_path)
        metrics = session_metrics(episodes)
    assert [(c.finish, c.reward, len(c.turns)) for c in played.completions] == [("length", 0.25, 3)] * 4
    assert metrics["session/ending/turn_limit"] == 1
    length = len(prompt_of(episodes, tmp_path).tokens)
    async with sampler(tmp_path, "forever", max_episode_tokens=length + 30) as episodes:
        played = await play(episodes, tmp_path)
        metrics = session_metrics(episodes)
    assert {c.finish for c in played.completions} == {"length"} and metrics[
        "session/ending/context_full"
    ] == 1


REWARD = """
def seen(prompts, completions, **columns):
    return [float(len(c)) for c in completions]
"""


@pytest.mark.parametrize(("transcript", "added"), [(False, 6.0), (True, 3.0)])
async def test_rewards_of_the_config_are_added(tmp_path: Path, transcript: bool, added: float) -> None:
    """They see the final message ("even 1"), or all three messages after the prompt."""
    (tmp_path / "reward.py").write_text(REWARD)
    config = RewardsConfig.model_validate({"functions": [{"function": f"{tmp_path}/reward.py:seen"}]})
    async with sampler(tmp_path, transcript=transcript) as episodes, RewardRunner(config) as rewards:
        judged = await episodes.judge(await play(episodes, tmp_path), rewards)
    assert judged.rewards[0].value == 7.0 + added
    assert next(iter(judged.rewards[0].scores)) == "seen" and "environment" in judged.rewards[0].scores


def test_rewards_that_abstain_or_fail() -> None:
    own = SampleReward(2.0, {"environment": correct(2.0)})
    assert _added(SampleReward(None, {"a": abstain()}), own).value == 2.0
    assert _added(SampleReward(None, {"a": Score(None, "error")}), own).value is None  # type: ignore[arg-type]
    assert _added(SampleReward(1.0, {"a": correct()}), SampleReward(None)).value == 1.0
    assert _added(SampleReward(None, {"a": abstain()}), SampleReward(None)).value is None


def test_the_common_start_of_prompts() -> None:
    assert _common_start([(1, 2, 3), (1, 2, 4), (1, 2)]) == (1, 2)
    assert _common_start([(1,), (2,)]) == () == _common_start([])


def call(prompt: tuple[int, ...], sampled: tuple[int, ...]) -> Call:
    return Call(prompt, sampled, (-1.0,) * len(sampled), "stop", ((0, 0, len(sampled)),))


PROMPT = (1, 2, 3)
LINEAR = [call(PROMPT, (4, 5)), call((1, 2, 3, 4, 5, 6), (7,))]
BRANCHING = [*LINEAR, call((1, 2, 9), (8, 8)), call((5,), (4,)), call((1, 2, 9, 8, 8, 1), (2, 3))]


def test_branches_are_counted() -> None:
    assert leaves(LINEAR) == 1 and leaves(BRANCHING) == 3


@pytest.mark.parametrize("calls", [LINEAR, BRANCHING])
@pytest.mark.parametrize("share", [False, True])
def test_the_check_of_every_call_finds_what_was_changed(calls: list[Call], share: bool) -> None:
    completion = lay_out(PROMPT, calls)
    check_layout(PROMPT, calls, completion)
    prompt = Prompt(0, PROMPT, "p")
    group = Group(prompt, (completion, lay_out(PROMPT, LINEAR)))
    batch = Batch.build([group], share_prefix=share)
    check_batch([group], batch)
    changes: list[Callable[[], object]] = []
    for i in range(len(completion.tokens)):
        tokens = (*completion.tokens[:i], 99, *completion.tokens[i + 1 :])
        changes.append(lambda tokens=tokens: check_layout(PROMPT, calls, replace(completion, tokens=tokens)))
    changes.append(lambda: check_layout((1, 2, 4), calls, completion))
    changes.append(lambda: check_layout(PROMPT, calls[:-1], completion))
    changes.append(
        lambda: check_layout(PROMPT, calls, replace(completion, mask=(True,) * len(completion.tokens)))
    )
    for i in range(batch.num_tokens):
        tokens = batch.tokens.clone()
        tokens[i] = 99
        changes.append(lambda tokens=tokens: check_batch([group], batch.with_(tokens=tokens)))
    changes.append(lambda: check_batch([group], batch.with_(turn=batch.turn + 1)))
    for change in changes:
        with pytest.raises(RecordMismatch):
            change()


@pytest.mark.parametrize("spans", [(), ((3, 0, 2),), ((3, 0, 1), (4, 2, 3)), ((1, 0, 3),), ((3, 0, 4),)])
def test_version_spans_must_cover_a_call(spans: tuple[tuple[int, int, int], ...]) -> None:
    whole = replace(call((1,), (2, 3, 4)), versions=((2, 0, 1), (3, 1, 3)))
    check_versions([whole], 2)
    with pytest.raises(RecordMismatch):
        check_versions([whole, replace(whole, versions=spans)], 2)


def test_gaps_are_reported_for_each_turn() -> None:
    completion = lay_out(PROMPT, BRANCHING)
    batch = Batch.build([Group(Prompt(0, PROMPT, "p"), (completion,))])
    gap, half = LogpGap(), LogpGap()
    logps = batch.sampler_logps + 0.1 * (batch.turn + 1)
    gap.add(logps, batch, 0)
    metrics = gap.metrics
    for number in range(1, 6):
        assert metrics[f"session/logp_gap/{number}"] == pytest.approx(0.1 * number, rel=1e-4)
        assert is_documented(f"session/logp_gap_mean/{number}")
    assert "turn 5" in gap.where() and LogpGap().where() == ""
    half.merge([gap, LogpGap()])
    assert half.metrics == metrics
