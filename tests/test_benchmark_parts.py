"""Helpers of the benchmarks, and the bounds of a GRPO step, against values computed by hand."""

from __future__ import annotations

import json
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OTHER = {"cpu": "another one", "capability": "AVX2", "bfloat16_arithmetic": False}


@pytest.fixture(scope="module")
def real_step() -> Iterator[ModuleType]:
    """The script benchmarks/real_step.py as a module; scripts import each other by bare names."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import real_step

        yield real_step
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(BENCHMARKS)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def common(real_step: ModuleType) -> ModuleType:
    return sys.modules["common"]


# -- the machine -----------------------------------------------------------------------------------------


def test_the_kind_of_a_processor_is_kept_by_a_results_file(common: ModuleType, tmp_path: Path) -> None:
    described = {**OTHER, "cores": 64, "load": 3.5}
    assert common.kind_of(described) == ("another one", "AVX2", False)
    here = common.machine("torch", "no-such-package")
    assert here["versions"]["no-such-package"] is None and here["versions"]["torch"] == torch.__version__
    assert here["cpu"] and here["cores"] >= 1 and ("gpu" in here) == torch.cuda.is_available()
    common.write_result(tmp_path / "new" / "a.json", {"results": [1]}, "no-such-package")
    written = json.loads((tmp_path / "new" / "a.json").read_text())
    assert written["results"] == [1] and written["machine"]["versions"]["no-such-package"] is None
    assert common.kind_of(written["machine"]) == common.kind_of(here)


def test_new_rows_replace_those_of_the_same_case_and_of_another_processor(
    common: ModuleType, tmp_path: Path
) -> None:
    file, key = tmp_path / "a.json", ("task", "dtype")
    a, b = ({"task": task, "dtype": "float32", "seconds": 1} for task in "ab")
    new = {"task": "b", "dtype": "float32", "seconds": 2}
    assert common.merge_rows(file, key, [new]) == [new]
    common.write_result(file, {"results": [a, b]})
    assert common.merge_rows(file, key, [new]) == [a, new]
    file.write_text(json.dumps({"machine": OTHER, "results": [a, b]}))
    assert common.merge_rows(file, key, [new]) == [new]
    assert common.merge_rows(file, key, [new], timed=False) == [a, new]


def test_an_entry_replaces_that_of_its_kind_of_processor(common: ModuleType, tmp_path: Path) -> None:
    file, strong = tmp_path / "new" / "a.json", {**OTHER, "capability": "AVX512"}
    assert common.entry_of(file, OTHER) == {}
    for machine, seconds in ((strong, 1), (OTHER, 2), ({**OTHER, "load": 3.5}, 3)):
        common.write_entry(file, {"machine": machine, "seconds": seconds})
    assert [common.entry_of(file, machine)["seconds"] for machine in (OTHER, strong)] == [3, 1]
    assert len(json.loads(file.read_text())["machines"]) == 2


def test_versions_of_a_peer_are_those_of_its_environment(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")})
    metadata = Path(packages) / "made_up-1.5.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: Made_Up\nVersion: 1.5\n")
    monkeypatch.setenv("RFT_PEER_TRL", str(tmp_path / "env" / "bin" / "python"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert common.peer_versions("trl", "made-up") == {"made-up": "1.5"}
    with pytest.raises(KeyError, match="absent"):
        common.peer_versions("trl", "made-up", "absent")
    before = list(sys.path)
    common.use_peer("trl")
    common.use_peer("trl")
    assert sys.path == [*before, packages]


# -- time ------------------------------------------------------------------------------------------------


def test_runs_alternate_and_ratios_are_taken_round_by_round(common: ModuleType) -> None:
    calls: list[str] = []
    rounds = common.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == ["a", "b"] * 3  # the first turn is not counted
    assert [len(times) for times in rounds.all.values()] == [2, 2] and len(rounds.gflops) == 3
    assert min(rounds.gflops) > 0
    rounds = common.Rounds({"slow": [4.0, 30.0, 6.0], "fast": [2.0, 10.0, 2.0]}, [50.0, 30.0, 40.0])
    assert rounds.gain("slow", "fast") == 3.0  # of 2, 3 and 3
    assert rounds.summary() == {
        "seconds": {"slow": 6.0, "fast": 2.0},
        "spread": {"slow": 6.5, "fast": 4.0},
        "baseline_gflops": [40.0, 30.0],
    }


def test_the_error_of_gradients_is_relative_to_the_reference(common: ModuleType) -> None:
    model, reference = (torch.nn.Linear(2, 1) for _ in range(2))
    model.weight.grad, reference.weight.grad = torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]])
    model.bias.grad, reference.bias.grad = torch.ones(1), torch.zeros(1)  # has no norm to compare with
    assert common.gradient_error(model, reference) == pytest.approx(0.1)  # 0.5 of 5


# -- bounds of a step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "width", "parameters"), [({}, 4, 348), ({"head_dim": 4}, 8, 348 + 2 * 48)]
)  # twice the queries, keys, values and outputs, of 48 parameters a layer
def test_sizes_are_those_of_the_model(
    real_step: ModuleType, tmp_path: Path, more: dict[str, Any], width: int, parameters: int
) -> None:
    config = LlamaConfig(
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
        tie_word_embeddings=True,
        pad_token_id=None,
        **more,
    )
    config.save_pretrained(tmp_path)
    sizes = real_step.Sizes.of(str(tmp_path))
    assert sizes == real_step.Sizes(
        parameters, 40, layers=2, width=width, keys=width // 2, hidden=4, intermediate=8
    )
    assert LlamaForCausalLM(config).num_parameters() == parameters


def test_the_work_of_a_step_by_hand(real_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of 10 tokens, three completions of 2 each: 32 tokens, of which 12 are sampled."""
    monkeypatch.setattr(real_step, "PROMPTS", 2)
    monkeypatch.setattr(real_step, "GENERATIONS", 3)
    sizes = real_step.Sizes(100, 40, layers=2, width=3, keys=3, hidden=4, intermediate=5)
    products = 60 * 32 + 40 * 12  # of the body for all tokens, of the head for the sampled ones
    pairs = 2 * (
        10 * 10 / 2 + 3 * 2 * (10 + 1)
    )  # a completion's token sees the prompt and half of the others
    assert real_step.train_work(sizes, 10, 2) == 6 * products + 3 * (4 * 3 * 2) * pairs == 31_104
    # The weights are read twice, 800 bytes in float32; the products are 4,800 operations.
    assert real_step.rollout_bound(sizes, 10, 2, "float32", rate=100, read=10) == 80
    assert real_step.rollout_bound(sizes, 10, 2, "bfloat16", rate=100, read=10) == 48
    assert real_step.rollout_bound(sizes, 10, 2, "bfloat16", rate=200, read=10) == 40


