"""The learner on a real tiny model: splitting changes nothing, faults are named, state survives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rft.algorithms import ALGORITHMS
from rft.batch import Batch
from rft.config.learner import LearnerConfig
from rft.errors import LearnerError
from rft.learner.learner import Learner
from rft.learner.schedule import learning_rate
from rft.learner.spec import LearnerSpec
from tests.specs import changed, learner_spec

pytestmark = pytest.mark.numerics


class Watched(Learner):
    """A learner that keeps each update's gradient."""

    def _optimize(self) -> dict[str, float]:
        self.seen = getattr(self, "seen", [])
        self.seen.append([p.grad.clone() for p in self.policy.trained() if p.grad is not None])
        return super()._optimize()


def spec(model: Path, algorithm: str = "grpo", **changes) -> LearnerSpec:
    settings = {"learning_rate": 1e-3, "max_grad_norm": None, **changes.pop("config", {})}
    base = learner_spec(model, changes.pop("settings", ALGORITHMS[algorithm]()), **settings)
    return changed(base, **changes)


def gradient(model: Path, batch: Batch, algorithm, micro: int) -> tuple[float, list[torch.Tensor]]:
    learner = Watched(spec(model, settings=algorithm, config={"tokens_per_micro_batch": micro}))
    metrics = learner.step(batch, 0)
    return metrics["train/loss"], learner.seen[0]


@pytest.mark.parametrize(
    "algorithm",
    [
        ALGORITHMS["grpo"](),
        ALGORITHMS["grpo"](normalization="sequence", beta=0.1),
        ALGORITHMS["dr_grpo"](),
        ALGORITHMS["sft"](),
        ALGORITHMS["dpo"](),
    ],
    ids=["token", "sequence and KL", "constant", "sft", "pairs"],
)
def test_splitting_packing_and_sharing_change_no_gradient(tiny_folder, make_groups, algorithm) -> None:
    """Invariant 1: one micro-batch or many, prompts shared or repeated: the same loss and gradient."""
    groups = make_groups(groups=5, size=2 if algorithm.unit == "pair" else 4)
    whole = Batch.build(groups)
    loss, grads = gradient(tiny_folder, whole, algorithm, 10_000)
    scale = max(g.abs().max() for g in grads)
    assert scale > 0
    for batch, micro in ((whole, 40), (Batch.build(groups, share_prefix=True), 10_000), (whole, 1)):
        other_loss, other = gradient(tiny_folder, batch, algorithm, micro)
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        for a, b in zip(grads, other, strict=True):
            assert (a - b).abs().max() <= 1e-5 * scale


def test_degenerate_groups_carry_no_gradient_and_are_counted(tiny_folder, make_groups) -> None:
    groups = [
        replace(g, completions=tuple(replace(c, reward=1.0) for c in g.completions)) for g in make_groups()
    ]
    learner = Watched(spec(tiny_folder))
    metrics = learner.step(Batch.build(groups), 0)
    assert metrics["train/grad_norm"] == 0 and metrics["group/degenerate"] == 3


