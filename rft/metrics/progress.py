"""The progress of a run on stderr: a live display, or plain lines.

with Progress(total_steps=150, title="arithmetic") as progress:
    progress.stage("starting the rollout engine")
    progress.phase("rollout", 40, 64)
    progress.update(12, {"reward/mean": 0.61, "time/step": 1.2})
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from types import TracebackType
from typing import IO, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rft.config.metrics import Display
from rft.utils.terminal import printable, say

PHASES = {
    "time/rollout": ("rollout", "cyan"),
    "time/reward": ("reward", "yellow"),
    "time/reference": ("reference", "blue"),
    "time/train": ("train", "green"),
    "time/sync": ("sync", "magenta"),
    "time/eval": ("eval", "white"),
    "time/checkpoint": ("checkpoint", "red"),
}
BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """Format seconds for people: 0.42 s, 8.3 s, 3 min 07 s, 5 h 12 min, 2 d 03 h."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def sparkline(values: list[float], width: int = 40) -> str:
    """Draw a series as one line of at most `width` block characters, each the mean of a stretch of values,
    scaled between the line's extremes."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    shown = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] for v in shown)


def phase_bar(times: Mapping[str, float], width: int) -> Text:
    """Draw the shares of a step's time as one coloured bar with a legend."""
    known = {key: times[key] for key in PHASES if times.get(key, 0.0) > 0}
    total = sum(known.values())
    bar, legend = Text(), Text()
    for key, seconds in known.items():
        name, color = PHASES[key]
        bar.append("━" * max(1, round(width * seconds / total)), style=color)
        legend.append(f"  ━ {name} {100 * seconds / total:.0f} %", style=color)
    bar.truncate(width)
    return bar + Text("\n") + legend if known else Text("")


