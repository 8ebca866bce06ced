"""Adapters on a base in 4 or 8 bits, on CPU through bitsandbytes; adapters on the head; exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rft.algorithms import ALGORITHMS
from rft.batch import Batch
from rft.config.learner import AdapterConfig
from rft.learner.adapters.merge import plain_name
from rft.learner.learner import Learner
from rft.tasks.tiny import build_tiny
from tests.test_learner import spec

pytestmark = pytest.mark.numerics

pytest.importorskip("bitsandbytes")


def quantized(
    model: Path, quantize: str | None, method: str, algorithm: Any = None, **adapter: Any
) -> Learner:
    config = {
        "adapter": AdapterConfig(method=method, r=4, **adapter),
        "quantize": quantize,
        "learning_rate": 1e-2,
    }
    return Learner(spec(model, settings=algorithm or ALGORITHMS["grpo"](beta=0.1), config=config))


def plain(model: Path, weights: dict[str, Any]) -> Learner:
    one = Learner(spec(model))
    for name, parameter in one.policy.model.named_parameters():
        parameter.data.copy_(weights[name])
    return one


@pytest.mark.parametrize(
    ("quantize", "method"),
    [("nf4", "lora"), ("fp4", "dora"), ("int8", "lora"), ("nf4", "eva"), ("nf4", "loftq")],
)
def test_a_quantised_base(tiny_folder: Path, make_groups, tmp_path: Path, quantize: str, method: str) -> None:
    batch, other = Batch.build(make_groups(seed=1)), Batch.build(make_groups(seed=2))
    one = quantized(tiny_folder, quantize, method)
    base = {plain_name(n): t.clone() for n, t in one.policy.model.state_dict().items() if "lora" not in n}
    one.step(batch, 0)
    trained = one.score(batch)["logps"]
    # The push is the dequantised base plus the adapter, in full precision. 8 bits multiply in int8.
    merged = {n: t.clone() for n, t in one.weights()}
    gap = (plain(tiny_folder, merged).score(batch)["logps"] - trained).abs().max()
    assert gap < (0.05 if quantize == "int8" else 1e-5)
    now = {plain_name(n): t for n, t in one.policy.model.state_dict().items()}
    assert all(torch.equal(t, now[n]) for n, t in base.items()), "the quantised base changed"

    one.capture_state()(tmp_path)
    two = quantized(tiny_folder, quantize, method)
    two.read_state(tmp_path)
    assert one.step(other, 1)["train/loss"] == two.step(other, 1)["train/loss"]
    for (name, a), (_, b) in zip(one.weights(), two.weights(), strict=True):
        assert torch.equal(a, b), name


def test_loftq_begins_nearer_to_the_full_weights_than_rounding_alone(tiny_folder: Path) -> None:
    full = dict(Learner(spec(tiny_folder)).weights())
    error = {}
    for method in ("lora", "loftq"):
        weights = dict(quantized(tiny_folder, "nf4", method).weights())
        error[method] = sum(float((weights[n] - t).square().sum()) for n, t in full.items())
    assert error["loftq"] < 0.9 * error["lora"]


def untied(folder: Path) -> Path:
    """The tiny model with a head of its own."""
    build_tiny(folder, seed=3, hidden_size=64, layers=2, heads=2, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    other = AutoModelForCausalLM.from_config(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.lm_head.weight.add_(0.01 * torch.randn(other.lm_head.weight.shape))
    other.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "algorithm", [ALGORITHMS["grpo"](beta=0.1), ALGORITHMS["distill"]()], ids=["grpo", "kl"]
)
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_an_adapter_on_the_head(make_groups, tmp_path: Path, method: str, algorithm: Any) -> None:
    """Its factors reach the log-prob kernel and the divergences; reference and push leave them right."""
    folder = untied(tmp_path / "untied")
    batch = Batch.build(make_groups(seed=1))
    start = Learner(spec(folder)).score(batch)["logps"]
    one = quantized(folder, None, method, algorithm, target_modules=["q_proj", "lm_head"])
    before = {n: t.clone() for n, t in one.weights()}
    for step in range(2):  # the first step of distillation from oneself has no gradient
        one.step(batch, step)
        for parameter in one.policy.model.parameters():
            if parameter.requires_grad and step == 0:
                parameter.data.add_(0.01)
    assert (one.score_reference(batch) - start).abs().max() < 2e-5
    weights = {n: t.clone() for n, t in one.weights()}
    assert not torch.equal(weights["lm_head.weight"], before["lm_head.weight"])
    gap = (plain(folder, weights).score(batch)["logps"] - one.score(batch)["logps"]).abs().max()
    assert gap < 1e-5


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "olora"])
def test_the_export_is_a_plain_model_and_an_adapter_on_the_original_base(
    tiny_folder: Path, make_groups, tmp_path: Path, method: str
) -> None:
    from peft import PeftModel

    batch = Batch.build(make_groups(seed=1))
    one = quantized(tiny_folder, None, method, rslora=method == "pissa")
    one.step(batch, 0)
    one.export(str(tmp_path))
    trained = one.score(batch)["logps"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        plain(tiny_folder, dict(merged.named_parameters())).score(batch)["logps"] - trained
    ).abs().max() < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    got = plain(tiny_folder, dict(adapted.named_parameters())).score(batch)["logps"]
    assert (got - trained).abs().max() < 1e-5
