"""The report of a check: figures, and problems with their remedies."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

PROBES = {
    "load": "the environment loads, and fits the config and the data",
    "template": "the chat template repeats earlier turns unchanged",
    "thinking": "the chat template keeps the thoughts of earlier turns",
    "parser": "tool calls survive the chat template and the parser",
    "injection": "an observation cannot open a turn",
    "faults": "the environment does not fail, whatever the policy writes",
    "determinism": "equal seeds and replies give equal observations and rewards",
    "leaks": "a session does not depend on others",
    "reward": "rewards are finite, in range, and differ between sessions",
    "tokens": "sessions fit the limits",
    "tools": "every tool can be called",
}
"""Names of the probes, which `--accept` takes."""


@dataclass(frozen=True)
class Finding:
    """Something that a probe found. what: with the place and an example. instead: the remedy."""

    probe: str
    what: str
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.probe}: {self.what}" + (f"; {self.instead}" if self.instead else "")


@dataclass
class Report:
    """lines: the text of each subject. figures: the same as plain data, for `--json`. notes: possible
    mistakes. accept: names of probes whose problems do not count."""

    accept: Collection[str] = ()
    lines: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)
    accepted: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    def line(self, label: str, text: str, **figures: Any) -> None:
        """Add a subject: its line, and its figures."""
        self.lines.append((label, text))
        self.figures[label] = figures

    def problem(self, probe: str, what: str, instead: str) -> None:
        accepted = probe in self.accept
        (self.accepted if accepted else self.problems).append(Finding(probe, what, instead))

    def note(self, probe: str, what: str, instead: str = "") -> None:
        self.notes.append(Finding(probe, what, instead))

    @property
    def good(self) -> bool:
        return not self.problems

    def text(self) -> str:
        """Return the report for people."""
        out = [f"{label:<12} {text}" for label, text in self.lines]
        out += [f"note         {note}" for note in self.notes]
        out += [f"accepted     {finding}" for finding in self.accepted]
        count = len(self.problems)
        out.append(f"problems     {count or 'none'}")
        return "\n".join([*out, *(f"  - {problem}" for problem in self.problems)])

    def plain(self) -> dict[str, Any]:
        """Return the report as plain data."""
        parts = {"problems": self.problems, "accepted": self.accepted, "notes": self.notes}
        shown = {name: [vars(finding) for finding in part] for name, part in parts.items()}
        return {"good": self.good, **shown, "figures": self.figures}


def indented(text: str) -> str:
    """Indent the lines of a text after the first, below a problem."""
    return text.replace("\n", "\n      ")


def shown_difference(
    tokenizer: Any, before: tuple[int, ...], after: tuple[int, ...], around: int = 8
) -> tuple[int, str]:
    """Return the first position at which two token sequences differ, and both in context."""
    pairs = zip(before, after, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))

    def decode(ids: tuple[int, ...]) -> str:
        return repr(tokenizer.decode(list(ids), skip_special_tokens=False)) if ids else "the end"

    context = decode(before[max(0, at - around) : at])
    old, new = decode(before[at : at + around]), decode(after[at : at + around])
    return at, f"after {context} came {old}, and now comes {new}"
