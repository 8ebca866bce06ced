"""`rft select` and `rft sample`: scores, what is kept, going on, and what each mistake is answered with."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.cli import main
from rft.config.data import DataConfig
from rft.data import DataError
from rft.data.rows import Rows
from rft.errors import ConfigError
from rft.tasks.tiny import build_tiny
from rft.tools import row_scores
from rft.tools import select as module
from rft.tools.row_scores import (
    Arguments,
    Diverse,
    Reading,
    Scored,
    Scorer,
    best_of_batches,
    error_and_uncertainty,
    nuclear_norm,
    pass_rates,
    projection,
    relative_gain,
    token_score,
)
from rft.tools.sample import kept_rows
from rft.tools.select import METHODS, bounds, select

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
    relative = Arguments(data, "lobass", str(tiny_folder), tuned=str(tuned), fraction=0.5)
    select(relative, tmp_path / "lobass", quiet)
    losses = [-s for s in scores(tmp_path / "before")]
    assert scores(tmp_path / "lobass") == pytest.approx([g / x for g, x in zip(gains, losses, strict=True)])
    plain = Arguments(data, "uds", str(tiny_folder), fraction=0.5, diversity=0.0)
    select(plain, tmp_path / "uds", quiet)
    norms = scores(tmp_path / "uds")
    assert min(norms[2], norms[4]) > norms[5], "longer rows have a larger norm"
    with pytest.raises(ConfigError, match="name the model after training by --tuned"):
        select(Arguments(data, "learnability", str(tiny_folder), fraction=0.5), tmp_path / "no", quiet)
    with pytest.raises(ConfigError, match="--tuned: uds does not read a second model"):
        select(Arguments(data, "uds", "a", tuned="b", fraction=0.5), tmp_path / "no", quiet)


def test_lobass_is_the_gain_relative_to_the_first_loss() -> None:
    assert relative_gain(2.0, 0.5) == 0.75
    assert relative_gain(0.2, 0.05) == pytest.approx(0.75), "the scale of the loss does not matter"
    assert relative_gain(1.0, 1.5) == -0.5
    assert relative_gain(0.0, 0.0) is None, "a response that is known for certain has nothing to learn"


def test_q_tuning_of_a_row_by_hand() -> None:
    """Targets of probability 1/2, 1/8, 1, 1/3 as in the test of the algorithm, in distributions of which the
    rest is on one other token: scores 1/2 of 2 + 8, 8 + 2 + 1, 1 + 8 + 3, 3 + 1; mean entropy of the four."""
    p = torch.tensor([1 / 2, 1 / 8, 1.0, 1 / 3], dtype=torch.float64)
    logits = torch.stack([p, 1 - p], 1).clamp(min=1e-300).log()
    score, more = error_and_uncertainty(logits, torch.zeros(4, dtype=torch.int64), 0.75)
    assert score == pytest.approx((2 * 8 * 1 * 3) ** 0.25)
    entropies = [-x * math.log(x) - (1 - x) * math.log(1 - x) for x in (1 / 2, 1 / 8, 1 / 3)]
    assert more["entropy"] == pytest.approx(sum(entropies) / 4)
    assert more["tokens"] == [1, 1, 1, 0]


def test_q_tuning_keeps_two_quadrants_and_marks_tokens(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity and entropy by rank: known (1, 1), noise (6, 6), misconceptions (5, 2) and (4, 3), and
    calibration (3, 4) and (2, 5): half of six rows are the outer ones of both quadrants, then, of the two
    with the next a, the one of higher perplexity."""
    ranks = {0: (1, 1), 1: (6, 6), 2: (5, 2), 3: (4, 3), 4: (3, 4), 5: (2, 5)}
    marks = [1, 0, 1]

    def of_rank(*_: Any) -> Scorer:
        return lambda number, row: Scored(
            float(ranks[number][0]), {"entropy": ranks[number][1] / 10, "tokens": marks}
        )

    monkeypatch.setattr(module, "scorer_of", of_rank)
    out = tmp_path / "out"
    select(Arguments(data, "q_tuning", "any", fraction=0.5), out, quiet)
    lines = [json.loads(line) for line in (out / "tokens.jsonl").read_text().splitlines()]
    assert lines == [
        {"row": 3, "quadrant": "misconception", "tokens": marks},
        {"row": 4, "quadrant": "misconception", "tokens": marks},
        {"row": 6, "quadrant": "calibration", "tokens": [1, 1, 1]},
    ]


