"""What expert iteration remembers: order, bound, and the way through a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Group, Prompt
from rft.contrib.replay import Replay
from rft.rollout.calls import Call, lay_out


def test_past_groups_are_mixed_in_and_forgotten_in_order(make_groups) -> None:
    steps = [make_groups(groups=1, seed=i) for i in range(4)]
    replay = Replay(2)
    mixed = [replay.select(s) for s in steps]
    assert mixed[0] == steps[0]
    assert mixed[1] == steps[1] + steps[0]
    assert mixed[3] == steps[3] + steps[1] + steps[2]
    assert Replay(0).select(steps[0]) == steps[0] and not Replay(0).past


def test_a_replay_survives_a_checkpoint(make_groups) -> None:
    groups = make_groups(groups=2)
    with_values = [
        replace(g, completions=tuple(replace(c, values={"a": 1.0, "b": (0.5, 2.0)}) for c in g.completions))
        for g in groups
    ]
    replay, other = Replay(3), Replay(3)
    replay.select(with_values)
    other.load_state_dict(
        json.loads(json.dumps(replay.state_dict())), {g.prompt.id: g.prompt for g in groups}
    )
    assert list(other.past) == [with_values]


def test_sessions_survive_a_checkpoint() -> None:
    calls = [
        Call((1, 2), (5, 6), (-0.5, -0.25), "stop", ((0, 0, 2),), reward=0.5, state="room"),
        Call((1, 2, 5, 7), (8,), (-1.0,), "stop", ((1, 0, 1),)),
    ]
    group = Group(Prompt(3, (1, 2), ""), (replace(lay_out((1, 2), calls), reward=1.0),))
    replay, other = Replay(1), Replay(1)
    replay.select([group])
    other.load_state_dict(json.loads(json.dumps(replay.state_dict())), {3: group.prompt})
    assert list(other.past) == [[group]]
    before, after = Batch.build([group]), Batch.build(other.past[0])
    assert after.turn is not None and after.tokens.tolist() == before.tokens.tolist()


def test_expert_iteration_imitates_good_answers_of_past_steps(make_groups) -> None:
    """Two old groups and one new one: the loss acts on all their right answers and on nothing else."""
    old, new = make_groups(groups=2, seed=1), make_groups(groups=1, seed=2)
    replay = Replay(ALGORITHMS["expert_iteration"]().replay)
    replay.select(old)
    batch = ALGORITHMS["expert_iteration"]().prepare(Batch.build(replay.select(new)))
    trained = batch.lengths > 0
    assert trained.tolist() == [c.reward > 0 for g in (*new, *old) for c in g.completions]
