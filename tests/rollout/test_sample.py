"""From an algorithm's plan to a scored group, with the real plain engine and real reward workers."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_share import digits

from rft.algorithms import ALGORITHMS
from rft.algorithms.base import Algorithm, PolicyOutput
from rft.batch import Batch, Completion, Group, Prompt
from rft.config.data import DataConfig
from rft.config.rewards import RewardsConfig
from rft.contrib.rewards.steps import split_steps
from rft.contrib.step_values import step_ends
from rft.data.chat import Renderer
from rft.learner.load import load_tokenizer
from rft.rewards.runner import RewardRunner
from rft.rewards.types import Outcome, SampleReward, Score
from rft.rollout.engine import EngineSpec, Generated, Request, Sampling
from rft.rollout.hf import HFEngine
from rft.rollout.sample import GroupSampler, Judged, completions_of, continued, scored_group
from tests.specs import engine_spec

SAMPLING = Sampling(n=4, max_tokens=10, seed=3)
DIGITS = "tests/rollout/digit_share.py:digits"


class Watched(HFEngine):
    """The engine, with the requests that it got."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.seen: list[Request] = []

    async def generate(self, request: Request) -> list[Generated]:
        self.seen.append(request)
        return await super().generate(request)


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rft.tasks.tiny import build_tiny

    folder = tmp_path_factory.mktemp("reference") / "tiny"
    build_tiny(folder, seed=8, hidden_size=64, layers=2, heads=2, intermediate_size=128)
    return folder


@pytest.fixture
def world(tiny_folder: Path, reference_folder: Path) -> tuple[Watched, Any, Prompt]:
    engine = Watched(engine_spec(tiny_folder, reference_folder))
    asyncio.run(engine.start())
    tokenizer = load_tokenizer(str(tiny_folder))
    text = "3+4=?\n"
    return engine, tokenizer, Prompt(0, tuple(tokenizer.encode(text)), text, {"completion": "3+4=7\n#### 7"})


def gather(world: tuple[Watched, Any, Prompt], algorithm: Algorithm, *functions: Any) -> Group:
    engine, tokenizer, prompt = world

    async def body() -> Group:
        config = RewardsConfig.model_validate(
            {"functions": functions or [{"function": DIGITS}], "workers": 1}
        )
        async with RewardRunner(config) as rewards:
            sampler = GroupSampler(algorithm, engine.generate, rewards, Renderer(DataConfig(), tokenizer))
            group, _ = await sampler.sample(prompt, SAMPLING, "train-0", 60, 0.5)
            return group

    return asyncio.run(body())


def test_an_observer_reads_the_pioneer_and_is_trained_on_its_own_words_only(
    world: tuple[Watched, Any, Prompt],
) -> None:
    engine, tokenizer, prompt = world
    group = gather(world, ALGORITHMS["cory"]())
    assert [c.values["observer"] for c in group.completions] == [0, 1, 0, 1]
    assert [c.values["pair"] for c in group.completions] == [0, 0, 1, 1]
    assert [c.values["copy"] for c in group.completions] == [1, 0, 1, 0]  # the roles were swapped at step 50
    assert all(r.copy == (0 if "observer" in r.id else 1) for r in engine.seen)
    asked = {r.id: r for r in engine.seen}
    for i in (0, 1):
        pioneer, observer = group.completions[2 * i : 2 * i + 2]
        answer = pioneer.tokens if pioneer.finish == "stop" else (*pioneer.tokens, tokenizer.eos_token_id)
        read = answer + prompt.tokens
        assert asked[f"train-0-observer-{i}"].tokens == prompt.tokens + read
        assert observer.tokens[: len(read)] == read
        assert observer.mask == (False,) * len(read) + (True,) * (len(observer.tokens) - len(read))
        assert observer.versions == ((-1, len(read), len(observer.tokens)),)
        assert observer.text == tokenizer.decode(observer.tokens[len(read) :], skip_special_tokens=True)
        assert observer.reward == digits([observer.text])[0]
    batch = Batch.build([group])
    shared = ALGORITHMS["cory"]().sequence_rewards(batch)
    assert shared[0] == shared[1] and shared[2] == shared[3]


