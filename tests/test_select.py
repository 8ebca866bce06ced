"""`rft select` and `rft sample`: scores, what is kept, going on, and what each mistake is answered with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.cli import main
from rft.data import DataError
from rft.errors import ConfigError
from rft.tasks.tiny import build_tiny
from rft.tools import select as module
from rft.tools.sample import kept_rows
from rft.tools.select import Arguments, bounds, nuclear_norm, pass_rates, select, token_score

ROWS = [
    {"prompt": "What is 2+2?", "completion": "It is four."},
    {"prompt": "What is 2+2?", "completion": "4"},
    {"prompt": "Say hello to a friend of yours", "completion": "Hello, my dear old friend, how are you?"},
    {"prompt": "What is 2+2?", "completion": "4"},
    {"prompt": "Say hello to a friend of yours", "completion": "Hello, my dear old friend, how are you!"},
    {"prompt": "Name a colour", "completion": "Blue"},
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return str(file)


def kept(out: Path) -> list[int]:
    rows = [json.loads(line) for line in (out / "selected.jsonl").read_text().splitlines()]
    used: list[int] = []
    for row in rows:
        used.append(next(i for i, r in enumerate(ROWS) if r == row and i not in used))
    return used


def scores(out: Path) -> list[Any]:
    return [json.loads(line)["score"] for line in (out / "scores.jsonl").read_text().splitlines()]


def quiet(_: str) -> None: ...


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"method": "length", "range": (5, 6)}, [0]),
        ({"method": "length", "fraction": 0.5}, [0, 2, 4]),
        ({"method": "length", "fraction": 0.5, "lowest": True}, [1, 3, 5]),
        ({"method": "length", "quantiles": (0.0, 0.6)}, [0, 1, 3, 5]),
        ({"method": "exact"}, [0, 1, 2, 4, 5]),
        ({"method": "minhash", "threshold": 0.7}, [0, 1, 2, 5]),
    ],
)
def test_methods_without_a_model(data: str, tmp_path: Path, options: dict[str, Any], rows: list[int]) -> None:
    if options["method"] == "minhash":
        pytest.importorskip("datasketch")
    out = tmp_path / "out"
    result = select(Arguments(data, **options), out, quiet)
    assert kept(out) == rows
    assert (result.rows, result.kept) == (6, len(rows))
    page = (out / "report.html").read_text()
    assert f"{len(rows)} kept of 6" in page
    assert "<svg" in page
    assert select(Arguments(data, **options), out, quiet) == result  # a finished one is written again


def test_scores_by_hand() -> None:
    """Two tokens with probabilities (1/2, 1/4, 1/4) and (1/8, 3/4, 1/8); targets 0 and 2."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], dtype=torch.float64).log() + 3
    targets = torch.tensor([0, 2])
    mean = (math.log(0.5) + math.log(0.125)) / 2
    assert token_score("grape", logits, targets) == pytest.approx(mean)
    assert token_score("perplexity", logits, targets) == pytest.approx(4.0)  # exp(log(16) / 2)
    norms = [math.sqrt(0.25 + 0.0625 * 2), math.sqrt(0.015625 + 0.5625 + 0.765625)]
    assert token_score("el2n", logits, targets) == pytest.approx(sum(norms) / 2)


def test_methods_with_a_model(data: str, tmp_path: Path, tiny_folder: Path) -> None:
    by = {name: tmp_path / name for name in ("grape", "perplexity", "el2n")}
    select(Arguments(data, "grape", str(tiny_folder)), by["grape"], quiet)
    select(Arguments(data, "perplexity", str(tiny_folder), quantiles=(0.2, 0.8)), by["perplexity"], quiet)
    select(Arguments(data, "el2n", str(tiny_folder), fraction=0.5), by["el2n"], quiet)
    likely, perplexity = scores(by["grape"]), scores(by["perplexity"])
    assert perplexity == pytest.approx([math.exp(-s) for s in likely])
    best = [max((0, 1), key=lambda i: likely[i]), max((2, 4), key=lambda i: likely[i]), 5]
    assert kept(by["grape"]) == sorted(best)
    low, *_, high = sorted(perplexity)[1:5]  # rows 1 and 3 are equal: both are kept, or none
    assert kept(by["perplexity"]) == [i for i in range(6) if low <= perplexity[i] <= high]
    assert all(0 < s < math.sqrt(2) for s in scores(by["el2n"]))
    assert len(kept(by["el2n"])) == 3
    one = ROWS[0]["completion"]
    assert likely[0] == pytest.approx(_mean_logp(tiny_folder, ROWS[0]["prompt"], one), rel=1e-4)


