"""`rft init` recognises data, writes a config that `rft check` accepts, and overwrites nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rft.cli import main
from rft.config.load import load_config
from rft.config.schema import Config, algorithm_name

GSM8K = Path(__file__).parents[1] / "examples" / "data" / "gsm8k"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows(**columns: Any) -> list[dict[str, Any]]:
    """Forty rows; a callable is called with the row's number."""
    return [{k: v(i) if callable(v) else v for k, v in columns.items()} for i in range(40)]


def initialised(tmp_path: Path, data: list[dict[str, Any]] | Path, *words: str) -> tuple[int, Config | None]:
    """Run `rft init`; return its exit code and, if it wrote one, the config, which `rft check` accepts."""
    if not isinstance(data, Path):
        lines = "\n".join(json.dumps(row) for row in data)
        data, _ = tmp_path / "rows.jsonl", (tmp_path / "rows.jsonl").write_text(lines + "\n")
    out = tmp_path / "first.yaml"
    code = main(["init", str(out), "--data", str(data), *words])
    if not out.exists():
        return code, None
    assert main(["check", str(out), f"output_dir={tmp_path / 'runs'}"]) == 0
    return code, load_config(out)


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the tiny model is cached in ./runs


@pytest.mark.parametrize(
    ("data", "algorithm", "columns", "reward"),
    [
        (rows(prompt=lambda i: f"{i} + 1?", answer=lambda i: str(i + 1)), "grpo", {}, "math"),
        (rows(question=lambda i: f"{i} + 1?", target=lambda i: i + 1), "grpo",
         {"prompt": "question", "answer": "target"}, "math"),
        (rows(prompt="A or B?", answer=lambda i: "AB"[i % 2]), "grpo", {}, "choice"),
        (rows(prompt="The colour?", answer=lambda i: ["deep blue", "red"][i % 2]), "grpo", {}, "exact_match"),
        (rows(messages=[turn("user", "hello"), turn("assistant", "hi")]), "sft", {}, None),
        (rows(messages=[turn("user", "1 + 1?")], answer="2"), "grpo", {"prompt": "messages"}, "math"),
        (rows(instruction="say hi", output="hi"), "sft", {}, None),  # Alpaca's names are known
        (rows(prompt="say hi", chosen="hi", rejected="no"), "dpo", {}, None),
        (rows(question="say hi", chosen="hi", rejected="no"), "dpo", {"prompt": "question"}, None),
        (rows(prompt="say hi", completion="hi", label=lambda i: i % 2 == 0), "kto", {}, None),
    ],
)  # fmt: skip
def test_the_data_is_recognised(
    tmp_path: Path, data: list[dict[str, Any]], algorithm: str, columns: dict[str, str], reward: str | None
) -> None:
    code, config = initialised(tmp_path, data)
    assert code == 0
    assert config is not None
    assert algorithm_name(config.algorithm) == algorithm
    assert config.data.columns == columns
    assert [f.function for f in config.rewards.functions] == ([] if reward is None else [reward])
    assert config.data.holdout == 4


def test_answers_inside_solutions_and_a_test_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = initialised(tmp_path, GSM8K)
    assert config is not None
    assert config.data.answer_pattern == r"####\s*(.+)"
    assert config.data.columns == {"prompt": "question"}
    assert config.data.holdout == 0
    assert config.eval.every > 0
    told = capsys.readouterr()
    for words in (
        "algorithm: grpo, from the columns question, answer",
        "reward: math",
        "learning rate: 0.0003",
    ):
        assert words in told.err
    assert "gold answer  math judges '72': correct 1" in told.out  # of `rft check`


def test_the_file_explains_itself(tmp_path: Path) -> None:
    initialised(tmp_path, rows(prompt="1 + 1?", answer="2"))
    text = (tmp_path / "first.yaml").read_text()
    assert text.count("#") >= 12
    assert "tokens_per_micro_batch: auto" in text


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    _, config = initialised(tmp_path, rows(prompt="say hi"), "--reward", "mine.py:short")
    assert config is not None
    assert config.rewards.functions[0].function == "mine.py:short"


def test_without_arguments(tmp_path: Path) -> None:
    assert main(["init"]) == 0
    assert load_config(tmp_path / "run.yaml").data.resolved_kind == "arithmetic"


@pytest.mark.parametrize(
    ("data", "arguments", "words"),
    [
        (rows(prompt="hi"), (), "no gold answers"),
        (rows(x=1), (), "the columns x are not among those that rft recognises"),
        (rows(prompt="1 + 1?", answer="2"), ("--reward", "mth"), "did you mean 'math'?"),
        (rows(prompt="1 + 1?", answer="2"), ("--reward", "code"), "code needs the column 'tests'"),
        (rows(prompt="1 + 1?", answer="2"), ("--algorithm", "grppo"), "did you mean 'grpo'?"),
        (rows(prompt="a", chosen="b", rejected="c"), ("--reward", "math"), "dpo trains on the rows only"),
        (rows(prompt="1 + 1?", answer="2"), ("--model", "./nowhere"), "'./nowhere' is not a model folder"),
        (Path("nowhere.jsonl"), (), "nowhere.jsonl: no such file or folder"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: list[dict[str, Any]] | Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    code, config = initialised(tmp_path, data, *arguments)
    told = capsys.readouterr().err
    assert (code, config) == (2, None)
    assert told.startswith("rft: 1 problem found:")
    assert words in told


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    assert main(["init"]) == 2
    assert "run.yaml exists and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text() == "mine"
