"""The order of a batch, its layout and its micro-batches change nothing but rounding."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from worlds import objective, random_groups, random_tables

from rft.algorithms import ALGORITHMS, Algorithm
from rft.batch import Batch, Group
from rft.packing import micro_batches

ONLINE = [name for name, cls in ALGORITHMS.items() if cls.online]
MORE: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"beta": 0.1, "normalization": "sequence"}),
    ("grpo", {"correction": "sequence_truncate", "scale_rewards": "batch"}),
    ("grpo", {"entropy_coef": 0.1, "entropy_advantage": 0.4, "top_entropy": 0.5}),
    ("clip_cov", {"covariance_low": -0.1, "share": 1.0}),
    ("kl_cov", {"share": 0.3}),
    ("dppo", {"delta": 0.02, "divergence_kind": "kl"}),
    ("m2po", {"second_moment": 0.01}),
    ("ppo", {"beta": 0.1, "lam_length": 0.5}),
    ("rloo", {"beta": 0.1}),
    ("raft", {"top_share": 0.5}),
    ("raft", {"top_share": 0.25, "rank": "batch"}),
    ("reward_difference", {"clip": 0.1}),
    ("distill", {"estimator": "sampled"}),
    ("per_step", {"source": "process"}),
]
SETTINGS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ONLINE] + MORE


def make(name: str, settings: dict[str, Any]) -> Algorithm:
    return ALGORITHMS[name](**settings)


def groups_for(algorithm: Algorithm, seed: int) -> list[Group]:
    return random_groups(seed, demonstrated=algorithm.needs_demonstrations)


def same(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert expected[1].abs().sum() > 0, "the case must have a gradient, or it shows nothing"
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)


def splitter(algorithm: Algorithm, max_tokens: int) -> Callable[[Batch], list[list[int]]]:
    """The learner's own splitting into micro-batches."""
    keep = algorithm.unit == "pair"
    return lambda batch: micro_batches(batch, max_tokens, keep_groups=keep)[0]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
@pytest.mark.parametrize("share_prefix", [False, True])
def test_micro_batches(name: str, settings: dict[str, Any], share_prefix: bool) -> None:
    algorithm, tables = make(name, settings), random_tables(1)
    batch = Batch.build(groups_for(algorithm, 1), share_prefix=share_prefix)
    split = splitter(algorithm, 32)
    assert len(split(batch)) > 1
    same(objective(algorithm, batch, tables, split), objective(algorithm, batch, tables))


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_a_shared_prompt(name: str, settings: dict[str, Any]) -> None:
    algorithm, tables = make(name, settings), random_tables(2)
    groups = groups_for(algorithm, 2)
    plain, shared = Batch.build(groups), Batch.build(groups, share_prefix=True)
    same(objective(algorithm, shared, tables), objective(algorithm, plain, tables))


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_the_order_of_groups_and_of_completions(name: str, settings: dict[str, Any]) -> None:
    algorithm, tables = make(name, settings), random_tables(3)
    groups = groups_for(algorithm, 3)
    shuffled = [
        Group(g.prompt, tuple(random.Random(i).sample(g.completions, 4))) for i, g in enumerate(groups)
    ]
    shuffled = shuffled[1:] + shuffled[:1]
    same(
        objective(algorithm, Batch.build(shuffled), tables), objective(algorithm, Batch.build(groups), tables)
    )
