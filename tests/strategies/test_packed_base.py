"""A 4-bit base on a CPU with AVX512-BF16, where bitsandbytes repacks it in place: never in a learner, and
read rightly where it happened. And 8 bits, whose arithmetic depends on the mode."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rft.algorithms import ALGORITHMS
from rft.batch import Batch
from rft.cli import main
from rft.kernels.attention import prepare_model, self_check, tolerance_of
from rft.learner.learner import Learner
from rft.learner.load import load_causal_lm
from rft.utils.quantized import evaluation_mode, full_weight, is_quantized, keep_row_major, rounding
from tests.strategies import avx512bf16
from tests.strategies.test_qlora import plain, quantized
from tests.test_bad_input import run
from tests.test_learner import spec

pytestmark = pytest.mark.numerics

bnb = pytest.importorskip("bitsandbytes")

SCALE = torch.finfo(torch.bfloat16).eps / 2  # packing rounds each scale to bfloat16


@pytest.fixture
def repacks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The processor's behaviour, and the shapes of all weights that were repacked."""
    avx512bf16.packed.clear()
    avx512bf16.emulate(monkeypatch.setattr)
    return avx512bf16.packed


def layer(kind: str, nested: bool, shape: tuple[int, int] = (64, 128)) -> Any:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind, compress_statistics=nested)
    made.weight = bnb.nn.Params4bit(
        torch.randn(shape), quant_type=kind, compress_statistics=nested, module=made, requires_grad=False
    )
    return made.to("cpu")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_packed_weight_is_read_as_it_was(repacks: Any, kind: str, nested: bool) -> None:
    one = layer(kind, nested)
    before, x = full_weight(one).float(), torch.randn(3, 128)
    wanted = one(x)
    one.eval()(x)
    assert repacks == [(64, 128)]
    bytes_now, state_now = one.weight.data.clone(), one.weight.quant_state
    garbage = bnb.functional.dequantize_4bit(one.weight.data, state_now).float()
    assert garbage.shape != before.shape or (garbage - before).abs().max() > 0.1
    found = full_weight(one).float()
    assert ((found - before).abs() <= SCALE * before.abs() * 1.001).all()
    assert torch.equal(found.bfloat16(), avx512bf16.unpack(one.weight.data, state_now))
    assert one.weight.quant_state is state_now and torch.equal(one.weight.data, bytes_now), "it was changed"

    keep_row_major(one)  # undoes it, and it stays so
    again = one(x)
    assert repacks == [(64, 128)]
    torch.testing.assert_close(again, wanted, rtol=0, atol=SCALE * float((x.abs() @ before.abs().t()).max()))
    (x.requires_grad_(), one.train()(x).sum().backward())
    torch.testing.assert_close(x.grad, full_weight(one).sum(0).expand(3, -1))


def test_row_major_layers_stay_so_as_copies_and_in_state_dicts(repacks: Any) -> None:
    one = nn.Sequential(layer("nf4", True))
    state = {n: t.clone() for n, t in one.state_dict().items()}
    keep_row_major(one)
    other = copy.deepcopy(one).eval()
    other(torch.randn(3, 128))
    assert not repacks
    for found in (one.state_dict(), other.state_dict()):
        assert state.keys() == found.keys() and all(torch.equal(t, found[n]) for n, t in state.items())


def base_of(learner: Learner) -> dict[str, Tensor]:
    model = learner.policy.model
    return {n: t.clone() for n, t in model.state_dict().items() if "lora" not in n}


@pytest.mark.parametrize("odd", [False, True], ids=["", "sizes that cannot be packed"])
@pytest.mark.parametrize("method", ["lora", "dora", "loftq"])
def test_three_steps_with_pushes(
    repacks: Any, tiny_folder: Path, make_groups: Any, tmp_path: Path, method: str, odd: bool
) -> None:
    """Training, scoring, held-out data, pushes, a checkpoint and an export: the base stays as it is."""
    from rft.tasks.tiny import build_tiny

    folder = tiny_folder
    if odd:  # 80 columns are no whole blocks, 80 rows no whole groups of 32
        folder = tmp_path / "odd"
        build_tiny(folder, seed=7, hidden_size=80, layers=1, heads=2, intermediate_size=80)
    batch = Batch.build(make_groups(seed=1))
    one = quantized(folder, "nf4", method)
    before = base_of(one)
    for step in range(3):
        one.evaluate(batch, step)
        metrics = one.step(batch, step)
        assert metrics["train/grad_norm"] > 0
        pushed = {n: t.clone() for n, t in one.weights()}  # the proof: an engine has these, and nothing else
        scored = one.score(batch)["logps"]
        assert (plain(folder, pushed).score(batch)["logps"] - scored).abs().max() < 1e-5
    # Gradients pass through every layer: the first one's adapter has moved too.
    moved = [
        p.abs().max() for n, p in one.policy.model.named_parameters() if "layers.0" in n and "lora_B" in n
    ]
    assert moved and min(moved) > 0
    (tmp_path / "state").mkdir()
    one.capture_state()(tmp_path / "state")
    one.export(str(tmp_path / "export"))
    assert not repacks
    now = base_of(one)
    assert before.keys() == now.keys() and all(torch.equal(t, now[n]) for n, t in before.items())
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "export").named_parameters())
    assert (plain(folder, exported).score(batch)["logps"] - scored).abs().max() < 1e-5
    two = quantized(folder, "nf4", method)
    two.read_state(tmp_path / "state")
    assert torch.equal(two.score(batch)["logps"], scored)


