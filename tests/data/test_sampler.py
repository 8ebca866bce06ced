"""The sampler: every row once an epoch, the same order for the same seed, resumed to the row."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rft.data import DataError, Sampler


def test_each_epoch_visits_every_row_once_in_a_new_order() -> None:
    sampler = Sampler(10, seed=1)
    first, second = sampler.next(10), sampler.next(10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert sampler.seen == 20
    assert Sampler(10, seed=1).next(10) == first
    assert Sampler(10, seed=2).next(10) != first
    assert Sampler(4, shuffle=False).next(6) == [0, 1, 2, 3, 0, 1]


@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 5),
    ks=st.lists(st.integers(0, 40), max_size=6),
    cut=st.integers(0, 6),
)
def test_resuming_continues_exactly(size: int, seed: int, ks: list[int], cut: int) -> None:
    whole, before = Sampler(size, seed), Sampler(size, seed)
    expected = [whole.next(k) for k in ks]
    got = [before.next(k) for k in ks[:cut]]
    after = Sampler(size, seed)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    got += [after.next(k) for k in ks[cut:]]
    assert got == expected
    assert sum(map(len, got)) == after.seen


def test_another_dataset_cannot_resume() -> None:
    with pytest.raises(DataError, match="size=10, this run has size=11"):
        Sampler(11).load_state_dict(Sampler(10).state_dict())
    with pytest.raises(DataError, match="empty"):
        Sampler(0)
