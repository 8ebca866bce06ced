"""`RunLog`: the log files of a run, one JSON object per line.

`metrics.jsonl` has one line per step, `samples.jsonl` completions to read, `events.jsonl` events with their
times. A run that resumes at step k first moves the lines after k to `*.superseded.jsonl`: an earlier process
wrote them, and these steps are repeated.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rft.config.metrics import TrackingConfig
from rft.metrics.trackers import Tracker, open_trackers
from rft.utils.files import write_text_atomic

METRICS_FILE, SAMPLES_FILE, EVENTS_FILE = "metrics.jsonl", "samples.jsonl", "events.jsonl"


class Observer(Protocol):
    """Follows a run through its log. An exception that it raises ends the run."""

    def begin(self) -> None:
        """The run begins: its log is open, nothing else is started."""

    def logged(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """A step's line was written; `metrics` is the line."""

    def completed(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Metrics were added to the line that an earlier process wrote; `metrics` is the whole line."""

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """An event was written."""


class RunLog:
    """Write the log files of a run folder. Only one process may write at a time; use as a context manager.

    Args:
        run_dir: the run's folder; created if missing.
        total_steps: planned steps of the run; samples of the first and the last one are kept.
        tracking: trackers to feed, and how many samples to keep.
        resumed_at: None for a new run; k for a run that resumes from a checkpoint of step k; -1 for one
            that was interrupted before its first checkpoint and starts over.
        config: the resolved config as plain values, for trackers that show it.
        observers: receive each written line, after the trackers.

    Raises:
        FileExistsError: `resumed_at` is None and the folder already has metrics.
        rft.metrics.trackers.TrackerMissing: a tracker's package is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        tracking: TrackingConfig,
        *,
        resumed_at: int | None = None,
        config: Mapping[str, Any] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.observers = tuple(observers)
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.tracking = tracking
        self._resumed_at = resumed_at
        self._open_files: list[Lines] = []
        self.run_dir.mkdir(parents=True, exist_ok=True)
        metrics = self.run_dir / METRICS_FILE
        if resumed_at is None and metrics.exists() and metrics.stat().st_size:
            raise FileExistsError(
                f"{metrics} has lines of an earlier run: resume that run, or choose another run folder"
            )
        # Trackers are set up before the first write, so that a missing one leaves nothing behind.
        self._trackers: list[Tracker] = open_trackers(
            tracking, self.run_dir, resumed_at=resumed_at, config=config or {}
        )
        kept = resumed_at if resumed_at is not None else -1
        moved = [set_aside(self.run_dir / name, after=kept) for name in (METRICS_FILE, SAMPLES_FILE)]
        end_torn_line(self.run_dir / EVENTS_FILE)
        self._metrics, self._samples, self._events = (
            self._append_to(name) for name in (METRICS_FILE, SAMPLES_FILE, EVENTS_FILE)
        )
        rows = read_jsonl(metrics)
        self.last_step = max((row["step"] for row in rows), default=-1)
        # The line of the step that the run resumes from, as an earlier process wrote it; {} if there is none.
        self.resumed_line: dict[str, float | None] = next((r for r in rows if r["step"] == resumed_at), {})
        # Splits whose samples an earlier process wrote for the step that is resumed from.
        self._written_splits = {
            row["split"] for row in read_jsonl(self.run_dir / SAMPLES_FILE) if row["step"] == resumed_at
        }
        self.event(
            "run/opened",
            pid=os.getpid(),
            host=socket.gethostname(),
            total_steps=total_steps,
            resumed_at=resumed_at,
        )
        for report in filter(None, moved):
            self.event("run/superseded", **report)

    def _append_to(self, name: str) -> Lines:
        file = Lines(self.run_dir / name)
        self._open_files.append(file)
        return file

    # -- reading -----------------------------------------------------------------------------------

    def resumed_metrics(self) -> dict[str, float]:
        """The metrics in the line of the step that the run resumes from; {} if there is none."""
        line = {name: v for name, v in self.resumed_line.items() if name not in ("step", "time/wall")}
        return {name: math.nan if value is None else value for name, value in line.items()}

    def resumed_evaluation(self) -> dict[str, float]:
        """The evaluation among them; {} if that step was not evaluated to the end."""
        metrics = self.resumed_metrics()
        names = [name for name in metrics if name.startswith("eval/") or name == "time/eval"]
        return {name: metrics[name] for name in names} if "time/eval" in names else {}

    # -- writing -----------------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's line: `step`, `time/wall` and `metrics`. Every step has one line only.

        NaN and infinities become null, and an event `metric/non_finite` names them. A run that resumes from
        step k may log k again, to complete it (an evaluation that a stop interrupted): metrics that the
        existing line has not are added to it, and an event names them.

        Raises:
            ValueError: `step`, or a later step, already has a line.
            TypeError: a value is not a number.
        """
        if step <= self.last_step and not step == self.last_step == self._resumed_at:
            raise ValueError(
                f"step {step} cannot be logged after step {self.last_step}: each step has one line, in order"
            )
        earlier = self.resumed_line if step == self.last_step else None
        added: dict[str, float | None] = {}
        non_finite: dict[str, str] = {}
        for name, value in metrics.items():
            if name == "step" or name in (earlier or {}):
                continue
            number = _number(name, value)
            added[name] = number if math.isfinite(number) else None
            if not math.isfinite(number):
                non_finite[name] = str(number)
        if earlier is None:
            row = {"step": step, "time/wall": round(time.time(), 3), **added}
            _write(self._metrics, row)
            self.last_step = step
        else:
            row = {**earlier, **added}
            self._replace_last_line(row)
            self.event("metric/added", step=step, names=sorted(added))
        if non_finite:
            self.event("metric/non_finite", step=step, values=non_finite)
        finite = {name: v for name, v in added.items() if v is not None}
        for tracker in self._trackers:
            tracker.log(step, finite)
        for observer in self.observers:
            (observer.logged if earlier is None else observer.completed)(step, row)

    def _replace_last_line(self, row: Mapping[str, float | None]) -> None:
        """Replace the last line of the metrics. The file is replaced as a whole: a kill loses no line."""
        path = self.run_dir / METRICS_FILE
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.strip()]
        write_text_atomic(path, "".join(lines[:-1]) + _line(row))
        self._open_files.remove(self._metrics)
        self._metrics.close()
        self._metrics = self._append_to(METRICS_FILE)

    def wants_samples(self, step: int) -> bool:
        """True on the steps whose samples are kept: every `sample_every`, the first (0) and the last."""
        if self.tracking.samples_kept == 0:
            return False
        return step % self.tracking.sample_every == 0 or step >= self.total_steps

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep some of a step's completions if `wants_samples` is True for the step.

        rows: `prompt`, `completion` (text), `reward`, `scores`, `outcome`, `finish`, `version`, and
        `split` ("train", the default, or "eval"). At most `samples_kept` of each split are written,
        evenly spaced, so that an unchanging held-out set shows the same prompts every time.
        """
        if not self.wants_samples(step):
            return
        for split in ("train", "eval"):
            if step == self._resumed_at and split in self._written_splits:
                continue
            of_split = [row for row in rows if row.get("split", "train") == split]
            for row in _spread(of_split, self.tracking.samples_kept):
                _write(self._samples, {"step": step, "split": split, **row})

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event: wall time (`time`), monotonic time (`clock`), `kind` and `fields`.

        A field that JSON cannot represent is written as its `repr`: reporting a fault must not fail.
        """
        stamp = {"time": round(time.time(), 3), "clock": round(time.monotonic(), 3), "kind": kind}
        _write(self._events, {**stamp, **fields})
        for observer in self.observers:
            observer.event(kind, fields)

    def begin(self) -> None:
        """Tell the observers that the run begins."""
        for observer in self.observers:
            observer.begin()

    # -- the end -----------------------------------------------------------------------------------

    def close(self, reason: str = "done") -> None:
        """Write `run/closed` and close files and trackers. A second call does nothing."""
        if not self._open_files:
            return
        self.event("run/closed", last_step=self.last_step, reason=reason)
        with contextlib.ExitStack() as stack:  # close every one; the first error is still raised
            for file in self._open_files:
                stack.callback(file.close)
            for tracker in self._trackers:
                stack.callback(tracker.close)
        self._open_files.clear()
        self._trackers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("done" if kind is None else f"{kind.__name__}: {error}")


# -- lines -----------------------------------------------------------------------------------------


def _number(name: str, value: Any) -> float:
    """Convert a Python, NumPy or one-element tensor number to a Python number; integers stay integers."""
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else value
    item = getattr(value, "item", None)
    if item is None:
        raise TypeError(f"metric {name!r} must be a number, got {type(value).__name__}: {value!r}")
    number: float = item()
    return number


def _strict(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot represent, by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_strict(row), ensure_ascii=False, allow_nan=False, default=repr) + "\n"


def _write(file: Lines, row: Mapping[str, Any]) -> None:
    """Flush one line to the operating system, so that it survives the process."""
    # A lone surrogate (half of a character cut by sampling) cannot be UTF-8; show it as \udXXX.
    file.write(_line(row).encode("utf-8", "backslashreplace"))


class Lines:
    """A file that grows by whole lines. While its disk is full, the newest `MOST_WAITING` lines are buffered
    in memory: a full disk must not stop a long run."""

    MOST_WAITING = 100_000

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting: list[bytes] = []

    def write(self, line: bytes) -> None:
        """Append a line, after the buffered ones. Raises OSError for errors other than a full disk."""
        self._waiting.append(line)
        del self._waiting[: -self.MOST_WAITING]
        size = os.fstat(self._descriptor).st_size
        data = b"".join(self._waiting)
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            os.ftruncate(self._descriptor, size)  # remove a partial line
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        else:
            self._waiting.clear()

    def close(self) -> None:
        os.close(self._descriptor)


def _spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return at most `count` evenly spaced rows, including the first."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def parse_line(line: str) -> dict[str, Any] | None:
    """Parse a line's object; None if it is torn (a process died, or is still writing) or not JSON."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file; [] if it does not exist. A torn line is left out."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `read_jsonl`, one in memory at a time."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if (row := parse_line(line)) is not None:
                yield row


def set_aside(path: Path, after: int) -> dict[str, Any] | None:
    """Move lines of steps later than `after`, and torn ones, to `NAME.superseded.jsonl`.

    If the process is killed, nothing is lost: lines are flushed there before they are removed here, and a
    second call does not write them twice. Returns the fields of an event, None if nothing moved.
    """
    kept, moved, steps = _split_after(path, after)
    if not moved:
        return None
    aside = path.with_name(path.name.removesuffix(".jsonl") + ".superseded.jsonl")
    payload = "".join(moved)
    if not (aside.exists() and aside.read_text(encoding="utf-8").endswith(payload)):
        with aside.open("a", encoding="utf-8") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
    write_text_atomic(path, "".join(kept))
    first, last = (min(steps), max(steps)) if steps else (None, None)
    return {"file": path.name, "lines": len(moved), "first_step": first, "last_step": last}


def _split_after(path: Path, after: int) -> tuple[list[str], list[str], list[int]]:
    """Return lines to keep, lines to move (a torn one as `{"torn": text}`), and the moved lines' steps."""
    kept: list[str] = []
    moved: list[str] = []
    steps: list[int] = []
    lines: Iterable[str] = ()
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in filter(None, lines):
        row = parse_line(line)
        if row is None or not isinstance(row.get("step"), int):
            moved.append(json.dumps({"torn": line}) + "\n")
        elif row["step"] > after:
            moved.append(line + "\n")
            steps.append(row["step"])
        else:
            kept.append(line + "\n")
    return kept, moved, steps


def end_torn_line(path: Path) -> None:
    """End an incomplete last line, so that the next one starts on a new line."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
