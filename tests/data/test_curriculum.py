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


def test_the_posterior_forgets_and_counts() -> None:
    """Beta(1, 1); 3 of 4 correct, then 0 of 2, with half of the past: (1 + 3, 1 + 1), then
    (2 + 1/2 + 0, 1 + 1/2 + 2)."""
    sampler = Curriculum(3, 0, CurriculumConfig(model="beta", decay=0.5))
    sampler.observe_rate(1, 0.75, 4)
    assert sampler.posterior == {1: (4.0, 2.0)}
    sampler.observe_rate(1, 0.0, 2)
    assert sampler.posterior == {1: (2.5, 3.5)}
    again = Curriculum(3, 0, sampler.config)
    sampler.next(12)
    again.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert again.posterior == sampler.posterior
    assert again.next(20) == sampler.next(20)


def test_predicted_rates_choose_prompts_near_the_target() -> None:
    """Rows 0 to 9 are never solved, 10 to 19 in half of the cases, 20 to 29 always; 30 to 39 are unknown, and
    their prior reaches the target too."""
    config = CurriculumConfig(model="beta", explore=1e-9, rest=0, candidates=8)
    sampler, seen = Curriculum(40, 1, config), Counter[int]()
    for row in range(30):
        sampler.observe_rate(row, (0.0, 0.5, 1.0)[row // 10], 64)
    for row in sampler.next(2000):
        seen[row // 10] += 1
    assert seen[1] > 0.6 * 2000 and seen[3] > 0.05 * 2000
    assert seen[0] + seen[2] < 0.01 * 2000
    hard = Curriculum(40, 1, config.model_copy(update={"target": 0.02}))
    hard.posterior = dict(sampler.posterior)
    assert Counter(row // 10 for row in hard.next(500))[0] > 400


def test_generations_follow_the_standard_deviation() -> None:
    """Posterior means 1/2, 1/10 and 1/2 (deviations 0.5, 0.3, 0.5; mean 13/30): 8 * 15/13 and 8 * 9/13."""
    sampler = Curriculum(4, 0, CurriculumConfig(allocate=True, decay=1.0))
    assert sampler.generations(0, 8) == 8
    sampler.observe_rate(0, 0.5, 38)
    sampler.observe_rate(1, 3 / 38, 38)
    sampler.observe_rate(2, 0.5, 8)
    assert [sampler.generations(row, 8) for row in range(4)] == [9, 6, 9, 8]
    sampler.observe_rate(3, 0.0, 10**6)
    assert sampler.generations(3, 8) == 4 and sampler.generations(0, 8) == 12
    plain = Curriculum(4, 0, CurriculumConfig())
    plain.observe_rate(0, 0.0, 8)
    assert plain.generations(0, 8) == Sampler(4, 0).generations(0, 8) == 8
