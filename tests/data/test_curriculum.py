"""The curriculum sampler: prefers the middle, measures everything, resumes to the draw."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rft.batch import Completion, Group, Prompt
from rft.contrib.curriculum import Curriculum, CurriculumConfig, pass_rate
from rft.data.errors import DataError
from rft.data.sampler import Sampler
from rft.rewards.types import Outcome, Score

CONFIG = CurriculumConfig(explore=0.2, rest=4)


def trained(size: int = 40, draws: int = 4000) -> tuple[Curriculum, Counter[int]]:
    """Row r is solved in r / (size - 1) of the cases. Draws of the second half, by row."""
    sampler, seen = Curriculum(size, 3, CONFIG), Counter[int]()
    for draw in range(draws):
        (row,) = sampler.next(1)
        sampler.observe_rate(row, row / (size - 1))
        seen[row] += draw >= draws // 2
    return sampler, seen


def test_the_middle_is_drawn_most_and_nothing_is_forgotten() -> None:
    _, seen = trained()
    hard, middle, easy = (sum(seen[r] for r in rows) for rows in (range(5), range(17, 23), range(35, 40)))
    assert middle / 6 > 2 * max(hard, easy) / 5
    assert set(seen) == set(range(40)) and min(seen.values()) > 0


def test_a_weight_is_the_variance_of_a_trial_for_a_target_of_one_half() -> None:
    sampler = Curriculum(4, 0, CurriculumConfig(floor=1e-9))
    for rate in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        assert sampler.weight(rate) == pytest.approx(4 * rate * (1 - rate), abs=1e-6)
    skewed = Curriculum(4, 0, CurriculumConfig(target=0.8))
    assert max(range(101), key=lambda p: skewed.weight(p / 100)) == 80
    assert skewed.weight(0) == skewed.weight(1) == 0.05


def test_it_resumes_to_the_draw() -> None:
    one, _ = trained(draws=100)
    two = Curriculum(40, 3, CONFIG)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(200):
        (a,), (b,) = one.next(1), two.next(1)
        assert (a, one.epoch) == (b, two.epoch)
        one.observe_rate(a, 0.5)
        two.observe_rate(b, 0.5)


def test_a_row_drawn_again_has_another_key_and_rests() -> None:
    sampler, keys, last = Curriculum(30, 1, CONFIG), set(), {}
    for draw in range(600):
        before = sampler.plain.seen
        (row,) = sampler.next(1)
        assert (sampler.epoch, row) not in keys
        keys.add((sampler.epoch, row))
        if sampler.plain.seen == before:  # out of turn
            assert draw - last[row] > CONFIG.rest
        last[row] = draw
        sampler.observe_rate(row, 0.5)


def test_a_checkpoint_of_the_plain_sampler_is_refused() -> None:
    with pytest.raises(DataError, match=r"without train\.curriculum"):
        Curriculum(5, 0, CONFIG).load_state_dict(Sampler(5, 0).state_dict())


def test_pass_rate_counts_correct_outcomes() -> None:
    found = [Outcome.correct, Outcome.wrong, Outcome.correct, Outcome.unparseable]
    completions = tuple(Completion((1,), scores={"math": Score(0.5, outcome)}) for outcome in found)
    assert pass_rate(Group(Prompt(0, (1,), "p"), completions), "math") == 0.5
