"""`rft watch RUN`: a live view of a run. It only reads files, so it also works from another machine."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rft.metrics.progress import duration, phase_bar, sparkline
from rft.report.events import as_text, notable_events, outcome_of
from rft.report.history import Row, Run
from rft.utils.terminal import printable

SHOWN = (
    ("reward", "reward/mean", "{:.3f}", "cyan"),
    ("accuracy", "eval/accuracy", "{:.1%}", "green"),
    ("entropy", "policy/entropy", "{:.3f}", "magenta"),
    ("KL to sampler", "policy/kl", "{:.2g}", "blue"),
    ("length", "completion/length_mean", "{:.1f}", "yellow"),
    ("proof of pushes", "sync/proof_gap", "{:.1e}", "white"),
    ("log-prob gap", "sync/logp_gap", "{:.1e}", "white"),
    ("tokens/s", "throughput/tokens_per_s", "{:,.0f}", "white"),
)
TONES = {"bad": "red", "warn": "yellow", "info": "dim"}
LAST_EVENTS, LAST_SAMPLES = 6, 2
SILENT_AFTER = 300.0


def watch(
    run_dir: Path | str, *, once: bool = False, every: float = 2.0, console: Console | None = None
) -> None:
    """Show a run until it ends or Ctrl-C; with `once`, one frame. If the output cannot be redrawn (a dumb
    terminal, a file), a frame is appended whenever the run has progressed.

    every: polling interval of the files in seconds.

    Raises rft.report.history.NoRun if `run_dir` is not a run folder.
    """
    run = Run(run_dir)
    console = console or Console()
    if once:
        console.print(frame(run, console.width))
        return
    redraws = console.is_terminal and not console.is_dumb_terminal
    with Live(console=console, auto_refresh=False, screen=False) if redraws else nullcontext() as live:
        shown = None
        while True:
            state = run.state(SILENT_AFTER)
            if live is not None:
                live.update(frame(run, console.width), refresh=True)
            elif shown != (run.step, state):
                console.print(frame(run, console.width))
            shown = run.step, state
            if state.startswith(("ended", "gone")):
                return
            time.sleep(every)
            run.refresh()


def frame(run: Run, width: int) -> RenderableType:
    """Render one frame: numbers and time shares, ages and engines, events, samples."""
    parts: list[RenderableType] = [_head(run)]
    if run.metrics:
        parts.append(_panel("numbers", _numbers(run, max(10, width - 50))))
        bar = phase_bar({k: v for k, v in run.metrics[-1].items() if v is not None}, max(20, width - 6))
        if bar.plain:
            parts.append(_panel("where the time goes (last step)", bar))
    pair = [p for p in (_ages(run), _engines(run)) if p is not None]
    if pair:
        parts.append(Columns(pair))
    events = notable_events(run)[-LAST_EVENTS:]
    if events:
        parts.append(_panel("events", _events(events)))
    if run.samples:
        parts.append(_panel("last samples", _samples(run.samples[-LAST_SAMPLES:])))
    if run.damaged_lines():
        parts.append(Text(run.damaged_lines(), "yellow"))
    return Group(*parts)


def _panel(title: str, body: RenderableType) -> Panel:
    return Panel(body, title=title, title_align="left", border_style="dim")


def _head(run: Run) -> Text:
    state = run.state(SILENT_AFTER)
    color = (
        "green" if state in ("running", "ended: done") else "yellow" if state == "ended: stopped" else "red"
    )
    text = Text.assemble(
        (printable(run.name), "bold"), "  ", (printable(state), color), f"  step {run.step}/{run.total_steps}"
    )
    left = seconds_left(run)
    if state == "running" and left is not None:
        text.append(f"  {duration(left)} left", style="dim")
    if run.metrics:
        text.append(
            f"  last step {duration(max(0.0, time.time() - run.metrics[-1]['time/wall']))} ago", "dim"
        )
    return text


def seconds_left(run: Run) -> float | None:
    """Estimate from the last 30 lines of the current process; None before two of them."""
    opened = list(run.of_kind("run/opened"))
    since = opened[-1]["time"] if opened else 0.0
    recent = [row for row in run.metrics[-30:] if row["time/wall"] >= since]
    if len(recent) < 2:
        return None
    first, last = recent[0], recent[-1]
    if last["step"] <= first["step"]:
        return None
    pace = (last["time/wall"] - first["time/wall"]) / (last["step"] - first["step"])
    return float(pace * (run.total_steps - run.step))


def _numbers(run: Run, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, name, form, color in SHOWN:
        values = run.series(name)[1]
        if values:
            change = f"from {form.format(values[0])}" if len(values) > 1 else ""
            table.add_row(
                label, Text(form.format(values[-1]), "bold"), Text(change, "dim"),
                Text(sparkline(values, width), color),
            )  # fmt: skip
    return table


def _ages(run: Run) -> Panel | None:
    """Show the ages of the last step's completions as bars."""
    ages = histogram(run.metrics[-1]) if run.metrics else {}
    if not ages:
        return None
    table = Table.grid(padding=(0, 1))
    for age, share in ages.items():
        table.add_row(f"{age}", Text("█" * max(1, round(24 * share)), "cyan"), f"{share:.0%}")
    return _panel("age of the completions (versions)", table)


def histogram(row: Mapping[str, float | None]) -> dict[int, float]:
    """Return age -> share from the `rollout/age/*` of one row."""
    shares = {int(m[1]): v for k, v in row.items() if v and (m := re.fullmatch(r"rollout/age/(\d+)", k))}
    return dict(sorted(shares.items()))


def engines(run: Run) -> dict[str, Row]:
    """Return the merged fields of each engine's events, newest last: `kind`, `time`, version and so on."""
    known: dict[str, Row] = {}
    for event in run.of_kind("engine/"):
        if "engine" in event:
            name = str(event["engine"])
            known[name] = {**known.get(name, {}), **event}
    return known


def _engines(run: Run) -> Panel | None:
    known = engines(run)
    if not known:
        return None
    table = Table.grid(padding=(0, 2))
    table.add_row(*(Text(word, "dim") for word in ("engine", "state", "version", "last sign")))
    for name, event in sorted(known.items()):
        lost = event["kind"] == "engine/lost"
        ago = duration(max(0.0, time.time() - event["time"]))
        state = Text("lost", "red") if lost else Text("alive", "green")
        version = Text(printable(str(event.get("version", ""))))
        table.add_row(Text(printable(name)), state, version, f"{ago} ago")
    return _panel("engines", table)


def _events(events: list[dict[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for event in events:
        text = Text(event["text"], no_wrap=True, overflow="ellipsis")
        table.add_row(
            Text(f"after {event['at']}", "dim", no_wrap=True),
            f"step {event['step']}",
            Text(event["kind"], TONES[event["tone"]], no_wrap=True),
            text,
        )
    return table


def _samples(rows: list[Row]) -> Group:
    parts: list[RenderableType] = []
    for row in rows:
        reward = row.get("reward")
        shown = "no reward" if reward is None else f"reward {reward:.3g}"
        head = f"step {row['step']} · {printable(row['split'])} · {shown} · {outcome_of(row)}"
        parts.append(Text(head, "dim"))
        parts.append(Text(_shorten(as_text(row.get("prompt"))), "bold"))
        parts.append(Text(_shorten(as_text(row.get("completion")))))
    return Group(*parts)


def _shorten(text: str, lines: int = 6) -> str:
    """Truncate to at most `lines` lines."""
    all_lines = text.splitlines()
    return "\n".join(all_lines[:lines] + ["…"] * (len(all_lines) > lines))
