"""Transcripts of sessions: the rows that a run writes, and what the page shows of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rft.batch import Completion, Prompt
from rft.loops.step_metrics import spans
from rft.report.report import write_report
from rft.report.transcript import transcript
from rft.rollout.calls import Call, lay_out
from rft.tasks.tiny import build_tokenizer

TOKENIZER = build_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def call(prompt: tuple[int, ...], text: str, version: int, reward: float | None = None) -> Call:
    sampled = ids(text)
    return Call(prompt, sampled, (-0.5,) * len(sampled), "stop", ((version, 0, len(sampled)),), reward=reward)


def laid_out(*calls: Call) -> tuple[Prompt, Completion]:
    prompt = Prompt(0, calls[0].prompt, "q")
    return prompt, lay_out(prompt.tokens, calls)


ASKED = ids("<|user|>1+1=?<|end|><|assistant|>")
TOOL = "<tool_call>{}</tool_call><|end|>"
RESULT = ids("<|user|><tool_response>2</tool_response><|end|><|assistant|>")


def test_spans_say_who_wrote_what_by_which_version_for_which_reward() -> None:
    first = call(ASKED, TOOL, 4, 0.25)
    second = call((*ASKED, *ids(TOOL), *RESULT), "#### 2<|end|>", 5)
    prompt, completion = laid_out(first, second)
    assert spans(prompt, completion, TOKENIZER) == [
        {"text": "<|user|>1+1=?<|end|><|assistant|>", "tokens": len(ASKED)},
        {"text": TOOL, "tokens": len(ids(TOOL)), "turn": 1, "versions": [4], "reward": 0.25},
        {"text": TOKENIZER.decode(RESULT), "tokens": len(RESULT)},
        {
            "text": "#### 2<|end|>",
            "tokens": len(ids("#### 2<|end|>")),
            "turn": 2,
            "versions": [5],
            "reward": None,
        },
    ]


def test_a_span_that_follows_another_place_is_marked() -> None:
    first = call(ASKED, "3<|end|>", 0)
    afresh = ids("<|user|>1+1=?<|end|><|assistant|>three<|end|><|user|>No.<|end|><|assistant|>")
    prompt, completion = laid_out(first, call(afresh, "2<|end|>", 0))
    rows = spans(prompt, completion, TOKENIZER)
    assert [row.get("branch", False) for row in rows] == [False, False, True, False]
    assert "".join(row["text"] for row in rows[:1] + rows[2:]) == TOKENIZER.decode(
        (*afresh, *ids("2<|end|>"))
    )
    assert sum(row["tokens"] for row in rows) == len(prompt.tokens) + len(completion.tokens)


CALLED = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1+1"}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "assistant", "content": "", "tool_calls": [CALLED]},
    {"role": "tool", "name": "calculator", "content": "<script>alert(1)</script>"},
    {"role": "assistant", "content": "#### 2"},
]
SPANS: list[dict[str, Any]] = [
    {"text": "<|user|>1+1=?<|end|><|assistant|>", "tokens": 10},
    {"text": "calculator 1+1<|end|>", "tokens": 20, "turn": 1, "versions": [3, 4, 5], "reward": 0.5},
    {"text": "<script>alert(2)</script>", "tokens": 1_200},
    {"text": "#### 2<|end|>", "tokens": 1, "turn": 2, "versions": [5], "reward": None, "branch": True},
]


def test_a_transcript_tells_of_each_turn() -> None:
    shown = transcript({"messages": MESSAGES, "spans": SPANS})
    assert shown is not None
    called, result, answer = shown.parts
    assert called.sampled and called.calls == [("calculator", '{"expression": "1+1"}')]
    assert called.facts == ["turn 1", "20 tokens sampled", "version 3-5", "reward 0.5"]
    assert (result.role, result.sampled, result.facts) == ("tool calculator", False, ())
    assert answer.facts == ["turn 2", "1 token sampled", "version 5"]
    assert (shown.sampled, shown.given) == (21, 1_210)
    assert [span.title for span in shown.spans[::2]] == [
        "10 tokens given to the policy",
        "1,200 tokens given to the policy",
    ]
    assert [span.branch for span in shown.spans] == [False, False, False, True]


def test_a_message_that_no_turn_sampled_gets_no_facts() -> None:
    """An environment may edit the history, so that its assistant messages are not the policy's."""
    edited = [*MESSAGES[:2], {"role": "assistant", "content": "something else"}]
    for messages in (edited, MESSAGES[:2]):
        shown = transcript({"messages": messages, "spans": SPANS})
        assert shown is not None and not any(part.facts for part in shown.parts)
        assert shown.spans[1].title == "turn 1 · 20 tokens sampled · version 3-5 · reward 0.5"


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"messages": MESSAGES},
        {"messages": MESSAGES, "spans": []},
        {"messages": "x", "spans": SPANS},
        {"messages": MESSAGES, "spans": [{"text": 3, "tokens": 1}]},
        {"messages": MESSAGES, "spans": [{"text": "x", "tokens": float("inf")}]},
        {"messages": MESSAGES, "spans": ["x"]},
    ],
)
def test_other_rows_have_none(row: dict[str, Any]) -> None:
    assert transcript(row) is None


def test_odd_values_are_shown() -> None:
    messages = [
        {"role": 7, "content": {"a": 1}, "tool_calls": [{"function": {"name": [1]}}, 3, {"function": 2}]}
    ]
    shown = transcript(
        {"messages": messages, "spans": [{"text": "x", "tokens": 1, "turn": [1], "versions": {}}]}
    )
    assert shown is not None and shown.parts[0].role == "7"
    assert transcript({"messages": [{}], "spans": [{"text": "x", "tokens": 1}]}) is not None


def test_the_page_shows_a_session_and_runs_nothing(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    row = {"split": "eval", "prompt": "1+1=?", "completion": "#### 2", "messages": MESSAGES, "spans": SPANS}
    rows = [{**row, "step": 0, "reward": 0.0}, {**row, "step": 1, "reward": 1.0}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in html and html.count("&lt;script&gt;alert(1)") == 2
    assert html.count("<b>calculator</b> {&#34;expression&#34;: &#34;1+1&#34;}") == 2
    assert html.count("21 tokens sampled by the policy,\n    1,210 given to it") == 2
    assert (
        '<span class="sampled" title="turn 2 · 1 token sampled · version 5">#### 2&lt;|end|&gt;</span>'
        in html
    )
    assert html.count("branch: encoded afresh") == 2
