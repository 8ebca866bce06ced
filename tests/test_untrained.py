"""What has no gradient is not trained on: the same loss and gradient, and the same metrics, for less work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.algorithms import ALGORITHMS
from rft.algorithms.base import Algorithm
from rft.batch import Batch, Group
from rft.learner import objective
from rft.learner.learner import Learner
from rft.learner.model import PolicyModel
from tests.test_learner import Watched, spec


def train_on_all(algorithm: Algorithm, batch: Batch) -> tuple[Batch, Batch]:
    return batch, batch.pruned(torch.zeros_like(batch.mask))[0]


def rewarded(groups: list[Group], rewards: list[list[float]]) -> list[Group]:
    return [
        replace(g, completions=tuple(replace(c, reward=r) for c, r in zip(g.completions, row, strict=True)))
        for g, row in zip(groups, rewards, strict=True)
    ]


MIXED = [[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.3, 1.0]]
CASES: list[tuple[str, dict[str, Any], int]] = [
    # algorithm, settings, sequences of the 16 that have a gradient
    ("grpo", {}, 8),
    ("grpo", {"normalization": "sequence"}, 8),
    ("dr_grpo", {}, 8),
    ("gspo", {}, 8),
    ("rloo", {}, 8),
    ("grpo", {"beta": 0.1}, 16),  # the KL acts on all
    ("grpo", {"beta": 0.1, "kl_in": "reward"}, 8),
    ("raft_pp", {}, 9),  # all above 0
    ("raft", {"threshold": 0.0}, 3),
    ("expert_iteration", {}, 9),
    ("reinforce_rej", {}, 8),
    ("online_dpo", {}, 4),  # the best and the worst of two groups
    ("iterative_dpo", {}, 4),
    ("ppo", {}, 16),  # the critic learns from all
]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("name", "settings", "acting"), CASES)
def test_the_same_step_for_less(
    name: str, settings: dict[str, Any], acting: int, share: bool, tiny_folder: Path, make_groups, monkeypatch
) -> None:
    batch = Batch.build(rewarded(make_groups(groups=4, size=4), MIXED), share_prefix=share)
    algorithm = ALGORITHMS[name](**settings)
    runs = []
    for divide in (objective.divide, train_on_all):
        monkeypatch.setattr(objective, "divide", divide)
        learner = Watched(spec(tiny_folder, settings=algorithm, config={"tokens_per_micro_batch": 60}))
        trained: list[int] = []
        run = PolicyModel.run

        def counted(self, batch, *args, run=run, trained=trained, **kwargs):
            if torch.is_grad_enabled():
                trained.append(batch.num_sequences)
            return run(self, batch, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(PolicyModel, "run", counted)
            runs.append((learner.step(batch, 0), learner.seen[0], sum(trained)))
    (metrics, grads, sequences), (all_metrics, all_grads, all_sequences) = runs
    assert (sequences, all_sequences) == (acting, 16)
    scale = max(float(g.abs().max()) for g in all_grads)
    assert scale > 0
    for a, b in zip(grads, all_grads, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * scale
    same = {
        k for k in all_metrics if not k.startswith(("time/", "throughput/")) and k != "train/micro_batches"
    }
    assert metrics.keys() == all_metrics.keys()
    for key in same:
        assert metrics[key] == pytest.approx(all_metrics[key], rel=1e-4, abs=1e-5), key


def test_untrained_groups_may_be_left_unmeasured(tiny_folder, make_groups, monkeypatch) -> None:
    seen: list[int] = []
    run = PolicyModel.run

    def counted(self, batch, *args, **kwargs):
        seen.append(batch.num_sequences)
        return run(self, batch, *args, **kwargs)

    monkeypatch.setattr(PolicyModel, "run", counted)
    batch = Batch.build(rewarded(make_groups(groups=4, size=4), MIXED))
    losses = []
    for measured, sequences in ((True, 16), (False, 8)):
        seen.clear()
        learner = Learner(spec(tiny_folder, config={"measure_untrained": measured}))
        metrics = learner.step(batch, 0)
        losses.append((metrics["train/loss"], metrics["train/grad_norm"]))
        assert sum(seen) == sequences
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["grpo", "online_dpo"])
@pytest.mark.parametrize("measured", [True, False])
def test_a_batch_without_any_gradient(name, measured, tiny_folder, make_groups) -> None:
    groups = rewarded(make_groups(groups=4, size=4), [[1.0] * 4] * 4)
    learner = Learner(spec(tiny_folder, name, config={"measure_untrained": measured}))
    before = [p.clone() for p in learner.policy.trained()]
    metrics = learner.step(Batch.build(groups), 0)
    assert metrics.get("train/grad_norm", 0) == 0 and metrics.get("train/loss", 0) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.trained(), strict=True))


def test_old_log_probs_are_not_computed_for_what_is_left_out(tiny_folder, make_groups, monkeypatch) -> None:
    """RAFT with two passes: one forward without gradient, of the best completions alone."""
    scored: list[int] = []
    run = PolicyModel.run

    def counted(self, batch, *args, **kwargs):
        if not torch.is_grad_enabled():
            scored.append(batch.num_sequences)
        return run(self, batch, *args, **kwargs)

    monkeypatch.setattr(PolicyModel, "run", counted)
    batch = Batch.build(rewarded(make_groups(groups=4, size=4), MIXED))
    Learner(spec(tiny_folder, settings=ALGORITHMS["raft"](), num_iterations=2)).step(batch, 0)
    assert sum(scored) == 4


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("asft", {}),
        ("distill", {}),
        ("grpo", {"beta": 0.1, "kl_estimator": "full"}),
        ("ppo", {"beta": 0.1, "kl_in": "loss", "kl_estimator": "full"}),
        ("dpo", {}),
        ("dpo", {"weighting": "aligned"}),
    ],
)
def test_the_reference_reads_a_batch_once(name, settings, tiny_folder, make_groups, monkeypatch) -> None:
    calls: list[str] = []
    run, states = PolicyModel.run, PolicyModel.states
    learner = Learner(spec(tiny_folder, settings=ALGORITHMS[name](**settings)))

    def counted(kind, inner):
        def method(self, *args, **kwargs):
            if self is learner.reference:
                calls.append(kind)
            return inner(self, *args, **kwargs)

        return method

    monkeypatch.setattr(PolicyModel, "run", counted("run", run))
    monkeypatch.setattr(PolicyModel, "states", counted("states", states))
    metrics = learner.step(Batch.build(make_groups(size=2)), 0)
    assert len(calls) == 1
    if "beta" in settings:
        assert metrics["policy/kl_ref"] == pytest.approx(0, abs=1e-5)


def test_a_weak_supervisors_student_needs_no_reference(tiny_folder, make_groups) -> None:
    learner = Learner(spec(tiny_folder, "weak_to_strong"))
    assert learner.reference is None
    learner.step(Batch.build(make_groups()), 0)


def test_pruning_keeps_ancestors_and_places() -> None:
    """A prompt with two children, of which one has a child: keeping that keeps its line."""
    batch = Batch(
        tokens=torch.arange(5),
        positions=torch.tensor([0, 1, 2, 3, 2]),
        segment=torch.tensor([0, 1, 1, 2, 3]),
        source=torch.tensor([-1, 0, 1, 2, 0]),
        mask=torch.tensor([False, True, True, True, True]),
        sequence=torch.tensor([-1, 0, 0, 0, 1]),
        parent=torch.tensor([-1, 0, 1, 0]),
        group=torch.tensor([0, 0]),
    )
    kept, place = batch.pruned(batch.tokens == 3)
    assert kept.tokens.tolist() == [0, 1, 2, 3] == place.tolist()
    assert kept.parent.tolist() == [-1, 0, 1] and kept.num_sequences == 1
    kept, place = batch.pruned(batch.tokens == 4)
    assert kept.tokens.tolist() == [0, 4] == place.tolist()
    assert kept.source.tolist() == [-1, 0] and kept.parent.tolist() == [-1, 0]
    assert batch.pruned(torch.zeros(5, dtype=torch.bool))[0].num_tokens == 0