def test_the_share_of_products_alone_by_hand(real_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of 8 rows takes 0.5 s."""
    monkeypatch.setattr(real_step, "PROMPTS", 2)
    monkeypatch.setattr(real_step, "GENERATIONS", 4)
    monkeypatch.setattr(real_step, "LENGTH", 10)
    monkeypatch.setattr(real_step, "product_rate", lambda dtype: 100.0)
    monkeypatch.setattr(real_step, "read_rate", lambda: 1e9)
    monkeypatch.setattr(real_step, "decode_products", lambda sizes, dtype, rows: rows / 16)
    sizes = real_step.Sizes(100, 40, layers=2, width=3, keys=3, hidden=4, intermediate=5)
    prompts, completions = 2 * 60 * 2 * 10 / 100, 2 * 100 * 8 * 10 / 100
    share = real_step.products_alone(sizes, 10, "float32")
    assert share == pytest.approx((prompts + completions) / (prompts + 10 * 0.5))


def run(who: str, dtype: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    return {"who": who, "dtype": dtype, "seconds": seconds, "median": 2.0, **more}


def test_the_summary_compares_the_better_dtypes(real_step: ModuleType) -> None:
    aims = real_step.AIMS
    learner = aims["learner float32"]
    runs = [
        run("rft", "float32", [2.0, 9.0], first=2.0, shares={"train": learner, "rollout": 0.2}),
        run("rft", "float32", [4.0], first=6.0, shares={"train": learner, "rollout": 0.4}),
        run("rft", "bfloat16", [1.0, 3.0], first=2.0, shares={"train": 0.0, "rollout": 1.0}),
        run("trl", "float32", [30.0]),
        run("trl", "bfloat16 weights", [20.0, 10.0, 2.0]),
    ]
    result = real_step.summary(runs)
    assert result["seconds_per_step"] == {
        "rft bfloat16": 2.0,
        "rft float32": 4.0,
        "trl bfloat16 weights": 10.0,
        "trl float32": 30.0,
    }
    assert result["best"] == {"rft": "rft bfloat16", "trl": "trl bfloat16 weights"}
    assert result["ratio"] == 5.0 and result["passed"] == (aims["ratio"] <= 5.0)
    single, half = result["shares"]["float32"], result["shares"]["bfloat16"]
    assert single["learner"] == learner and single["learner_passed"]
    assert single["rollout"] == pytest.approx(0.3) and single["rollout_passed"] == (aims["rollout"] <= 0.3)
    assert single["first_step"] == 2.0 and single["first_step_passed"] == (aims["first step"] >= 2.0)
    assert not half["learner_passed"] and half["rollout_passed"] and half["first_step"] == 1.0


def test_the_summary_of_one_library_has_no_ratio(real_step: ModuleType) -> None:
    result = real_step.summary([run("trl", "float32", [1.0])])
    assert result == {"seconds_per_step": {"trl float32": 1.0}, "aims": real_step.AIMS, "shares": {}}
