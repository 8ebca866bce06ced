"""The slot buffer: exact accounting and the age bound, for any order of events."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.batch import Group, Prompt
from rft.rollout.buffer import SlotBuffer, SlotError, State, Work

PROMPT = Prompt(0, (1,), "p")
GROUP = Group(PROMPT, ())


def fill(slots: SlotBuffer, version: int, first: int = 0) -> list[Work]:
    works = []
    while slots.free:
        work = slots.lease((0, first + len(works)), PROMPT)
        slots.dispatch(work, version)
        works.append(work)
    return works


def test_synchronous_waits_for_the_whole_batch() -> None:
    slots = SlotBuffer(batch=3, staleness=0)
    works = fill(slots, version=0)
    assert len(works) == 3
    for work in works[:2]:
        slots.score(work, GROUP)
    assert slots.take(version=0) is None
    slots.score(works[2], GROUP)
    assert slots.take(version=0) == works
    assert slots.free == 0, "slots are freed by the engines' acknowledgement only"
    assert slots.acknowledge() == 3
    assert slots.free == 3 and slots.counts["trained"] == 3


def test_a_young_group_may_overtake_only_while_the_old_ones_can_still_be_in_time() -> None:
    slots = SlotBuffer(batch=1, staleness=2)
    old = fill(slots, version=0)
    assert len(old) == 3
    slots.score(old[2], GROUP)
    # Two groups of version 0 stay behind, due at versions up to 2, one per step: 1 and 2 are left. Fine.
    assert slots.take(version=0) == [old[2]]
    slots.acknowledge()
    young = fill(slots, version=1)
    slots.score(young[0], GROUP)
    # Taking it at version 1 would leave two due at 2 with one place: not allowed.
    assert slots.take(version=1) is None
    slots.score(old[0], GROUP)
    assert slots.take(version=1) == [old[0]]


def test_dropping_frees_the_slot_and_keeps_the_reason() -> None:
    slots = SlotBuffer(batch=1, staleness=0)
    (work,) = fill(slots, version=0)
    slots.drop(work, "unjudged")
    assert slots.free == 1 and slots.counts["dropped/unjudged"] == 1
    with pytest.raises(SlotError, match="is dropped"):
        slots.score(work, GROUP)


def test_where_nobody_waits_late_groups_get_too_old_and_never_come_into_a_step() -> None:
    slots = SlotBuffer(batch=1, staleness=1, waits=False)
    late, young = fill(slots, version=0)
    slots.score(young, GROUP)
    assert slots.take(version=0) == [young]
    slots.acknowledge()
    (young,) = fill(slots, version=1)
    slots.score(young, GROUP)
    assert slots.take(version=1) == [young], "the one in flight would have to be in this step"
    assert slots.too_old(version=1) == []
    assert slots.too_old(version=2) == [late]
    slots.acknowledge()
    slots.score(late, GROUP)  # it came just now, too late
    with pytest.raises(SlotError, match="2 versions old"):
        slots.take(version=2)
    slots.drop(slots.too_old(version=2)[0], "too_old")
    assert slots.take(version=2) is None and slots.counts["dropped/too_old"] == 1


def test_lease_beyond_capacity_is_refused() -> None:
    slots = SlotBuffer(batch=1, staleness=1)
    fill(slots, version=0)
    with pytest.raises(SlotError, match="no free slot: all 2"):
        slots.lease((0, 9), PROMPT)


def test_outstanding_names_what_a_resumed_run_must_hand_out_again() -> None:
    slots = SlotBuffer(batch=1, staleness=1)
    works = fill(slots, version=0)
    slots.score(works[0], GROUP)
    slots.take(version=0)
    assert slots.outstanding() == [works[1].key]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.booleans(), st.integers(0, 2**32))
def test_age_bound_and_accounting_hold_whatever_happens(
    batch: int, staleness: int, waits: bool, seed: int
) -> None:
    """Random finishing order, drops and repeated dispatches: no group is trained on older than the
    bound, the loop never deadlocks, and everything handed out ends exactly once."""
    slots, dice = SlotBuffer(batch, staleness, waits), random.Random(seed)
    version, handed, trained, inflight = 0, 0, 0, []
    while version < 30:
        while slots.free:
            work = slots.lease((0, handed), PROMPT)
            slots.dispatch(work, version)
            inflight.append(work)
            handed += 1
        if inflight:
            work = inflight.pop(dice.randrange(len(inflight)))
            chance = dice.random()
            if chance < 0.1:
                slots.drop(work, "lost")
            elif chance < 0.2:
                slots.dispatch(work, version)  # its engine died: the lease goes to another one
                inflight.append(work)
            else:
                slots.score(work, GROUP)
        taken = slots.take(version)
        assert taken is not None or inflight or slots.free, "deadlock"
        if taken:
            assert len(taken) == batch
            assert all(0 <= version - w.version <= staleness for w in taken)
            trained += len(taken)
            version += 1
            slots.acknowledge()
            late = slots.too_old(version)
            assert not (waits and late)
            for work in late:
                slots.drop(work, "too_old")
                inflight = [w for w in inflight if w is not work]
    ended = slots.counts["trained"] + slots.counts["dropped/lost"] + slots.counts["dropped/too_old"]
    assert trained == slots.counts["trained"] == 30 * batch
    assert ended + len(slots.live) == handed
    assert all(w.state != State.trained for w in slots.live.values())
