"""Sums with and without a calculator, and the tiny vocabulary that knows the tool."""

import re
from itertools import accumulate

import pytest
from pydantic import ValidationError

from rft.config.data import DataConfig
from rft.data import load_groups
from rft.data.chat import Renderer
from rft.environments.builtin_tools import calculator
from rft.environments.tools import tool_schema
from rft.rewards.math import math
from rft.rollout.tool_calls import format_of, parse
from rft.tasks import TASKS
from rft.tasks.sums import CALCULATOR, Sums, demonstrate
from rft.tasks.tiny import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(640, task="sums")


def test_the_schema_is_that_of_the_built_in_tool():
    assert tool_schema("calculator", calculator) == CALCULATOR


def test_a_demonstration_by_hand():
    call, result, answer = demonstrate("48+91-33+25", 131, with_call=True)
    function = {"name": "calculator", "arguments": {"expression": "48+91-33+25"}}
    assert call == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert result == {"role": "tool", "name": "calculator", "content": "131"}
    assert answer == {"role": "assistant", "content": "#### 131"}
    assert demonstrate("1+2", 3, with_call=False) == [{"role": "assistant", "content": "#### 3"}]


def test_rows_are_right_and_the_calculator_agrees():
    for row in Sums().rows("train", 200, 1):
        assert re.fullmatch(r"\d{2}([+-]\d{2}){3}=\?", row["prompt"])
        assert calculator(row["prompt"].removesuffix("=?")) == row["answer"]
        assert int(row["answer"]) >= 0
        *before, answer = row["completion"]
        assert math(answer["content"], row["answer"]).value == 1.0
        assert [m["role"] for m in before] in ([], ["assistant", "tool"])
        assert row["tools"] == [CALCULATOR]


def test_a_quarter_calls_the_calculator_and_a_tenth_is_held_out():
    rows = Sums().rows("train", 4000, 1)
    assert 0.23 < sum(len(row["completion"]) == 3 for row in rows) / len(rows) < 0.27
    assert all(len(row["completion"]) == 1 for row in Sums(calls=0).rows("train", 50, 1))
    small = [Sums(operands=2, digits=1).rows(split, 4000, 2) for split in ("train", "test")]
    train, test = ({row["prompt"] for row in rows} for rows in small)
    assert not train & test and 0.05 < len(test) / len(train | test) < 0.15


def test_a_limit_holds_for_each_partial_result():
    for row in Sums(limit=99).rows("train", 300, seed=0):
        parts = re.findall(r"[+-]?\d+", row["prompt"])
        partial = list(accumulate(map(int, parts)))
        assert len(parts) == 4 and all(0 <= result <= 99 for result in partial)
        assert row["answer"] == str(partial[-1])
    for options in ({"limit": 15}, {"limit": 99, "operators": ("+",)}):
        with pytest.raises(ValueError, match="needs the operator -"):
            Sums(**options)


def test_rows_are_the_same_for_the_same_arguments_only():
    task = TASKS["sums"]()
    assert task.rows("train", 30, 1) == task.rows("train", 30, 1) != task.rows("train", 30, 2)
    with pytest.raises(ValueError, match="split"):
        task.rows("valid", 1, 1)
    with pytest.raises(ValidationError, match="calls"):
        Sums(calls=2)


def test_the_vocabulary_has_the_words_of_the_tool(tokenizer):
    (row,) = Sums(calls=1).rows("train", 1, 1)
    messages = [{"role": "user", "content": row["prompt"]}, *row["completion"]]
    ids = tokenizer.apply_chat_template(messages, tools=row["tools"])["input_ids"]
    assert len(ids) < 90
    assert len(tokenizer("calculator(expression")["input_ids"]) == 3
    assert [tokenizer.decode([i]) for i in tokenizer("48+7-131")["input_ids"]] == [
        "48",
        "+",
        "7",
        "-",
        "13",
        "1",
    ]
    with pytest.raises(ValueError, match="for the task 'sudoku'; choose one of arithmetic, sums"):
        build_tokenizer(task="sudoku")


def test_a_demonstration_is_what_the_tool_parser_reads(tokenizer):
    """The trained tokens of a call, as the engine would sample them, are parsed to the call."""
    config = DataConfig(kind="sums", options={"calls": 1}, limit=3)
    assert format_of(Renderer(config, tokenizer)) == "json"
    for group, row in zip(load_groups(config, tokenizer), Sums(calls=1).rows("train", 3, 0), strict=True):
        (completion,) = group.completions
        trained = [t for t, m in zip(completion.tokens, completion.mask, strict=True) if m]
        call, answer, rest = tokenizer.decode(trained).split("<|end|>")
        (parsed,) = parse("json", call, row["tools"]).calls
        assert (parsed.name, parsed.arguments) == (
            "calculator",
            {"expression": row["prompt"].removesuffix("=?")},
        )
        assert answer == f"#### {row['answer']}" and rest == ""
        assert "\ncalculator(expression)<|end|>" in tokenizer.decode(group.prompt.tokens)
