"""Credit for the turns of sessions: hand-computed returns and advantages, and what is refused."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from rft.algorithms import ALGORITHMS
from rft.algorithms.math.sequences import branching, to_grid
from rft.algorithms.math.turns import as_sequences, turn_returns
from rft.batch import Batch, Completion, Group, Prompt
from rft.rollout.calls import Call, lay_out

PROMPT = (1, 2)


def session(turns: list[tuple[float | None, str]], reward: float, *, drifts: bool = False) -> Completion:
    """A session of turns (reward, state), two tokens each; with `drifts` every turn is a branch."""
    calls: list[Call] = []
    for k, (earned, state) in enumerate(turns):
        prompt = (
            PROMPT
            if not calls
            else calls[-1].prompt + (calls[-1].sampled[:1] if drifts else calls[-1].sampled)
        )
        prompt += (50 + k,) if calls else ()
        calls.append(
            Call(prompt, (10 + k, 20), (-1.0, -1.0), "stop", ((0, 0, 2),), reward=earned, state=state)
        )
    return replace(lay_out(PROMPT, calls), reward=reward)


def batch_of(*, drifts: bool = False, groups: int = 1) -> Batch:
    """Earned, with the rest of the session's reward in the last turn: (1, 2), (0, 1) and (1)."""
    completions = (
        session([(1.0, "s"), (None, "t")], 3.0, drifts=drifts),
        session([(0.0, "s"), (1.0, "s")], 1.0, drifts=drifts),
        session([(None, "t")], 1.0, drifts=drifts),
    )
    return Batch.build([Group(Prompt(i, PROMPT, ""), completions) for i in range(groups)], share_prefix=True)


def of_turns(x: torch.Tensor, batch: Batch) -> list[float]:
    """The value of each turn, which all of its tokens share."""
    assert batch.turn is not None
    place = batch.sequence * 10 + batch.turn
    cells = torch.unique(place[batch.mask])
    out = []
    for cell in cells.tolist():
        values = x[batch.mask & (place == cell)]
        assert torch.equal(values, values[:1].expand_as(values))
        out.append(float(values[0]))
    assert not x[~batch.mask].any()
    return out


def advantages(batch: Batch, algorithm: str = "dr_grpo", **options: Any) -> list[float]:
    prepared = ALGORITHMS[algorithm](**options).prepare(batch)
    assert prepared.advantages is not None
    assert torch.equal(prepared.sequence, batch.sequence) and torch.equal(prepared.group, batch.group)
    return of_turns(prepared.advantages, batch)


def test_returns_are_discounted_sums_and_the_last_turn_earns_the_rest() -> None:
    batch = batch_of()
    assert batch.rewards is not None
    returns = turn_returns(batch, batch.rewards, 0.5)
    torch.testing.assert_close(returns, torch.tensor([[2.0, 2.0], [0.5, 1.0], [1.0, 0.0]]))
    undiscounted = turn_returns(batch, batch.rewards, 1.0)
    torch.testing.assert_close(undiscounted[:, 0], batch.rewards)


@pytest.mark.parametrize("drifts", [False, True])
def test_turns_are_compared_with_those_of_the_same_number(drifts: bool) -> None:
    got = advantages(batch_of(drifts=drifts), turn_returns="turn", turn_discount=0.5)
    mean = 3.5 / 3  # of 2, 0.5 and 1; then of 2 and 1
    assert got == pytest.approx([2 - mean, 0.5, 0.5 - mean, -0.5, 1 - mean])


@pytest.mark.parametrize("drifts", [False, True])
def test_turns_are_compared_with_all_of_the_group(drifts: bool) -> None:
    got = advantages(batch_of(drifts=drifts), turn_returns="group", turn_discount=0.5)
    assert got == pytest.approx([0.7, 0.7, -0.8, -0.3, -0.3])  # mean 6.5 / 5


