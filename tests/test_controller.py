"""The online loop on simulated actors: what is counted, what is kept, when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.controller import NoSignal
from tests.simulated import alternating, simulated

OUTCOMES = ("correct", "wrong", "abstain", "error", "timeout", "unparseable")


@pytest.mark.parametrize("staleness", [0, 1])
def test_reward_metrics_of_training_survive_an_evaluation(tmp_path: Path, staleness: int) -> None:
    """Asynchronously, groups of the next steps are scored while held-out completions are: theirs count."""
    with simulated(
        tmp_path, rollout={"engine": "hf", "staleness": staleness}, eval={"every": 1, "problems": 24}
    ) as run:
        run.go()
    rows = run.rows()
    assert all(row["eval/accuracy"] == 0.5 for row in rows)
    judged = sum(row.get(f"reward/math/{outcome}", 0) for row in rows for outcome in OUTCOMES)
    assert judged == 4 * 4 * 4, "every training completion once, no held-out one"


class Now:
    """A judge that gives every n-th group different rewards, and the others equal ones."""

    def __init__(self, every: int, equal: float | None = 1.0) -> None:
        self.every, self.equal, self.groups = every, equal, 0

    def __call__(self, prompt: str, n: int) -> list[float | None]:
        self.groups += 1
        return alternating(prompt, n) if self.groups % self.every == 0 else [self.equal] * n


@pytest.mark.parametrize("staleness", [0, 3])
def test_a_kept_group_starts_the_count_of_those_without_signal_anew(tmp_path: Path, staleness: int) -> None:
    """Two of three groups are filtered: never more than 2 in a row, though 8 a step."""
    with simulated(
        tmp_path,
        Now(3),
        algorithm="dapo",
        train={"max_filtered": 1},
        rollout={"engine": "hf", "staleness": staleness},
    ) as run:
        run.go()
    rows = run.rows()
    assert rows[-1]["step"] == 4
    assert sum(row.get("group/filtered", 0) for row in rows) >= 20


@pytest.mark.parametrize(
    ("equal", "why"), [(1.0, "in 9 the rewards differ too little"), (None, "in 9 too few completions could")]
)
def test_too_many_groups_in_a_row_without_signal_end_the_run(
    tmp_path: Path, equal: float | None, why: str
) -> None:
    with (
        simulated(tmp_path, Now(10**6, equal), algorithm="dapo", train={"max_filtered": 2}) as run,
        pytest.raises(NoSignal, match=f"9 groups in a row were dropped while step 1 was sampled .{why}"),
    ):
        run.go()
    assert run.learner.saved, "what was done so far is kept"