def test_q_tuning_with_a_model(data: str, tmp_path: Path, tiny_folder: Path) -> None:
    select(Arguments(data, "q_tuning", str(tiny_folder), fraction=0.5), tmp_path / "q", quiet)
    select(Arguments(data, "perplexity", str(tiny_folder), range=(0, 1e9)), tmp_path / "p", quiet)
    assert scores(tmp_path / "q") == scores(tmp_path / "p")
    lines = [json.loads(line) for line in (tmp_path / "q" / "tokens.jsonl").read_text().splitlines()]
    selected = [json.loads(line) for line in (tmp_path / "q" / "selected.jsonl").read_text().splitlines()]
    assert [ROWS[line["row"] - 1] for line in lines] == selected and len(lines) == 3
    for line in lines:
        share = sum(line["tokens"]) / len(line["tokens"])
        assert (share < 0.9) == (line["quadrant"] == "misconception")


class Readings:
    """Stands for the models: row `number` has the logits of `of[number]`."""

    device = "cpu"

    def __init__(self, of: list[list[list[float]]]) -> None:
        self.of, self.read_rows = [torch.tensor(x) for x in of], list[int]()

    def read(self, number: int, row: Any) -> Reading | None:
        self.read_rows.append(number)
        logits = self.of[number]
        return Reading([logits], [logits], torch.zeros(len(logits))) if len(logits) else None


def diverse(of: list[list[list[float]]], fraction: float) -> tuple[Diverse, Readings]:
    readings = Readings(of)
    arguments = Arguments("", "uds", "m", fraction=fraction, max_length=2, diversity=10.0)
    return Diverse(readings, arguments), readings  # type: ignore[arg-type]


def test_uds_by_hand() -> None:
    """Logits diag(a, b), of nuclear norm a + b. Vocabulary and length are within the projection's size, so
    that it is orthogonal, and distances are those of the logits (Frobenius)."""
    batch = [[[float(a), 0.0], [0.0, 1.0]] for a in (8, 7, 6, 5, 4, 3, 2, 1)]
    later = [[[8.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 9.0]], []]
    score, _ = diverse([*batch, *later], 0.25)
    values = [score(i, {}).score for i in range(11)]
    assert values[:8] == pytest.approx([9, 8, 7, 6, 5, 4, 3, 2]), "no row was kept before"
    # the buffer has diag(8, 1) and diag(7, 1)
    far = (math.hypot(7, 8) + math.hypot(6, 8)) / 2
    assert values[8] == pytest.approx(9 + 10 * (0 + 1) / 2)
    assert values[9] == pytest.approx(10 + 10 * far)
    assert values[10] is None
    assert best_of_batches([*map(float, values[:10]), math.nan], 0.25) == [0, 1, 9]  # type: ignore[arg-type]
    assert best_of_batches([math.nan, 1.0, 3.0], 0.01) == [2], "one of each batch at least"


def test_uds_restores_its_buffer_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_scores, "BUFFER", 3)
    generator = torch.Generator().manual_seed(0)
    of = [torch.randn(2, 5, generator=generator).tolist() for _ in range(30)]
    of[17] = []
    whole, _ = diverse(of, 0.25)
    expected = [whole(i, {}).score for i in range(30)]
    rows = Rows([{}] * 30, range(30), DataConfig(path="rows.jsonl"), "rows.jsonl")
    for done in (0, 3, 8, 18, 29):
        again, readings = diverse(of, 0.25)
        again.restore([math.nan if s is None else s for s in expected[:done]], rows)
        assert len(readings.read_rows) <= 3 + done % 8, "only the buffer and the open batch are read again"
        assert readings.read_rows == sorted(readings.read_rows), "in order"
        assert [again(i, {}).score for i in range(done, 30)] == expected[done:]


def test_a_projection_keeps_lengths() -> None:
    square = projection(16, 16, seed=3).double()
    torch.testing.assert_close(square @ square.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-6)
    vectors = torch.randn(200, 4096, generator=torch.Generator().manual_seed(1))
    ratio = (vectors @ projection(4096, 128, seed=0).T).norm(dim=1) / vectors.norm(dim=1)
    assert 0.95 < ratio.mean() < 1.05 and ratio.std() < 0.15


