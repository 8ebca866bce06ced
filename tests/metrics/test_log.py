"""The run log: whole lines, one a step, and nothing lost or doubled by a kill and a resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rft.config.metrics import TrackingConfig
from rft.metrics import RunLog, is_documented_event
from rft.metrics.log import Lines, read_jsonl, set_aside
from rft.report.history import Run as History

TENSORBOARD = TrackingConfig(trackers=("tensorboard",), sample_every=10, samples_kept=2)
PLAIN = TrackingConfig(trackers=(), sample_every=10, samples_kept=2)


def rows(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return read_jsonl(run / f"{name}.jsonl")


def steps(run: Path, name: str = "metrics") -> list[int]:
    return [row["step"] for row in rows(run, name)]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows(run, "events") if row["kind"] == kind]


def write(run: Path, first: int, last: int, resumed_at: int | None = None) -> None:
    with RunLog(run, 100, PLAIN, resumed_at=resumed_at) as log:
        for step in range(first, last + 1):
            log.log(step, {"reward/mean": step / 100})


def test_each_step_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 10, PLAIN)
    log.log(1, {"reward/mean": 0.5, "train/tokens": 7})
    before_close = json.loads((tmp_path / "metrics.jsonl").read_text())
    log.close()
    assert before_close.pop("time/wall") == pytest.approx(time.time(), abs=60)
    assert before_close == {"step": 1, "reward/mean": 0.5, "train/tokens": 7}


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path, 10, PLAIN) as log:
        odd: Any = {"train/loss": torch.tensor(0.25), "reward/mean": np.float32(0.5), "train/tokens": True}
        log.log(1, odd)
    (row,) = rows(tmp_path)
    assert (row["train/loss"], row["reward/mean"], row["train/tokens"]) == (0.25, 0.5, 1)


def test_what_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    with RunLog(tmp_path, 10, PLAIN) as log, pytest.raises(TypeError, match="'train/loss' must be a number"):
        log.log(1, {"train/loss": "0.5"})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_become_null_and_an_event(tmp_path: Path, value: float) -> None:
    with RunLog(tmp_path, 10, PLAIN) as log:
        log.log(3, {"train/loss": value, "reward/mean": 1.0})
    assert rows(tmp_path)[0]["train/loss"] is None
    (event,) = events(tmp_path, "metric/non_finite")
    assert (event["step"], event["values"]) == (3, {"train/loss": str(value)})


def test_a_step_cannot_be_logged_twice_or_backwards(tmp_path: Path) -> None:
    with RunLog(tmp_path, 10, PLAIN) as log:
        log.log(2, {})
        for step in (2, 1):
            with pytest.raises(ValueError, match="after step 2"):
                log.log(step, {})
    assert steps(tmp_path) == [2]


def test_a_new_run_does_not_write_into_an_old_one(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    with pytest.raises(FileExistsError, match="lines of an earlier run"):
        RunLog(tmp_path, 10, PLAIN)
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_a_resume_sets_later_lines_aside(tmp_path: Path) -> None:
    write(tmp_path, 0, 7)
    write(tmp_path, 5, 9, resumed_at=4)
    assert steps(tmp_path) == list(range(10))
    assert steps(tmp_path, "metrics.superseded") == [5, 6, 7]
    (event,) = events(tmp_path, "run/superseded")
    assert {k: event[k] for k in ("file", "lines", "first_step", "last_step")} == {
        "file": "metrics.jsonl", "lines": 3, "first_step": 5, "last_step": 7
    }  # fmt: skip


def test_a_torn_line_is_kept_aside_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    write(tmp_path, 0, 2)
    for name in ("metrics", "events"):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 3, "reward/me')
    write(tmp_path, 3, 4, resumed_at=2)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    assert rows(tmp_path, "metrics.superseded") == [{"torn": '{"step": 3, "reward/me'}]
    assert [e["kind"] for e in rows(tmp_path, "events")][-1] == "run/closed"


def test_setting_aside_can_be_interrupted_and_repeated(tmp_path: Path) -> None:
    write(tmp_path, 0, 7)
    path = tmp_path / "metrics.jsonl"
    before = path.read_text()
    set_aside(path, after=4)
    path.write_text(before)  # killed after the copy was safe, before the lines went from here
    set_aside(path, after=4)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    assert steps(tmp_path, "metrics.superseded") == [5, 6, 7]
    assert set_aside(path, after=4) is None


def test_a_run_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    write(tmp_path, 0, 2)
    write(tmp_path, 0, 1, resumed_at=-1)
    assert steps(tmp_path) == [0, 1]
    assert steps(tmp_path, "metrics.superseded") == [0, 1, 2]


def test_the_step_resumed_at_keeps_its_line_and_samples(tmp_path: Path) -> None:
    shown = [{"prompt": "p", "completion": "c", "split": "eval"}]
    with RunLog(tmp_path, 100, PLAIN) as log:
        log.samples(0, shown)
        log.log(0, {"eval/accuracy": 0.5})
    with RunLog(tmp_path, 100, PLAIN, resumed_at=0) as log:
        assert log.resumed_line["eval/accuracy"] == 0.5
        log.samples(0, shown)
        log.log(0, {"eval/accuracy": 0.6})
        log.log(1, {})
    assert steps(tmp_path) == [0, 1]
    assert rows(tmp_path)[0]["eval/accuracy"] == 0.5
    assert len(rows(tmp_path, "samples")) == 1
    assert events(tmp_path, "metric/added")[0]["names"] == []


def test_an_evaluation_is_added_to_the_line_of_the_step_resumed_at(tmp_path: Path) -> None:
    """Readers that follow the file, trackers and observers see one line, with the new metrics once."""

    class Follows:
        def __init__(self) -> None:
            self.calls: list[tuple[str, int, dict[str, Any]]] = []

        def begin(self) -> None: ...

        def event(self, kind: str, fields: Any) -> None: ...

        def logged(self, step: int, metrics: Any) -> None:
            self.calls.append(("logged", step, dict(metrics)))

        def completed(self, step: int, metrics: Any) -> None:
            self.calls.append(("completed", step, dict(metrics)))

    write(tmp_path, 0, 7)
    before = rows(tmp_path)
    reader = History(tmp_path)
    follows = Follows()
    with RunLog(tmp_path, 100, TENSORBOARD, resumed_at=5, observers=[follows]) as log:
        log.log(5, {"eval/accuracy": 0.75, "eval/loss": math.nan, "reward/mean": 99.0})
        reader.refresh()
        assert reader.metrics[-1] == {**before[5], "eval/accuracy": 0.75, "eval/loss": None}
        log.log(6, {"reward/mean": 0.06})
        reader.refresh()
    assert rows(tmp_path)[:5] == before[:5] and steps(tmp_path) == list(range(7))
    assert rows(tmp_path) == reader.metrics and reader.last("eval/accuracy") == 0.75
    assert [call[:2] for call in follows.calls] == [("completed", 5), ("logged", 6)]
    assert follows.calls[0][2] == rows(tmp_path)[5]
    (added,) = events(tmp_path, "metric/added")
    assert (added["step"], added["names"]) == (5, ["eval/accuracy", "eval/loss"])
    assert events(tmp_path, "metric/non_finite")[0]["values"] == {"eval/loss": "nan"}
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in tags.Scalars("eval/accuracy")] == [(5, 0.75)]
    assert [e.step for e in tags.Scalars("reward/mean")] == [6]


KILLED = """
    import sys
    from pathlib import Path
    from rft.config.metrics import TrackingConfig
    from rft.metrics import RunLog
    log = RunLog(Path(sys.argv[1]), 10**6, TrackingConfig(trackers=()))
    for step in range(10**6):
        log.log(step, {"reward/mean": 0.5, "policy/entropy": 0.1})