def test_learnability_and_nuclear_norm(data: str, tmp_path: Path, tiny_folder: Path) -> None:
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
    assert nuclear_norm(logits) == pytest.approx(7.0)
    assert nuclear_norm(torch.ones(2, 2, dtype=torch.float64)) == pytest.approx(2.0), "equal rows: rank 1"
    tuned = tmp_path / "tuned"
    build_tiny(tuned, seed=2)
    both = Arguments(data, "learnability", str(tiny_folder), tuned=str(tuned), fraction=0.5)
    select(both, tmp_path / "learn", quiet)
    for name, folder in (("before", tiny_folder), ("after", tuned)):
        select(Arguments(data, "grape", str(folder)), tmp_path / name, quiet)
    gains = [a - b for a, b in zip(scores(tmp_path / "after"), scores(tmp_path / "before"), strict=True)]
    assert scores(tmp_path / "learn") == pytest.approx(gains)
    best = sorted(range(6), key=lambda i: (-scores(tmp_path / "learn")[i], i))[:3]
    assert kept(tmp_path / "learn") == sorted(best)
    select(Arguments(data, "uds", str(tiny_folder), fraction=0.5), tmp_path / "uds", quiet)
    norms = scores(tmp_path / "uds")
    assert min(norms[2], norms[4]) > norms[5], "longer rows have a larger norm"
    with pytest.raises(ConfigError, match="name the model after training by --tuned"):
        select(Arguments(data, "learnability", str(tiny_folder), fraction=0.5), tmp_path / "no", quiet)
    with pytest.raises(ConfigError, match="--tuned: uds reads one model"):
        select(Arguments(data, "uds", "a", tuned="b", fraction=0.5), tmp_path / "no", quiet)


