"""What ends a demonstrated turn of an online run is what the chat template ends turns with."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rft.algorithms.base import Rollout
from rft.batch import Completion, Prompt
from rft.config.data import DataConfig
from rft.contrib.pairs import sample_pairs
from rft.contrib.rewards.trained import TrainedTexts
from rft.data import load_groups
from rft.data.chat import Renderer
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.sample import sample_group
from tests.cases.families import CHATML, END, R1, gemma_tokenizer, glm_tokenizer, make_tokenizer

BASE = make_tokenizer(CHATML, eos=END)  # a base model's tokenizer with a chat template: eos 0, turns end in 2
GLM = glm_tokenizer()  # a line break and the next role end a turn
LINE = tuple(GLM("\n", add_special_tokens=False)["input_ids"])
FAMILIES = [(BASE, (2,)), (gemma_tokenizer(), (4,)), (GLM, (*LINE, 3)), (make_tokenizer(None), (2,))]


def sampled(
    tokenizer: Any, plan: list[Rollout], completion: str = "4", answers: list[Generated] | None = None
) -> tuple[list[Completion], Prompt, list[Request]]:
    """The group of one prompt; the engine answers its requests in turn."""
    render = Renderer(DataConfig(), tokenizer)
    prompt = Prompt(0, tuple(render.prompt("q")[1]), "q", {"completion": completion})
    requests: list[Request] = []

    async def generate(request: Request) -> list[Generated]:
        requests.append(request)
        assert answers is not None
        return [answers[len(requests) - 1]]

    sampling = Sampling(len(plan), 100, seed=1)
    if plan[0].role:
        pairs = sample_pairs(generate, "x", prompt, len(plan) // 2, sampling, render, (0, 0))
        return asyncio.run(pairs), prompt, requests
    group = asyncio.run(sample_group(generate, "x", prompt, plan, sampling, render))
    return group, prompt, requests


@pytest.mark.parametrize(("tokenizer", "end"), FAMILIES)
@pytest.mark.parametrize("written", ["4", "4<|im_end|>\n", "4<|endoftext|>"])
def test_a_demonstration_ends_as_the_template_ends_turns(
    tokenizer: Any, end: tuple[int, ...], written: str
) -> None:
    if written != "4" and end != (2,):
        written = "4<|endoftext|>"
    (whole,), _, _ = sampled(
        tokenizer, [Rollout(prefix_share=1.0)], written.replace(END, tokenizer.eos_token)
    )
    four = tuple(tokenizer("4", add_special_tokens=False)["input_ids"])
    assert whole.tokens == four + end
    assert whole.text.strip() == "4"


def test_it_is_what_supervised_training_learns(tmp_path: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "completion": "a</think>4"}', encoding="utf-8")
    for tokenizer in (*(t for t, _ in FAMILIES), make_tokenizer(R1)):
        learned = load_groups(DataConfig(path=str(file)), tokenizer)[0]
        (whole,), prompt, _ = sampled(tokenizer, [Rollout(prefix_share=1.0)], "a</think>4")
        assert (prompt.tokens, whole.tokens) == (learned.prompt.tokens, learned.completions[0].tokens)


@pytest.mark.parametrize(("tokenizer", "end"), FAMILIES)
@pytest.mark.parametrize("stopped", ["by the limit", "by the end token", "by the turn's end"])
def test_an_observer_reads_a_turn_that_ends_as_the_template_ends_it(
    tokenizer: Any, end: tuple[int, ...], stopped: str
) -> None:
    four = tuple(tokenizer("4", add_special_tokens=False)["input_ids"])
    ends = {"by the limit": (), "by the end token": (tokenizer.eos_token_id,), "by the turn's end": end}
    tokens = four + ends[stopped]
    answer = Generated(tokens, (-1.0,) * len(tokens), "stop" if ends[stopped] else "length", ())
    answers = [answer, answer]
    plan = [Rollout(role="pioneer"), Rollout(role="observer")]
    (pioneer, observer), prompt, requests = sampled(tokenizer, plan, answers=answers)
    read = four + end + prompt.tokens
    assert requests[1].tokens == prompt.tokens + read
    assert pioneer.tokens == tokens and observer.tokens == read + tokens


def test_a_reward_model_reads_an_empty_answer_as_a_turn_that_ends_at_once() -> None:
    texts = TrainedTexts({"kind": "preference", "data": {}}, BASE)
    assert texts.response("q", " ")[-1] == texts.response("q", "4")[-1] == 2