@pytest.mark.parametrize("drifts", [False, True])
def test_gigpo_adds_the_advantage_among_equal_states_to_the_sessions(drifts: bool) -> None:
    got = advantages(batch_of(drifts=drifts), turn_returns="state", turn_discount=0.5, turn_weight=0.5)
    session, s, t = 5 / 3, 3.5 / 3, 1.5  # means of 3, 1, 1; of 2, 0.5, 1 in state s; of 2, 1 in state t
    first, second, third = 3 - session, 1 - session, 1 - session
    assert got == pytest.approx(
        [
            first + (2 - s) / 2,
            first + (2 - t) / 2,
            second + (0.5 - s) / 2,
            second + (1 - s) / 2,
            third + (1 - t) / 2,
        ]
    )


def test_gigpo_divides_by_the_deviation_of_grpo() -> None:
    got = advantages(batch_of(), "grpo", turn_returns="state", turn_discount=0.5)
    spread, t = (4 / 3) ** 0.5 + 1e-4, 0.5**0.5 + 1e-4  # of 3, 1, 1; of 2, 1
    assert got[1] == pytest.approx((3 - 5 / 3) / spread + 0.5 / t)
    assert got[4] == pytest.approx((1 - 5 / 3) / spread - 0.5 / t)


@pytest.mark.parametrize(("algorithm", "deviation"), [("dr_grpo", False), ("grpo", True)])
def test_gigpo_by_the_equations_of_its_paper(algorithm: str, deviation: bool) -> None:
    """arXiv:2505.10978, eq. 3 and 5 to 8, written as loops over a dictionary of anchor states. The published
    weights: omega 1, gamma 0.95."""
    rng = random.Random(3)
    groups: list[list[list[tuple[float, str]]]] = [
        [
            [(rng.choice([0.0, 1.0, -0.5]), rng.choice("abc")) for _ in range(rng.randint(1, 4))]
            for _ in range(5)
        ]
        for _ in range(3)
    ]

    def relative(x: float, among: list[float]) -> float:
        apart = x - statistics.fmean(among)
        return apart / (statistics.stdev(among) + 1e-4) if deviation and len(among) > 1 else apart

    expected = []
    for sessions in groups:
        returns = [
            [sum(0.95 ** (k - t) * s[k][0] for k in range(t, len(s))) for t in range(len(s))]
            for s in sessions
        ]
        anchors: dict[str, list[float]] = {}
        for s, values in zip(sessions, returns, strict=True):
            for (_, state), value in zip(s, values, strict=True):
                anchors.setdefault(state, []).append(value)
        totals = [sum(r for r, _ in s) for s in sessions]
        for s, values, total in zip(sessions, returns, totals, strict=True):
            for (_, state), value in zip(s, values, strict=True):
                expected.append(relative(total, totals) + relative(value, anchors[state]))
    made = [
        Group(Prompt(i, PROMPT, ""), tuple(session(list(s), sum(r for r, _ in s)) for s in sessions))
        for i, sessions in enumerate(groups)
    ]
    got = advantages(Batch.build(made), algorithm, turn_returns="state", turn_discount=0.95)
    assert got == pytest.approx(expected, abs=1e-5)


def test_rloo_leaves_the_turn_itself_out() -> None:
    got = advantages(batch_of(), "rloo", turn_returns="turn", turn_discount=0.5)
    assert got == pytest.approx([2 - 0.75, 1.0, 0.5 - 1.5, -1.0, 1 - 1.25])


def test_groups_are_separate_and_a_turn_alone_has_no_advantage() -> None:
    single = advantages(batch_of(), turn_returns="state", turn_discount=0.5)
    assert advantages(batch_of(groups=2), turn_returns="state", turn_discount=0.5) == pytest.approx(
        2 * single
    )
    completions = (session([(None, "a"), (None, "b")], 1.0), session([(None, "a")], 0.0))
    batch = Batch.build([Group(Prompt(0, PROMPT, ""), completions)])
    assert advantages(batch, turn_returns="turn") == pytest.approx([0.5, 0.0, -0.5])


