"""Steps in which nothing, or next to nothing, is trained on: every completion was cut off at the length limit
and left out, or none was sampled by the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.algorithms import ALGORITHMS
from rft.algorithms.base import Algorithm
from rft.batch import Batch, Completion, Group, Prompt
from rft.errors import LogpGapError
from rft.learner.learner import Learner
from tests.parallel_ranks import MASKED, masked_groups
from tests.specs import changed, learner_spec

CUT = {
    "grpo": ALGORITHMS["grpo"](mask_truncated=True),
    "grpo with a KL": ALGORITHMS["grpo"](mask_truncated=True, beta=0.1, kl_estimator="full"),
    "gspo": ALGORITHMS["gspo"](mask_truncated=True),
    "dr_grpo": ALGORITHMS["dr_grpo"](mask_truncated=True),
    "ppo": ALGORITHMS["ppo"](mask_truncated=True, beta=0.1, kl_target=0.1),
    "ppo, critic apart": ALGORITHMS["ppo"](mask_truncated=True, critic="model"),
}


def learner_of(model: Path, algorithm: Algorithm, **changes: Any) -> Learner:
    config = {"learning_rate": 1e-2, "weight_decay": 0.1, **changes.pop("config", {})}
    spec = learner_spec(model, algorithm, **config)
    return Learner(changed(spec, **{"expects_fresh": True, **changes}))


def everything(learner: Learner) -> list[torch.Tensor]:
    """Copies of all that an update changes: weights, the critic's included, and the optimizer's state."""
    state = learner.optimizer.state_dict()["state"]
    moments = [t for entry in state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in (*learner.policy.trained(), *moments)]


def unchanged(before: list[torch.Tensor], learner: Learner) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, everything(learner), strict=True))


@pytest.mark.parametrize("micro", [1, 10_000])
@pytest.mark.parametrize("name", CUT)
def test_a_step_without_a_trained_token_changes_nothing_but_the_version(
    name: str, micro: int, tiny_folder: Path
) -> None:
    """Neither Adam's moments, nor weight decay, nor an adaptive KL weight move; the next step is as ever."""
    learner = learner_of(tiny_folder, CUT[name], config={"tokens_per_micro_batch": micro})
    learner.step(Batch.build(masked_groups(0, MASKED["none"])), 0)
    before, state = everything(learner), dict(learner.state)
    metrics = learner.step(Batch.build(masked_groups(1, MASKED["all"])), 1)
    assert unchanged(before, learner) and learner.state == state and learner.version == 2
    assert metrics["train/updates"] == metrics["train/loss_tokens"] == 0
    assert "train/loss" not in metrics and "train/grad_norm" not in metrics
    assert all(value == value for value in metrics.values()), "no metric is nan"
    (line,) = [line for line in learner.pop_messages() if "changes no weights" in line]
    assert line.startswith("step 2") and "all 12 completions ran into the length limit" in line
    assert not [line for line in learner.pop_messages() if "changes no weights" in line]
    metrics = learner.step(Batch.build(masked_groups(2, MASKED["but one"])), 2)
    assert metrics["train/updates"] == 1 and not unchanged(before, learner)


def test_mini_batches_without_a_trained_token_are_passed_over(tiny_folder: Path) -> None:
    """One of three groups is left: one update a pass, with the gradient of a step on that group alone."""
    algorithm = ALGORITHMS["grpo"](mask_truncated=True)
    learner = learner_of(tiny_folder, algorithm, minibatches=3, num_iterations=2, config={"eps": 1e-3})
    groups = masked_groups(0, lambda g, k: g != 1)
    metrics = learner.step(Batch.build(groups), 0)
    assert metrics["train/updates"] == 2
    alone = learner_of(tiny_folder, algorithm, num_iterations=2, config={"eps": 1e-3})
    alone.step(Batch.build(groups[1:2]), 0)
    for a, b in zip(learner.policy.trained(), alone.policy.trained(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_of_demonstrations_is_trained_on_and_is_not_stale(tiny_folder: Path) -> None:
    learner = learner_of(tiny_folder, ALGORITHMS["distill"](demonstration_share=1.0))
    given = Completion((7, 8), finish="demonstration", demonstrated=2, logps=(0.0, 0.0), reward=1.0)
    before = everything(learner)
    metrics = learner.step(Batch.build([Group(Prompt(0, (5, 6), "p"), (given,) * 2)]), 0)
    assert metrics["train/updates"] == 1 and metrics["train/loss_tokens"] == 4
    assert not unchanged(before, learner)


@pytest.mark.parametrize("cut", ["none", "all"])
def test_engines_that_are_stale_are_found_whatever_the_loss_leaves_out(cut: str, tiny_folder: Path) -> None:
    learner = learner_of(tiny_folder, ALGORITHMS["grpo"](mask_truncated=True))
    learner.step(Batch.build(masked_groups(0, MASKED["none"])), 0)
    before = everything(learner)
    with pytest.raises(
        LogpGapError, match=r"by policy version 1: the engines are stale .their newest version is 0"
    ):
        learner.step(Batch.build(masked_groups(0, MASKED[cut])), 1)
    assert unchanged(before, learner) and learner.version == 1


def test_pairs_without_a_preferred_one_change_nothing(tiny_folder: Path, make_groups: Any) -> None:
    learner = learner_of(tiny_folder, ALGORITHMS["online_dpo"](), expects_fresh=False)
    learner.step(Batch.build(make_groups(seed=1)), 0)
    before = everything(learner)
    ties = [
        replace(g, completions=tuple(replace(c, reward=0.5) for c in g.completions)) for g in make_groups()
    ]
    metrics = learner.step(Batch.build(ties), 1)
    assert metrics["train/updates"] == 0 and unchanged(before, learner)
    assert any("no pair" in line for line in learner.pop_messages())