def test_a_non_finite_gradient_stops_before_the_update(tiny_folder, make_groups) -> None:
    groups = make_groups()
    bad = replace(groups[0].completions[0], reward=float("inf"))
    groups[0] = replace(groups[0], completions=(bad, *groups[0].completions[1:]))
    learner = Learner(spec(tiny_folder))
    before = [p.clone() for p in learner.policy.trained()]
    with pytest.raises(LearnerError, match=r"gradient norm is nan .* nothing was updated"):
        learner.step(Batch.build(groups), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.trained(), strict=True))
    assert learner.version == 0

    skipping = Learner(spec(tiny_folder, config={"on_nonfinite": "skip"}))
    assert skipping.step(Batch.build(groups), 0)["train/skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, skipping.policy.trained(), strict=True))


def test_state_read_back_goes_on_to_the_same_weights(tiny_folder, make_groups, tmp_path) -> None:
    batches = [Batch.build(make_groups(seed=i)) for i in range(3)]
    one = Learner(spec(tiny_folder, num_iterations=2, minibatches=3))
    for i, batch in enumerate(batches[:2]):
        one.step(batch, i)
    one.capture_state()(tmp_path)
    two = Learner(spec(tiny_folder, num_iterations=2, minibatches=3))
    two.read_state(tmp_path)
    assert two.version == one.version == 2
    first, second = one.step(batches[2], 2), two.step(batches[2], 2)
    assert first["train/loss"] == second["train/loss"]
    for a, b in zip(one.policy.trained(), two.policy.trained(), strict=True):
        assert torch.equal(a, b)


def test_several_updates_compare_with_the_policy_before_the_step(tiny_folder, make_groups) -> None:
    """With inner epochs the ratio is to the old policy: it starts at 1 and moves."""
    learner = Learner(spec(tiny_folder, num_iterations=3))
    metrics = learner.step(Batch.build(make_groups()), 0)
    assert metrics["train/updates"] == 3
    assert metrics["policy/ratio_spread"] > 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.6, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.6, 0.2]),
    ],
)
def test_learning_rate(schedule: str, expected: list[float]) -> None:
    """Warm-up over 2 steps, then down to 0.2 at the last of 5: linear and cosine meet half-way, at
    0.2 + 0.8 / 2 = 0.6."""
    config = LearnerConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule, final_lr_ratio=0.2)
    assert [learning_rate(config, step, 5) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("critic", ["head", "model"])
def test_a_critic_learns_beside_the_policy_and_survives(tiny_folder, make_groups, tmp_path, critic) -> None:
    """In the warm-up only the critic moves: neither its gradient nor weight decay reaches the policy."""
    settings = ALGORITHMS["ppo"](critic=critic, critic_rate=10.0, critic_warmup=2)
    learner = Learner(spec(tiny_folder, settings=settings, config={"weight_decay": 0.1}))
    batch = Batch.build(make_groups(groups=4, size=4))
    before = {name: p.clone() for name, p in learner.policy.model.named_parameters()}
    losses = [learner.step(batch, i)["critic/loss"] for i in range(2)]
    assert losses[1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in learner.policy.model.named_parameters())
    values = learner.score(batch, outputs=frozenset({"values"}))["values"]
    learner.capture_state()(tmp_path)
    other = Learner(spec(tiny_folder, settings=settings, config={"weight_decay": 0.1}))
    other.read_state(tmp_path)
    assert torch.equal(other.score(batch, outputs=frozenset({"values"}))["values"], values)
    learner.step(batch, 2)
    assert any((p != before[name]).any() for name, p in learner.policy.model.named_parameters())


def test_the_reference_follows_the_policy_every_so_many_steps(tiny_folder, make_groups, tmp_path) -> None:
    settings = ALGORITHMS["iterative_dpo"](refresh_reference=2)
    learner = Learner(spec(tiny_folder, settings=settings))
    batch = Batch.build(make_groups(groups=2, size=4))

    def apart(one: Learner) -> float:
        """How far the policy's log-probs are from those of its reference."""
        reference = one.score(batch, model=one.reference)["logps"]
        return float((one.score(batch)["logps"] - reference).abs().max())

    distances = []
    for i in range(3):
        learner.step(batch, i)
        distances.append(apart(learner))
    assert distances[0] > 1e-3 and distances[1] == 0 and distances[2] > 1e-3
    learner.capture_state()(tmp_path)
    other = Learner(spec(tiny_folder, settings=settings))
    other.read_state(tmp_path)
    assert apart(other) == distances[2]


def test_refreshing_the_reference_may_reset_the_optimizer(tiny_folder: Path, make_groups) -> None:
    """After the refresh the reference is the policy, and Adam counts its steps from 1 again."""
    batch = Batch.build(make_groups(groups=2, size=2))
    counts: dict[bool, list[set[int]]] = {}
    for reset in (False, True):
        settings = ALGORITHMS["grpo"](beta=0.1, refresh_reference=2, reset_optimizer=reset)
        learner = Learner(spec(tiny_folder, settings=settings))
        counts[reset] = []
        for step in range(3):
            kl = learner.step(batch, step)["policy/kl_ref"]
            assert (kl == pytest.approx(0, abs=1e-9)) == (step in (0, 2))
            counts[reset].append({int(s["step"]) for s in learner.optimizer.state.values()})
    assert counts == {False: [{1}, {2}, {3}], True: [{1}, set(), {1}]}


def test_moments_made_at_the_start_change_no_result(tiny_folder, make_groups, tmp_path: Path) -> None:
    """Nor do they stay when a checkpoint is loaded."""
    batch = Batch.build(make_groups(groups=3, size=4))
    plain, early = (Learner(spec(tiny_folder, config={"weight_decay": 0.1})) for _ in range(2))
    before = [p.detach().clone() for p in early.policy.trained()]
    early.make_moments()
    assert len(early.optimizer.state) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, early.policy.trained(), strict=True))
    assert all(p.grad is None for p in early.policy.trained())
    for state in early.optimizer.state.values():
        assert not any(bool(value.any()) for value in state.values())
    for step in range(2):
        norms = [learner.step(batch, step)["train/grad_norm"] for learner in (plain, early)]
        assert norms[0] == norms[1] > 0
    same_state(plain, early)
    early.capture_state()(tmp_path)
    resumed = Learner(spec(tiny_folder, config={"weight_decay": 0.1}))
    resumed.make_moments()
    resumed.read_state(tmp_path)
    same_state(resumed, early)


def same_state(one: Learner, other: Learner) -> None:
    """Assert that two learners have the same weights and moments, to the bit."""
    for a, b in zip(one.policy.trained(), other.policy.trained(), strict=True):
        assert torch.equal(a, b)
        states = one.optimizer.state[a], other.optimizer.state[b]
        assert states[0].keys() == states[1].keys() > {"step", "exp_avg"}
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