def test_without_turn_rewards_and_discount_the_first_turns_have_the_sessions_advantage() -> None:
    completions = tuple(session([(None, "a"), (None, "b")], r) for r in (1.0, 0.0, 0.25))
    batch = Batch.build([Group(Prompt(0, PROMPT, ""), completions)])
    for algorithm in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "max_rl", "opo"):
        assert advantages(batch, algorithm, turn_returns="turn") == pytest.approx(
            advantages(batch, algorithm)
        )


def test_a_completion_of_a_single_call_is_one_turn() -> None:
    single = Completion((5, 6), mask=(True, False), reward=0.0)
    several = session([(None, "a"), (None, "b")], 1.0)
    batch = Batch.build([Group(Prompt(0, PROMPT, ""), (several, single))])
    assert advantages(batch, turn_returns="turn") == pytest.approx([0.5, 0.0, -0.5])


def test_turns_as_sequences_are_ordered_by_group() -> None:
    batch = batch_of(groups=2)
    assert batch.rewards is not None
    turns = as_sequences(batch, turn_returns(batch, batch.rewards, 1.0), "state")
    assert turns.num_sequences == 10 and turns.num_groups == 4
    assert torch.equal(turns.group, turns.group.sort().values)
    assert turns.lengths.tolist() == [2.0] * 10


def test_a_batch_without_turns_is_refused() -> None:
    batch = Batch.build([Group(Prompt(0, PROMPT, ""), (Completion((5,), reward=1.0),) * 2)])
    with pytest.raises(ValueError, match="turn_rewards"):
        ALGORITHMS["grpo"](turn_returns="turn").prepare(batch)


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("ppo", {"turn_returns": "turn"}, "PPO assigns credit in another way"),
        ("per_step", {"turn_returns": "state"}, "PerStep assigns credit in another way"),
        ("raft", {"turn_returns": "turn"}, "RAFT assigns credit in another way"),
        ("luffy", {"turn_returns": "turn"}, "LUFFY assigns credit in another way"),
        ("rloo", {"turn_returns": "turn", "beta": 0.1}, "turn_returns cannot contain a KL penalty"),
        ("dapo", {"turn_returns": "turn", "overlong_buffer": 8}, "overlong_buffer shapes the reward"),
        ("grpo", {"turn_discount": 0.9}, "turn_discount has no effect without turn_returns"),
        ("grpo", {"turn_returns": "turn", "turn_weight": 2.0}, "turn_weight weighs turn_returns: state only"),
    ],
)
def test_combinations_without_meaning_are_conflicts(
    algorithm: str, options: dict[str, Any], message: str
) -> None:
    conflicts = ALGORITHMS[algorithm](**options).conflicts(8)
    assert any(message in conflict for conflict in conflicts)


def test_every_algorithm_of_group_rewards_has_turn_returns() -> None:
    known = {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "max_rl", "opo", "reinforce_pp"}
    online = {name: kind() for name, kind in ALGORITHMS.items() if hasattr(kind, "turn_level")}
    assert {name for name, algorithm in online.items() if algorithm.turn_level} >= known


def test_a_session_that_branches_has_no_order() -> None:
    linear, branched = batch_of(), batch_of(drifts=True)
    assert not branching(linear).any()
    assert branching(branched).tolist() == [True, True, False]
    to_grid(linear)
    with pytest.raises(ValueError, match="a session branches"):
        to_grid(branched)
    assert advantages(branched, "reinforce_pp") == pytest.approx(advantages(linear, "reinforce_pp"))
    with pytest.raises(ValueError, match="a session branches"):
        ALGORITHMS["reinforce_pp"](gamma=0.9).prepare(branched)
    assert [ALGORITHMS[n]().reads_order for n in ("ppo", "per_step", "reinforce_pp", "grpo")] == [
        True, True, False, False
    ]  # fmt: skip
