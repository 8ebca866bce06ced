"""Rewards see the special tokens that a policy wrote, and none of those that end its turn."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from rft.contrib.rewards.steps import split_steps
from rft.contrib.step_values import _pieces, step_ends
from rft.rewards import load_reward
from rft.rollout.engine import Generated
from rft.rollout.sample import completions_of

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]
TURNS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|eot|>", "[INST]", "[/INST]"]
LOOP = "{%- for m in messages -%}"
TEMPLATES = {
    "none": None,
    "chatml": LOOP + "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
    # The generation prompt opens the thought, and the last answer is written with one.
    "thinks": LOOP + "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}",
    # A turn is closed by the next role.
    "roles": LOOP + "{{- '<|' + m.role + '|>\n' + m.content -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}",
    # No system message, turns in alternation, marks that are a pair.
    "inst": "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    + LOOP
    + "{%- if m.role == 'user' -%}{{- '[INST]' + m.content | trim + '[/INST]' -}}"
    "{%- else -%}{{- m.content + eos_token -}}{%- endif -%}{%- endfor -%}",
    # Contents are lists of parts: a string is no message.
    "parts": LOOP + "{{- '<|im_start|>' + m.content[0]['text'] + '<|im_end|>' -}}{%- endfor -%}",
}


@lru_cache
def tokenizer(name: str) -> Any:
    from rft.tasks.tiny import build_tokenizer

    built = build_tokenizer(512, 512)
    built.add_special_tokens({"additional_special_tokens": TAGS + TURNS})
    built.chat_template = TEMPLATES[name]
    return built


def text(name: str, written: str, finish: str = "stop") -> str:
    own = tokenizer(name)
    tokens = tuple(own.encode(written, add_special_tokens=False))
    (completion,) = completions_of([Generated(tokens, (0.0,) * len(tokens), finish, ())], own)  # type: ignore[arg-type]
    assert completion.tokens == tokens
    pieces = _pieces(completion, own)
    assert "".join(pieces) == completion.text
    assert len(pieces) == len(tokens)
    assert len(step_ends(pieces, "\n")) == max(len(split_steps(completion.text, "\n")), bool(tokens))
    return completion.text


FORMAT = "<think>2 + 2</think><answer>4</answer>"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("end", ["<|end|>", "<|end|><|pad|><|pad|>", "<|im_end|>", ""])
def test_tags_stay_and_the_end_goes(name: str, end: str) -> None:
    seen = text(name, FORMAT + end, "stop" if end else "length")
    assert seen == FORMAT
    assert load_reward("format")([""], [seen]) == [1.0]
    assert load_reward("math")([""], [seen], answer=["4"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "written", "finish", "seen"),
    [
        ("chatml", "4<|im_end|>\n<|end|>", "stop", "4"),  # a base model that ends twice
        ("chatml", "4\n<|im_end|>", "stop", "4\n"),
        ("chatml", "4<|im_end|>\n<|im_start|>", "length", "4"),
        ("chatml", "4<|im_end|>\n<|im_start|>user\n5", "length", "4<|im_end|>\n<|im_start|>user\n5"),
        (
            "chatml",
            "<tool_call>4</tool_call>",
            "stop",
            "<tool_call>4</tool_call>",
        ),  # a stop token of the config
        ("chatml", "<answer>4</answer>", "length", "<answer>4</answer>"),
        ("thinks", "2 + 2</think>4<|im_end|>", "stop", "2 + 2</think>4"),
        ("thinks", "2 + 2</think>", "length", "2 + 2</think>"),
        ("thinks", "<think>", "length", "<think>"),
        ("roles", "4<|user|>", "stop", "4"),
        ("roles", "4\n<|assistant|>", "length", "4\n"),
        ("inst", "4[INST]", "length", "4"),
        ("parts", "4<|eot|>", "stop", "4"),  # the model's own stop token, in no template
        ("parts", "4<|eot|>5", "length", "4<|eot|>5"),
        ("none", "4<|im_end|>", "length", "4<|im_end|>"),  # nothing says what it means here
        ("none", "<|begin|>4<|end|>", "stop", "<|begin|>4"),
        ("none", "4\n\n", "stop", "4\n\n"),  # an ordinary token may stop, too
        ("none", "<|end|>", "stop", ""),
        ("none", "", "length", ""),
    ],
)
def test_what_is_left(name: str, written: str, finish: str, seen: str) -> None:
    assert text(name, written, finish) == seen


def test_samples_judges_and_steps_see_the_same(tmp_path: Path) -> None:
    from rft.batch import Prompt
    from rft.loops.step_metrics import sample_rows
    from rft.rewards.types import Outcome, SampleReward, Score
    from rft.rollout.sample import Judged

    own = tokenizer("chatml")
    tokens = tuple(own.encode(FORMAT + "<|im_end|>", add_special_tokens=False))
    completions = completions_of([Generated(tokens, (0.0,) * len(tokens), "stop", ())], own)
    reward = SampleReward(1.0, {"r": Score(1.0, Outcome.correct)})
    (row,) = sample_rows(Judged(Prompt(0, (1,), "q"), completions, [reward]), "eval", own)
    assert row["completion"] == FORMAT
