"""The slot buffer: which prompt is where, and how old a rollout may be when it is trained on.

There are (staleness + 1) * batch slots. A slot is taken when a prompt is handed out and freed when the
prompt was trained on *and* every live engine acknowledged the version that came of it, or when it was
dropped. Every work ends exactly once, TRAINED or DROPPED(reason).

Age bound: a group dispatched at version v is trained on by a policy of version at most v + staleness.
Old groups go first; a young group may overtake one that is still in flight only as long as all groups
left behind can still meet their bound with `batch` of them consumed per step (see `_feasible`). Where the
buffer does not wait for late groups, it may always, and those that got too old are to be dropped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from rft.batch import Group, Prompt


class State(StrEnum):
    """The state of a work."""

    waiting = "waiting"
    inflight = "inflight"
    scored = "scored"
    trained = "trained"
    dropped = "dropped"


class SlotError(RuntimeError):
    """The accounting is broken: a bug in rft."""


@dataclass(eq=False)
class Work:
    """One prompt that was handed out. `key` is (epoch, row), which a checkpoint stores."""

    ticket: int
    key: tuple[int, int]
    prompt: Prompt
    state: State = State.waiting
    version: int = -1  # of the policy when it was dispatched
    group: Group | None = None
    reason: str = ""


@dataclass
class SlotBuffer:
    """Slots for `batch` prompts per step at a given staleness."""

    batch: int
    staleness: int
    waits: bool = True  # for groups that would get too old; else `too_old` names them
    live: dict[int, Work] = field(default_factory=dict)  # every work that holds a slot, by ticket
    counts: Counter[str] = field(default_factory=Counter)  # ended work, by state and reason
    # Works by version, kept as they move: `take` is asked once per completed group, of which there may be
    # tens of thousands in flight, and may not walk through all of them each time.
    _scored: Counter[int] = field(default_factory=Counter)
    _inflight: Counter[int] = field(default_factory=Counter)
    _tickets: int = 0

    @property
    def capacity(self) -> int:
        return (self.staleness + 1) * self.batch

    @property
    def free(self) -> int:
        return self.capacity - len(self.live)

    @property
    def scored(self) -> int:
        """Works that are scored and not yet trained on."""
        return self._scored.total()

    def lease(self, key: tuple[int, int], prompt: Prompt) -> Work:
        """Hand out a prompt. Raises SlotError when no slot is free."""
        if self.free < 1:
            raise SlotError(f"no free slot: all {self.capacity} are taken")
        work = Work(self._tickets, key, prompt)
        self._tickets += 1
        self.live[work.ticket] = work
        return work

    def dispatch(self, work: Work, version: int) -> None:
        """Send the work to an engine that samples with policy `version` or a later one.

        A group that is dispatched again (its engine died) keeps its first version, which is the safe side
        of the bound.
        """
        self._expect(work, State.waiting, State.inflight)
        if work.version < 0:
            work.version = version
        self._move(work, State.inflight)

    def score(self, work: Work, group: Group) -> None:
        """Store the work's completions with their rewards."""
        self._expect(work, State.inflight)
        work.group = group
        self._move(work, State.scored)

    def drop(self, work: Work, reason: str) -> None:
        """End the work without training on it; its slot is free at once."""
        self._expect(work, State.waiting, State.inflight, State.scored)
        work.reason = reason
        self._move(work, State.dropped)
        del self.live[work.ticket]
        self.counts[f"dropped/{reason}"] += 1

    def take(self, version: int) -> list[Work] | None:
        """`batch` scored works to train policy `version` on, in ticket order; None: not yet."""
        if self.scored < self.batch or (self.waits and not self._feasible(self._left(), version + 1)):
            return None
        ready = [w for w in self.live.values() if w.state == State.scored]
        chosen = sorted(ready, key=lambda w: (w.version, w.ticket))[: self.batch]
        for work in chosen:
            if version - work.version > self.staleness:
                raise SlotError(f"work {work.ticket} is {version - work.version} versions old")
            self._move(work, State.trained)
        return sorted(chosen, key=lambda w: w.ticket)

    def put_back(self, works: list[Work]) -> None:
        """Return works to `scored` that were taken for a step that failed."""
        for work in works:
            self._expect(work, State.trained)
            self._move(work, State.scored)

    def _left(self) -> Counter[int]:
        """Works by version that are left once the `batch` oldest scored ones are taken."""
        left, wanted = Counter(self._inflight), self.batch
        for version in sorted(self._scored):
            taken = min(wanted, self._scored[version])
            left[version] += self._scored[version] - taken
            wanted -= taken
        return left

    def _feasible(self, left: Counter[int], version: int) -> bool:
        """True if the works left can all be trained on in time, `batch` per step from `version` on."""
        behind = 0
        for sampled_by in sorted(left):
            deadline = sampled_by + self.staleness
            behind += left[sampled_by]
            if behind > max(deadline - version + 1, 0) * self.batch:
                return False
        return True

    def acknowledge(self) -> int:
        """Free the slots of trained works: every live engine has the version that they led to."""
        done = [w for w in self.live.values() if w.state == State.trained]
        for work in done:
            del self.live[work.ticket]
        self.counts["trained"] += len(done)
        return len(done)

    def too_old(self, version: int) -> list[Work]:
        """Works, in flight or left over, that policy `version` may not be trained on; in ticket order."""
        late = (w for w in self.live.values() if w.state in (State.inflight, State.scored))
        return sorted((w for w in late if version - w.version > self.staleness), key=lambda w: w.ticket)

    def outstanding(self) -> list[tuple[int, int]]:
        """Keys of the works that were handed out and have not ended, in ticket order."""
        return [w.key for _, w in sorted(self.live.items()) if w.state != State.trained]

    def _move(self, work: Work, state: State) -> None:
        """Change a work's state and the counts by version."""
        books = {State.scored: self._scored, State.inflight: self._inflight}
        for book, change in ((books.get(work.state), -1), (books.get(state), 1)):
            if book is not None:
                book[work.version] += change
                if not book[work.version]:
                    del book[work.version]
        work.state = state

    def _expect(self, work: Work, *states: State) -> None:
        if work.state not in states or self.live.get(work.ticket) is not work:
            raise SlotError(f"work {work.ticket} is {work.state}, expected {' or '.join(states)}")
