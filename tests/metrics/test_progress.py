"""The display: plain lines where there is no terminal, a live one where there is, stdout left alone."""

from __future__ import annotations

import io

import pytest

from rft.metrics import Progress
from rft.metrics.progress import ProgressState, duration, phase_bar, sparkline


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = {
    "reward/mean": 0.5,
    "eval/accuracy": 0.25,
    "time/step": 1.5,
    "time/rollout": 0.9,
    "time/train": 0.6,
}


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Progress(3, "demo", stream=out, line_every=0) as progress:
        progress.stage("starting the engine")
        progress.update(1, {"reward/mean": 0.5, "time/step": 1.5})
        progress.note("a [note] stays")
        progress.update(3, METRICS)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["demo: 3 steps", "starting the engine ..."]
    assert lines[2] == "step 1/3 · reward 0.500 · 1.5 s a step"
    assert lines[3] == "a [note] stays"
    assert lines[4] == "step 3/3 · reward 0.500 · accuracy 0.250 · 1.5 s a step"
    assert "\x1b" not in out.getvalue()


def test_plain_lines_are_not_a_flood_but_evaluations_are_told() -> None:
    out = io.StringIO()
    with Progress(100, "demo", stream=out, line_every=3600) as progress:
        for step in range(1, 101):
            progress.update(step, {"reward/mean": 0.5} | ({"eval/accuracy": 0.1} if step == 50 else {}))
    told = [line.split(" · ")[0] for line in out.getvalue().splitlines()[1:]]
    assert told == ["step 1/100", "step 50/100", "step 100/100"]


def test_live_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    with Progress(10, "demo", stream=out) as progress:
        progress.stage("starting the engine")
        progress.update(4, METRICS)
        progress.phase("rollout", 3, 8)
    frame = out.getvalue()
    for text in ("demo", "reward", "0.500", "accuracy", "0.250", "step time", "time left", "4/10 steps",
                 "3/8", "rollout 60 %", "train 40 %"):  # fmt: skip
        assert text in frame


def test_off_says_nothing() -> None:
    out = Terminal()
    with Progress(10, "demo", stream=out, display="off") as progress:
        progress.stage("starting")
        progress.update(1, METRICS)
        progress.note("note")
    assert out.getvalue() == ""


def test_stdout_stays_clean(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, "demo", display="plain") as progress:
        progress.stage("starting")
        progress.update(2, METRICS)
        progress.note("note")
    captured = capsys.readouterr()
    assert captured.out == "" and "step 2/2" in captured.err and "note" in captured.err


def test_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("rft.metrics.progress.time.monotonic", lambda: now)
    state = ProgressState(100, "demo")
    state.update(10, {})
    assert state.seconds_left is None
    now += 4.0
    state.update(12, {"train/loss": None})
    assert state.seconds_left == pytest.approx(88 * 2.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.42 s"), (8.31, "8.3 s"), (187, "3 min 07 s"), (18720, "5 h 12 min"), (183600, "2 d 03 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0] * 50 + [1.0] * 50, width=4) == "▁▁██"
    assert sparkline([]) == ""


def test_phase_bar_shares_the_step() -> None:
    bar, legend = phase_bar({"time/rollout": 3.0, "time/train": 1.0, "time/step": 9.0}, 40).plain.split("\n")
    assert bar == "━" * 40
    assert legend.split("━")[1:] == [" rollout 75 %  ", " train 25 %"]
