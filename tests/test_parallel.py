"""Two real processes train as one does: FSDP2 and ZeRO 1 to 3 over gloo, against a single process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.learner.learner import Learner
from tests import parallel_ranks as ranks

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a single process and two ranks of every kind have left; those before one that failed have, too."""
    root = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "tests.parallel_ranks", str(tiny_folder), str(root)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=380)
    (root / "error").write_text(done.stderr)
    return root


def left(runs: Path, name: str) -> Any:
    if not (runs / name).exists():
        pytest.fail((runs / "error").read_text())
    return torch.load(runs / name, weights_only=False)


def result(runs: Path, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = left(runs, f"{kind}/result.pt")
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * a[name].abs().max(), name


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_two_ranks_give_the_weights_and_metrics_of_one(runs: Path, kind: str) -> None:
    """Uneven token counts, clipping, a reference, several micro-batches, and a step in which one rank has
    no work at all. Adam makes any wrong gradient a visible change of weights."""
    one, two = result(runs, ranks.alone(kind)), result(runs, kind)
    for step in range(ranks.STEPS):
        same(one["weights"][step], two["weights"][step])
        assert (one["scores"][step] - two["scores"][step]).abs().max() < 1e-4
        first, second = one["metrics"][step], two["metrics"][step]
        assert first.keys() == second.keys()
        for name in first:
            if not name.startswith(("time/", "throughput/")) and name != "train/micro_batches":
                assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), (name, step)
    moved = max(
        float((a - b).abs().max()) for a, b in zip(*(w.values() for w in two["weights"][:2]), strict=True)
    )
    assert moved > 1e-4


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(runs: Path, tiny_folder: Path, kind: str) -> None:
    learner = Learner(ranks.spec(tiny_folder, **ranks.trains(kind)))
    learner.read_state(runs / kind / "state")
    assert learner.version == 2
    learner.step(ranks.batch(2), 2)
    same(result(runs, ranks.alone(kind))["weights"][2], ranks.weights(learner))


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_a_checkpoint_of_one_process_goes_on_in_two_ranks(runs: Path, kind: str) -> None:
    one, two = result(runs, ranks.alone(kind)), result(runs, kind)
    same(one["weights"][2], two["resumed weights"])
    assert two["resumed"]["train/grad_norm"] == pytest.approx(one["metrics"][2]["train/grad_norm"], rel=1e-5)


def test_weights_are_cast_to_the_engines_precision_before_they_are_gathered(runs: Path) -> None:
    """Half the bytes travel between the ranks, and the same bits arrive."""
    (exact_bytes, exact), (half_bytes, half) = result(runs, "fsdp2")["pushes"]
    each = sum(tensor.nbytes for tensor in exact.values()) / 2
    assert exact_bytes == pytest.approx(each, rel=0.02)  # uneven halves are padded
    assert half_bytes == exact_bytes / 2
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in exact.items())


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_the_export_is_an_ordinary_model(runs: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(runs / kind / "model", dtype=torch.float32)
    same(result(runs, kind)["weights"][2], dict(loaded.named_parameters()))


@pytest.mark.parametrize("kind", ranks.LORA)
def test_the_adapter_that_ranks_export_is_that_of_one_process(runs: Path, kind: str) -> None:
    from safetensors.torch import load_file

    one, two = (
        load_file(runs / k / "model/adapter/adapter_model.safetensors") for k in (ranks.alone(kind), kind)
    )
    assert len(two) > 0
    same(one, two, tolerance=1e-5)


@pytest.mark.parametrize("kind", ranks.MASKED_KINDS)
def test_several_ranks_agree_on_what_is_passed_over(runs: Path, kind: str) -> None:
    """Micro-batches of one tree: a step with nothing for anyone, and one with a single tree."""
    one, two = left(runs, "masked single.pt"), left(runs, f"masked {kind}.pt")
    for step in range(3):
        assert two[step]["metrics"]["train/updates"] == one[step]["metrics"]["train/updates"]
        for name, weight in one[step]["weights"].items():
            torch.testing.assert_close(two[step]["weights"][name], weight, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(two[0]["weights"][n], w) for n, w in two[1]["weights"].items())