"""


def test_a_real_kill_loses_no_line_that_was_written(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "run")])
    path = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 20_000):
        assert time.monotonic() < until, "the writer did not write"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = len(rows(tmp_path / "run"))
    write(tmp_path / "run", 101, 120, resumed_at=100)
    assert steps(tmp_path / "run") == list(range(121))
    moved = [row["step"] for row in rows(tmp_path / "run", "metrics.superseded") if "step" in row]
    assert moved == list(range(101, written))


def test_samples_are_kept_at_the_start_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    with RunLog(tmp_path, 25, PLAIN) as log:
        for step in range(26):
            log.samples(step, [{"prompt": f"p{i}", "completion": "c"} for i in range(6)])
    assert steps(tmp_path, "samples") == [0, 0, 10, 10, 20, 20, 25, 25]
    assert [row["prompt"] for row in rows(tmp_path, "samples")[:2]] == ["p0", "p3"]


def test_samples_of_both_splits_have_room(tmp_path: Path) -> None:
    with RunLog(tmp_path, 25, PLAIN) as log:
        log.samples(0, [{"prompt": i, "split": s} for s in ("train", "eval") for i in range(5)])
    assert [row["split"] for row in rows(tmp_path, "samples")] == ["train"] * 2 + ["eval"] * 2


def test_half_a_character_can_be_written(tmp_path: Path) -> None:
    with RunLog(tmp_path, 25, PLAIN) as log:
        log.samples(0, [{"prompt": "p", "completion": "half \ud83d of it"}])
    assert rows(tmp_path, "samples")[0]["completion"] == "half \ud83d of it"


def test_an_event_says_when_and_survives_odd_fields(tmp_path: Path) -> None:
    with RunLog(tmp_path, 25, PLAIN) as log:
        log.event("fault/learner", what=ValueError("bad"), where=Path("a/b"), value=math.nan)
    (event,) = events(tmp_path, "fault/learner")
    assert event["what"] == "ValueError('bad')" and event["value"] == "nan"
    assert event["time"] == pytest.approx(time.time(), abs=60) and event["clock"] > 0


def test_every_event_of_the_log_itself_is_documented(run_dir: Path) -> None:
    kinds = {event["kind"] for event in rows(run_dir, "events")}
    assert {"run/opened", "run/closed", "run/superseded"} <= kinds
    assert [kind for kind in kinds if not is_documented_event(kind)] == []


def test_the_end_tells_its_reason_once(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), RunLog(tmp_path, 25, PLAIN) as log:
        log.log(4, {})
        raise RuntimeError("boom")
    log.close()
    (event,) = events(tmp_path, "run/closed")
    assert (event["reason"], event["last_step"]) == ("RuntimeError: boom", 4)


def test_lines_wait_while_the_disk_is_full(tiny_disk: Path) -> None:
    """No half line is left on a full disk, and no line is missing once there is room."""
    filler, lines = tiny_disk / "filler", Lines(tiny_disk / "events.jsonl")
    filler.write_bytes(b"x" * (900 * 1024))
    for number in range(3000):
        lines.write(b'{"number": %d, "text": "%s"}\n' % (number, b"y" * 80))
    there = read_jsonl(tiny_disk / "events.jsonl")
    assert 0 < len(there) < 3000 and (tiny_disk / "events.jsonl").read_bytes().endswith(b"}\n")
    filler.unlink()
    lines.write(b'{"number": 3000}\n')
    lines.close()
    assert [row["number"] for row in read_jsonl(tiny_disk / "events.jsonl")] == list(range(3001))
