"""Composition: sums, gates, vectors, group normalisation, schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from rft.config.rewards import RewardConfig, RewardsConfig, Schedule
from rft.rewards import Outcome, Score
from rft.rewards.combine import combine, direction_of, gdpo, normalized, scheduled


def two(**changes: Any) -> RewardsConfig:
    first = changes.pop("first", {})
    second = changes.pop("second", {})
    functions = [RewardConfig(function="math", **first), RewardConfig(function="format", **second)]
    return RewardsConfig(functions=functions, **changes)


def total(
    config: RewardsConfig, a: Score | float | None, b: Score | float | None, **more: Any
) -> float | None:
    def score(x: Score | float | None) -> Score:
        if isinstance(x, Score):
            return x
        return Score(x, Outcome.abstain if x is None else Outcome.correct)

    return combine(config, {"math": [score(a)], "format": [score(b)]}, **more)[0].value


ERROR = Score(None, Outcome.error, "broken")


def test_weighted_sum_leaves_out_what_abstains_and_fails_with_what_fails() -> None:
    config = two(first={"weight": 2.0}, second={"weight": 0.5})
    assert total(config, 1.0, 1.0) == 2.5
    assert total(config, None, 1.0) == 0.5
    assert total(config, None, None) is None
    assert total(config, 1.0, ERROR) is None
    assert total(config, 1.0, Score(0.0, Outcome.timeout)) == 2.0  # a program's own timeout has a value


def test_gates() -> None:
    config = two(second={"gate": True})
    assert total(config, 1.0, 1.0) == 1.0
    assert total(config, 1.0, 0.0) == 0.0
    assert total(config, 1.0, None) == 1.0
    assert total(two(second={"gate": True}, gate_value=-1.0), 1.0, 0.4) == -1.0
    assert total(two(combine="min"), 1.0, 0.0) == 0.0
    assert total(two(combine="product"), 0.5, 0.5) == 0.25
    assert total(two(clip=(-1.0, 1.0)), 1.0, 1.0) == 1.0


def test_a_preference_direction() -> None:
    config = two(combine="vector", direction=[3.0, 4.0])
    assert total(config, 1.0, 0.5) == pytest.approx((3 + 2) / 5)
    assert total(config, 1.0, None) is None


def test_a_preference_direction_of_each_row() -> None:
    config = two(combine="vector", direction="row")
    scores = {"math": [Score(1.0, Outcome.correct)] * 2, "format": [Score(0.5, Outcome.correct)] * 2}
    got = [r.value for r in combine(config, scores, directions=[[3, 4], [12, -5]])]
    assert got == pytest.approx([(3 + 2) / 5, (12 - 2.5) / 13])


@pytest.mark.parametrize(
    ("column", "words"),
    [(None, "it is missing; set data.directions"), ([1, 2, 3], "of 2 numbers"), ([0, 0], "not all 0")],
)
def test_a_direction_that_a_row_lacks(column: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        direction_of(column, 2)


def test_normalisation_over_the_group() -> None:
    got = normalized([1.0, 0.0, 5.0, 5.0, None], [0, 0, 1, 1, 1], epsilon=0.0)
    assert got == [1.0, -1.0, 0.0, 0.0, None]
    third = 1 / 3
    assert normalized([third] * 3, [0, 0, 0]) == [0.0] * 3


def test_gdpo_keeps_apart_what_the_sum_would_merge() -> None:
    correct = [1.0, 0.0, 0.0, 0.0]
    short = [0.0, 1.0, 1.0, 0.0]
    got = gdpo([correct, short], [1.0, 1.0], [0] * 4)
    a, b = (1 - 0.25) / (math.sqrt(0.1875) + 1e-4), -0.25 / (math.sqrt(0.1875) + 1e-4)
    h = 0.5 / (0.5 + 1e-4)
    assert got == pytest.approx([a - h, b + h, b + h, b - h])
    config = two(combine="gdpo")
    rewards = combine(
        config,
        {
            "math": [Score(v, Outcome.correct) for v in correct],
            "format": [Score(v, Outcome.correct) for v in short],
        },
        groups=[0] * 4,
    )
    assert [r.value for r in rewards] == pytest.approx(got)
    assert rewards[1].vector == (0.0, 1.0)


def test_schedules() -> None:
    linear = Schedule(start=1.0, end=0.0, begin=0.2, until=0.6)
    assert [scheduled(linear, p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx(
        [1.0, 1.0, 0.5, 0.0, 0.0]
    )
    assert scheduled(Schedule(start=0.0, end=2.0, shape="cosine"), 0.5) == pytest.approx(1.0)
    assert scheduled(Schedule(start=0.0, end=2.0, shape="step", until=0.5), 0.49) == 0.0
    assert scheduled(Schedule(start=0.0, end=2.0, shape="step", begin=0.5, until=0.5), 0.5) == 2.0
    config = two(second={"weight": {"start": 1.0, "end": 0.0}})
    assert total(config, 1.0, 1.0, progress=0.75) == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"combine": "vector"}, "needs `direction`"),
        ({"direction": [1.0, 1.0]}, "only used by combine: vector"),
        ({"second": {"name": "math"}}, "two rewards are called 'math'"),
        ({"first": {"gate": True}, "second": {"gate": True}}, "all rewards are gates"),
        ({"clip": (1.0, 0.0)}, "clip"),
        ({"on_error": {"max_fraction": 2}}, "max_fraction"),
    ],
)
def test_configs_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        two(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("combine_by", "expected"),
    [("sum", [2.0 * 0.75 + 1.0, 1.0, None]), ("product", [0.75, 1.0, None]), ("min", [0.75, 1.0, None])],
)
def test_a_pairwise_reward_that_abstains_leaves_its_weight_out(
    combine_by: str, expected: list[float | None]
) -> None:
    """The third completion has nobody to be compared with, and the other reward abstains too: it has no
    value, never a zero."""
    config = RewardsConfig.model_validate(
        {
            "functions": [
                {"function": "pairwise_model", "name": "win_rate", "weight": 2.0},
                {"function": "format"},
            ],
            "combine": combine_by,
        }
    )
    won, none = Score(0.75, Outcome.correct), Score(None, Outcome.abstain)
    one = Score(1.0, Outcome.correct)
    rewards = combine(config, {"win_rate": [won, none, none], "format": [one, one, none]})
    assert [r.value for r in rewards] == expected
    assert [r.vector for r in rewards] == [(0.75, 1.0), (None, 1.0), None]
