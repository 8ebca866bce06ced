"""The slot buffer: tracks every dispatched prompt and bounds the age of rollouts that are trained on.

There are (staleness + 1) * batch slots. A slot is taken when a prompt is leased and freed when the prompt
was trained on *and* every live engine acknowledged the resulting version, or when the prompt was dropped.
Every work item ends exactly once, as TRAINED or DROPPED(reason).

Age bound: a group dispatched at version v is trained on by a policy of version at most v + staleness.
Old groups go first; a young group may overtake one that is still in flight only if all remaining groups
can still meet their bound with `batch` of them consumed per step (see `_feasible`). If the buffer does not
wait for late groups, overtaking is always allowed, and groups that became too old have to be dropped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from rft.batch import Group, Prompt


class State(StrEnum):
    """The state of a work item."""

    waiting = "waiting"
    inflight = "inflight"
    scored = "scored"
    trained = "trained"
    dropped = "dropped"


class SlotError(RuntimeError):
    """Inconsistent slot accounting: a bug in rft."""


@dataclass(eq=False)
class Work:
    """One leased prompt. `key` is (epoch, row), which a checkpoint stores."""

    ticket: int
    key: tuple[int, int]
    prompt: Prompt
    state: State = State.waiting
    version: int = -1  # policy version at dispatch
    group: Group | None = None
    reason: str = ""


@dataclass
class SlotBuffer:
    """Manage slots for `batch` prompts per step at a given staleness."""

    batch: int
    staleness: int
    waits: bool = True  # for groups that would become too old; if False, `too_old` lists them
    live: dict[int, Work] = field(default_factory=dict)  # every work item that holds a slot, by ticket
    counts: Counter[str] = field(default_factory=Counter)  # ended work items, by state and reason
    # Counts by version, updated on every move: `take` is called once per completed group, with possibly tens
    # of thousands in flight, and must not iterate over all of them.
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
        """Number of work items that are scored and not yet trained on."""
        return self._scored.total()

    def lease(self, key: tuple[int, int], prompt: Prompt) -> Work:
        """Lease a slot for a prompt. Raises SlotError if no slot is free."""
        if self.free < 1:
            raise SlotError(f"no free slot: all {self.capacity} are taken")
        work = Work(self._tickets, key, prompt)
        self._tickets += 1
        self.live[work.ticket] = work
        return work

    def dispatch(self, work: Work, version: int) -> None:
        """Mark the work item as sent to an engine that samples with policy `version` or a later one. A group
        that is dispatched again (its engine died) keeps its first version, which is the conservative side of
        the bound."""
        self._expect(work, State.waiting, State.inflight)
        if work.version < 0:
            work.version = version
        self._move(work, State.inflight)

    def score(self, work: Work, group: Group) -> None:
        """Store the completions with their rewards."""
        self._expect(work, State.inflight)
        work.group = group
        self._move(work, State.scored)

    def drop(self, work: Work, reason: str) -> None:
        """End the work item without training on it; its slot is free at once."""
        self._expect(work, State.waiting, State.inflight, State.scored)
        work.reason = reason
        self._move(work, State.dropped)
        del self.live[work.ticket]
        self.counts[f"dropped/{reason}"] += 1

    def take(self, version: int) -> list[Work] | None:
        """Take `batch` scored items to train policy `version` on, in ticket order; None if not ready."""
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
        """Return items of a failed step to `scored`."""
        for work in works:
            self._expect(work, State.trained)
            self._move(work, State.scored)

    def _left(self) -> Counter[int]:
        """Count, by version, the items that remain once the `batch` oldest scored ones are taken."""
        left, wanted = Counter(self._inflight), self.batch
        for version in sorted(self._scored):
            taken = min(wanted, self._scored[version])
            left[version] += self._scored[version] - taken
            wanted -= taken
        return left

    def _feasible(self, left: Counter[int], version: int) -> bool:
        """True if all remaining items can be trained on in time, `batch` per step from `version` on."""
        behind = 0
        for sampled_by in sorted(left):
            deadline = sampled_by + self.staleness
            behind += left[sampled_by]
            if behind > max(deadline - version + 1, 0) * self.batch:
                return False
        return True

    def acknowledge(self) -> int:
        """Free the slots of trained items: every live engine has the resulting version."""
        done = [w for w in self.live.values() if w.state == State.trained]
        for work in done:
            del self.live[work.ticket]
        self.counts["trained"] += len(done)
        return len(done)

    def too_old(self, version: int) -> list[Work]:
        """List items, in flight or scored, that are too old for policy `version`, in ticket order."""
        late = (w for w in self.live.values() if w.state in (State.inflight, State.scored))
        return sorted((w for w in late if version - w.version > self.staleness), key=lambda w: w.ticket)

    def outstanding(self) -> list[tuple[int, int]]:
        """List the keys of leased items that have not ended, in ticket order."""
        return [w.key for _, w in sorted(self.live.items()) if w.state != State.trained]

    def _move(self, work: Work, state: State) -> None:
        """Change an item's state and update the counts by version."""
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
