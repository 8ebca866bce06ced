"""Metrics of a sampled evaluation, against numbers computed by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from rft.metrics.evaluation import (
    Evaluation,
    Problem,
    Sampled,
    best_of,
    bootstrap_interval,
    calibration_error,
    change_metrics,
    evaluation_metrics,
    flips,
    majority,
    mcnemar,
    paired_test,
    pass_at_k,
)


def sample(correct: bool | None, answer: str = "", **values: Any) -> Sampled:
    return Sampled(correct, answer=answer, **values)


def problem(number: int, *marks: bool | None, greedy: bool | None = None) -> Problem:
    return Problem(number, [sample(m) for m in marks], None if greedy is None else sample(greedy))


@pytest.mark.parametrize(
    ("n", "correct", "k", "chance"),
    [(4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 4, 2, 1.0), (4, 0, 4, 0.0), (5, 2, 3, 1 - 1 / 10)],
)
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(
    n: int, correct: int, k: int, chance: float
) -> None:
    from itertools import combinations

    marks = [True] * correct + [False] * (n - correct)
    subsets = list(combinations(marks, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(n, correct, k) == pytest.approx(chance)


def test_a_majority_of_wrong_answers_outvotes_the_right_one() -> None:
    right, wrong, none = sample(True, "5"), sample(False, "6"), sample(False)
    assert majority([right, right, wrong]) == 1.0
    assert majority([right, wrong, wrong]) == 0.0
    assert majority([right, wrong]) == 0.5, "a tie counts by halves"
    assert majority([none, none, right]) == 1.0, "no answer is no vote"
    assert majority([none, none]) == 0.0
    votes = [Problem(0, [right] * 3 + [wrong] * 2), Problem(1, [wrong, right, right, right, right])]
    metrics = evaluation_metrics(votes)
    assert metrics["maj@4"] == metrics["maj@5"] == 1.0 and "maj@2" not in metrics
    assert metrics["distinct_answers"] == 2.0


def test_best_of_n_takes_the_highest_rank_and_halves_a_tie() -> None:
    ranked = [sample(True, rank=0.2), sample(False, rank=0.9), sample(True, rank=0.9)]
    assert best_of(ranked[:2]) == 0.0 and best_of(ranked[::2]) == 1.0 and best_of(ranked) == 0.5
    metrics = evaluation_metrics([Problem(0, ranked), Problem(1, [sample(True, rank=1.0)] * 3)])
    assert metrics["best@3"] == 0.75


def test_accuracy_leaves_out_what_could_not_be_judged() -> None:
    metrics = evaluation_metrics(
        [problem(0, True, None, greedy=False), problem(1, False, True), problem(2, None)]
    )
    assert metrics["accuracy"] == 0.75 and metrics["unjudged"] == 2
    assert metrics["pass@2"] == 1.0, "only problem 1 has two judged samples"
    assert metrics["greedy_accuracy"] == 0.0 and metrics["problems"] == 3
    assert math.isnan(evaluation_metrics([problem(0, None)])["accuracy"])


def test_diversity_is_counted_within_a_problem() -> None:
    same = [sample(True, tokens=(1, 2, 3)), sample(True, tokens=(1, 2, 3))]
    other = [sample(True, tokens=(1, 2)), sample(True, tokens=(3, 4))]
    metrics = evaluation_metrics([Problem(0, same), Problem(1, other)])
    assert metrics["distinct_1"] == pytest.approx((3 / 6 + 4 / 4) / 2)
    assert metrics["distinct_2"] == pytest.approx((2 / 4 + 2 / 2) / 2)
    assert metrics["distinct_3"] == pytest.approx(1 / 2), "problem 1 has no triple"
    assert metrics["distinct"] == 0.75


def test_calibration_error_by_hand() -> None:
    # bin 0.8..0.9: confidence 0.85 twice, one right: |0.85 - 0.5| * 2; bin 0.9..1: 1.0, right: 0. Of 3.
    assert calibration_error([(0.85, True), (0.85, False), (1.0, True)]) == pytest.approx(0.7 / 3)
    stated = [sample(True, confidence=1.0), sample(False, confidence=1.0), sample(True), sample(None)]
    metrics = evaluation_metrics([Problem(0, stated)])
    assert metrics["ece"] == 0.5 and metrics["confidence"] == 1.0 and metrics["stated"] == 0.5


def test_length_and_truncation_by_hand() -> None:
    samples = [sample(True, length=n, truncated=n == 8) for n in (1, 3, 8, 8)]
    metrics = evaluation_metrics([Problem(0, samples[:3]), Problem(1, samples[3:])])
    assert metrics["length_mean"] == 5.0 and metrics["truncated"] == 0.5, "means over samples"


def test_abstention_by_hand() -> None:
    """Of eight completions two decline; of the other six, one was not judged, and three of five are right."""
    answers = [sample(c, declined=False) for c in (True, True, False, None)]
    more = [sample(True, declined=False), sample(False, declined=False)]
    declines = [sample(False, declined=True), sample(None, declined=True)]
    metrics = evaluation_metrics([Problem(0, answers), Problem(1, more + declines)])
    assert metrics["declined"] == 0.25 and metrics["accuracy_answered"] == pytest.approx(3 / 5)
    assert metrics["accuracy"] == pytest.approx((2 / 3 + 1 / 3) / 2), "a refusal counts as its reward judges"
    none = evaluation_metrics([Problem(0, declines)])
    assert none["declined"] == 1.0 and math.isnan(none["accuracy_answered"])
    assert "declined" not in evaluation_metrics([problem(0, True)]), "not asked for"


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        values = rng.binomial(4, 0.3, 100) / 4
        low, high = bootstrap_interval(values, seed=trial)
        covered += low <= 0.3 <= high
        assert low <= values.mean() <= high
    assert 0.90 <= covered / 200 <= 0.99
    assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)


def test_flips_are_counted_by_the_greedy_completion_and_name_their_rows() -> None:
    before = [
        problem(7, False, greedy=True),
        problem(8, True, greedy=False),
        problem(9, True),
        problem(10, None),
    ]
    now = [problem(7, True, greedy=False), problem(8, True, greedy=True), problem(9, True), problem(10, True)]
    changed = flips(before, now)
    assert (changed.compared, changed.negative, changed.positive) == (3, (7,), (8,))
    metrics = change_metrics(before, now)
    assert metrics["negative_flips"] == metrics["positive_flips"] == pytest.approx(1 / 3)
    assert metrics["forgetting"] == pytest.approx((0 + 1 + 1) / 3 - 1.0)
    assert change_metrics([problem(1, True)], [problem(2, True)]) == {}


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32) and mcnemar(5, 0) == mcnemar(0, 5)
    assert mcnemar(1, 5) == pytest.approx(2 * 7 / 64)
    before = [problem(i, i < 5) for i in range(20)]
    now = [problem(i, i < 15) for i in range(20)]
    test = paired_test(before, now)
    assert (test.problems, test.only_a, test.only_b) == (20, 0, 10) and test.difference == 0.5
    assert test.p == pytest.approx(2 / 1024) and 0.2 < test.low < 0.5 < test.high < 0.8
    with pytest.raises(ValueError, match="no judged problem in common"):
        paired_test([problem(1, True)], [problem(2, True)])


def test_an_evaluation_survives_json() -> None:
    samples = [sample(False, "6", reward=0.0, rank=0.0, length=3), sample(None, truncated=True)]
    made = Evaluation(0, {"": [Problem(3, samples, sample(True), "2+3=", "5")], "b": []}, {"": "x", "b": "y"})
    read = Evaluation.from_dict(json.loads(json.dumps(made.to_dict())))
    assert read == made
    assert read.same(Evaluation(5, {"": [], "b": []}, {"": "x", "b": "other"})) == [""]
    assert read.with_texts({}).sets[""][0].text == "" and read.with_texts({"": [3]}) == read