class ProgressState:
    """The state of both displays: the newest numbers and the time left."""

    def __init__(self, total_steps: int, title: str) -> None:
        self.total_steps, self.title = total_steps, title
        self.step, self.stage, self.stage_since = 0, "", time.monotonic()
        self.started = time.monotonic()
        self.metrics: dict[str, float] = {}
        self.rewards: list[float] = []
        self.accuracies: list[float] = []
        self.phase: tuple[str, int, int] | None = None
        self._ends: deque[tuple[int, float]] = deque(maxlen=30)

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self.step, self.stage, self.phase = step, "", None
        self.metrics.update({k: v for k, v in metrics.items() if v is not None})
        self._ends.append((step, time.monotonic()))
        for name, series in (("reward/mean", self.rewards), ("eval/accuracy", self.accuracies)):
            value = metrics.get(name)
            if value is not None:
                series.append(value)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the last 30 steps, evaluations and checkpoints included; None before two steps."""
        if len(self._ends) < 2 or self._ends[-1][0] <= self._ends[0][0]:
            return None
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        return (self.total_steps - self.step) * (ended - began) / (last - first)

    def line(self) -> str:
        """Format the newest step as one plain line."""
        m = self.metrics
        parts = [f"step {self.step}/{self.total_steps}"]
        for name, label in (("reward/mean", "reward"), ("eval/accuracy", "accuracy"), ("train/loss", "loss")):
            if name in m and not (label == "loss" and "reward/mean" in m):
                parts.append(f"{label} {m[name]:.3f}")
        if "time/step" in m:
            parts.append(f"{duration(m['time/step'])} a step")
        if self.seconds_left is not None and self.step < self.total_steps:
            parts.append(f"{duration(self.seconds_left)} left")
        return " · ".join(parts)


class Progress:
    """Show a live display on a terminal, plain lines elsewhere.

    Args:
        total_steps: steps of the whole run (a resumed one counts from its start).
        title: the run's name.
        display: "live", "plain", "off"; "auto" selects live if `stream` is a terminal, else plain.
        stream: output stream; stderr by default, so that stdout stays clean for JSON.
        line_every: minimum seconds between two plain step lines. Steps with an evaluation, and the
            last one, are always printed.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        display: Display = "auto",
        stream: IO[str] | None = None,
        line_every: float = 1.0,
    ) -> None:
        self.state = ProgressState(total_steps, title)
        self._stream = stream or sys.stderr
        self._line_every, self._last_line = line_every, float("-inf")
        if display == "auto":
            display = "live" if self._stream.isatty() else "plain"
        self._display = display
        self._console = Console(file=self._stream, force_terminal=True if display == "live" else None)
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        if display == "live":
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                redirect_stdout=False,
            )
            self._live.start()
        elif display == "plain":
            self._say(f"{title}: {total_steps} steps")

    # -- reports of the run ------------------------------------------------------------------------

    def stage(self, text: str) -> None:
        """Show a part outside of the steps, such as starting the engine. Ends with the next stage or step."""
        self.state.stage, self.state.stage_since = text, time.monotonic()
        self.state.phase = None
        if self._display == "plain":
            self._say(f"{text} ...")

    def phase(self, name: str, done: int, total: int) -> None:
        """Show progress within a step or stage; live display only, since it changes too often."""
        self.state.phase = (name, done, total)

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Show a finished step. `metrics` as written to `metrics.jsonl`."""
        self.state.update(step, metrics)
        if self._display != "plain":
            return
        now = time.monotonic()
        always = "eval/accuracy" in metrics or step >= self.state.total_steps
        if always or now - self._last_line >= self._line_every:
            self._last_line = now
            self._say(self.state.line())

    def note(self, text: str) -> None:
        """Print a permanent line: a warning, a checkpoint, a fault."""
        if self._display != "off":
            self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the display; its last frame stays. A second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- rendering ------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        say(text, self._stream)

    def _render(self) -> RenderableType:
        return render(self.state, self._console.width, self._spinner)


def render(state: ProgressState, width: int, spinner: Spinner) -> RenderableType:
    """Render the live display's frame: stage or numbers, the bar, and the time shares."""
    inner = max(20, width - 6)
    parts: list[RenderableType] = []
    if state.stage:
        spinner.update(text=f" {state.stage}  {duration(time.monotonic() - state.stage_since)}")
        parts.append(spinner)
    if state.metrics:
        parts.append(_numbers(state))
    if state.step or not state.stage:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            _bar(
                total=state.total_steps,
                completed=state.step,
                width=max(10, inner - 16),
            ),
            Text(f"{state.step}/{state.total_steps} steps", style="bold"),
        )
        parts.append(bar)
    if state.phase is not None:
        name, done, total = state.phase
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(f"{name:<10}"),
            _bar(total=total, completed=done, width=max(10, inner - 32)),
            Text(f"{done}/{total}"),
        )
        parts.append(row)
    times = phase_bar(state.metrics, inner)
    if times.plain:
        parts.append(times)
    return Panel(
        Group(*parts), title=Text(printable(state.title), "bold"), title_align="left", border_style="dim"
    )


def _bar(total: int, completed: int, width: int) -> ProgressBar:
    return ProgressBar(
        total=max(1, total), completed=completed, width=width, complete_style="green", finished_style="green"
    )


def _numbers(state: ProgressState) -> Table:
    """Show reward and accuracy with their history, step time and time left."""
    m = state.metrics
    table = Table.grid(padding=(0, 2))
    for label, name, series in (
        ("reward", "reward/mean", state.rewards),
        ("accuracy", "eval/accuracy", state.accuracies),
    ):
        if name in m:
            table.add_row(label, Text(f"{m[name]:.3f}", style="bold"), Text(sparkline(series), style="cyan"))
    if "train/loss" in m:
        table.add_row("loss", Text(f"{m['train/loss']:.4g}", style="bold"), "")
    if "time/step" in m:
        speed = m.get("throughput/tokens_per_s")
        rate = f"{speed:,.0f} tokens/s" if speed is not None else ""
        table.add_row("step time", Text(duration(m["time/step"]), style="bold"), rate)
    left = state.seconds_left
    elapsed = f"{duration(time.monotonic() - state.started)} so far"
    table.add_row("time left", Text("…" if left is None else duration(left), style="bold"), elapsed)
    return table
