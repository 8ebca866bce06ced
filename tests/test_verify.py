"""The comparison of two runs' recorded calls in `rft verify-resume`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rft.metrics import record
from rft.metrics.record import Source, StepRecord
from rft.samples import Completion, Group
from rft.tools.verify import _calls
from tests.test_record import step_record

CONFIG = {"rollout": {"dtype": "float32"}, "learner": {"dtype": "float32"}, "sync": {"max_logp_gap": None}}
Change = Callable[[Completion], Completion]


def write(run: Path, steps: dict[int, Change | None], *, seed: int = 1) -> Path:
    for step, change in steps.items():
        plain = step_record(step, CONFIG)
        groups = [_changed(group, change) for group in plain.groups]
        read: StepRecord = replace(plain, groups=groups, sources=[Source(0, 3, 5, seed), None])
        record.write(run / record.FOLDER, read)
    return run


def _changed(group: Group, change: Change | None) -> Group:
    first, *rest = group.completions
    return replace(group, completions=(change(first) if change else first, *rest))


def shifted(by: float) -> Change:
    return lambda c: replace(c, logps=tuple(x - by for x in c.logps or ()))


def other_ids(c: Completion) -> Completion:
    return replace(c, tokens=(*c.tokens[:-1], 4))


def test_equal_runs(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, {1: None, 2: None}) for name in "ab")
    for exact in (True, False):
        finding = _calls(one, two, exact=exact)
        assert finding.equal and finding.must
    assert _calls(one, two, exact=True).detail == "12 calls"  # two sessions of two, two answers, two steps


@pytest.mark.parametrize(
    ("steps", "seed", "equal", "detail"),
    [
        ({1: None, 2: shifted(1e-4)}, 1, True, "up to step 2 8 of 8 completions .* by 0.0001"),
        ({1: None, 2: shifted(0.1)}, 1, False, "by 0.1"),
        ({1: other_ids, 2: shifted(0.1)}, 1, True, "up to step 1 2 of 4 completions"),
        ({1: None, 2: None}, 7, False, "different prompts or seeds at step 1"),
        ({1: None}, 1, False, r"recorded steps: \[1, 2\] against \[1\]"),
    ],
)
def test_runs_whose_rounding_may_differ(
    tmp_path: Path, steps: dict[int, Change | None], seed: int, equal: bool, detail: str
) -> None:
    """The first completion of each group is changed in the second run."""
    one, two = write(tmp_path / "a", {1: None, 2: None}), write(tmp_path / "b", steps, seed=seed)
    finding = _calls(one, two, exact=False)
    assert finding.equal is equal
    assert re.search(detail, finding.detail), finding.detail
    assert not _calls(one, two, exact=True).equal
