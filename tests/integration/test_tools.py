"""A policy that has learned to call tools calls them, in a run with the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rft
from rft.environments.tools import tool_schema
from rft.metrics.log import read_jsonl
from tests.specs import needs_vllm


def lookup(key: str) -> str:
    """Look a key up.

    Args:
        key: the key
    """
    if key == "a":
        return "7"
    raise KeyError(key)


def found(completions: Any, **columns: Any) -> list[float]:
    return [float(text[-1]["content"].strip() == "7") for text in completions]


def conversation(key: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"key": key}}}
    result = "7" if key == "a" else '{"error": "KeyError: \'b\'"}'
    return {
        "messages": [
            {"role": "user", "content": f"key {key}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "lookup", "content": result},
            {"role": "assistant", "content": "7" if key == "a" else "none"},
        ],
        "tools": [tool_schema("lookup", lookup)],
    }


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_policy_calls_tools(tmp_path: Path) -> None:
    here: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "eval": {"every": 0},
        "learner": {"learning_rate": 5e-3},
    }
    tiny = {"path": "tiny", "options": {"layers": 2}}
    rows = [conversation(key) for key in "ab"] * 16
    learned = rft.train(model=tiny, data=rows, algorithm="sft", steps=60, batch_size=8, name="sft", **here)
    assert learned.model_path is not None
    here["learner"] = {"learning_rate": 1e-6}
    run = rft.train(
        model=str(learned.model_path),
        data=[{"prompt": [{"role": "user", "content": f"key {key}"}]} for key in "ab"] * 4,
        algorithm="rloo",
        tools=[lookup],
        rewards=[found],
        steps=2,
        batch_size=2,
        num_generations=4,
        rollout={"sampling": {"max_prompt_length": 500, "max_completion_length": 200}},
        name="rl",
        **here,
    )
    last = run.metrics[-1]
    assert last["session/turns"] > 1.5 and last["environment/tool_calls"] > 0.25
    assert (
        last["session/malformed"] + last["environment/tool_calls"] > 0.8
    )  # by a policy that learned in 60 steps
    assert last["session/branches"] == 1 and last["session/retokenised"] == 0
    called = [
        row for row in read_jsonl(run.path / "samples.jsonl") if "'content': '7', 'tool_call_id'" in str(row)
    ]
    assert called and all(row["reward"] == 1.0 for row in called)