def _mean_logp(folder: Path, prompt: str, completion: str) -> float:
    """The mean log-prob of a response with its end token, from transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    start = tokenizer(before, add_special_tokens=False)["input_ids"]
    answer = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([start + answer])).logits[0].log_softmax(-1)
    return sum(float(logits[len(start) + i - 1, token]) for i, token in enumerate(answer)) / len(answer)


def test_it_goes_on_where_it_was_cut(
    data: str, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, whole, cut = Arguments(data, "grape", str(tiny_folder)), tmp_path / "whole", tmp_path / "cut"
    select(arguments, whole, quiet)
    calls: list[int] = []
    make: Callable[..., module.Scorer] = module._scorer

    def failing(*args: Any) -> module.Scorer:
        score = make(*args)

        def scored(number: int, row: Any) -> module.Score:
            calls.append(number)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return score(number, row)

        return scored

    monkeypatch.setattr(module, "_scorer", failing)
    with pytest.raises(KeyboardInterrupt):
        select(arguments, cut, quiet)
    with (cut / "scores.jsonl").open("a") as file:
        file.write('{"row": 4, "sc')  # a line that a killed process was writing
    said: list[str] = []
    select(arguments, cut, said.append)
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    assert said[0] == "going on: 3 of 6 rows were scored before"
    assert all((whole / n).read_bytes() == (cut / n).read_bytes() for n in ("scores.jsonl", "selected.jsonl"))


def test_pass_rates_of_collected_sessions(data: str, tmp_path: Path) -> None:
    file = tmp_path / "sessions.jsonl"
    verdicts = {0: [True, False], 1: [True, True], 2: [False, None], 5: [None]}
    file.write_text(
        "\n".join(json.dumps({"prompt_id": i, "success": s}) for i, each in verdicts.items() for s in each)
    )
    assert pass_rates(file) == {0: 0.5, 1: 1.0, 2: 0.0}
    select(Arguments(data, "pass_rate", range=(0.1, 0.9), sessions=str(file)), tmp_path / "out", quiet)
    assert kept(tmp_path / "out") == [0]
    assert "3 without a score" in (tmp_path / "out" / "report.html").read_text()
    file.write_text('{"row": 1}')
    with pytest.raises(ConfigError, match="has a line without 'success'"):
        pass_rates(file)


def test_quantiles_are_inclusive() -> None:
    ordered = [float(i) for i in range(11)]
    assert bounds(Arguments("", "length", quantiles=(0.25, 0.75)), ordered) == (3.0, 7.0)
    assert bounds(Arguments("", "length", quantiles=(0.0, 1.0)), ordered) == (0.0, 10.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lenght"}, "'lenght' is unknown; choose one of length, exact"),
        ({"method": "length"}, "say which rows to keep by --range or --quantiles or --fraction"),
        ({"method": "length", "range": (1, 2), "fraction": 0.5}, "give one of them"),
        ({"method": "exact", "fraction": 0.5}, "exact does not choose rows by it"),
        ({"method": "grape"}, "name one by --model"),
        ({"method": "pass_rate", "range": (0, 1)}, "sessions.jsonl of `rft collect` by --sessions"),
        ({"method": "length", "quantiles": (0.5, 0.5)}, "0 <= LOW < HIGH <= 1"),
        ({"method": "length", "range": (3, 2)}, "must not be above"),
        ({"method": "length", "fraction": 0}, "above 0 and up to 1"),
    ],
)
def test_mistakes(data: str, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        select(Arguments(data, **options), tmp_path / "out", quiet)
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    select(Arguments(data, "exact"), out, quiet)
    with pytest.raises(ConfigError, match="has scores of other arguments"):
        select(Arguments(data, "length", fraction=0.5), out, quiet)
    with pytest.raises(ConfigError, match="has out, which rft select did not write"):
        select(Arguments(data, "exact"), tmp_path, quiet)
    with pytest.raises(DataError, match="no row is left"):
        select(Arguments(data, "length", range=(90, 91)), tmp_path / "none", quiet)


def test_the_command(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["select", data, "--method", "length", "--quantiles", "0", "0.5", "--out", str(out)]
    assert main(command) == 0
    assert "selected.jsonl: 3 of 6 rows kept" in capsys.readouterr().err
    assert main([*command, "--column", "prompt"]) == 2
    assert "--column: write NAME=COLUMN" in capsys.readouterr().err


def session(text: str, reward: float | None, success: bool | None) -> dict[str, Any]:
    row = {"prompt": "1+1", "answer": "2"}
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": text}]
    return {
        "row": row,
        "messages": messages,
        "reward": reward,
        "success": success,
        "scores": {"math": reward},
    }


def test_best_of_k_and_rejection_sampling() -> None:
    group = [
        session("3", 0.0, False),
        session("2", 1.0, True),
        session("two", 1.0, True),
        session("?", None, None),
    ]

    def texts(*options: Any) -> list[str]:
        return [row["completion"] for row in kept_rows(group, *options)]

    assert texts("best", None) == ["2"]
    assert texts("success", None) == ["2", "two"]
    assert texts("all", None) == ["3", "2", "two"]
    assert texts("all", 0.5) == ["2", "two"]
    assert texts("best", 2.0) == []
    (row,) = kept_rows(group, "best", None)
    assert row == {"prompt": "1+1", "answer": "2", "completion": "2", "reward": 1.0, "scores": {"math": 1.0}}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_samples_of_a_policy_are_demonstrations(tmp_path: Path) -> None:
    """The command of the page on a real engine; the file trains, and the same command goes on or is done."""
    (tmp_path / "digits.py").write_text(
        "def score(completions, **columns):\n    return [sum(map(str.isdigit, c)) / 9 for c in completions]\n"
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        "algorithm: grpo\ndata: {kind: arithmetic, limit: 4}\n"
        f"rewards: ['{tmp_path}/digits.py:score']\noutput_dir: {tmp_path}\n"
        "rollout: {engine: hf, threads: 1, sampling: {max_prompt_length: 64, max_completion_length: 8}}\n"
        "train: {batch_size: 2}\nlearner: {threads: 1}\n"
    )
    out = tmp_path / "samples"
    command = ["sample", str(config), "--samples", "3", "--prompts", "3", "--out", str(out)]
    assert main(command) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    sessions = [json.loads(line) for line in (out / "sessions" / "sessions.jsonl").read_text().splitlines()]
    assert len(sessions) == 9
    best = [max(s["reward"] for s in sessions if s["prompt_id"] == i) for i in range(3)]
    assert [row["reward"] for row in rows] == best
    before = (out / "samples.jsonl").read_bytes()
    assert main(command) == 0
    assert (out / "samples.jsonl").read_bytes() == before
    assert main([*command, "--keep", "all"]) == 0
    assert len((out / "samples.jsonl").read_text().splitlines()) == 9
