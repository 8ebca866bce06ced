"""Every method of peft on a tiny model: it trains, it merges, it comes back exactly, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.algorithms import ALGORITHMS
from rft.batch import Batch
from rft.config.learner import AdapterConfig
from rft.errors import ModelError
from rft.learner.adapters.adapter import tuner_layers
from rft.learner.adapters.merge import plain_name
from rft.learner.adapters.methods import REFUSED, known_methods, peft_config
from rft.learner.learner import Learner
from tests.test_learner import spec

# What a method needs to fit a model of 64 hidden units, or cannot do without.
SETTINGS: dict[str, dict[str, Any]] = {
    "bone": {"r": 16},
    "c3a": {"options": {"block_size": 32}},
    "fourierft": {"options": {"n_frequency": 50}},
    "oft": {"options": {"oft_block_size": 8}},
    "vblora": {"options": {"vector_length": 16, "num_vectors": 8}},
}
ELSEWHERE = {
    "loftq": "makes up for 4-bit rounding: test_qlora.py",
    "adamss": "needs scikit-learn, which rft does not bring",
    "beft": "trains biases, which this model's layers lack: refused below",
}
METHODS = sorted(set(known_methods()) - set(ELSEWHERE))
MOVED = {"pissa", "olora", "corda", "lora_ga"}  # a part of the base moves into the adapter


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Learner:
    return Learner(spec(tiny_folder))


@pytest.fixture
def borrowed(plain: Learner) -> Iterator[Learner]:
    """The plain model as an instrument: whatever is loaded into it, it is itself again afterwards."""
    kept = {n: p.detach().clone() for n, p in plain.policy.model.named_parameters()}
    yield plain
    put(plain, kept)


def put(learner: Learner, weights: dict[str, torch.Tensor]) -> None:
    own = dict(learner.policy.model.named_parameters())
    assert own.keys() == weights.keys()
    for name, parameter in own.items():
        parameter.data.copy_(weights[name])


def adapted(model: Path, method: str, algorithm: str = "grpo", **settings: Any) -> Learner:
    adapter = AdapterConfig(method=method, **{**SETTINGS.get(method, {}), **settings})
    rl = ALGORITHMS[algorithm](beta=0.1)
    return Learner(spec(model, settings=rl, config={"adapter": adapter, "learning_rate": 1e-2}))


def logps(learner: Learner, batch: Batch) -> torch.Tensor:
    return learner.score(batch)["logps"]


@pytest.mark.parametrize("method", METHODS)
def test_method(tiny_folder: Path, make_groups, tmp_path: Path, borrowed: Learner, method: str) -> None:
    batch, other = Batch.build(make_groups(seed=1)), Batch.build(make_groups(seed=2))
    start = logps(borrowed, batch)
    torch.manual_seed(0)
    one = adapted(tiny_folder, method)
    one.step(batch, 0)
    trained = logps(one, batch)
    assert (trained - start).abs().max() > 1e-4, "the step did not move the policy"
    # The reference is the model that the run began with, though the policy has moved on.
    assert (one.score_reference(batch) - start).abs().max() < 2e-5
    assert torch.equal(logps(one, batch), trained), "running the reference changed the policy"

    before = {n: t.clone() for n, t in one.policy.model.state_dict().items()}
    put(borrowed, dict(one.weights()))
    assert (logps(borrowed, batch) - trained).abs().max() < 1e-5
    after = one.policy.model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items()), "merging touched the model"
    if method not in MOVED:
        original = Learner(spec(tiny_folder)).policy.model.state_dict()
        assert all(torch.equal(after[n], original[plain_name(n)]) for n in after if plain_name(n) in original)

    one.capture_state()(tmp_path)
    assert not (tmp_path / "model").exists(), "the checkpoint holds the whole model"
    torch.manual_seed(5)
    two = adapted(tiny_folder, method)
    two.read_state(tmp_path)
    assert one.step(other, 1)["train/loss"] == two.step(other, 1)["train/loss"]
    for (name, a), (_, b) in zip(one.weights(), two.weights(), strict=True):
        assert torch.equal(a, b), name


def test_eva_redistributes_its_ranks_and_resumes(tiny_folder: Path, make_groups, tmp_path: Path) -> None:
    """The budget is r per layer. Ranks differ, and are the same in the resumed run."""
    build = lambda: adapted(tiny_folder, "eva", r=4, options={"eva_config": {"rho": 3.0}})  # noqa: E731
    one, two = build(), build()
    start = logps(one, Batch.build(make_groups(seed=1)))
    one.step(Batch.build(make_groups(seed=1)), 0)
    assert (one.score_reference(Batch.build(make_groups(seed=1))) - start).abs().max() < 2e-5
    ranks = {path: len(layer.lora_A["default"].weight) for path, layer in tuner_layers(one.policy.model)}
    linear = [n for n in dict(one.weights()) if ".layers." in n and "norm" not in n]
    assert sum(ranks.values()) == 4 * len(linear) and max(ranks.values()) <= 12
    assert len(set(ranks.values())) > 1, "all ranks are equal: nothing was redistributed"
    one.capture_state()(tmp_path)
    two.read_state(tmp_path)
    resumed = {path: len(layer.lora_A["default"].weight) for path, layer in tuner_layers(two.policy.model)}
    assert resumed == ranks
    other = Batch.build(make_groups(seed=2))
    assert one.step(other, 1)["train/loss"] == two.step(other, 1)["train/loss"]
    for (name, a), (_, b) in zip(one.weights(), two.weights(), strict=True):
        assert torch.equal(a, b), name


def test_bone_updates_blocks_by_a_product_and_a_sum(tiny_folder: Path) -> None:
    """W' = W + W_b M_i + M_i for the blocks W_b of block row i."""
    one = adapted(tiny_folder, "bone", r=16)
    path, layer = next(tuner_layers(one.policy.model))
    blocks = layer.miss_block["default"]
    blocks.data = torch.randn(blocks.shape, generator=torch.Generator().manual_seed(0))
    weight = layer.get_base_layer().weight.detach()
    expected = weight.clone()
    for i in range(weight.shape[0] // 16):
        for j in range(weight.shape[1] // 16):
            at = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
            expected[at] += weight[at] @ blocks[i] + blocks[i]
    torch.testing.assert_close(dict(one.weights())[f"{path}.weight"], expected)


def test_cola_merges_and_begins_anew(tiny_folder: Path, make_groups, tmp_path: Path) -> None:
    """Two updates, a merge: the policy is unchanged by it, the new adapter is 0, moments are empty, the
    reference is the first model. The next update adds further ranks."""
    build = lambda: adapted(tiny_folder, "lora", r=2, restart_every=2)  # noqa: E731
    one, plain = build(), adapted(tiny_folder, "lora", r=2)
    first, batch = dict(one.weights()), Batch.build(make_groups(seed=1))
    start = logps(one, batch)
    for step in range(2):
        one.step(batch, step), plain.step(batch, step)
    layers = dict(tuner_layers(one.policy.model))
    # as without restarts, up to the random A of the two: both began from the same seed
    for (name, a), (_, b) in zip(one.weights(), plain.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    for path, layer in layers.items():
        assert not layer.lora_B["default"].weight.any()
        assert torch.equal(layer.get_base_layer().weight, dict(one.weights())[f"{path}.weight"])
    assert not one.optimizer.state, "the moments of the merged adapter were kept"
    assert (one.score_reference(batch) - start).abs().max() < 1e-6
    one.capture_state()(tmp_path)
    two = build()
    two.read_state(tmp_path)
    for step in (2, 3):
        other = Batch.build(make_groups(seed=step))
        assert one.step(other, step)["train/loss"] == two.step(other, step)["train/loss"]
    now = dict(two.weights())
    for (name, a), (_, b) in zip(one.weights(), now.items(), strict=True):
        assert torch.equal(a, b), name
    change = now[f"{path}.weight"] - first[f"{path}.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) > 2, (
        "two adapters of rank 2 changed only two directions"
    )


def test_every_method_of_peft_is_tested_or_refused_with_a_reason() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    everything = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert everything <= set(METHODS) | set(REFUSED) | set(ELSEWHERE)
    for method, reason in REFUSED.items():
        with pytest.raises(ModelError, match=f"method '{method}' cannot be used") as told:
            peft_config(AdapterConfig(method=method))
        assert reason in str(told.value)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"method": "loraa"}, "unknown method 'loraa' (did you mean 'lora'"),
        ({"method": "ln_tuning"}, "cannot be used"),
        ({"options": {"lora_dropuot": 0.1}}, "no option 'lora_dropuot' in peft (did you mean 'lora_dropout'"),
        ({"method": "vera", "alpha": 3}, "method 'vera' has no setting 'alpha'"),
        ({"method": "bone", "r": 48}, "fully divisible"),
        (
            {"target_modules": ["q_prj"]},
            "'q_prj' matches no layer (did you mean 'q_proj'?); the linear layers are: ",
        ),
        ({"target_modules": "no.*thing"}, "'no.*thing' matches no layer"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head shares its weights with the embeddings"),
        ({"method": "pissa", "options": {"use_dora": True}}, "cannot be combined with use_dora or lora_bias"),
        ({"method": "beft", "target_modules": ["q_proj"]}, "no bias"),
    ],
)
def test_what_cannot_be_trained_is_named(tiny_folder: Path, adapter: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as told:
        Learner(spec(tiny_folder, config={"adapter": AdapterConfig(**adapter)}))
    assert words in str(told.value)
