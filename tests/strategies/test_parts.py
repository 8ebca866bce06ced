"""Strategies that train parts of a policy: what moves, what does not, and that a resumed run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rft.batch import Batch
from rft.config.learner import (
    GaloreConfig,
    HftConfig,
    LiftConfig,
    LisaConfig,
    SaftConfig,
    SubnetworkConfig,
)
from rft.contrib.strategies.galore import GaloreAdamW
from rft.contrib.strategies.subnetwork import find_mask, largest_gradients, principal_weights
from rft.errors import ModelError
from rft.learner.learner import Learner
from tests.test_learner import spec


def learner(model: Path, strategy: Any, **config: Any) -> Learner:
    return Learner(spec(model, config={"strategy": strategy, **config}))


def copies(one: Learner) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in one.weights()}


def changed(before: dict[str, torch.Tensor], one: Learner) -> set[str]:
    return {name for name, t in one.weights() if not torch.equal(t, before[name])}


def test_lisa_trains_drawn_layers_and_drops_the_moments_of_the_others(tiny_folder: Path, make_groups) -> None:
    one = learner(tiny_folder, LisaConfig(layers=1, every=1))
    batch = Batch.build(make_groups())
    seen = set()
    for step in range(6):
        before = copies(one)
        one.step(batch, step)
        moved = {name.split(".")[2] for name in changed(before, one) if ".layers." in name}
        assert len(moved) == 1, "more or less than one layer was trained"
        seen |= moved
        held = [p for p in one.policy.model.model.layers.parameters() if p in one.optimizer.state]
        assert all(p.requires_grad for p in held)
    assert seen == {"0", "1"}, "six draws never chose one of the layers"


def test_hft_freezes_half_of_each_layers_matrices(tiny_folder: Path, make_groups) -> None:
    one = learner(tiny_folder, HftConfig())
    before = copies(one)
    one.step(Batch.build(make_groups()), 0)
    moved = changed(before, one)
    for layer in ("0", "1"):
        matrices = [n for n, t in before.items() if f".layers.{layer}." in n and t.ndim == 2]
        attention = [n for n in matrices if "attn" in n]
        assert len(moved & set(attention)) == len(attention) / 2
        assert len(moved & (set(matrices) - set(attention))) in (1, 2)


def test_galore_is_adamw_where_the_subspace_is_whole(tiny_folder: Path) -> None:
    """With as many directions as rows, P is orthogonal: for a fixed gradient direction Adam of P^T G turned
    back is a rotation of Adam's sign-like first step; with rank 1 of a rank-1 gradient it is exact."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(6, generator=generator), torch.randn(9, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(6, 9))
    optimizer = GaloreAdamW(
        [{"params": [weight], "rank": 1}], lr=0.1, betas=(0.9, 0.999), eps=0.0, every=10, scale=0.5
    )
    weight.grad = torch.outer(u, v)
    optimizer.step()
    # P = u / |u| up to sign; P^T G = |u| v, whose first Adam step is sign(v); times 0.5 and the rate.
    expected = -0.1 * 0.5 * torch.outer(u / u.norm(), v.sign())
    assert torch.allclose(weight.detach(), expected, atol=1e-6)


def test_galore_keeps_small_moments_and_resumes(tiny_folder: Path, make_groups, tmp_path: Path) -> None:
    one = learner(tiny_folder, GaloreConfig(rank=4, every=2))
    before = copies(one)
    one.step(Batch.build(make_groups(seed=1)), 0)
    assert changed(before, one) == set(before)
    held = one.optimizer.state[one.policy.model.model.layers[0].mlp.up_proj.weight]
    assert held["first"].shape == (4, 128) and held["projection"].shape == (64, 4)
    again(one, lambda: learner(tiny_folder, GaloreConfig(rank=4, every=2)), make_groups, tmp_path)


