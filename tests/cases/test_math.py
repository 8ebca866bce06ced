"""Math answers that were judged wrongly, the kinds that they stand for, and gold answers that are none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rft.cli import main
from rft.config.rewards import RewardConfig, RewardsConfig
from rft.preflight.rewards import check_values
from rft.rewards import Outcome, load_reward
from rft.rewards.equal import equal
from rft.rewards.math import extract

HERE = Path(__file__).parent


def rows(name: str) -> list[dict[str, Any]]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


JUDGED = rows("math_false_negatives.jsonl") + rows("math_false_positives.jsonl")
SAME = [(row["gold"], row["answer"]) for row in rows("math_equal.jsonl")]
DIFFERENT = [(row["gold"], row["answer"]) for row in rows("math_different.jsonl")]


def value(completion: str, answer: Any, prompt: Any = "") -> float | None:
    score = load_reward("math").score([prompt], [completion], answer=[answer])[0]  # type: ignore[attr-defined]
    return score.value


@pytest.mark.parametrize("row", JUDGED, ids=lambda row: f"{row['answer']}|{row['completion']}")
def test_labelled_completions(row: dict[str, Any]) -> None:
    assert value(row["completion"], row["answer"]) == float(row["label"])


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same_answer_written_differently(gold: str, answer: str) -> None:
    assert equal(gold, answer).equal


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers_differ_both_ways(gold: str, answer: str) -> None:
    assert not equal(gold, answer).equal
    assert not equal(answer, gold).equal


BOMBS = [
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    "9^9^9^9",
    "((((5!)!)!)!)!",
    "99999999999999999999!",
    r"\binom{10^9}{5*10^8}",
    r"\exp(\exp(\exp(\exp(9))))",
    r"\sin(10^{10^{10}})",
    "((2^{1000})^{1000})^{1000}",
    "1e-999",
    "(" * 900,
    "{" * 900,
    r"\frac{" * 200 + "1" + "}{2}" * 200,
    r"\sqrt{" * 300 + "2" + "}" * 300,
    "1," * 900,
    "x^" * 900 + "2",
    "a" * 1999,
    "ab " * 600,
    r"\text{a}" * 250,
    r"\pm" * 600,
    r"\{" * 900,
    "|" * 1900,
    "1 or " * 380,
    "x=1," * 450,
    "(1,2)," * 300,
    "½" * 1900,
    "3\u0305" * 900,
    r"\begin{pmatrix}" + "1&" * 800 + r"\end{pmatrix}",
    "2^{" * 400 + "2" + "}" * 400,
    r"\int_0^1 9^{9^{9^x}} dx",
    r"\sum_{k=1}^{100000} k^{100000}",
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda b: b[:30])
def test_what_cannot_be_computed_is_wrong_at_once(bomb: str) -> None:
    """Also in threads, where no signal can stop it: the bound is the size of what is computed."""
    import rft.rewards.symbolic  # noqa: F401

    start = time.process_time()
    for gold in ("5", "x^2+1", "1,2", r"\sqrt2", "y=2x+1", r"\begin{pmatrix}1\\2\end{pmatrix}"):
        assert not equal(gold, bomb).equal
        assert not equal(bomb, gold).equal
    assert time.process_time() - start < 20  # a hang; the answers take milliseconds
    assert equal(bomb, bomb).equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$\boxed{2}\quad\boxed{5}$", "2, 5"),
        (r"\boxed{2}\text{ and }\boxed{5}", "2, 5"),
        (r"\boxed{2} \\ \boxed{5}", "2, 5"),
        (r"$x = \boxed{2}$ and $y = \boxed{5}$", "x = 2, y = 5"),
        (r"first \boxed{1}. So \boxed{2}", "2"),
        (r"\boxed{x = \boxed{5}}", "x = 5"),
        ("<think>maybe 3</think><answer>5</answer>", "5"),
        ("hm</think><answer>The answer is 5.</answer>", "5"),
        (r"hm</think><answer>\boxed{5}</answer>", "5"),
    ],
)
def test_joined_boxes_and_tags(text: str, answer: str) -> None:
    found = extract(text)
    assert found is not None
    assert found.text is not None
    assert equal(answer, found.text).equal, found


@pytest.mark.parametrize(
    "text",
    [
        r"<think>so it is \boxed{5}",
        "<think>a</think> wait <think>the answer is 5",
        r"\boxed{}",
        r"\boxed{} 5",
        r"\boxed{5} or rather \boxed{}",
        "<answer></answer> 5",
    ],
)
def test_an_open_thought_and_an_empty_answer_are_not_read(text: str) -> None:
    score = load_reward("math").score([""], [text], answer=["5"])[0]  # type: ignore[attr-defined]
    assert (score.value, score.outcome) == (0.0, Outcome.unparseable)


@pytest.mark.parametrize(
    ("prompt", "answer", "gold", "right"),
    [
        ("Compute $2+3$.", "2+3", "5", False),
        ("Compute $2 + 3$.", "2+3", "5", False),
        ("Compute $2+3$.", "5", "5", True),
        ("Compute 1+2+3 and then 4.", "1+5", "6", True),
        ("Factor $x^2+2x+1$.", "x^2+2x+1", "(x+1)^2", False),
        ("Factor $x^2+2x+1$.", "(x+1)^2", "(x+1)^2", True),
        (r"Simplify $\dfrac{6}{8}$.", r"\frac{6}{8}", r"\frac34", False),
        (r"Which of $\frac34$ and $\frac12$ is larger?", r"\frac{3}{4}", r"\frac34", True),
        (r"What is $\binom{5}{2}$?", r"\binom52", "10", True),  # written otherwise: not seen
        (r"What is $\binom{5}{2}$?", r"\binom{5}{2}", "10", False),
        ("Solve $(x-1)(x+1)=0$ for a factor", "x+1", "1+x", True),
        ("A train drives 60 km/h. How fast is it?", "60 km/h", "60", True),
        ("It leaves at 3:45 PM. When?", "3:45 PM", "3:45", True),
        ([{"role": "user", "content": "Compute $2+3$."}], "2+3", "5", False),
    ],
)
def test_an_answer_that_repeats_the_question_is_wrong(
    prompt: Any, answer: str, gold: str, right: bool
) -> None:
    assert value(rf"\boxed{{{answer}}}", gold, prompt) == float(right)


BAD_GOLDS = [
    None,
    {"value": 4},
    [],
    [None],
    [["4"]],
    "",
    "  ",
    "$$",
    "#### ",
    r"\boxed{",
    r"\boxed{}",
    r"\frac{1}{2",
    float("nan"),
    float("inf"),
    '{"value": 4}',
    "null",
    "NaN",
    "so " * 1000,
]


@pytest.mark.parametrize("gold", BAD_GOLDS, ids=lambda g: repr(g)[:20])
def test_a_gold_that_nothing_can_equal_is_found_with_its_row(gold: Any) -> None:
    config = RewardsConfig(functions=[RewardConfig(function="math", columns={"answer": "solution"})])
    good: list[Any] = ["4", 4, 4.0, ["4", "5"], r"so \boxed{4}", "a\n#### 4", "\\text{east}", True]
    table = [(number, {"solution": answer}) for number, answer in enumerate([*good, gold, "5"], 1)]
    (problem,) = check_values(config, "rows.jsonl", table)
    assert "rewards.functions[0] (math)" in problem
    assert "rows.jsonl" in problem
    assert f"1 row ({len(good) + 1}): column 'solution': the gold answer" in problem


@pytest.mark.parametrize(
    ("file", "row", "words"), [("gold_dict.jsonl", 1, "is a dict"), ("gold_null.jsonl", 2, "is null")]
)
def test_check_finds_golds_that_are_none(
    tmp_path: Path, capsys: Any, file: str, row: int, words: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("algorithm: {name: grpo}\nrewards: [{function: math}]\n")
    command = ["check", str(config), f"data={{path: {HERE / file}}}", f"output_dir={tmp_path}"]
    assert main([*command, "train.batch_size=2", "eval.every=0"]) == 2
    told = capsys.readouterr()
    assert f"({row}" in told.err + told.out
    assert f"the gold answer {words}" in told.err + told.out


@pytest.mark.parametrize("function", ["choice", "exact_match", "class_label", "f1", "rouge_l"])
def test_other_rewards_of_an_answer_refuse_null_and_dicts(function: str) -> None:
    config = RewardsConfig(functions=[RewardConfig(function=function)])
    table = [(1, {"answer": "A"}), (2, {"answer": None}), (3, {"answer": {"a": 1}}), (4, {"answer": " "})]
    (problem,) = check_values(config, "rows.jsonl", table)
    assert all(words in problem for words in ("(2)", "null", "(3)", "a dict", "(4)", "empty"))


def test_math_verify_is_right_nowhere_that_rft_is_wrong() -> None:
    """On the labelled completions; in a process of its own, so that its caches and loggers stay there."""
    code = (
        "import json, logging, sys; logging.disable(logging.CRITICAL)\n"
        "from math_verify import parse, verify\n"
        "cases = json.load(sys.stdin)\n"
        "print(json.dumps([bool(verify(parse(f'${a}$'), parse(c))) for c, a in cases]))"
    )
    given = json.dumps([(row["completion"], row["answer"]) for row in JUDGED])
    done = subprocess.run(
        [sys.executable, "-c", code], input=given, capture_output=True, text=True, check=True
    )
    for row, theirs in zip(JUDGED, json.loads(done.stdout), strict=True):
        if theirs == row["label"]:
            assert value(row["completion"], row["answer"]) == float(row["label"]), row
