"""The record of a step: what is read is what was trained on; kills, resumes and full disks."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rft.batch import Batch, Completion, Group, Prompt
from rft.errors import LearnerError, RecordError
from rft.metrics import record
from rft.metrics.record import Source, StepRecord
from rft.rewards.types import Outcome, Score
from rft.rollout.calls import Call, lay_out
from rft.samples import Origin
from tests.simulated import SimLearner, simulated

VERSIONS = {"rft": "0.1.0"}


def groups() -> list[Group]:
    """A session that branches, and single answers; texts, numbers and scores that are hard to write down."""
    calls = [
        Call((1, 2, 3), (5, 6), (-0.1, -1e-7), "stop", ((4, 0, 1), (5, 1, 2)), reward=0.1, state="room"),
        Call((1, 2, 9), (8,), (float(np.float32(-1 / 3)),), "length", ((5, 0, 1),)),
    ]
    session = replace(
        lay_out((1, 2), calls),
        text="lone \ud83d half",
        reward=0.1 + 0.2,
        scores={"env": Score(None, Outcome.error, "Traceback ...")},
        values={"a": math.nan, "b": (0.5, 2.0)},
        messages=({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},),
        origin=Origin(2**62 - 1, "turn_limit", ({"role": "user", "content": "look"},)),
    )
    single = Completion((7,), "x", logps=(-2.5,), versions=((5, 0, 1),), reward=1.0)
    return [
        Group(Prompt(3, (1, 2), [{"role": "user", "content": "hi"}]), (session, session)),
        Group(Prompt(4, (1,), "hi"), (single, replace(single, finish="length", demonstrated=1))),
    ]


def step_record(step: int, config: dict[str, object] | None = None) -> StepRecord:
    sources = [Source(0, 3, 5, 2**62 - 7), None]
    return StepRecord(step, groups(), sources, {"train/loss": 0.1}, config or {}, {"threads": 1}, VERSIONS)


def rounded(c: Completion) -> Completion:
    """A completion as a record has it: log-probs in the precision of a batch, scores as plain data."""
    scores = {
        n: {"value": s.value, "outcome": str(s.outcome), "detail": s.detail} for n, s in c.scores.items()
    }
    logps = None if c.logps is None else tuple(np.float32(c.logps).tolist())
    return replace(c, logps=logps, scores=scores)


def test_a_record_is_what_was_trained_on(tmp_path: Path) -> None:
    written = step_record(12)
    record.write(tmp_path, written)
    ((step, path),) = record.steps(tmp_path).items()
    read = record.read(path)
    assert step == read.step == 12 and read.sources == written.sources
    assert (read.metrics, read.learner, read.versions) == (written.metrics, written.learner, VERSIONS)
    wanted = [replace(g, completions=tuple(map(rounded, g.completions))) for g in written.groups]
    assert repr(read.groups) == repr(wanted)  # nan is not nan
    one, two = Batch.build(written.groups), Batch.build(read.groups)
    for name in ("tokens", "mask", "sampler_logps", "version", "rewards", "segment", "source", "turn"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert all(torch.equal(one.columns[k].nan_to_num(-9), two.columns[k].nan_to_num(-9)) for k in one.columns)
    assert np.load(path)["tokens"].tolist() == [
        t for g in written.groups for c in g.completions for t in c.tokens
    ]


@pytest.mark.slow
def test_a_kill_while_writing_leaves_whole_records(tmp_path: Path) -> None:
    """A process writes one record after the other, until it is killed: what is there can be read."""
    program = textwrap.dedent(
        f"""
        from pathlib import Path
        from rft.metrics import record
        from tests.test_record import step_record
        for n in range(1, 10**6):
            record.write(Path({str(tmp_path)!r}), step_record(n % 40, dict(text="x" * 10**5)))
            print(n, flush=True)
        """
    )
    for _ in range(2):
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(60):  # so that records are replaced as well
                assert process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
        kept = record.steps(tmp_path)
        assert len(kept) == 40 and all(record.read(path).step == step for step, path in kept.items())
    assert record.set_aside(tmp_path, after=30) == list(range(31, 40))
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".npz")] == [record.SUPERSEDED]
    assert list(record.steps(tmp_path)) == list(range(31))


def test_damaged_and_foreign_records_are_refused(tmp_path: Path) -> None:
    path = record.path_of(tmp_path, 1)
    with pytest.raises(RecordError, match="there is no record"):
        record.read(path)
    record.write(tmp_path, step_record(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(RecordError, match="is damaged"):
        record.read(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(RecordError, match="is damaged"):
        record.read(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(record.META, json.dumps({"format": 99, "versions": {"rft": "9.1"}}))
    with pytest.raises(RecordError, match=r"has format 99, and this version of rft reads 1: .* \(9.1\)"):
        record.read(path)


def test_old_records_are_removed(tmp_path: Path) -> None:
    for step in range(1, 7):
        size = record.write(tmp_path, step_record(step))
    record.prune(tmp_path, 4, 10**9)
    assert list(record.steps(tmp_path)) == [3, 4, 5, 6]
    record.prune(tmp_path, None, 2 * size + 10)
    assert list(record.steps(tmp_path)) == [5, 6]
    record.prune(tmp_path, None, 1)
    assert list(record.steps(tmp_path)) == [6]


def test_a_run_records_the_groups_of_its_last_steps(tmp_path: Path) -> None:
    with simulated(tmp_path, tracking={"record_steps": 2}) as run:
        run.go()
    paths = record.steps(run.folder / record.FOLDER)
    assert list(paths) == [3, 4]
    read = record.read(paths[4])
    (trained,) = (e for e in run.events("group/trained") if e["step"] == 4)
    assert [[s.epoch, s.row] for s in read.sources if s is not None] == trained["prompts"]
    assert {s.version for s in read.sources if s is not None} == {3}
    assert run.controller._build(list(read.groups)).tokens.tolist() == run.learner.batches[-1].tokens.tolist()
    assert read.metrics["train/grad_norm"] == 1.0 and read.config == run.controller.config.to_dict()


def test_a_step_that_fails_is_recorded(tmp_path: Path) -> None:
    """Without numbers: `rft replay` can repeat it."""

    def fail(step: int) -> None:
        if step == 2:
            raise LearnerError("the gradient norm is nan")

    with simulated(tmp_path, learner=SimLearner(fail)) as run, pytest.raises(LearnerError):
        run.go()
    paths = record.steps(run.folder / record.FOLDER)
    assert list(paths) == [1, 2, 3]
    failed = record.read(paths[3])
    assert failed.metrics == {} and len(failed.groups) == 4 and None not in failed.sources


def test_a_run_without_records_writes_none(tmp_path: Path) -> None:
    with simulated(tmp_path, tracking={"record_steps": 0}) as run:
        run.go()
    assert not (run.folder / record.FOLDER).exists()


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path) -> None:
    with simulated(tmp_path) as run:
        (run.folder / record.FOLDER).write_text("in the way")
        run.go()
    assert len(run.events("fault/record")) == 4 and run.rows()[-1]["step"] == 4
