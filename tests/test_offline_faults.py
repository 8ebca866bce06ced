"""Offline runs use the saver and the guards of online runs: a full disk, background saves, a loss spike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rft import checkpoint
from rft.errors import CheckpointError
from rft.metrics.guards import GuardStop
from rft.utils.deadlines import Overdue
from tests.test_offline import Run, plan_of

Writer = Callable[[Path], None]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    lines = (run.path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def with_writer(run: Run, wrap: Callable[[Writer], Writer]) -> Run:
    """The run with a learner whose checkpoint writers are wrapped."""
    capture = run.learner.capture_state
    run.learner.capture_state = lambda: wrap(capture())  # type: ignore[method-assign]
    return run


class Full:
    """A disk that is full for the first `times` checkpoints."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, write: Writer) -> Writer:
        def fails(folder: Path) -> None:
            self.times -= 1
            if self.times >= 0:
                raise OSError(28, "No space left on device")
            write(folder)

        return fails


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_survived_as_often_as_the_config_says(
    tiny_folder: Path, tmp_path: Path, background: bool
) -> None:
    checkpoints = {"every": 1, "keep": 2, "max_failures": 2, "background": background}
    run = with_writer(Run(plan_of(tiny_folder, tmp_path, checkpoint=checkpoints), "run"), Full(2))
    run.carry_out()
    assert run.lines[-1]["step"] == 6
    faults = events(run, "fault/checkpoint")
    assert [fault["action"] for fault in faults] == [
        "training continues (failure 1 of 2 in a row)",
        "training continues (failure 2 of 2 in a row)",
    ]
    assert "No space left on device" in faults[0]["what"]
    found = checkpoint.latest(run.path / "checkpoints")
    assert found is not None and found.step == 6


def test_a_disk_that_stays_full_ends_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    checkpoints = {"every": 1, "keep": 2, "max_failures": 1}
    run = with_writer(Run(plan_of(tiny_folder, tmp_path, checkpoint=checkpoints), "run"), Full(99))
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.carry_out()
    assert [fault["action"] for fault in events(run, "fault/checkpoint")] == [
        "training continues (failure 1 of 1 in a row)",
        "the run ends",
    ]


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_is_written_while_training_goes_on(
    tiny_folder: Path, tmp_path: Path, background: bool
) -> None:
    checkpoints = {"every": 2, "keep": 9, "background": background}
    run = Run(plan_of(tiny_folder, tmp_path, checkpoint=checkpoints), "run")
    went_on: list[bool] = []

    def waiting(write: Writer) -> Writer:
        version = run.learner.version

        def slow(folder: Path) -> None:
            deadline = time.monotonic() + (20 if background else 0.2)
            while version < 6 and run.learner.version == version and time.monotonic() < deadline:
                time.sleep(0.01)
            went_on.append(run.learner.version > version)
            write(folder)

        return slow

    with_writer(run, waiting).carry_out()
    assert went_on == [background, background, False]  # the last one is waited for
    assert [saved["step"] for saved in events(run, "checkpoint/saved")] == [2, 4, 6]


def with_loss(run: Run, at: int, loss: float) -> Run:
    """The run with a learner that reports `loss` for step `at`."""
    right = run.learner.step

    def jumps(batch: Any, step: int) -> dict[str, float]:
        metrics = right(batch, step)
        return {**metrics, "train/loss": loss} if step == at else metrics

    run.learner.step = jumps  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize("action", [None, "stop", "off"])
def test_guards_act_in_offline_runs(tiny_folder: Path, tmp_path: Path, action: str | None) -> None:
    """A spike of the loss warns by default offline."""
    guards = {"window": 2, "warmup": 0, **({} if action is None else {"loss_spike": action})}
    run = with_loss(Run(plan_of(tiny_folder, tmp_path, guards=guards), "run"), 4, 1e3)
    if action == "stop":
        with pytest.raises(GuardStop, match="loss_spike"):
            run.carry_out()
    else:
        run.carry_out()
    found = [(e["action"], e["step"]) for e in events(run, "guard/loss_spike") if e["value"] == 1e3]
    assert found == {None: [("warn", 5)], "stop": [("stop", 5)], "off": []}[action]
    last = run.lines[-1]["step"]
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None and saved.step == last  # a guard's stop keeps the steps up to it
    assert last == (5 if action == "stop" else 6)


def test_a_guard_of_a_resumed_run_knows_its_beginning(tiny_folder: Path, tmp_path: Path) -> None:
    """The history is read back: the first step after a stop is compared with those before it."""
    guards = {"window": 4, "warmup": 4, "loss_spike": "stop"}
    quiet = {"learning_rate": 1e-5, "threads": 1}
    plan = plan_of(tiny_folder, tmp_path, guards=guards, learner=quiet)
    run = Run(plan, "run")
    with pytest.raises(Exception, match="stopped at step 4"):
        run.carry_out(stop_after=4)
    again = with_loss(Run(plan, "run", resume=True), 4, 1e3)
    with pytest.raises(GuardStop, match="train/loss jumped to 1000"):
        again.carry_out()
    assert again.lines[-1]["step"] == 5


def test_a_step_that_ends_after_its_deadline_is_not_saved_as_the_step_before(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The loop gave up on step 4, the learner finished it: its weights are not those of step 3."""
    run = Run(plan_of(tiny_folder, tmp_path), "run")  # a checkpoint every 2 steps
    finishes = run.handle.step

    async def late(batch: Any, step: int) -> dict[str, float]:
        metrics = await finishes(batch, step)
        if step == 3:
            raise Overdue("step on the learner did not finish within 3600 s (learner.step_timeout_s)")
        return metrics

    run.handle.step = late  # type: ignore[method-assign]
    with pytest.raises(Overdue, match="step_timeout_s"):
        run.carry_out()
    assert run.learner.version == 4
    newest = checkpoint.latest(run.path / "checkpoints")
    assert newest is not None and newest.step == 2
    (fault,) = events(run, "fault/learner")
    assert "no checkpoint is saved: the learner holds version 4" in fault["action"]
