"""Format events and samples of a run, for the report and the live view."""

from __future__ import annotations

import json
from typing import Any

from rft.metrics.progress import duration
from rft.report.history import Row, Run
from rft.utils.terminal import printable

# Events for the list below the timeline, most urgent first, with their CSS class.
NOTABLE = {
    "fault/": "bad",
    "run/failed": "bad",
    "checkpoint/rejected": "bad",
    "engine/lost": "bad",
    "guard/": "warn",
    "metric/non_finite": "warn",
    "run/stopped": "warn",
    "run/superseded": "info",
    "checkpoint/restored": "info",
    "engine/rebuilt": "info",
    "run/opened": "info",
    "run/closed": "info",
}
HIDDEN = ("time", "clock", "kind", "step", "pid")
MAX_EVENTS = 200


def notable_events(run: Run) -> list[dict[str, str]]:
    """Return the notable events, in order, printable; at most the latest `MAX_EVENTS`."""
    start = run.events[0]["time"] if run.events else 0.0
    rows = []
    for event in run.of_kind(*NOTABLE):
        kind = event["kind"]
        fields = {k: v for k, v in event.items() if k not in HIDDEN and v is not None}
        text = fields.pop("message", None) or fields.pop("text", None)
        rest = ", ".join(f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in fields.items())
        tone = next(tone for known, tone in NOTABLE.items() if kind == known or kind.startswith(known))
        rows.append(
            {
                "at": duration(event["time"] - start),
                "step": f"{run.step_at(event):.0f}",
                "kind": printable(kind),
                "tone": tone,
                "text": printable(f"{text} ({rest})" if text and rest else str(text or rest)),
            }
        )
    return rows[-MAX_EVENTS:]


def outcome_of(row: Row) -> str:
    """Return a sample's outcome in one word: the sample's, or else that of the first reward function."""
    outcome = row.get("outcome")
    if isinstance(outcome, dict):
        outcome = next(iter(outcome.values()), None)
    return printable(str(outcome or ""))


def as_text(value: Any) -> str:
    """Format a prompt or completion as printable text: text, or chat messages as `role: content` lines."""
    if isinstance(value, list) and all(isinstance(m, dict) for m in value):
        return "\n".join(f"{printable(str(m.get('role', '?')))}: {as_text(m.get('content'))}" for m in value)
    return "" if value is None else printable(str(value))
