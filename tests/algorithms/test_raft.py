"""RAFT: what is chosen, and where a threshold stands."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import completion, group

from rft.algorithms import ALGORITHMS
from rft.batch import Batch
from rft.config.load import load_config
from rft.config.validate import warnings
from tests.specs import problems_of


def batch_of(*rewards: list[float]) -> Batch:
    return Batch.build(
        [
            group(i, *(completion((10 * i + j,), r) for j, r in enumerate(row)))
            for i, row in enumerate(rewards, start=1)
        ]
    )


def chosen(batch: Batch, **settings: Any) -> list[int]:
    prepared = ALGORITHMS["raft"](**settings).prepare(batch)
    return prepared.tokens[prepared.mask].tolist()


def test_the_best_of_each_group_is_kept_whatever_it_is_worth() -> None:
    """Scores of a reward model may all lie below 0."""
    batch = batch_of([-3.0, -1.0, -2.0], [-0.5, -0.7, -0.6], [4.0, 5.0, 6.0])
    assert chosen(batch) == [11, 20, 32]
    assert chosen(batch, threshold=0.0) == [32]


def test_a_share_of_each_group_or_of_the_batch() -> None:
    batch = batch_of([0.1, 0.9, 0.8, 0.2], [0.3, 0.4, 0.5, 0.6], [0.0, 0.01, 0.02, 0.03])
    assert chosen(batch, top_share=0.5) == [11, 12, 22, 23, 32, 33]
    # A fifth of twelve is 2.4, rounded up: 0.9, 0.8 and 0.6.
    assert chosen(batch, top_share=0.2, rank="batch") == [11, 12, 23]
    assert chosen(batch, top_share=0.5, rank="batch", threshold=0.35) == [11, 12, 21, 22, 23]


def test_equal_rewards_of_a_batch_are_spread_over_the_prompts() -> None:
    batch = batch_of([1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    assert chosen(batch, top_share=0.25, rank="batch") == [10, 20, 30]
    assert chosen(batch, top_share=0.4, rank="batch") == [10, 11, 20, 21, 30]


def test_a_batch_needs_a_share() -> None:
    (found,) = problems_of(ALGORITHMS["raft"](rank="batch"))
    assert "top_share: 0.2" in found


@pytest.mark.parametrize(
    ("algorithm", "rewards", "said"),
    [
        ("raft_pp", "[{function: reward_model, options: {model: m}}]", "threshold: null"),
        ("expert_iteration", "[{function: math}, {function: reward_model}]", "threshold: null"),
        ("reinforce_rej", "[{function: reward_model}]", "another algorithm"),
        ("{name: raft, threshold: 0.5}", "[{function: reward_model}]", "algorithm.threshold: 0.5"),
        ("raft", "[{function: reward_model}]", ""),
        ("raft_pp", "[{function: math}]", ""),
        ("raft_pp", "[{function: math}, {function: reward_model, weight: 0}]", ""),
        ("grpo", "[{function: reward_model}]", ""),
    ],
)
def test_a_threshold_on_a_reward_models_scores_is_warned_of(algorithm: str, rewards: str, said: str) -> None:
    config = load_config("examples/arithmetic.yaml", [f"algorithm={algorithm}", f"rewards={rewards}"])
    found = warnings(config)
    assert len(found) == bool(said)
    assert said in "".join(found)