@pytest.mark.timeout(120)
def test_uds_goes_on_where_it_was_cut(tmp_path: Path, tiny_folder: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {i}+{i}?", "completion": str(2 * i)} for i in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = Arguments(str(data), "uds", str(tiny_folder), fraction=0.25)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert select(arguments, whole, quiet).kept == 2 + 2 + 1
    lines = (whole / "scores.jsonl").read_text().splitlines(keepends=True)
    select(arguments, cut, quiet)
    for name in ("selected.jsonl", "report.html"):
        (cut / name).unlink()
    (cut / "scores.jsonl").write_text("".join(lines[:13]))
    select(arguments, cut, quiet)
    assert all((whole / n).read_bytes() == (cut / n).read_bytes() for n in ("scores.jsonl", "selected.jsonl"))


PEAK = """
import resource, sys
from pathlib import Path
from rft.tools.select import Arguments, select
for name in ("small", "large"):
    for method, options in (("length", {"fraction": 0.5}), ("exact", {})):
        data, out = (Path(sys.argv[1]) / text for text in (f"{name}.jsonl", f"{name}-{method}"))
        select(Arguments(str(data), method, **options), out, lambda text: None)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.timeout(240)
def test_rows_are_not_kept_in_memory(tmp_path: Path) -> None:
    """The peak memory of a selection grows by what its method keeps of a row, not by its data."""
    for name, rows in (("small", 1000), ("large", 10_000)):
        with (tmp_path / f"{name}.jsonl").open("w") as out:
            for i in range(rows):
                out.write(json.dumps({"prompt": f"{i} " + "why " * 500, "completion": "so " * 800}) + "\n")
    assert (tmp_path / "large.jsonl").stat().st_size > 40 * 2**20
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    peaks = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert float(peaks[-1]) - float(peaks[1]) < 10, f"peaks in MB: {peaks}"


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_are_read_in_order_and_named(tmp_path: Path, packed: bool) -> None:
    """Two files of a split, one of them with a blank line and a malformed one."""
    folder = tmp_path / "data"
    folder.mkdir()
    parts = ["".join(json.dumps(row) + "\n\n" for row in ROWS[:2]), json.dumps(ROWS[2]) + "\n{'prompt': 1}\n"]
    for name, text in zip("ab", parts, strict=True):
        raw = text.encode()
        file = folder / f"train-{name}.jsonl{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(raw) if packed else raw)
    with pytest.raises(DataError, match=r"train-b.*malformed JSON in line 2"):
        select(Arguments(str(folder), "exact"), tmp_path / "no", quiet)
    assert not (tmp_path / "no").exists()
    (folder / f"train-b.jsonl{'.gz' if packed else ''}").unlink()
    assert select(Arguments(str(folder), "exact"), tmp_path / "out", quiet).kept == 2
    array = tmp_path / "array.jsonl"
    array.write_text(json.dumps(ROWS, indent=1))
    assert select(Arguments(str(array), "exact"), tmp_path / "array", quiet).kept == 5


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
    make: Callable[..., Scorer] = module.scorer_of

    def failing(*args: Any) -> Scorer:
        score = make(*args)

        def scored(number: int, row: Any) -> Scored:
            calls.append(number)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return score(number, row)

        return scored

    monkeypatch.setattr(module, "scorer_of", failing)
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
        ({"method": "lobass", "model": "m", "fraction": 0.5}, "lobass: name the model after training"),
        ({"method": "uds", "model": "m", "quantiles": (0, 1)}, "uds does not choose rows by it"),
        ({"method": "uds", "model": "m", "fraction": 0.5, "lowest": True}, "uds keeps no lowest scores"),
        ({"method": "uds", "model": "m", "fraction": 0.5, "diversity": -1}, "a number from 0 on"),
        ({"method": "q_tuning", "model": "m", "fraction": 0.5, "token_share": 0}, "--token-share: write"),
        ({"method": "length", "range": (0, 5), "lowest": True}, "it goes with --fraction"),
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
    with pytest.raises(SystemExit):
        main(["select", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(METHODS) in text
    assert main([*command, "--column", "prompt"]) == 2
    assert "--column: write NAME=COLUMN" in capsys.readouterr().err


def test_the_command_names_wrong_data(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one message, without a traceback, before a model is loaded or a folder is made."""
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text("")
    assert main(["select", str(file), "--method", "exact", "--out", str(out)]) == 2
    assert "rows.jsonl: the dataset is empty; give at least one row" in capsys.readouterr().err
    file.write_text('{"prompt": "1+1", "answer": "2"}')
    command = ["select", str(file), "--method", "grape", "--model", str(tiny_folder), "--out", str(out)]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "row 1, column 'completion': no such column" in err and "Traceback" not in err
    assert "here: --column completion=NAME_IN_YOUR_DATA" in err and not out.exists()
    assert main([*command, "--column", "completion=answer"]) == 0


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
