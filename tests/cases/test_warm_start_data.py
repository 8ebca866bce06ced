"""The demonstrations of a warm start are checked by `rft check`, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rft.cli import main
from tests.cases.families import glm_tokenizer, make_model, make_tokenizer

GOOD = {"prompt": "q", "completion": "4"}
TURNS = [{"role": "user", "content": "q"}, *[{"role": "assistant", "content": "4"}] * 2]


def check(
    tmp_path: Path, tokenizer: Any, rows: list[Any], *overrides: str, own: bool = False
) -> tuple[int, Path]:
    folder = make_model(tmp_path / "model", tokenizer)
    file = tmp_path / "demonstrations.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f"{json.dumps({'prompt': 'q', 'answer': '4'})}\n" * 64, encoding="utf-8")
    config = {
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(folder)},
        "algorithm": "grpo",
        "rewards": [{"function": "math"}],
        "data": {"path": str(file if own else prompts)},
        "warm_start": {"cache": str(tmp_path / "cache"), **({} if own else {"data": {"path": str(file)}})},
        "rollout": {"engine": "hf", "sampling": {"max_prompt_length": 60, "max_completion_length": 8}},
        "eval": {"every": 0},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    return main(["check", str(tmp_path / "run.yaml"), *overrides]), file


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, {"prompt": "q"}], "row 2"),
        ([GOOD, {**GOOD, "completion": ""}], "row (2): a response is empty"),
        ([{"messages": [{"role": "user", "content": "q"}]}], "no assistant message to learn from"),
        ([{**GOOD, "completion": "4" * 5000}], "the longest row has"),
        ([], "the dataset is empty"),
    ],
)
def test_bad_demonstrations_are_found_by_check(
    rows: list[Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = check(tmp_path, make_tokenizer(), rows)
    message = capsys.readouterr().err
    assert code == 2 and "warm_start.data: " in message and words in message, message


def test_a_demonstrated_turn_that_no_stop_token_ends_is_found_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": TURNS}] * 2
    assert check(tmp_path, glm_tokenizer(), rows)[0] == 2
    assert "warm_start.data: a trained turn ends with '<|assistant|>' (token 4)" in capsys.readouterr().err
    assert check(tmp_path, glm_tokenizer(), rows, "rollout.sampling.stop_token_ids=[4]")[0] == 0


def test_the_runs_own_data_must_demonstrate_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, make_tokenizer(), [{"prompt": "q", "answer": "4"}] * 64, own=True)[0] == 2
    message = capsys.readouterr().err
    assert "column 'completion'" in message and "name other data under warm_start.data" in message


def test_data_of_a_finished_warm_start_are_not_read_again(tmp_path: Path) -> None:
    from rft.config.load import load_config
    from rft.plan import make_plan
    from rft.preflight.data import warm_start_folder

    code, file = check(tmp_path, make_tokenizer(), [GOOD] * 4)
    assert code == 0
    plan = make_plan(load_config(tmp_path / "run.yaml"))
    folder = warm_start_folder(plan.config, plan.config.warm_start, plan.model)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    file.unlink()
    assert main(["check", str(tmp_path / "run.yaml")]) == 0
