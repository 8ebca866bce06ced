"""`rft replay`: steps of a run with a two-turn environment are computed again, to the bit, from records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rft.batch import Group
from rft.cli import main
from rft.errors import ConfigError
from rft.metrics import record
from rft.plan import Plan
from rft.tools.recompute import Replay, replay
from tests.in_process import InProcessLearner
from tests.integration.test_sessions import CONFIG, PLAY

STEPS = 5


@pytest.fixture(scope="module")
def trained(ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the hf engine, in lockstep, with checkpoints of steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("agentic")
    (folder / "env.py").write_text(PLAY)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    more = ("checkpoint.keep=9", "eval.every=0", "rewards=[]", "rollout.turns=lockstep")
    assert main(["train", f"{folder}/run.yaml", f"output_dir={folder}", f"train.steps={STEPS}", *more]) == 0
    (folder / "env.py").unlink()  # a replay needs no environment
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def here(plan: Plan) -> InProcessLearner:
    return InProcessLearner(plan.learner_spec(), plan.channel_spec())


def of(run: Path, step: int) -> Replay:
    return replay(run, step, lambda text: None, here)


def changed(run: Path, step: int, change: Callable[[record.StepRecord], record.StepRecord]) -> None:
    """Write a step's record again, changed."""
    read = record.read(record.path_of(run / record.FOLDER, step))
    record.write(run / record.FOLDER, change(replace(read, groups=[_plain(g) for g in read.groups])))


def _plain(group: Group) -> Group:
    return replace(group, completions=tuple(replace(c, scores={}) for c in group.completions))


def test_the_step_after_a_checkpoint_from_the_command_line(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(trained), "--step", "3"]) == 0
    shown = capsys.readouterr().out
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][3]
    first, _, loss, norm, others, promised, verdict = shown.splitlines()
    assert first == f"step 3 of {trained}, from step-00000002"
    assert loss.split()[1:] == [repr(logged["train/loss"])] * 2 + ["equal"] and logged["train/loss"] != 0
    assert norm.split()[1:] == [repr(logged["train/grad_norm"])] * 2 + ["equal"]
    assert others.endswith("other values: equal")
    assert promised == "promised: equal, to the bit" and verdict == "verdict: kept"


@pytest.mark.parametrize(("step", "start", "count"), [(4, 2, 2), (2, None, 2)])
def test_two_steps_after_a_checkpoint_or_the_start(
    trained: Path, step: int, start: int | None, count: int
) -> None:
    result = of(trained, step)
    assert (result.start and result.start.step) == start and len(result.steps) == count
    assert result.kept and not result.causes and all(one.kept for one in result.steps)
    assert result.steps[-1].now["train/grad_norm"] > 0 and len(result.steps[-1].names) > 10


def test_the_record_is_what_the_environment_answered(trained: Path) -> None:
    """Every completion has its transcript, both turns, seeds and how it ended."""
    read = record.read(record.path_of(trained / record.FOLDER, 3))
    completions = [c for group in read.groups for c in group.completions]
    assert len(completions) == 8 and len({c.origin.seed for c in completions if c.origin}) == 8
    for c in completions:
        assert c.origin is not None and c.origin.ending == "finished"
        assert [m["role"] for m in c.origin.opening] == ["user"]
        assert [m["role"] for m in c.messages] == ["assistant", "user", "assistant"]
        assert len(c.turns) == 2 and {v for v, _, _ in c.versions} == {2}
    assert all(source is not None and source.version == 2 for source in read.sources)


def test_another_reward_breaks_the_verdict(run: Path) -> None:
    def other(read: record.StepRecord) -> record.StepRecord:
        first, *rest = read.groups
        best, *others = first.completions
        better = replace(best, reward=(best.reward or 0.0) + 0.5)
        return replace(read, groups=[replace(first, completions=(better, *others)), *rest])

    changed(run, 3, other)
    result = of(run, 3)
    assert not result.kept
    text = "\n".join(result.lines())
    assert "DIFFERS" in text and text.endswith("verdict: BROKEN")
    assert "the first step that differs: 3" in "\n".join(of(run, 4).lines())


def test_other_libraries_or_threads_promise_rounding_only(run: Path) -> None:
    changed(
        run,
        3,
        lambda r: replace(r, versions={**r.versions, "torch": "2.0"}, learner={**r.learner, "threads": 7}),
    )
    result = of(run, 3)
    assert result.kept and "within rounding" in "\n".join(result.lines())
    assert any("torch: version 2.0 ->" in cause for cause in result.causes)
    assert "threads: 7 -> 1" in result.causes


def test_a_damaged_checkpoint_is_passed_over(run: Path) -> None:
    """Weights that were deleted: the steps before it are computed too, if they are recorded."""
    shutil.rmtree(run / "checkpoints" / "step-00000002" / "model")
    assert of(run, 3).start is None
    record.path_of(run / record.FOLDER, 1).unlink()
    with pytest.raises(
        ConfigError, match=r"no usable checkpoint before it; .*model.* is missing .*record of step 1:"
    ):
        of(run, 3)


def test_nothing_to_compute_from_is_said(run: Path) -> None:
    folder = run / record.FOLDER
    with pytest.raises(ConfigError, match=r"there is no record of it; .* has those of steps 1 to 5"):
        of(run, 6)
    third = record.path_of(folder, 3).rename(folder / "aside")
    with pytest.raises(
        ConfigError, match="checkpoint before it is of step 2, and there is no record of step 3"
    ):
        of(run, 4)
    changed(run, 4, lambda r: replace(r, config={**r.config, "train": {**r.config["train"], "steps": 9}}))
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    third.rename(record.path_of(folder, 3))
    with pytest.raises(ConfigError, match=r"train\.steps was 9 at step 4 and 5 at step 5"):
        of(run, 5)
    record.path_of(folder, 5).write_bytes(b"half")
    with pytest.raises(ConfigError, match="is damaged"):
        of(run, 5)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="has no records: no step was finished"):
        of(run, 5)
    with pytest.raises(ConfigError, match="is not a run folder"):
        of(run / "checkpoints", 5)
