"""Sources of a mixture in environments of their own, beside a source whose rows have one completion each."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rft.batch import Batch, Group
from rft.config.load import parse_config
from rft.config.schema import Config
from rft.config.validate import problems
from rft.data import PromptSet, load_prompts
from rft.data.chat import Renderer
from rft.environments.sources import together
from rft.loops.evaluate import evaluate
from rft.preflight.data import EvalSet
from rft.preflight.environment import check_environment, longest_prompts
from rft.preflight.rewards import check_run_rewards
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.episodes import EpisodeGroupSampler, Episodes, check_batch, make_episodes
from rft.run_training import make_environments, make_rewards, start_environments
from tests.specs import facts

PLAY = '''
async def play(row, session):
    """Ask twice."""
    messages = [{"role": "user", "content": row["prompt"]}]
    for _ in range(2):
        reply = await session.chat(messages)
        messages += [reply.message(), {"role": "user", "content": "again"}]
    return 2.0

def half(prompts, completions, **columns):
    return [0.5 for _ in completions]
'''
TOOLS = {"kind": "tools", "tools": ["calculator"]}


def config(folder: Path, **changes: Any) -> Config:
    """Sources `asks` (an environment of two turns), `tools` (the calculator) and `plain` (none)."""
    (folder / "env.py").write_text(PLAY)
    for name in ("asks", "tools", "plain"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": f"{name} 3+4?", "answer": "7"}) + "\n")
    play = {"kind": "function", "path": f"{folder}/env.py:play", "max_episode_tokens": 400}
    mixture = {
        "asks": {"path": f"{folder}/asks.jsonl", "system": "Be brief.", "environment": play},
        "tools": {"path": f"{folder}/tools.jsonl", "environment": {**TOOLS, "max_episode_tokens": 1000}},
        "plain": {"path": f"{folder}/plain.jsonl"},
    }
    raw = {
        "algorithm": "grpo",
        "data": {"mixture": mixture},
        "rewards": [{"function": f"{folder}/env.py:half"}],
        "rollout": {"sampling": {"max_prompt_length": 200, "max_completion_length": 24}},
    }
    return parse_config({**raw, **changes})


@dataclass
class Policy:
    """Writes `seven` to every request."""

    tokens: tuple[int, ...]
    requests: list[Request]

    async def __call__(self, request: Request) -> list[Generated]:
        self.requests.append(request)
        count = len(self.tokens)
        one = Generated(self.tokens, (-1.0,) * count, "stop", ((0, 0, count),))
        return [one] * request.sampling.n


@dataclass
class Playground:
    config: Config
    prompts: PromptSet
    policy: Policy
    episodes: Episodes
    groups: EpisodeGroupSampler

    async def group(self, source: str) -> Group:
        (prompt,) = (p for p in self.prompts.prompts if p.columns["mixture_source"] == source)
        return (await self.groups.sample(prompt, Sampling(2, 24, seed=5), f"of-{source}", 0, 0.0))[0]


@asynccontextmanager
async def playground(folder: Path, tokenizer: Any) -> AsyncIterator[Playground]:
    made = config(folder)
    ends = tokenizer(f"seven{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
    policy = Policy(tuple(ends), [])
    environments, rewards = make_environments(made), make_rewards(made)
    assert environments is not None
    try:
        await start_environments(environments, rewards)
        episodes = make_episodes(made, environments, policy, tokenizer)
        render = Renderer(made.data, tokenizer)
        groups = EpisodeGroupSampler(made.algorithm, policy, rewards, render, episodes)
        yield Playground(made, load_prompts(made.data, tokenizer), policy, episodes, groups)
    finally:
        await environments.close()
        await rewards.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


async def test_each_source_is_played_in_its_environment(tmp_path: Path, tokenizer: Any) -> None:
    async with playground(tmp_path, tokenizer) as ground:
        groups = [await ground.group(name) for name in ("asks", "tools", "plain")]
        metrics = ground.episodes.take_metrics()
        requests, rewards = list(ground.policy.requests), ground.groups.rewards
        held_out = EvalSet("", ground.prompts, ground.config.eval, 24)
        evaluated, _ = await evaluate(
            ground.policy,
            rewards,
            tokenizer,
            [held_out],
            ground.config,
            label="eval",
            episodes=ground.episodes,
        )
    assert [[c.reward for c in group.completions] for group in groups] == [[2.5] * 2, [0.5] * 2, [0.5] * 2]
    assert [len(c.turns) for group in groups for c in group.completions] == [2, 2, 1, 1, 0, 0]
    batch = Batch.build(groups)
    check_batch(groups, batch)
    assert int(batch.mask.sum()) == 8 * len(ground.policy.tokens)
    assert metrics["environment/episodes"] == 4 and metrics["session/turns"] == 1.5
    assert evaluated["eval/session/turns"] == 1.5
    texts = {request.id: tokenizer.decode(request.tokens) for request in requests}
    assert {i for i, text in texts.items() if "Be brief." in text} == {i for i in texts if "of-asks" in i}
    assert {i for i, text in texts.items() if "calculator" in text} == {i for i in texts if "of-tools" in i}


def test_metrics_of_several_environments() -> None:
    one = {"environment/episodes": 3.0, "environment/tool_calls": 2.0, "environment/tool_errors": 0.5}
    two = {"environment/episodes": 1.0, "environment/tool_calls": 6.0, "environment/tool_errors": 1.0}
    idle = {"environment/episodes": 0.0, "environment/workers/started": 2.0}
    assert together([one, two, idle]) == pytest.approx(
        {
            "environment/episodes": 4.0,
            "environment/tool_calls": 3.0,
            "environment/tool_errors": 0.75,
            "environment/workers/started": 2.0,
        }
    )
    assert together([one]) == one


def changed(made: Config, source: str, **environment: Any) -> Config:
    return made.replace({f"data.mixture.{source}.environment": environment})


def test_mistakes_name_the_source(tmp_path: Path, tokenizer: Any) -> None:
    made = config(tmp_path)
    prompts = load_prompts(made.data, tokenizer)
    assert not problems(made, facts(longest_prompt=longest_prompts(made, prompts)))
    assert not check_environment(made, tokenizer, prompts)
    assert not check_run_rewards(made, prompts, ())

    def found(made: Config) -> str:
        return "\n".join(problems(made, facts(longest_prompt=longest_prompts(made, prompts))))

    assert "data.mixture.tools.environment.path: kind tools loads no class" in found(
        changed(made, "tools", **TOOLS, path="a.py:f")
    )
    returns = made.replace({"algorithm": {"name": "grpo", "turn_returns": "turn"}})
    assert "and plain has no environment; remove it" in found(returns)
    in_turns = made.replace({"rollout.turns": "lockstep", "rollout.staleness": 0})
    assert "lockstep orders the sessions of one environment, and data.mixture.asks" in found(in_turns)
    offline = made.replace({"algorithm": {"name": "sft"}, "rewards": []})
    assert "data.mixture.asks.environment: sft trains on rows of a dataset" in found(offline)
    assert "GRPO needs a reward; name at least one under rewards" in found(made.replace({"rewards": []}))

    shown = facts(demonstrations=True)
    assert not problems(made, shown)
    blended = "\n".join(problems(made.replace({"algorithm": {"name": "luffy"}}), shown))
    assert "data.mixture.asks.system: demonstrations of all sources share one system message" in blended

    wrong = changed(made, "tools", **TOOLS, max_episode_tokens=40)
    wrong = changed(wrong, "asks", kind="text", path="gone.py:f")
    gone, short = sorted(check_environment(wrong, tokenizer, prompts))
    assert short.startswith("data.mixture.tools.environment.max_episode_tokens: 40, but the prompt of row")
    assert gone.startswith("data.mixture.asks.environment: gone.py:f could not be loaded")

    reads = tmp_path / "reads.py"
    reads.write_text("def won(environments, **columns):\n    return [1.0 for _ in environments]\n")
    reading = made.replace({"rewards": [{"function": f"{reads}:won"}]})
    text = "\n".join(check_run_rewards(reading, prompts, ()))
    assert "this config has kind function" in text and "has no environment" in text
