"""Reading a run folder, while it grows too."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from rft.config.metrics import TrackingConfig
from rft.metrics import RunLog
from rft.report.history import NoRun, Run, Tail

PLAIN = TrackingConfig(trackers=())


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoRun, match=r"is not a run folder.*runs/NAME"):
        Run(tmp_path)


def test_a_whole_run(run_dir: Path) -> None:
    run = Run(run_dir)
    assert [row["step"] for row in run.metrics] == list(range(121))
    assert run.series("eval/accuracy")[0] == list(range(0, 121, 10))
    assert run.total_steps == run.step == 120
    assert (run.first("eval/accuracy"), run.last("train/loss")) == (0.35, run.metrics[-1]["train/loss"])
    assert run.last("no/such") is None
    assert run.config()["algorithm"]["name"] == "grpo"
    assert [run.step_at(event) for event in run.resumes()] == [62.0]
    assert [event["kind"] for event in run.faults()] == ["fault/engine"]
    assert run.state() == "ended: done"


def test_an_event_without_a_step_is_placed_by_its_time(run_dir: Path) -> None:
    run = Run(run_dir)
    (health,) = run.of_kind("engine/health")
    assert run.step_at(health) == 40.0


def test_a_tail_reads_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    tail = Tail(path, lambda row: row)
    tail.refresh()
    assert tail.rows == []
    path.write_text('{"step": 1}\n{"step"')
    tail.refresh()
    assert tail.rows == [{"step": 1}]
    with path.open("a") as file:
        file.write(': 2}\nnot json\n{"step": 3}\n')
    tail.refresh()
    assert tail.rows == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_run_that_resumes_is_read_anew(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, PLAIN) as log:
        for step in range(6):
            log.log(step, {})
        run = Run(tmp_path)
    with RunLog(tmp_path, 9, PLAIN, resumed_at=3) as log:
        log.log(4, {})
        run.refresh()
    assert [row["step"] for row in run.metrics] == [0, 1, 2, 3, 4]


def test_the_state_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, 9, PLAIN)
    log.log(1, {})
    run = Run(tmp_path)
    assert run.state() == "running"
    monkeypatch.setattr("rft.report.history.time.time", lambda now=time.time(): now + 1200)  # noqa: B008
    assert run.state() == "silent for 20 min"
    monkeypatch.undo()
    log.close("stopped")
    run.refresh()
    assert run.state() == "ended: stopped"


def test_a_dead_process_is_noticed_on_its_own_machine(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        RunLog(tmp_path, 9, PLAIN).log(1, {})
        os._exit(9)
    os.waitpid(pid, 0)
    assert Run(tmp_path).state() == f"gone: process {pid} ended without closing the run"
    events = tmp_path / "events.jsonl"
    events.write_text(events.read_text().replace(socket.gethostname(), "another-machine"))
    assert Run(tmp_path).state() == "running"  # over a shared folder only its silence can tell
