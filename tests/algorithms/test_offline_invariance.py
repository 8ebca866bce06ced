"""The order of rows, packing, shared prompts and micro-batches change no offline loss but by rounding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from offline_worlds import objective, random_groups, random_tables

from rft.algorithms import ALGORITHMS, Algorithm
from rft.algorithms.extras import arrange
from rft.batch import Batch, Group
from rft.packing import micro_batches

OFFLINE = [name for name, cls in ALGORITHMS.items() if not cls.online]
LOSSES = ("hinge", "ipo", "nca", "bco", "sppo_hard", "aot", "apo_zero", "apo_down", "discopop")
MORE: list[tuple[str, dict[str, Any]]] = [
    *[("dpo", {"loss_type": name, "beta": 0.5}) for name in LOSSES],
    *[("dpo", {"loss_type": name, "label_smoothing": 0.1}) for name in ("sigmoid", "robust", "exo")],
    *[("dpo", {"divergence_type": name, "alpha": 0.5}) for name in ("forward_kl", "js", "alpha")],
    ("dpo", {"tail": 0.3, "nll": 0.5, "length_normalized": True}),
    ("dpo", {"weighting": "plain"}),
    ("dpo", {"weighting": "aligned"}),
    ("dpo", {"reference_free": True}),
    ("simpo", {"alpha": 0.2}),
    ("kto", {"baseline": "zero", "undesirable": 0.5}),
    ("reward_regression", {"heads": 2}),
    ("reward_model", {"centre": 0.1, "margin": True}),
    ("poft", {"from_column": True}),
]
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"heads": 2} if name == "reward_regression" else {}) for name in OFFLINE],
    *MORE,
]


def groups_for(algorithm: Algorithm, seed: int) -> list[Group]:
    return random_groups(algorithm.data, seed)


def same(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert expected[1].abs().sum() > 0, "the case must have a gradient, or it shows nothing"
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)


def parts(algorithm: Algorithm, batch: Batch) -> list[list[int]]:
    """The learner's own splitting into micro-batches."""
    return micro_batches(batch, 24, keep_groups=algorithm.unit == "pair")[0]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_layout_and_order(name: str, settings: dict[str, Any]) -> None:
    algorithm, tables = ALGORITHMS[name](**settings), random_tables(1)
    groups = groups_for(algorithm, 1)
    if name == "kto" and algorithm.prescored:
        groups = arrange(algorithm, groups)  # who meets whose response depends on the order: fix it first
        object.__setattr__(algorithm, "arrange", list)
    expected = objective(algorithm, groups, tables)
    for share_prefix in (False, True):
        batch = Batch.build(arrange(algorithm, groups), share_prefix=share_prefix)
        assert len(parts(algorithm, batch)) > 1
        same(objective(algorithm, groups, tables, share_prefix=share_prefix), expected)
        split = objective(
            algorithm, groups, tables, share_prefix=share_prefix, parts=lambda b: parts(algorithm, b)
        )
        same(split, expected)
    shuffled = random.Random(1).sample(groups, len(groups))
    shuffled = [Group(g.prompt, g.completions[::-1]) for g in shuffled]
    same(objective(algorithm, shuffled, tables), expected)


@pytest.mark.parametrize("settings", [{}, {"tail": 0.3}, {"nll": 1.0}, {"weighting": "plain"}])
def test_rankings_are_pairs_of_neighbours(settings: dict[str, Any]) -> None:
    algorithm, tables = ALGORITHMS["dpo"](**settings), random_tables(2)
    ranked = random_groups("ranked", 2, groups=4)
    pairs = [Group(g.prompt, (g.completions[i], g.completions[i + 1])) for g in ranked for i in range(2)]
    expected = objective(algorithm, pairs, tables)
    same(objective(algorithm, ranked, tables), expected)
    same(objective(algorithm, ranked, tables, share_prefix=True), expected)
