"""Completions that begin with a part of a demonstration: how much, of which one, and what is left to say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from rft.algorithms import ALGORITHMS
from rft.algorithms.base import Rollout
from rft.batch import Completion, Group, Prompt
from rft.config.data import DataConfig
from rft.contrib.curriculum import pass_rate
from rft.data.chat import Renderer
from rft.data.errors import DataError
from rft.data.prompts import any_demonstration, demonstrations_of
from rft.rewards.types import Outcome, Score
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.sample import sample_group

END = 99


class Letters:
    """A tokenizer with a token for each character."""

    eos_token_id, eos_token = END, "<end>"
    bos_token_id = pad_token_id = bos_token = None
    all_special_ids = (END,)
    all_special_tokens = ("<end>",)
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        words, end, _ = text.partition("<end>")
        return {"input_ids": [ord(c) - 96 for c in words] + [END] * bool(end)}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(t + 96) for t in tokens if t != END)

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise ValueError("no template")

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [self.decode(row) for row in rows]


RENDER = Renderer(DataConfig(), Letters())


async def write_one(request: Request) -> list[Generated]:
    """Answer every request by token 7 and the end."""
    answer = Generated(tokens=(7, END), logps=(-1.0, -1.0), finish="stop", versions=((0, 0, 2),))
    return [answer] * request.sampling.n


def sample(
    completion: Any, plan: Sequence[Rollout], seed: int | None = 3, limit: int = 1000
) -> list[Completion]:
    prompt = Prompt(0, (50, 51), "p", {"completion": completion})
    sampling = Sampling(n=len(plan), max_tokens=limit, temperature=1.0, stop=(), seed=seed)
    return asyncio.run(sample_group(write_one, "x", prompt, plan, sampling, RENDER))


def given(completions: Sequence[Completion]) -> list[int]:
    return [c.demonstrated for c in completions]


HYBRID = Rollout(prefix_share=0.95, prefix_least=0.05)


def test_shares_are_drawn_for_each_hybrid_from_the_prompts_seed() -> None:
    text = "a" * 199  # 200 tokens with the end
    found = given(sample(text, [HYBRID] * 40 + [Rollout()] * 2))
    assert found[40:] == [0, 0]
    drawn = found[:40]
    assert len(set(drawn)) > 20 and min(drawn) >= 10 and max(drawn) <= 190
    assert 60 < sum(drawn) / 40 < 140  # uniform between 10 and 190: mean 100, deviation of a mean of 40: 8
    assert drawn == given(sample(text, [HYBRID] * 40)), "the same seed draws the same"
    assert drawn != given(sample(text, [HYBRID] * 40, seed=4))
    assert given(sample(text, [Rollout(prefix_share=0.95, prefix_least=0.95)] * 3)) == [190] * 3


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (10, 100, 9),  # 11 tokens with the end: 0.95 of them are 10, and two are left
        (3, 100, 2),
        (1, 100, 0),  # two tokens: both are left to the policy
        (40, 20, 18),  # the limit leaves two as well
    ],
)
def test_a_prefix_leaves_two_tokens(length: int, limit: int, expected: int) -> None:
    (found,) = sample("a" * length, [Rollout(prefix_share=0.95)], limit=limit)
    assert found.demonstrated == expected
    assert found.tokens[expected:] == (7, END) and found.finish == "stop"


def test_a_whole_demonstration_stays_whole() -> None:
    (found,) = sample("ab", [Rollout(prefix_share=1.0)])
    assert found.tokens == (1, 2, END) and found.finish == "demonstration" and found.demonstrated == 3


def test_each_hybrid_begins_with_one_of_several_demonstrations() -> None:
    found = sample(["a" * 50, "b" * 50, "", "c" * 50], [Rollout(prefix_share=0.5)] * 30)
    assert {c.tokens[0] for c in found} == {1, 2, 3}
    whole = sample(["ab", "cd"], [Rollout(prefix_share=1.0)] * 20)
    assert {c.tokens for c in whole} == {(1, 2, END), (3, 4, END)}


def test_demonstrations_are_texts() -> None:
    def of(value: Any) -> list[str]:
        return demonstrations_of(Prompt(4, (1,), "p", {"completion": value}))

    assert of(None) == of("") == of([]) == of([None, ""]) == []
    assert of("a") == ["a"] and of(["a", None, "b"]) == ["a", "b"]
    for wrong in (3, {"content": "a"}, [{"role": "assistant", "content": "a"}], ["a", 3]):
        with pytest.raises(DataError, match="row 5, column 'completion': must be a string, or a list"):
            of(wrong)
    prompts = [Prompt(0, (1,), "p", {"completion": "a"}), Prompt(1, (1,), "p", {"completion": 3})]
    with pytest.raises(DataError, match="row 2"):
        any_demonstration(prompts)


@pytest.mark.parametrize("name", ["prefix_rft", "luffy"])
def test_demonstrations_do_not_count_as_solved(name: str) -> None:
    """One right demonstration among four wrong answers: the policy solves the prompt in 0 of 4."""
    plan = ALGORITHMS[name]().rollouts(5, progress=1.0, demonstration=True)
    completions = []
    for i, c in enumerate(sample("a" * 60, plan)):
        outcome = Outcome.wrong if i else Outcome.correct
        completions.append(
            Completion(c.tokens, demonstrated=c.demonstrated, scores={"math": Score(0.0, outcome)})
        )
    group = Group(Prompt(0, (1,), "p"), tuple(completions))
    assert completions[0].demonstrated > 0 and pass_rate(group, "math") == 0.0
    assert pass_rate(Group(group.prompt, group.completions[:1]), "math") is None
