"""Overlap of training and evaluation rows: what counts, what is reported, what is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rft.config.load import parse_config
from rft.config.mixture import COLUMN
from rft.data.overlap import find_overlaps, overlapping
from rft.errors import ConfigError
from rft.plan import Plan, make_plan
from rft.report.plan_text import plan_lines
from rft.samples import Completion, Group, Prompt

STORY = "a farmer has twelve cows and buys three more then sells five of them on monday"


def prompts(*texts: Any, **columns: Any) -> list[Prompt]:
    return [Prompt(i, (1,), text, columns) for i, text in enumerate(texts)]


def test_equal_prompts_and_thirteen_shared_words() -> None:
    train = prompts("2 * 2 = ?", "What is 2+2?", f"Listen: {STORY.upper()}!", "twelve cows", STORY)
    held_out = prompts("what  IS 2+2?", STORY, "something else")
    (overlap,) = find_overlaps(train, {"evaluation": held_out})
    assert (overlap.rows, overlap.equal, overlap.hit) == ([1, 2, 4], {1, 4}, 2)
    assert overlap.lines() == [
        "training and evaluation: 3 of 5 training rows overlap 2 of 3 evaluation rows; 2 have an equal "
        "prompt, 1 share 13 words",
        "row 2 and evaluation row 1: 'What is 2+2?'",
        f"row 3 and evaluation row 2: 'Listen: {STORY.upper()[:69]}...'",
        f"row 5 and evaluation row 2: '{STORY}'",
    ]
    assert find_overlaps(train[:1], {"evaluation": held_out})[0].lines() == ["training and evaluation: none"]


def test_twelve_words_do_not_count() -> None:
    words = STORY.split()
    held_out = {"evaluation": prompts(STORY)}
    assert overlapping(prompts(" ".join([*words[:12], "moon"])), held_out) == set()
    assert overlapping(prompts(" ".join([*words[:13], "moon"])), held_out) == {0}


def test_a_template_is_common_text() -> None:
    """Words that more than ten training rows share do not make them overlap."""
    template = "Please think step by step and write the final answer into a box at the very end: "
    held_out = {"evaluation": prompts(template + "1+1")}
    assert overlapping(prompts(*(f"{template}{n}+5" for n in range(2, 13))), held_out) == set()
    assert overlapping(prompts(*(f"{template}{n}+5" for n in range(2, 12))), held_out) == set(range(10))


def test_messages_responses_and_sources() -> None:
    chat = [{"role": "user", "content": STORY}, {"role": "assistant", "content": None}]
    responses = [Group(Prompt(7, (1,), "Tell me a story."), (Completion((1,), text=f"Well, {STORY}."),))]
    assert overlapping(responses, {"a": prompts(chat)}) == {0}
    mixed = [*prompts("x", **{COLUMN: "one"}), *prompts("y", **{COLUMN: "two"})]
    found = find_overlaps(mixed, {"a": prompts("y"), "b": prompts("x", **{COLUMN: "one"})})
    labels = {(o.train, o.evaluation): o.rows for o in found}
    assert labels == {("one", "a"): [], ("two", "a"): [1], ("one", "b (one)"): [0], ("two", "b (one)"): []}


def plan(tmp_path: Path, tiny_folder: Path, algorithm: str, **data: Any) -> Plan:
    def write(name: str, questions: list[str]) -> str:
        rows = [{"prompt": q, "answer": "1", "completion": "1"} for q in questions]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    train, held_out = write("train.jsonl", ["1?", "2?", "3?"]), write("eval.jsonl", ["4?", "2 ?"])
    sampling = {"max_completion_length": 8, "max_prompt_length": 32}
    return make_plan(
        parse_config(
            {
                "output_dir": str(tmp_path),
                "algorithm": algorithm,
                "model": {"path": str(tiny_folder)},
                "data": {"path": train, "eval_path": held_out, "chat_template": "never", **data},
                "rewards": ["math"] if algorithm == "grpo" else [],
                "train": {"steps": 1, "batch_size": 1, "num_generations": 2},
                "rollout": {"engine": "hf", "sampling": sampling},
                "learner": {"threads": 1},
            }
        )
    )


@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_a_run_reports_or_drops(tmp_path: Path, tiny_folder: Path, algorithm: str) -> None:
    report = plan(tmp_path, tiny_folder, algorithm)
    lines = "\n".join(plan_lines(report))
    assert (
        "overlap      training and evaluation: 1 of 3 training rows overlap 1 of 2 evaluation rows" in lines
    )
    assert "row 2 and evaluation row 2: '2?'" in lines
    dropped = "\n".join(plan_lines(plan(tmp_path, tiny_folder, algorithm, decontaminate="drop")))
    assert "overlap      training and evaluation: none" in dropped
    assert "data         2 " in dropped
    assert "1 skipped: it overlaps an evaluation row (data.decontaminate)" in dropped


def test_mistakes(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="compares with evaluation rows, and there are none"):
        plan(tmp_path, tiny_folder, "sft", decontaminate="drop", eval_path=None)
    with pytest.raises(ConfigError, match="needs all rows, and `streaming` reads them on demand"):
        plan(tmp_path, tiny_folder, "sft", decontaminate="drop", streaming=True)
    with pytest.raises(ConfigError, match="leaves no row: all of them overlap"):
        same = str(tmp_path / "eval.jsonl")
        plan(tmp_path, tiny_folder, "sft", decontaminate="drop", path=same)
