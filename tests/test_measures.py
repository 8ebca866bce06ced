"""What was not measured has no value: not 0, which would read as a perfect one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Completion, Group, Prompt
from rft.contrib.curriculum import Curriculum, CurriculumConfig
from rft.learner.learner import Learner
from rft.learner.objective import TokenMeans, merge_means
from tests.test_learner import spec


def test_a_batch_of_an_older_version_has_no_gap(tiny_folder: Path, make_groups: Any) -> None:
    """An asynchronous step: every token is older than the version in training."""
    learner = Learner(spec(tiny_folder))
    batch = Batch.build(make_groups())
    fresh = learner.step(batch, 0)
    assert fresh["sync/logp_gap"] > 0 and fresh["sync/logp_gap_mean"] > 0
    late = learner.step(batch, 1)
    assert late["policy/mismatch_kl"] > 0
    assert not {name for name in late if name.startswith("sync/")}


def test_tokens_of_a_demonstration_are_no_part_of_the_divergence_from_the_sampler(
    tiny_folder: Path, make_groups: Any
) -> None:
    """Longer demonstrations do not pull the mean to 0, and a batch of nothing else has none."""

    def kl(demonstrated: int | None) -> float | None:
        def given(c: Completion) -> Completion:
            added = len(c.tokens) if demonstrated is None else demonstrated
            tokens = (*range(10, 10 + (demonstrated or 0)), *c.tokens)
            logps = (*[0.0] * (demonstrated or 0), *(c.logps or ()))
            return replace(c, tokens=tokens, logps=logps, versions=(), demonstrated=added)

        groups = [replace(g, completions=tuple(map(given, g.completions))) for g in make_groups()]
        batch = Batch.build(groups)
        own = batch if batch.demonstrated is None else batch.with_(mask=batch.mask & ~batch.demonstrated)
        algorithm = ALGORITHMS["grpo"]()
        learner = Learner(spec(tiny_folder, settings=algorithm))
        found = learner.step(batch, 0).get("policy/kl")
        if demonstrated:
            alone = Learner(spec(tiny_folder, settings=algorithm)).step(own, 0)["policy/kl"]
            assert found == pytest.approx(alone, rel=1e-5)
        return found

    assert kl(0) is not None and kl(6) is not None
    assert kl(None) is None


def test_a_batch_without_trained_tokens_has_no_means(tiny_folder: Path, make_groups: Any) -> None:
    masked = [
        replace(g, completions=tuple(replace(c, mask=(False,) * len(c.tokens)) for c in g.completions))
        for g in make_groups()
    ]
    metrics = Learner(spec(tiny_folder)).step(Batch.build(masked), 0)
    assert metrics["train/loss_tokens"] == 0
    taken = {name for name in metrics if name.startswith(("policy/", "critic/", "sync/"))}
    assert not taken


def test_a_skipped_update_has_no_gradient_norm(tiny_folder: Path, make_groups: Any) -> None:
    groups = make_groups()
    bad = replace(groups[0].completions[0], reward=float("inf"))
    groups[0] = replace(groups[0], completions=(bad, *groups[0].completions[1:]))
    skipping = Learner(spec(tiny_folder, config={"on_nonfinite": "skip"}))
    metrics = skipping.step(Batch.build(groups), 0)
    assert metrics["train/skipped"] == 1 and "train/grad_norm" not in metrics
    assert skipping.step(Batch.build(make_groups()), 1)["train/grad_norm"] > 0


def test_a_mean_is_over_the_tokens_that_were_measured() -> None:
    """A micro-batch without a metric (one without a pair) adds nothing to what it is divided by."""
    means, mask = TokenMeans(), torch.tensor([True, True, False])
    means.add({"a": torch.tensor([1.0, 3.0, 9.0]), "b": torch.tensor([4.0, torch.nan, 9.0])}, mask)
    means.add({"a": torch.tensor([5.0, 7.0, 9.0])}, mask)
    means.add({"c": torch.full((3,), torch.nan)}, mask)
    assert means.means() == {"a": 4.0, "b": 4.0}
    assert TokenMeans.merged([means, means]).means() == means.means()


def test_a_mean_of_updates_is_over_those_that_have_it() -> None:
    assert merge_means([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}
    assert merge_means([]) == {}


def test_offline_pairs_in_one_micro_batch_of_two_keep_their_mean(tiny_folder: Path) -> None:
    """Equal rewards make no pair: the micro-batch that holds only those measures nothing."""
    first, second = (6, 7, 8), (9, 10, 11)

    def group(index: int, rewards: tuple[float, float]) -> Group:
        both = (Completion(first, reward=rewards[0]), Completion(second, reward=rewards[1]))
        return Group(Prompt(index, (12, 13, 14 + index), "p"), both)

    learner = Learner(spec(tiny_folder, settings=ALGORITHMS["dpo"](), config={"tokens_per_micro_batch": 1}))
    alone = learner.step(Batch.build([group(0, (1.0, 0.0))]), 0)
    again = Learner(spec(tiny_folder, settings=ALGORITHMS["dpo"](), config={"tokens_per_micro_batch": 1}))
    mixed = again.step(Batch.build([group(0, (1.0, 0.0)), group(1, (0.5, 0.5))]), 0)
    assert alone["preference/chosen"] < -1
    assert mixed["preference/chosen"] == pytest.approx(alone["preference/chosen"], rel=1e-5)


def test_a_curriculum_that_has_measured_nothing_has_no_pass_rate() -> None:
    curriculum = Curriculum(10, 1, CurriculumConfig())
    assert curriculum.metrics() == {"data/measured": 0.0}
    curriculum.observe_rate(3, 0.5)
    assert curriculum.metrics() == {"data/measured": 1.0, "data/pass_rate": 0.5}
