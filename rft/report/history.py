"""Read a run folder: once for a report, or repeatedly while the run continues."""

from __future__ import annotations

import bisect
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rft.metrics.log import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, parse_line
from rft.utils import yaml_files

Row = dict[str, Any]
CONFIG_FILE = "config.yaml"


class NoRun(FileNotFoundError):
    """The folder is not a run folder."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def metrics_row(row: Row) -> Row | None:
    """Parse a line of metrics.jsonl: `step`, `time/wall` and other numbers or nulls; None for other lines."""
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not _number(row.get("time/wall")):
        return None
    return {k: v for k, v in row.items() if v is None or _number(v)}


def event_row(row: Row) -> Row | None:
    """Parse a line of events.jsonl with the fields that readers need; None for other lines."""
    if not isinstance(row.get("kind"), str) or not _number(row.get("time")):
        return None
    opened = row["kind"] == "run/opened"
    if opened and not all(isinstance(row.get(key), int) for key in ("pid", "total_steps")):
        return None
    return row


def sample_row(row: Row) -> Row | None:
    """Parse a line of samples.jsonl with the fields that readers need; None for other lines."""
    reward = row.get("reward")
    if not isinstance(row.get("step"), int) or not isinstance(row.get("split"), str):
        return None
    return row if reward is None or _number(reward) else None


class Tail:
    """The complete lines of a growing file. A line that is still being written is left for the next refresh.

    usable: validates a row, None for one that readers cannot use; `damaged` counts those.
    """

    def __init__(self, path: Path, usable: Callable[[Row], Row | None]) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.damaged = 0
        self._usable = usable
        self._offset, self._inode = 0, -1

    def refresh(self) -> None:
        """Read new lines. A file that was replaced (a resume moves lines away) is read again."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self.rows, self.damaged, self._offset, self._inode = [], 0, 0, stat.st_ino
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        lines = data[:end].decode("utf-8", errors="replace").split("\n")
        for line in filter(None, lines):
            parsed = parse_line(line)
            row = None if parsed is None else self._usable(parsed)
            if row is None:
                self.damaged += 1
            else:
                self.rows.append(row)


class Run:
    """A run folder. `refresh` reads new lines.

    Raises NoRun if the folder has neither metrics nor events.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._metrics = Tail(self.path / METRICS_FILE, metrics_row)
        self._events = Tail(self.path / EVENTS_FILE, event_row)
        self._samples = Tail(self.path / SAMPLES_FILE, sample_row)
        if not (self._metrics.path.exists() or self._events.path.exists()):
            raise NoRun(
                f"{self.path} is not a run folder: it has neither {METRICS_FILE} nor {EVENTS_FILE}. "
                "Name the folder that `rft train` printed, usually runs/NAME."
            )
        self.refresh()

    def refresh(self) -> None:
        for tail in (self._metrics, self._events, self._samples):
            tail.refresh()

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def metrics(self) -> list[Row]:
        """One row per step, in order."""
        return self._metrics.rows

    @property
    def events(self) -> list[Row]:
        return self._events.rows

    @property
    def samples(self) -> list[Row]:
        return self._samples.rows

    def damaged_lines(self) -> str:
        """Return a message with the number of unusable lines per file; empty if there are none."""
        tails = (self._metrics, self._events, self._samples)
        counts = [f"{tail.damaged} of {tail.path.name}" for tail in tails if tail.damaged]
        return f"lines left out as damaged: {', '.join(counts)}" if counts else ""

    def config_text(self) -> str | None:
        """The resolved config as written; None if the folder has none."""
        path = self.path / CONFIG_FILE
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None

    def config(self) -> dict[str, Any]:
        """The resolved config as plain values; {} if it is missing or damaged."""
        try:
            value = yaml_files.parse(self.config_text() or "")
        except yaml_files.YamlError:
            return {}
        return value if isinstance(value, dict) else {}

    # -- numbers -----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every metric in any row, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.metrics for name in row))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return (steps, values) of the rows where `name` has a number."""
        points = [(row["step"], row[name]) for row in self.metrics if row.get(name) is not None]
        return [step for step, _ in points], [float(value) for _, value in points]

    def last(self, name: str) -> float | None:
        """The newest number of a metric."""
        for row in reversed(self.metrics):
            if row.get(name) is not None:
                return float(row[name])
        return None

    def first(self, name: str) -> float | None:
        """The oldest number of a metric."""
        for row in self.metrics:
            if row.get(name) is not None:
                return float(row[name])
        return None

    @property
    def total_steps(self) -> int:
        """Total steps planned by the newest process; without events, the steps taken."""
        opened = [e for e in self.of_kind("run/opened")]
        return int(opened[-1]["total_steps"]) if opened else self.step

    @property
    def step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    # -- events ------------------------------------------------------------------------------------

    def of_kind(self, *kinds: str) -> Iterator[Row]:
        """Yield events of these kinds; `fault/` with the slash matches all with that prefix."""
        for event in self.events:
            kind = event.get("kind", "")
            if any(kind == k or (k.endswith("/") and kind.startswith(k)) for k in kinds):
                yield event

    def step_at(self, event: Row) -> float:
        """Locate an event on the step axis: by its `step`, the step it resumed at, or its time."""
        for key in ("step", "resumed_at"):
            if isinstance(event.get(key), int):
                return float(event[key])
        times = [row["time/wall"] for row in self.metrics]
        index = bisect.bisect(times, event["time"])
        return float(self.metrics[index - 1]["step"]) if index else 0.0

    def resumes(self) -> list[Row]:
        """Return the `run/opened` events of processes that resumed an earlier one."""
        return [e for e in self.of_kind("run/opened") if e.get("resumed_at") is not None]

    def faults(self) -> list[Row]:
        """Return failures: of parts, of engines, of the run itself."""
        return list(self.of_kind("fault/", "engine/lost", "run/failed"))

    def state(self, silent_after: float = 300.0) -> str:
        """Return "running", "ended (reason)", "gone" (the process no longer exists), or "silent for ..."."""
        if not self.events:
            return "no events"
        opened = list(self.of_kind("run/opened"))
        closed = list(self.of_kind("run/closed"))
        if closed and (not opened or closed[-1]["time"] >= opened[-1]["time"]):
            return f"ended: {closed[-1].get('reason', 'done')}"
        if opened and opened[-1].get("host") == socket.gethostname():
            pid = opened[-1]["pid"]
            if not Path(f"/proc/{pid}").exists():
                return f"gone: process {pid} ended without closing the run"
        newest = max(r["time/wall"] if "time/wall" in r else r["time"] for r in self._newest())
        quiet = time.time() - newest
        return "running" if quiet < silent_after else f"silent for {quiet / 60:.0f} min"

    def _newest(self) -> list[Row]:
        return [rows[-1] for rows in (self.metrics, self.events) if rows]