def test_a_pair_leaves_together() -> None:
    def scored(value: float | None) -> SampleReward:
        return SampleReward(value, {"math": Score(value, Outcome.correct)})

    completions = [
        Completion((5,), values={"pair": float(i // 2), "observer": float(i % 2)}) for i in range(4)
    ]
    judged = Judged(Prompt(0, (1,), ""), completions, [scored(1.0), scored(None), scored(0.0), scored(1.0)])
    assert [c.values["pair"] for c in scored_group(judged, [True] * 4).completions] == [1, 1]


def test_a_reward_called_win_rate_is_that_column() -> None:
    reward = SampleReward(
        2.0, {"win_rate": Score(0.75, Outcome.correct), "length": Score(1.25, Outcome.correct)}
    )
    group = scored_group(Judged(Prompt(0, (1,), ""), [Completion((5,))], [reward]), [True])
    assert group.completions[0].values == {"win_rate": 0.75} and group.completions[0].reward == 2.0


@pytest.mark.parametrize("name", ["sppo", "nash_md", "grpo"])
def test_a_win_rate_that_abstains_is_not_trained_on_by_it(name: str) -> None:
    """Another reward judged the completion, so that it stays; whoever learns from win rates leaves it out."""

    def judged(rate: float | None) -> SampleReward:
        outcome = Outcome.abstain if rate is None else Outcome.correct
        scores = {"win_rate": Score(rate, outcome), "length": Score(1.0, Outcome.correct)}
        return SampleReward(1.0 + (rate or 0.0), scores)

    rates = [0.75, None, 0.25]
    completions = [Completion((5, 6 + i), logps=(-1.0, -1.0)) for i in range(3)]
    judgement = Judged(Prompt(0, (1,), ""), completions, [judged(rate) for rate in rates])
    group = scored_group(judgement, [True] * 3)
    assert len(group.completions) == 3
    algorithm = ALGORITHMS[name]()
    batch = algorithm.prepare(Batch.build([group]).with_(ref_logps=torch.zeros(9)))
    assert batch.lengths.tolist() == ([2, 2, 2] if name == "grpo" else [2, 0, 2])
    logps = torch.where(batch.mask, torch.full((9,), -1.0), 0.0).requires_grad_()
    loss = algorithm.loss(PolicyOutput(logps), batch)
    loss[batch.mask if len(loss) == 9 else slice(None)].sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logps.grad).all()
    assert bool(logps.grad[batch.sequence == 1].abs().max() > 0) == (name == "grpo")


@pytest.mark.parametrize(
    ("pieces", "separator", "ends"),
    [
        (("1+", "1\n", "=2"), "\n", (2, 3)),
        (("a", ".", "\n", "\n", "b"), "\n\n", (4, 5)),
        (("a\n", "\n", "b", "\n", ""), "\n", (1, 5)),  # blank steps are none; the end token is the last one's
        (("a\nb\nc", "d"), "\n", (1, 1, 2)),  # two steps end within one token
        (("a\n",), "\n", (1,)),
        ((" ", "\n"), "\n", (2,)),
        ((), "\n", ()),
    ],
)
def test_where_steps_end(pieces: tuple[str, ...], separator: str, ends: tuple[int, ...]) -> None:
    assert step_ends(pieces, separator) == ends
    assert len(ends) == max(len(split_steps("".join(pieces), separator)), bool(pieces))


def test_steps_are_valued_by_going_on_from_their_ends(world: tuple[Watched, Any, Prompt]) -> None:
    """Each distinct beginning is continued once, by `branches` samples that fit the length limit, and the
    value is the mean reward of the whole texts."""
    engine, tokenizer, prompt = world
    algorithm = ALGORITHMS["per_step"](branches=3, separator="e")
    group = gather(world, algorithm)
    branched = {r.tokens[len(prompt.tokens) :]: r for r in engine.seen if "-step-" in r.id}
    boundaries = {c.tokens[: int(e)] for c in group.completions for e in c.values["step_ends"][:-1]}
    assert boundaries and set(branched) == boundaries
    for start, request in branched.items():
        assert request.sampling.n == 3 and request.sampling.max_tokens == 10 - len(start)
        again = asyncio.run(HFEngine.generate(engine, request))  # the seed depends on the beginning alone
        texts = [c.text for c in completions_of([continued(start, g) for g in again], tokenizer)]
        expected = sum(digits(texts)) / 3
        for c in group.completions:
            for e, v in zip(c.values["step_ends"][:-1], c.values["step_values"][1:], strict=True):
                if c.tokens[: int(e)] == start:
                    assert v == pytest.approx(expected)
    for c in group.completions:
        assert c.values["step_ends"][-1] == len(c.tokens) and math.isnan(c.values["step_values"][0])
    advantages = algorithm.prepare(Batch.build([group])).advantages
    assert advantages.isfinite().all() and advantages.abs().max() > 0


def test_continuations_of_one_beginning_join_as_pairs(world: tuple[Watched, Any, Prompt]) -> None:
    engine, tokenizer, prompt = world
    group = gather(world, ALGORITHMS["prefix_dpo"](branches=4, separator="e"))
    whole = [c for c in group.completions if "prefix" not in c.values]
    assert len(whole) == SAMPLING.n and not any(c.mask or c.demonstrated for c in whole)
    branched = sorted((r.tokens[len(prompt.tokens) :], r) for r in engine.seen if "-step-" in r.id)
    expected = {}
    for number, (start, request) in enumerate(branched, 1):
        again = asyncio.run(HFEngine.generate(engine, request))
        made = completions_of([continued(start, g) for g in again], tokenizer)
        rewards = digits([c.text for c in made])
        if max(rewards) > min(rewards):
            expected[float(number)] = (start, max(rewards), min(rewards))
    assert expected
    for number, (start, best, worst) in expected.items():
        good, bad = (c for c in group.completions if c.values.get("prefix") == number)
        assert (good.reward, bad.reward) == pytest.approx((best, worst))
        for c in (good, bad):
            assert c.tokens[: len(start)] == start and c.demonstrated == len(start) and c.mask is not None
            assert sum(c.mask) == len(c.tokens) - len(start) and not any(c.mask[: len(start)])
    assert len(group.completions) == len(whole) + 2 * len(expected)


def test_steps_are_scored_by_a_reward_that_judges_steps(world: tuple[Watched, Any, Prompt]) -> None:
    algorithm = ALGORITHMS["per_step"](source="process", separator="e")
    process = {"function": "process", "options": {"function": DIGITS, "separator": "e"}, "name": "steps"}
    group = gather(world, algorithm, process)
    assert any(len(c.values["step_rewards"]) > 1 for c in group.completions)
    for c in group.completions:
        parts = split_steps(c.text, "e")
        assert c.values["step_rewards"] == pytest.approx(digits(parts))
        assert len(c.values["step_ends"]) == len(parts)
    assert algorithm.prepare(Batch.build([group])).advantages.isfinite().all()


@pytest.mark.parametrize("mixture", [0.3, 1.0])
def test_the_plain_engine_draws_from_the_geometric_mixture(
    world: tuple[Watched, Any, Prompt], mixture: float
) -> None:
    engine, _, prompt = world
    sampling = replace(SAMPLING, n=1, mixture=mixture, temperature=0.7)
    (generated,) = asyncio.run(engine.generate(Request("a", prompt.tokens, sampling)))
    ids = torch.tensor([prompt.tokens + generated.tokens])
    with torch.inference_mode():
        logps = [
            m(ids).logits[0, len(prompt.tokens) - 1 : -1].log_softmax(-1)
            for m in (engine.model, engine.reference)
        ]
    mixed = (((1 - mixture) * logps[0] + mixture * logps[1]) / 0.7).log_softmax(-1)
    expected = mixed.gather(-1, torch.tensor(generated.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(generated.logps), expected, atol=1e-5, rtol=1e-5)
