"""The online loop on simulated actors: what is counted, what is kept, when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rft.errors import (
    BrokenWeights,
    CheckpointError,
    EngineError,
    LearnerError,
    LogpGapError,
    NoSignal,
    RunStopped,
)
from rft.rewards.types import RewardError
from rft.utils.deadlines import Overdue
from tests.simulated import Run, SimLearner, alternating, saved_checkpoint, simulated

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
    ("equal", "why"), [(1.0, "in 9 the rewards are too similar"), (None, "in 9 too few completions could")]
)
def test_too_many_groups_in_a_row_without_signal_end_the_run(
    tmp_path: Path, equal: float | None, why: str
) -> None:
    with (
        simulated(tmp_path, Now(10**6, equal), algorithm="dapo", train={"max_filtered": 2}) as run,
        pytest.raises(NoSignal, match=f"9 groups in a row were dropped while step 1 was sampled .{why}"),
    ):
        run.go()


class Faulty(SimLearner):
    """A learner whose step `fails_at` raises."""

    def __init__(self, error: Exception, fails_at: int = 2) -> None:
        def on_step(step: int) -> None:
            if step == fails_at:
                raise error

        super().__init__(on_step)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("error", [LearnerError("the gradient norm is nan"), LogpGapError("they disagree")])
def test_a_step_that_fails_in_a_whole_learner_is_saved_up_to_it(
    tmp_path: Path, error: Exception, staleness: int
) -> None:
    """The checkpoint is of the last finished step; the works of the failed one are outstanding."""
    rollout = {"engine": "hf", "staleness": staleness}
    with (
        simulated(tmp_path, learner=Faulty(error), rollout=rollout) as run,
        pytest.raises(type(error), match=str(error)),
    ):
        run.go()
    assert_saved(run, 2)
    (told,) = run.events("fault/learner")
    assert str(error) in told["what"] and "a checkpoint of step 2 is saved" in told["action"]


def assert_saved(run: Run, step: int) -> None:
    """Every prompt that was handed out is trained on, dropped, or named by the checkpoint, once."""
    ((at, meta),) = run.learner.saved
    assert at == meta["step"] == run.learner.version == step
    trained = {tuple(k) for e in run.events("group/trained") for k in e["prompts"]}
    waiting = [tuple(k) for k in meta["outstanding"]]
    assert len(waiting) == len(set(waiting)) and not trained & set(waiting)
    handed = meta["sampler"]["epoch"] * meta["sampler"]["size"] + meta["sampler"]["position"]
    assert len(trained) + len(waiting) + len(meta["dropped"]) == handed == 4 * (step + 1) + 4 * run.staleness
    assert len(trained) == 4 * step


class SlowToAnnounce(SimLearner):
    """A learner whose third push is overdue before it is announced: its third step is finished."""

    async def announce(self, version: int) -> dict[str, Any]:
        if version == 3:
            raise Overdue("announce on the learner did not finish within 120 s (sync.timeout_s)")
        return await super().announce(version)


def test_what_was_finished_before_an_overdue_call_is_saved(tmp_path: Path) -> None:
    with (
        simulated(tmp_path, learner=SlowToAnnounce()) as run,
        pytest.raises(Overdue, match=r"sync\.timeout_s"),
    ):
        run.go()
    ((at, meta),) = run.learner.saved
    assert at == meta["step"] == run.learner.version == 3
    (fault,) = run.events("fault/learner")
    assert "did not finish within 120 s" in fault["what"]
    assert fault["action"] == "a checkpoint of step 3 is saved; the run ends"


def test_a_learner_that_stays_busy_after_an_overdue_call_delays_the_end_by_the_grace_only(
    tmp_path: Path,
) -> None:
    class Busy(Faulty):
        async def begin_save(self, *_: Any) -> None:
            await asyncio.sleep(600)

    overdue = Overdue("step on the learner at step 2 did not finish within 3600 s (learner.step_timeout_s)")
    with (
        simulated(tmp_path, learner=Busy(overdue), train={"stop_grace_s": 0.2}) as run,
        pytest.raises(Overdue, match="step on the learner at step 2"),
    ):
        run.go()
    (fault,) = run.events("fault/learner")
    why = "saving a checkpoint did not finish within 0.2 s (train.stop_grace_s)"
    assert fault["action"] == f"no checkpoint is saved: {why}; the run ends"


def test_broken_weights_are_not_saved(tmp_path: Path) -> None:
    with (
        simulated(tmp_path, learner=Faulty(BrokenWeights("weights are not finite"))) as run,
        pytest.raises(BrokenWeights),
    ):
        run.go()
    assert run.learner.saved == []
    assert "no checkpoint is saved" in run.events("fault/learner")[0]["action"]


def test_a_full_disk_does_not_hide_why_the_run_ends(tmp_path: Path) -> None:
    class Full(Faulty):
        async def finish_save(self, *_: object) -> str:
            raise CheckpointError("no space left")

    with (
        simulated(tmp_path, learner=Full(LearnerError("the gradient norm is nan"))) as run,
        pytest.raises(LearnerError, match="norm is nan"),
    ):
        run.go()
    assert "no checkpoint is saved: no space left" in run.events("fault/learner")[0]["action"]


def test_works_taken_before_the_engines_made_room_stay_outstanding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated(tmp_path) as run:
        fleet = run.controller.fleet

        async def before_step() -> None:
            if run.controller.step == 2:
                raise EngineError("vLLM does not sleep")

        monkeypatch.setattr(fleet, "before_step", before_step)
        with pytest.raises(EngineError, match="does not sleep"):
            run.go()
    assert_saved(run, 2)


def test_groups_of_a_failed_step_are_not_remembered(tmp_path: Path) -> None:
    """Expert iteration: what a resumed run trains on beside its new groups was trained on once."""
    with (
        simulated(
            tmp_path,
            learner=Faulty(LearnerError("nan")),
            algorithm={"name": "expert_iteration", "replay": 3},
        ) as run,
        pytest.raises(LearnerError),
    ):
        run.go()
    ((_, meta),) = run.learner.saved
    trained = [[row for _, row in e["prompts"]] for e in run.events("group/trained")]
    assert [[prompt for prompt, _ in step] for step in meta["replay"]] == trained


# -- a step's line is complete, however the process that took the step ended ---------------------------------

EVALUATED: dict[str, Any] = {"eval": {"every": 2, "problems": 8}, "train": {"steps": 4}}


def during_evaluation(run: Run, step: int, ends: Callable[[], None]) -> None:
    """Call `ends` instead of the evaluation of a step; if it returns, the evaluation takes for ever."""
    evaluation = run.controller.evaluation
    assert evaluation is not None
    whole = evaluation.run

    async def cut(at: int) -> dict[str, float]:
        if at == step:
            ends()
            await asyncio.sleep(60)
        return await whole(at)

    object.__setattr__(evaluation, "run", cut)


def assert_complete(run: Run, result: dict[str, float]) -> None:
    """The log has one line for each step, the evaluations that were due, and the result."""
    rows = run.rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4]
    assert result == {n: v for n, v in rows[-1].items() if n.startswith("eval/") or n == "time/eval"}
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    steps = [event["step"] for event in run.events("group/trained")]
    assert steps == [1, 2, 3, 4], "the prompts of every step"


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("fault", [None, RewardError("the judge is down")])
def test_an_evaluation_that_was_cut_short_is_made_up_for(
    tmp_path: Path, step: int, fault: Exception | None, staleness: int
) -> None:
    """By a stop, or by an error after which the step is saved; in the middle of the run, or at its end."""
    settings = {**EVALUATED, "rollout": {"engine": "hf", "staleness": staleness}}
    with simulated(tmp_path, **settings) as run:

        def ends() -> None:
            if fault is not None:
                raise fault
            run.controller.stop.set()

        during_evaluation(run, step, ends)
        with pytest.raises(RunStopped if fault is None else RewardError):
            run.go()
    assert run.rows()[-1]["step"] == step and "eval/accuracy" not in run.rows()[-1]
    assert "train/loss" in run.rows()[-1] and "time/step" in run.rows()[-1]
    saved = saved_checkpoint(run)
    assert saved.step == step
    assert saved.meta["counts"]["trained"] == 4 * step
    with simulated(tmp_path, resumed_at=step, **settings) as resumed:
        result = resumed.go(saved)
    assert_complete(resumed, result)
    assert resumed.events("metric/added")[0]["step"] == step


def test_an_evaluation_in_the_log_is_not_repeated(tmp_path: Path) -> None:
    """A run that was stopped in its export: the result is the evaluation in the log."""
    with simulated(tmp_path, **EVALUATED) as run:
        whole = run.go()
    with simulated(tmp_path, resumed_at=4, **EVALUATED) as again:
        during_evaluation(again, 4, lambda: pytest.fail("evaluated again"))
        result = again.go(saved_checkpoint(run))
    assert result == whole
    assert_complete(again, result)


def test_a_resumed_run_that_ends_earlier_has_its_evaluation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval": {"every": 2, "problems": 8}}
    with simulated(tmp_path, train={"steps": 4}, **settings) as run:
        run.learner.on_step = lambda step: run.controller.stop.set() if step == 2 else None
        with pytest.raises(RunStopped):
            run.go()
    saved = saved_checkpoint(run)
    assert saved.step == 3 and "eval/accuracy" not in run.rows()[-1]
    with simulated(tmp_path, resumed_at=3, train={"steps": 3}, **settings) as shorter:
        result = shorter.go(saved)
    assert shorter.rows()[-1]["eval/accuracy"] == result["eval/accuracy"] == 0.5


def test_a_step_whose_push_fails_is_logged_before_it_is_saved(tmp_path: Path) -> None:
    with simulated(tmp_path, **EVALUATED) as run:
        push = run.controller.fleet.push

        async def fails(version: int) -> Any:
            if version == 3:
                raise EngineError("no replica is left")
            return await push(version)

        run.controller.fleet.push = fails  # type: ignore[method-assign]
        with pytest.raises(EngineError):
            run.go()
    assert run.rows()[-1]["step"] == 3 and "train/loss" in run.rows()[-1]
    assert saved_checkpoint(run).meta["counts"]["trained"] == 12
    with simulated(tmp_path, resumed_at=3, **EVALUATED) as resumed:
        result = resumed.go(saved_checkpoint(run))
    assert_complete(resumed, result)


def test_what_the_curriculum_learns_of_dropped_groups_survives_a_stop(tmp_path: Path) -> None:
    """Groups that were filtered in the step that a stop cut short: they are not sampled again."""
    groups = 0

    def judge(prompt: str, n: int) -> list[float | None]:
        nonlocal groups
        groups += 1
        if groups == 10:
            run.controller.stop.set()
        return alternating(prompt, n) if groups <= 4 else [1.0] * n

    with simulated(tmp_path, judge, algorithm="dapo", train={"curriculum": {}, "max_filtered": 100}) as run:
        with pytest.raises(RunStopped):
            run.go()
        rates = run.controller.sampler.rates  # type: ignore[attr-defined]
    ((step, meta),) = run.learner.saved
    dropped = {row for _, row, _ in meta["dropped"]}
    assert step == 1 and len(dropped) >= 5
    assert dropped <= set(meta["sampler"]["measured"]) and {rates[row] for row in dropped} == {1.0}
    waiting = {row for _, row in meta["outstanding"]}
    assert not waiting & set(meta["sampler"]["measured"])
