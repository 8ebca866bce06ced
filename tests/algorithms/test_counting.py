"""What is left out of the loss counts in no average, and equal rewards are no signal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import completion, fill, group, objective, random_groups, random_tables

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Group
from rft.learner.objective import weigh
from tests.specs import problems_of


def truncated(groups: list[Group], *places: int) -> Batch:
    """The batch of these groups, in which the given sequences ran into the length limit."""
    batch = Batch.build(groups)
    cut = torch.zeros(batch.num_sequences, dtype=torch.bool)
    cut[list(places)] = True
    return batch.with_(truncated=cut)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        # Three completions of 1, 2 and 3 tokens, the last one is left out; max_completion_length 8.
        ("token", [1 / 3, 1 / 3, 1 / 3]),
        ("sequence", [1 / 2, 1 / 4, 1 / 4]),  # over the two that are trained on
        ("constant", [1 / 24, 1 / 24, 1 / 24]),  # over the three that were planned
    ],
)
def test_weights_of_tokens_beside_a_masked_sequence(normalization: str, expected: list[float]) -> None:
    sides = [completion((10,), 1.0), completion((11, 12), 0.0), completion((13, 14, 15), 0.0)]
    algorithm = ALGORITHMS["grpo"](normalization=normalization, mask_truncated=True)
    batch = algorithm.prepare(truncated([group(0, *sides)], 2))
    batch, _ = weigh(algorithm, batch, max_completion_length=8)
    torch.testing.assert_close(batch.weight[batch.mask], torch.tensor(expected))


@pytest.mark.parametrize("name", ["raft", "raft_pp", "gspo", "rloo", "grpo"])
def test_the_weights_of_a_sequence_mean_add_up_to_one(name: str) -> None:
    algorithm = ALGORITHMS[name](normalization="sequence", mask_truncated=True)
    batch = algorithm.prepare(truncated(random_groups(11), 0, 5, 7))
    assert 0 < int((batch.lengths > 0).sum()) < batch.num_sequences
    batch, _ = weigh(algorithm, batch, max_completion_length=8)
    assert float(batch.weight[batch.mask].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "settings"), [("sppo", {"eta": 2.0}), ("online_dpo", {})])
def test_sequences_and_pairs_without_tokens_are_not_counted(name: str, settings: dict[str, Any]) -> None:
    """A group that the mask leaves nothing of changes neither loss nor gradient."""
    algorithm, groups, tables = ALGORITHMS[name](**settings), random_groups(12), random_tables(12)
    batch = Batch.build(groups)
    gone = batch.with_(mask=batch.mask & (batch.group[batch.sequence] != 1))
    alone = Batch.build([groups[0], groups[2]])
    for got, expected in zip(
        objective(algorithm, gone, tables), objective(algorithm, alone, tables), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["gspo", "raft_pp", "rloo"])
def test_micro_batches_of_a_masked_batch(name: str) -> None:
    """A micro-batch in which everything is left out, and one in which some is."""
    algorithm, tables = ALGORITHMS[name](mask_truncated=True, normalization="sequence"), random_tables(13)
    batch = truncated(random_groups(13), 0, 1, 2, 3, 6)
    whole = objective(algorithm, batch, tables)
    split = objective(algorithm, batch, tables, lambda b: [[t] for t in range(b.num_sequences)])
    assert whole[1].any()
    torch.testing.assert_close(split[0], whole[0])
    torch.testing.assert_close(split[1], whole[1])


@pytest.mark.parametrize("name", ["ppo", "reinforce_pp"])
def test_whitening_is_over_the_tokens_that_are_trained(name: str) -> None:
    algorithm = ALGORITHMS[name](mask_truncated=True)
    batch = fill(truncated(random_groups(14), 1, 4, 9), random_tables(14))
    prepared = algorithm.prepare(batch)
    trained = prepared.advantages[prepared.mask]
    assert float(trained.mean()) == pytest.approx(0, abs=1e-5)
    assert float(trained.std()) == pytest.approx(1, abs=1e-4)


RELATIVE = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "gpg", "opo", "max_rl"]


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_kl_in_the_reward_makes_no_signal_of_equal_rewards(name: str, reward: float) -> None:
    """The estimate of the KL differs from completion to completion by sampling noise. Divided by its
    deviation it would be an advantage of 1."""
    sides = [completion((10 + 2 * i, 11 + 2 * i), reward) for i in range(4)]
    algorithm = ALGORITHMS[name](beta=1e-3, kl_in="reward")
    batch = fill(Batch.build([group(0, *sides)]), random_tables(15))
    assert algorithm.sequence_rewards(batch).unique().numel() == 4
    assert not algorithm.prepare(batch).advantages.any()


def test_cory_judges_equality_by_the_rewards_of_both() -> None:
    roles = [(p, o) for p in (0.0, 1.0) for o in (0.0, 1.0)]
    sides = [
        completion((10 + 2 * i, 11 + 2 * i), 1.0, values={"pair": pair, "observer": observer})
        for i, (pair, observer) in enumerate(roles)
    ]
    algorithm = ALGORITHMS["cory"](beta=0.1, kl_in="reward")
    batch = fill(Batch.build([group(0, *sides)]), random_tables(16))
    assert not algorithm.prepare(batch).advantages.any()


def test_reinforce_rej_judges_right_and_wrong_by_the_reward() -> None:
    """A negative estimate of the KL does not make a wrong answer right; it is taken off the advantage."""
    batch = Batch.build([group(0, completion((10,), 1.0), completion((11,), 0.0))])
    batch = fill(batch, {"old_logps": {10: -1.0, 11: -1.0}, "ref_logps": {10: -1.5, 11: -0.6}})
    prepared = ALGORITHMS["reinforce_rej"](beta=1.0, kl_in="reward").prepare(batch)
    torch.testing.assert_close(prepared.advantages[prepared.mask], torch.tensor([1 - 0.5, -1 + 0.4]))


REFRESHED = ["sppo", "reward_difference", "iterative_dpo", "ss_token"]


@pytest.mark.parametrize("name", REFRESHED)
@pytest.mark.parametrize(
    ("every", "minibatches", "said"), [(1, 1, True), (1, 2, False), (2, 1, False), (0, 1, False)]
)
def test_a_reference_that_is_always_the_policy_is_refused(
    name: str, every: int, minibatches: int, said: bool
) -> None:
    found = problems_of(ALGORITHMS[name](refresh_reference=every), minibatches=minibatches)
    assert [("refresh_reference: 20" in problem) for problem in found] == [True] * said


@pytest.mark.parametrize("name", ["sppo", "reward_difference", "iterative_dpo"])
def test_references_follow_every_twenty_steps_by_default(name: str) -> None:
    assert ALGORITHMS[name]().refresh_reference == 20
    assert problems_of(ALGORITHMS[name]()) == []


def test_with_a_reference_that_is_the_policy_sppo_is_reinforce_on_the_win_rate() -> None:
    """Why that is refused: the gradient by log-prob is -2 eta (P(win) - 1/2), whatever eta is."""
    algorithm, tables = ALGORITHMS["sppo"](eta=2.0), random_tables(17)
    tables["ref_logps"] = tables["logps"]
    _, gradient = objective(
        algorithm, Batch.build([group(0, completion((10,), 1.0), completion((11,), 0.0))]), tables
    )
    # Two sequences, means over both: -2 * 2 * (+-1/2) / 2.
    assert gradient[10:12].tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)
