"""`rft compare`: changed weights, spectra, masks, flips, wins and texts against numbers computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rft.cli import main
from rft.metrics.evaluation import Evaluation, Problem, Sampled, write_evaluation
from rft.tools.compare import compare, compare_texts, wins
from rft.tools.model_files import ModelFiles
from rft.tools.weight_changes import changed_mask, mask_overlap, spectrum, weight_changes


def saved(folder: Path, **tensors: torch.Tensor) -> ModelFiles:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return ModelFiles(folder, folder.name)


def test_a_weight_has_changed_if_its_bfloat16_value_has() -> None:
    # 1 + 2^-9 rounds to 1 in bfloat16; 1 + 2^-7 does not; a change of 1e-6 around 0 is below the tolerance
    start = torch.tensor([1.0, 1.0, 0.0, 0.0, 1e-3])
    tuned = torch.tensor([1.0 + 2**-9, 1.0 + 2**-7, 1e-6, 1e-4, 1e-3])
    assert changed_mask(start, tuned).tolist() == [False, True, False, True, False]


def test_rank_energy_and_intruders_of_an_update_by_hand() -> None:
    start = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    assert spectrum(start, start) == (0.0, 0, 0)
    grown = start.clone()
    grown[0, 0], grown[1, 1] = 108.0, 5.0  # singular values of the update 100 and 1
    assert spectrum(start, grown) == (0.5, 1, 0), "no new direction; 1 of 10001 is below 1 %"
    tall = torch.zeros(8, 2)
    tall[0, 0], tall[1, 1] = 2.0, 1.0
    new = tall.clone()
    new[5, 0] = 50.0  # a left direction that the start does not have
    rank, energy, intruders = spectrum(tall, new)
    assert (rank, energy, intruders) == (0.5, 1, 1)


def test_changes_and_overlap_of_two_models(tmp_path: Path) -> None:
    zero = torch.zeros(2, 4)
    one, two = zero.clone(), zero.clone()
    one[0, :3] = 1.0  # changes three weights, and two of them
    two[0, 1:] = 1.0
    two[1, 0] = 1.0
    start = saved(tmp_path / "start", w=zero + 1, bias=torch.ones(2))
    a = saved(tmp_path / "a", w=one + 1, bias=torch.ones(2))
    b = saved(tmp_path / "b", w=two + 1, bias=torch.ones(2))
    changes = weight_changes(start, a)
    assert changes.weights == 10 and changes.changed == pytest.approx(0.3)
    by_name = {row.name: row for row in changes.tensors}
    assert by_name["w"].changed == 3 / 8 and by_name["bias"].rank is None and by_name["bias"].changed == 0
    assert by_name["w"].norm == pytest.approx((3 / 8) ** 0.5) and by_name["w"].rank == 0.5
    assert changes.rank == 0.5
    overlap = mask_overlap(start, a, b)
    assert (overlap.both, overlap.of_a, overlap.of_b) == (2, pytest.approx(2 / 3), 0.5)
    assert (overlap.chance_a, overlap.chance_b) == (pytest.approx(0.4), pytest.approx(0.3))


def test_wins_are_counted_by_mean_reward() -> None:
    def problem(number: int, *rewards: float | None) -> Problem:
        return Problem(number, [Sampled(None, reward) for reward in rewards])

    a = [problem(0, 1.0, 0.0), problem(1, 0.0), problem(2, 1.0), problem(3, None), problem(4, 1.0)]
    b = [problem(0, 1.0, 1.0), problem(1, 0.0), problem(2, 0.5), problem(3, 1.0), problem(5, 1.0)]
    assert wins(a, b) == wins(a, b).__class__(wins=1, ties=1, losses=1)


@pytest.fixture
def pair(tiny_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model, and a copy with another head."""
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(0)
    name = next(n for n in weights if "embed_tokens" in n)
    weights[name] = weights[name] + 0.02 * torch.randn_like(weights[name])
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return tiny_folder, other


def test_divergence_of_texts_is_that_of_the_whole_distributions(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    found = compare_texts(*pair, str(rows), 8)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    from rft.config.data import DataConfig
    from rft.data import load_groups

    (group,) = load_groups(DataConfig(path=str(rows)), tokenizer, "sft").groups
    prompt, completion = group.prompt.tokens, group.completions[0].tokens
    ids = torch.tensor([[*prompt, *completion]])
    logs = []
    for folder in pair:
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0].detach()
        logs.append(logits.log_softmax(-1)[len(prompt) - 1 : -1])
    kl = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="sum") / len(completion)
    nll = torch.nn.functional.nll_loss(logs[1], torch.tensor(completion))
    assert found.rows == 1 and found.tokens == len(completion)
    assert found.kl_ab == pytest.approx(float(kl), rel=1e-3) and found.kl_ab > 1e-4
    assert found.nll_b == pytest.approx(float(nll), rel=1e-4)
    same = compare_texts(pair[0], pair[0], str(rows), 8)
    assert same.kl_ab == same.kl_ba == 0.0 and same.nll_a == same.nll_b


def make_run(folder: Path, model: Path, start: Path, marks: list[bool], rate: float) -> Path:
    import shutil

    folder.mkdir()
    shutil.copytree(model, folder / "model")
    config: dict[str, Any] = {
        "algorithm": "grpo", "model": {"path": str(start)}, "learner": {"learning_rate": rate}
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))
    accuracy = sum(marks) / len(marks)
    (folder / "result.json").write_text(json.dumps({"steps": 4, "eval/accuracy": accuracy}))
    problems = [Problem(i, [Sampled(m, float(m))], Sampled(m)) for i, m in enumerate(marks)]
    write_evaluation(folder, Evaluation(4, {"": problems}, {"": "same"}))
    return folder


def test_two_runs_side_by_side(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_run(tmp_path / "one", pair[0], pair[0], [True, True, False, False], 1e-3)
    two = make_run(tmp_path / "two", pair[1], pair[0], [False, True, True, True], 2e-3)
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    rows.write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    words = ["compare", str(one), str(two), "--data", str(rows), "--page", str(page), "--quick"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    a, b = found["weights"]["changes"]  # both from the model that the configs name
    assert a["changed"] == 0 and 0 < b["changed"] < 1
    changed = [row["name"] for row in b["tensors"] if row["changed"]]
    assert len(changed) == 1 and "embed_tokens" in changed[0]
    part = found["sets"][""]
    assert part["negative"] == [0] and part["positive"] == [2, 3]
    assert part["wins"] == {"wins": 2, "ties": 1, "losses": 1} and part["test"]["difference"] == 0.25
    assert found["metrics"] == {"eval/accuracy": [0.5, 0.75]}
    keys = {row["key"]: (row["a"], row["b"]) for row in found["config"]}
    assert keys["learner.learning_rate"] == (1e-3, 2e-3)
    assert found["texts"]["kl_ab"] > 0 and "rank" in b
    html = page.read_text()
    assert "only A solves" in html and "learner.learning_rate" in html and "McNemar" in html


def test_models_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "a", w=torch.ones(2, 2))
    saved(tmp_path / "b", w=torch.ones(2, 3))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "w has shape [2, 2] in" in capsys.readouterr().err
    with pytest.raises(Exception, match="no such folder"):
        compare("./nowhere", str(tmp_path / "b"), tmp_path / "scratch")