def test_pushes_of_a_base_that_was_packed_behind_the_learner(
    repacks: Any, tiny_folder: Path, make_groups: Any
) -> None:
    """As another library may: `weights` reads the packed form."""
    batch = Batch.build(make_groups(seed=1))
    one = quantized(tiny_folder, "nf4", "lora")
    one.step(batch, 0)
    before = {n: t.clone() for n, t in one.weights()}
    for module in one.policy.model.modules():
        if type(module).__name__ == "Linear4bit" and isinstance(module, bnb.nn.Linear4bit):
            module.weight.data, module.weight.quant_state = bnb.nn.modules._convert_weight_packed_for_cpu(
                module.weight.data, module.weight.quant_state
            )
    assert len(repacks) == 14
    for name, tensor in one.weights():
        wrong = (tensor - before[name]).abs().max() / before[name].abs().max()
        assert wrong < 2 * SCALE, name


def test_the_self_check_allows_for_the_arithmetic_of_quantised_layers(tiny_folder: Path) -> None:
    model = load_causal_lm(str(tiny_folder), torch.float32, "cpu", quantize="nf4")
    assert tolerance_of(model.model) == 1e-4
    for module in model.modules():
        if is_quantized(module):
            module.compute_dtype = torch.bfloat16
    assert rounding(model) == torch.finfo(torch.bfloat16).eps
    prepare_model(model)  # a base that was stored so computes in bfloat16 between float32 layers


def test_8_bits_are_judged_and_held_out_as_they_are_trained(tiny_folder: Path, make_groups: Any) -> None:
    """In evaluation mode activations are quantised too: another function than the one that is trained."""
    batch = Batch.build(make_groups(seed=1))
    one = quantized(tiny_folder, "int8", "lora", ALGORITHMS["sft"]())
    model, trained = one.policy.model, one.score(batch)["logps"]
    with evaluation_mode(model):
        kept = one.score(batch)["logps"]
        assert self_check(model, batch) < 1e-4
        assert tolerance_of(model.model) == 1e-4
    model.eval()
    other = one.score(batch)["logps"]
    assert tolerance_of(model.model) > 1e-2
    model.train()
    assert torch.equal(trained, kept) and not torch.equal(trained, other)
    total, units = one.evaluate(batch, 0)["loss"]
    assert total / units == pytest.approx(float(-trained[batch.mask].mean()), rel=1e-5)
    assert all(module.training for module in model.modules())


class Forgets(nn.Module):
    """A layer whose result depends on how often it ran."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        found: Tensor = self.inner(x) * (1 + 0.1 * self.calls)
        return found


class Mixes(nn.Module):
    """A layer that reads the whole row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x + x.mean(1, keepdim=True))
        return found


class Coarse(nn.Module):
    """A quantised layer with as few bits as the largest number of the whole row leaves."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax() / 7
        found: Tensor = self.inner((x / step).round() * step)
        return found


@pytest.mark.parametrize(
    ("wrapper", "quantize", "words"),
    [
        (
            Forgets,
            None,
            r"the same sequence gives different hidden states when it is run again .*another model",
        ),
        (Mixes, None, r"attends to other tokens than rft expects.*another architecture"),
        (
            Coarse,
            "nf4",
            r"quantised layers compute in fewer bits.*learner.quantize out, or set learner.dtype",
        ),
    ],
)
def test_a_model_that_is_refused_is_told_why(
    tiny_folder: Path, wrapper: type[nn.Module], quantize: str | None, words: str
) -> None:
    model = load_causal_lm(str(tiny_folder), torch.float32, "cpu", quantize=quantize)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = wrapper(mlp.down_proj)
    with pytest.raises(ValueError, match=r"differ by \d.*rounding explains.*Cause: .*" + words):
        prepare_model(model)


def test_a_model_that_is_stored_quantised_is_named(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Its 4-bit weights would stay frozen, and be pushed as they are packed."""
    from rft.learner.load import load_tokenizer

    folder = tmp_path / "stored"
    load_causal_lm(str(tiny_folder), torch.float32, "cpu", quantize="nf4").save_pretrained(folder)
    load_tokenizer(str(tiny_folder)).save_pretrained(folder)
    for more in ([], ["learner.adapter={r: 4}"]):
        assert main(run(tmp_path, f"model.path={folder}", "rollout.engine=hf", *more)) == 2
        told = capsys.readouterr().err
        assert "model.path: its weights are stored quantised (bitsandbytes)" in told
        assert "learner.quantize: nf4 with learner.adapter" in told
    one = Learner(spec(folder, config={"adapter": {"method": "lora", "r": 4}}))  # offline it works
    assert all(t.ndim < 2 or t.shape[1] > 1 for _, t in one.weights())
