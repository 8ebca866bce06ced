"""The online loop on simulated actors: what is counted, what is kept, when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.errors import BrokenWeights, CheckpointError, EngineError, LearnerError, LogpGapError, NoSignal
from tests.simulated import Run, SimLearner, alternating, simulated

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
