"""The transcript of a session in an environment: its messages, and its tokens by who wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from rft.report.events import as_text
from rft.report.history import Row
from rft.utils.terminal import printable


@dataclass(frozen=True)
class Part:
    """One message. calls: the tool calls in it, as (name, arguments). facts: about the turn in which the
    policy sampled it; none for a message that it was given."""

    role: str
    text: str
    calls: Sequence[tuple[str, str]] = ()
    facts: Sequence[str] = ()

    @property
    def sampled(self) -> bool:
        return self.role == "assistant"


@dataclass(frozen=True)
class Span:
    """Tokens that one side wrote. branch: they do not follow the span before."""

    text: str
    sampled: bool
    title: str
    branch: bool = False


@dataclass(frozen=True)
class Transcript:
    """A session. sampled, given: numbers of tokens; the prompt's are given ones."""

    parts: Sequence[Part]
    spans: Sequence[Span]
    sampled: int
    given: int


def transcript(row: Row) -> Transcript | None:
    """Return the transcript of a sample's row; None if it has none, or not one that can be read."""
    rows, messages = row.get("spans"), row.get("messages")
    if not _dicts(rows) or not _dicts(messages) or not all(_is_span(span) for span in rows):
        return None
    turns = [span for span in rows if "turn" in span]
    answers = [m for m in messages if m.get("role") == "assistant"]
    matched = len(turns) == len(answers) and all(map(_sampled, turns, answers))
    facts = iter([_facts(turn) for turn in turns] if matched else [()] * len(answers))
    parts = [
        Part(
            printable(_name(message)),
            as_text(message.get("content")),
            _calls(message.get("tool_calls")),
            next(facts) if message.get("role") == "assistant" else (),
        )
        for message in messages
    ]
    spans = [
        Span(
            as_text(span["text"]),
            "turn" in span,
            " · ".join(_facts(span)) if "turn" in span else _tokens(span, "given to the policy"),
            bool(span.get("branch")),
        )
        for span in rows
    ]
    sampled = sum(span["tokens"] for span in turns)
    return Transcript(parts, spans, sampled, sum(span["tokens"] for span in rows) - sampled)


def _dicts(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_span(span: Mapping[str, Any]) -> bool:
    count = span.get("tokens")
    return isinstance(span.get("text"), str) and isinstance(count, int) and 0 <= count < 2**53


def _sampled(turn: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    """Return whether a turn sampled a message: an environment may have edited it, or made it up."""
    text = as_text(message.get("content")).strip()
    names = [name for name, _ in _calls(message.get("tool_calls"))]
    return all(part in printable(turn["text"]) for part in (text, *names))


def _name(message: Mapping[str, Any]) -> str:
    role, name = str(message.get("role", "?")), message.get("name")
    return f"{role} {name}" if role == "tool" and isinstance(name, str) else role


def _calls(calls: Any) -> list[tuple[str, str]]:
    """Return (name, arguments as JSON) of a message's tool calls."""
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if _dicts(calls) else []
    return [
        (
            printable(str(function.get("name", "?"))),
            printable(json.dumps(function.get("arguments"), ensure_ascii=False)),
        )
        for function in functions
        if isinstance(function, dict)
    ]


def _facts(turn: Mapping[str, Any]) -> list[str]:
    versions, reward = turn.get("versions"), turn.get("reward")
    facts = [f"turn {turn['turn']}", _tokens(turn, "sampled")]
    if isinstance(versions, list) and versions:
        facts.append(f"version {'-'.join(str(v) for v in (versions[0], *versions[1:][-1:]))}")
    if isinstance(reward, int | float):
        facts.append(f"reward {reward:.3g}")
    return [printable(fact) for fact in facts]


def _tokens(span: Mapping[str, Any], how: str) -> str:
    count = span["tokens"]
    return f"{count:,} token{'s' if count != 1 else ''} {how}"