def again(one: Learner, build: Any, make_groups, folder: Path) -> None:
    """Saved and read back, the run goes on to the same weights."""
    one.capture_state()(folder)
    two = build()
    two.read_state(folder)
    for step in (1, 2):
        batch = Batch.build(make_groups(seed=10 + step))
        assert one.step(batch, step)["train/loss"] == two.step(batch, step)["train/loss"]
    for (name, a), (_, b) in zip(one.weights(), two.weights(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("strategy", [LisaConfig(layers=1, every=2), HftConfig(every=2)], ids=["lisa", "hft"])
def test_draws_resume(tiny_folder: Path, make_groups, tmp_path: Path, strategy: Any) -> None:
    one = learner(tiny_folder, strategy)
    one.step(Batch.build(make_groups(seed=1)), 0)
    again(one, lambda: learner(tiny_folder, strategy), make_groups, tmp_path)


def test_muon_moves_matrices_as_torch_does_and_resumes(tiny_folder, make_groups, tmp_path) -> None:
    """The layers' matrices by torch's Muon, embeddings and norms by AdamW; a resumed run goes on the same."""
    build = lambda: learner(tiny_folder, None, optimizer="muon", weight_decay=0.1)  # noqa: E731
    batch = Batch.build(make_groups(groups=2, size=2))
    one, plain = build(), learner(tiny_folder, None, weight_decay=0.1)
    matrix = "model.layers.0.mlp.up_proj.weight"
    before = dict(plain.policy.model.named_parameters())[matrix].detach().clone()
    seen: dict[str, torch.Tensor] = {}
    weight = dict(one.policy.model.named_parameters())[matrix]
    weight.register_post_accumulate_grad_hook(lambda p: seen.update(gradient=p.grad.clone()))
    one.step(batch, 0)
    plain.step(batch, 0)
    for name, p in plain.policy.model.named_parameters():
        mine = dict(one.policy.model.named_parameters())[name]
        by_adamw = "embed" in name or "lm_head" in name or p.ndim < 2
        assert torch.allclose(mine, p, atol=1e-7) == by_adamw, name
        assert ("momentum_buffer" in one.optimizer.state[mine]) != by_adamw
    expected = torch.nn.Parameter(before)
    expected.grad = seen["gradient"]
    rate = one.spec.config.learning_rate
    torch.optim.Muon([expected], lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-7)
    one.capture_state()(tmp_path)
    other = build()
    other.read_state(tmp_path)
    for each in (one, other):
        each.step(batch, 1)
    for a, b in zip(one.policy.model.parameters(), other.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_bitsandbytes_optimizers_train_and_resume(tiny_folder, make_groups, tmp_path, optimizer: str) -> None:
    build = lambda: learner(tiny_folder, None, optimizer=optimizer)  # noqa: E731
    one = build()
    before = copies(one)
    one.step(Batch.build(make_groups(seed=1)), 0)
    assert changed(before, one) == set(before)
    again(one, build, make_groups, tmp_path)


def test_a_subnetwork_is_found_saved_and_trained_alone(
    tiny_folder: Path, make_groups, tmp_path: Path
) -> None:
    first = learner(tiny_folder, None, learning_rate=1e-4)
    begun = copies(first)
    first.step(Batch.build(make_groups(seed=1)), 0)
    first.export(str(tmp_path / "tuned"))
    mask_file = tmp_path / "mask.safetensors"
    settings = SubnetworkConfig(mask=str(mask_file), tuned=str(tmp_path / "tuned"), tolerance=1e-4)
    one = learner(tiny_folder, settings)
    mask = load_file(mask_file)
    expected = find_mask(begun, dict(first.weights()), 1e-4)
    assert mask.keys() == expected.keys() and all(torch.equal(mask[n], expected[n]) for n in mask)
    share = sum(m.numel() for m in mask.values()) / sum(t.numel() for t in begun.values())
    assert 0 < share < 0.9

    # What the sparse optimizer does to the masked elements is what the dense one does: Adam is elementwise.
    dense = learner(tiny_folder, None)
    batch = Batch.build(make_groups(seed=2))
    dense.step(batch, 0), one.step(batch, 0)
    full = dict(dense.weights())
    for name, tensor in one.weights():
        inside = torch.zeros(tensor.numel(), dtype=torch.bool)
        inside[mask.get(name, torch.empty(0, dtype=torch.int64))] = True
        assert torch.equal(tensor.reshape(-1)[~inside], begun[name].reshape(-1)[~inside]), name
        assert torch.allclose(tensor.reshape(-1)[inside], full[name].reshape(-1)[inside], atol=1e-7), name
    assert sum(p.numel() for p in one.strategy.trained(one.policy)) == sum(m.numel() for m in mask.values())
    again(
        one,
        lambda: learner(tiny_folder, SubnetworkConfig(mask=str(mask_file))),
        make_groups,
        _made(tmp_path / "s"),
    )


def test_principal_weights_are_the_largest_after_rank_reduction() -> None:
    """The entry 2 is the second largest of the matrix, and the smallest of its approximation of rank 1."""
    weight = torch.tensor([[3.0, 0.5], [0.0, 2.0]])
    # W^T W = [[9, 1.5], [1.5, 4.25]]: v = (0.961, 0.278), rank 1 = (W v) v^T = [[2.90, 0.84], [0.53, 0.15]]
    assert principal_weights(weight, 1, 0.5).tolist() == [0, 1]
    assert principal_weights(weight, 2, 0.5).tolist() == [0, 3]
    assert principal_weights(weight, 1, 0.51).tolist() == [0, 1, 2], "a fraction is rounded up"


def test_largest_gradients_are_chosen_over_all_parameters_together() -> None:
    gradients = {
        "a": torch.tensor([[0.1, -5.0]]),
        "b": torch.tensor([0.2]),
        "c": torch.tensor([3.0, -4.0, 0]),
    }
    mask = largest_gradients(gradients, 0.5)
    assert {n: m.tolist() for n, m in mask.items()} == {"a": [1], "c": [0, 1]}


def sparse_step_is_dense_inside(one: Learner, dense: Learner, batch: Batch, step: int) -> None:
    """A step moves the masked elements as full fine-tuning would, and no others."""
    begun = copies(one)
    dense.step(batch, step), one.step(batch, step)
    full = dict(dense.weights())
    for name, tensor in one.weights():
        inside = torch.zeros(tensor.numel(), dtype=torch.bool)
        if name in one.strategy.parts:
            inside[one.strategy.parts[name].places] = True
        assert torch.equal(tensor.reshape(-1)[~inside], begun[name].reshape(-1)[~inside]), name
        assert torch.allclose(tensor.reshape(-1)[inside], full[name].reshape(-1)[inside], atol=1e-7), name


def test_lift_trains_the_principal_weights_of_the_layers(tiny_folder: Path, make_groups) -> None:
    one = learner(tiny_folder, LiftConfig(share=0.1, rank=4, every=0))
    parts, begun = one.strategy.parts, copies(one)
    assert set(parts) == {n for n, t in begun.items() if ".layers." in n and t.ndim == 2}
    for name, part in parts.items():
        assert torch.equal(part.places, principal_weights(begun[name], 4, 0.1)), name
    sparse_step_is_dense_inside(one, learner(tiny_folder, None), Batch.build(make_groups(seed=2)), 0)


def test_lift_chooses_anew_and_keeps_the_moments_of_elements_that_stay(
    tiny_folder: Path, make_groups, tmp_path: Path
) -> None:
    settings = LiftConfig(share=0.1, rank=4, every=2)
    one = learner(tiny_folder, settings, learning_rate=0.02)
    one.step(Batch.build(make_groups(seed=1)), 0)
    before = {
        n: (p.places, one.optimizer.state[p.gathered]["exp_avg"]) for n, p in one.strategy.parts.items()
    }
    still = {n: moment.clone() for n, (_, moment) in before.items()}
    one.strategy.updates = 1
    one.optimizer.param_groups[0]["lr"] = one.optimizer.param_groups[1]["lr"] = 0.0
    for part in one.strategy.parts.values():
        part.gathered.grad = None
    one.optimizer.step()  # without a gradient nothing moves, and the mask is chosen anew
    moved = 0
    for name, part in one.strategy.parts.items():
        dense = torch.zeros(part.parameter.numel()).index_put((before[name][0],), still[name])
        assert torch.equal(part.places, principal_weights(part.parameter, 4, 0.1))
        stays = torch.isin(part.places, before[name][0])
        moved += int((~stays).sum())
        now = one.optimizer.state[part.gathered]["exp_avg"]
        assert torch.equal(now[stays], dense[part.places][stays]) and not now[~stays].any()
        assert torch.equal(part.gathered, part.parameter.reshape(-1)[part.places])
    assert moved, "the first step changed no choice: nothing was tested"
    build = lambda: learner(tiny_folder, settings, learning_rate=0.02)  # noqa: E731
    again(one, build, make_groups, _made(tmp_path / "s"))


def test_saft_trains_the_largest_gradients_of_the_first_batch(
    tiny_folder: Path, make_groups, tmp_path: Path
) -> None:
    one, dense = learner(tiny_folder, SaftConfig(share=0.01)), learner(tiny_folder, None)
    seen: dict[str, torch.Tensor] = {}
    for name, p in dense.policy.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda q, name=name: seen.update({name: q.grad.clone()}))
    assert not one.strategy.parts
    sparse_step_is_dense_inside(one, dense, Batch.build(make_groups(seed=2)), 0)
    threshold = torch.cat([g.abs().reshape(-1) for g in seen.values()]).quantile(0.99)
    for name, gradient in seen.items():
        places = one.strategy.parts[name].places if name in one.strategy.parts else torch.empty(0).long()
        inside = torch.zeros(gradient.numel(), dtype=torch.bool).index_fill(0, places, True)
        sizes = gradient.abs().reshape(-1)
        assert (sizes[inside] >= threshold * 0.999).all() and (sizes[~inside] <= threshold * 1.001).all()
    again(one, lambda: learner(tiny_folder, SaftConfig(share=0.01)), make_groups, tmp_path)


def test_an_equal_model_gives_no_mask(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="so the mask is empty"):
        learner(tiny_folder, SubnetworkConfig(mask=str(tmp_path / "m"), tuned=str(tiny_folder)))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
