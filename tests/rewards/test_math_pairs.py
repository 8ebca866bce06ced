"""The math reward on generated pairs whose verdict is known by construction."""

from __future__ import annotations

import pytest
from math_pairs import pairs

from rft.rewards.equal import equal


@pytest.mark.parametrize("seed", range(3))
def test_no_generated_pair_is_judged_wrongly(seed: int) -> None:
    wrong = [pair for pair in pairs(seed, 60) if equal(pair.gold, pair.answer).equal is not pair.same]
    assert not wrong
