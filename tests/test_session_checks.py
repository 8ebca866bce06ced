"""Algorithms and sessions: what is refused or warned of before a run, and at the first batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Group, Prompt
from rft.config.schema import Config
from rft.config.validate import problems, warnings
from rft.errors import LearnerError
from rft.learner.learner import Learner
from rft.rollout.calls import Call, lay_out
from tests.specs import facts, learner_spec

ENVIRONMENT = {"kind": "tools", "tools": ["calculator"]}


def config_of(algorithm: str, options: dict[str, Any], environment: dict[str, Any] | None) -> Config:
    return Config(
        algorithm=ALGORITHMS[algorithm](**options),
        train={"num_generations": 4},
        rewards=[{"function": "math"}],
        environment=environment,
    )


@pytest.mark.parametrize(
    ("algorithm", "options", "environment", "message"),
    [
        ("grpo", {"turn_returns": "turn"}, None, "turn_returns credits the turns of sessions"),
        ("per_step", {}, ENVIRONMENT, "values the steps of one completion, and a session has turns"),
        ("luffy", {}, ENVIRONMENT, "continue a demonstration or another completion"),
        ("prefix_rft", {}, ENVIRONMENT, "continue a demonstration or another completion"),
        ("mml", {}, ENVIRONMENT, "trains on past groups, or on a second copy of the model"),
        ("cory", {}, ENVIRONMENT, "continue a demonstration or another completion"),
        ("dapo", {"overlong_buffer": 4}, ENVIRONMENT, "overlong_buffer of dapo measures whole sessions"),
    ],
)
def test_what_sessions_cannot_train_is_refused_before_a_run(
    algorithm: str, options: dict[str, Any], environment: dict[str, Any] | None, message: str
) -> None:
    found = problems(config_of(algorithm, options, environment), facts(demonstrations=True))
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    "algorithm", ["grpo", "rloo", "gspo", "dapo", "ppo", "reinforce_pp", "remax", "raft"]
)
def test_algorithms_of_whole_completions_train_sessions(algorithm: str) -> None:
    config = config_of(algorithm, {}, ENVIRONMENT)
    assert problems(config, facts()) == []
    assert [w for w in warnings(config) if "branches" in w] == [
        w for w in warnings(config) if algorithm == "ppo" and "reads the order of a session's tokens" in w
    ]
    assert bool(warnings(config)) == (algorithm == "ppo")


def sessions(*, drifts: bool) -> Batch:
    def completion(first: int, reward: float) -> Any:
        begin = Call((7, 8, 9), (first, 11, 12), (-5.0,) * 3, "stop", ((0, 0, 3),))
        kept = begin.sampled[: 2 if drifts else 3]
        then = Call((*begin.prompt, *kept, 30, 31), (40, 41), (-5.0,) * 2, "length", ((0, 0, 2),))
        return replace(lay_out((7, 8, 9), [begin, then]), reward=reward)

    return Batch.build([Group(Prompt(0, (7, 8, 9), ""), (completion(10, 1.0), completion(20, 0.0)))])


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("ppo", {"critic": "head"}), ("reinforce_pp", {"gamma": 0.9}), ("grpo", {}), ("gspo", {})],
)
def test_branches_stop_what_reads_the_order_of_tokens(
    algorithm: str, options: dict[str, Any], tiny_folder: Path
) -> None:
    made = ALGORITHMS[algorithm](**options)
    learner = Learner(learner_spec(tiny_folder, made))
    assert learner.step(sessions(drifts=False), 0)["train/updates"] == 1
    if not made.reads_order:
        assert learner.step(sessions(drifts=True), 1)["train/updates"] == 1
        return
    with pytest.raises(LearnerError, match=f"{type(made).__name__} reads the order .*, and 2 of the 2 sess"):
        learner.step(sessions(drifts=True), 1)
    assert learner.version == 1
