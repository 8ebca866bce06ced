"""The live view reads files alone: one frame, and a run that ends while it is watched."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from rft.config.metrics import TrackingConfig
from rft.metrics import RunLog
from rft.report.history import NoRun, Run
from rft.report.watch import engines, histogram, seconds_left, watch

PLAIN = TrackingConfig(trackers=())


def one_frame(run: Path, width: int = 110) -> str:
    out = io.StringIO()
    watch(run, once=True, console=Console(file=out, width=width))
    return out.getvalue()


def test_a_frame_of_a_finished_run(run_dir: Path) -> None:
    text = one_frame(run_dir)
    for part in ("arithmetic-seed1  ended: done", "step 120/120", "accuracy", "92.0%", "from 35.0%",
                 "━ rollout", "age of the completions", "60%", "engines", "fault/engine",
                 "What is 6 + 3 * 4?"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_frame_fits_the_terminal(run_dir: Path, width: int) -> None:
    assert max(map(len, one_frame(run_dir, width).splitlines())) <= width


def test_a_run_without_a_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, PLAIN):
        assert "running  step 0/9" in one_frame(tmp_path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(NoRun):
        watch(tmp_path, once=True)


def test_engines_by_their_last_word(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, PLAIN) as log:
        log.event("engine/started", engine=0, version=0)
        log.event("engine/started", engine=1, version=0)
        log.event("engine/lost", engine=0, reason="killed")
        log.event("engine/rebuilt", engine=0, version=7)
        log.event("engine/lost", engine=1, reason="silent")
    known = engines(Run(tmp_path))
    assert [(n, e["kind"], e["version"]) for n, e in known.items()] == [
        ("0", "engine/rebuilt", 7), ("1", "engine/lost", 0)
    ]  # fmt: skip
    text = one_frame(tmp_path)
    assert "alive" in text and "lost" in text


def test_ages_in_order() -> None:
    row = {"rollout/age/10": 0.25, "rollout/age/2": 0.75, "rollout/age/3": 0.0, "rollout/age_mean": 4.0}
    assert list(histogram(row).items()) == [(2, 0.75), (10, 0.25)]


def test_time_left_counts_the_present_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("rft.metrics.log.time.time", lambda: now)
    with RunLog(tmp_path, 100, PLAIN) as log:
        log.log(1, {})
    now += 50_000
    with RunLog(tmp_path, 100, PLAIN, resumed_at=1) as log:
        assert seconds_left(Run(tmp_path)) is None
        for step in (2, 3):
            now += 5
            log.log(step, {})
    assert seconds_left(Run(tmp_path)) == pytest.approx(97 * 5)


RUNNING = """
    import sys, time
    from pathlib import Path
    from rft.config.metrics import TrackingConfig
    from rft.metrics import RunLog
    with RunLog(Path(sys.argv[1]), 30, TrackingConfig(trackers=())) as log:
        print("open", flush=True)
        for step in range(1, 31):
            if step == 30:
                sys.stdin.readline()  # not before it was seen running
            log.log(step, {"reward/mean": step / 30, "time/train": 0.02})
            time.sleep(0.02)
"""


class Seen(io.StringIO):
    """Lets the process go on once the screen says that it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__()
        self.process = process

    def write(self, text: str) -> int:
        if "running" in text and self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        return super().write(text)


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_watching_another_process_until_it_ends(
    tmp_path: Path, terminal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dumb terminal cannot be drawn over; it gets one frame after the other."""
    monkeypatch.setenv("TERM", terminal)
    command = [sys.executable, "-c", textwrap.dedent(RUNNING), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        out = Seen(process)
        watch(tmp_path, every=0.05, console=Console(file=out, width=100, force_terminal=True))
        assert process.wait(timeout=30) == 0
    assert "running" in out.getvalue() and "ended: done" in out.getvalue() and "step 30/30" in out.getvalue()


def test_it_stops_when_the_process_is_gone(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        RunLog(tmp_path, 9, PLAIN).log(1, {})
        os._exit(9)
    os.waitpid(pid, 0)
    out = io.StringIO()
    watch(tmp_path, every=0.05, console=Console(file=out, width=100))
    assert f"gone: process {pid}" in out.getvalue()
