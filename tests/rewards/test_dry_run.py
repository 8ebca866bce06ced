"""`rft reward`: the table, disagreement, explanations, exit codes, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rft.config.rewards import RewardConfig, RewardsConfig
from rft.preflight.rewards import check_reward
from rft.tools.reward import main

HERE = Path(__file__).parent
ROWS = [
    {"prompt": "1+1", "completion": "#### 2", "answer": "2", "label": True},
    {"prompt": "1+2", "completion": "#### 4", "answer": "3", "label": True},
    {"prompt": "1+3", "completion": "no idea", "answer": "4", "label": False},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_the_table_and_disagreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["math", write(tmp_path / "f.jsonl", ROWS), "--explain"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1] for line in out.splitlines() if line[:1].isalpha()}
    assert (lines["correct"], lines["wrong"], lines["unparseable"]) == ("1", "1", "1")
    assert "hash: '4' != '3' (exact)" in out
    assert "3 compared, 33.33% disagree: 0 rewarded although labelled wrong, 1 not rewarded" in out
    assert "per call: median" in out


def test_an_error_exits_1_and_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    rows = [{"completion": "a"}, {"completion": "bad"}]
    assert main(["custom_rewards.py:raises", write(tmp_path / "f.jsonl", rows)]) == 1
    assert "the missing key" in capsys.readouterr().out


@pytest.mark.parametrize("gold", ["Infinity", "null", "{}"])
def test_a_gold_that_no_answer_can_equal_exits_2_after_the_table(
    gold: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": "q", "completion": "4", "answer": {answer}}}\n' for answer in ("4", gold)]
    file.write_text("".join(lines))
    assert main(["math", str(file)]) == 2
    out, err = capsys.readouterr()
    assert "correct            1" in out and "1 row (2): column 'answer': the gold answer" in err
    file.write_text(lines[0] + lines[0].replace("4}", '"Infinity"}'))  # a text may be right: of a limit, say
    assert main(["math", str(file)]) == 0


def test_options_and_columns_come_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": r"\boxed{2} #### 3", "gold": "3"}]
    arguments = ["math", write(tmp_path / "f.jsonl", rows), "--completion", "text", "--column", "answer=gold"]
    assert main([*arguments, 'extraction=["hash"]', "--explain"]) == 0
    assert "correct 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "rows", "words"),
    [
        (["mth"], ROWS, "did you mean 'math'"),
        (["math", "extracton=1"], ROWS, "did you mean 'extraction'"),
        (["math"], [{"completion": "x"}], "needs the column 'answer'"),
        (["math"], [{"text": "x"}], "f.jsonl, row 1: no 'completion' (found: text)"),
        (["math"], [], "the dataset is empty"),
    ],
)
def test_mistakes_exit_2(
    arguments: list[str], rows: list[Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "f.jsonl", rows)
    assert main([arguments[0], path, *arguments[1:]]) == 2
    assert words in capsys.readouterr().err


def test_a_broken_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"completion": "a"}\n{oops\n')
    assert main(["math", str(path)]) == 2
    assert "malformed JSON in line 2" in capsys.readouterr().err


def test_the_preflight_names_every_problem(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    functions = [
        RewardConfig(function="custom_rewards.py:lenght", name="a"),
        RewardConfig(function="math", options={"limit": 3}, name="b"),
        RewardConfig(function=str(tmp_path / "broken.py") + ":f", name="c"),
        RewardConfig(function="custom_rewards.py:with_columns", name="d", columns={"answer": "gold"}),
    ]
    problems = check_reward(RewardsConfig(functions=functions), HERE, columns=["solution"])
    assert len(problems) == 4
    for problem, words in zip(
        problems,
        ("did you mean 'length'", "did you mean 'limit_s'", "nothing_like_this", "'gold'"),
        strict=True,
    ):
        assert words in problem
    assert check_reward(RewardsConfig(functions=[RewardConfig(function="math")]), columns=["answer"]) == []


def test_the_plan_of_a_run_says_what_protects_from_programs(capsys: pytest.CaptureFixture[str]) -> None:
    from rft.cli import main as rft

    code = "rewards={functions: [{function: code, columns: {tests: answer}, options: {require: []}}]}"
    assert rft(["check", str(Path(__file__).parents[2] / "examples" / "arithmetic.yaml"), code]) == 0
    assert "\nsandbox (" in capsys.readouterr().out
