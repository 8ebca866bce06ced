"""What a reward says: an outcome and, where it could judge, a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

Messages = list[dict[str, Any]]
Text = str | Messages
"""A prompt or a completion: a string, or a list of chat messages."""


class Outcome(StrEnum):
    """How a judgement ended. `error` and a `timeout` of the reward itself carry no number."""

    correct = "correct"
    wrong = "wrong"
    unparseable = "unparseable"
    timeout = "timeout"
    error = "error"
    abstain = "abstain"


@dataclass(frozen=True, slots=True)
class Score:
    """One judgement of one completion.

    value: the reward, or None: not applicable (`abstain`), or not to be had (`error`, `timeout`).
        A completion that no answer can be found in is `unparseable` and has a value. A program that
        exceeds its own time limit is `timeout` with a value; a reward that hangs is `timeout` without.
    detail: what was extracted and why it was judged so; for `error`, the traceback.
    seconds: wall time of the judgement.
    steps: the value of each step, from a reward that judges step by step; a step that it abstains on
        has the mean of the others.
    """

    value: float | None
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    steps: tuple[float, ...] = ()

    @property
    def failed(self) -> bool:
        """True where the reward could not do its work, so that the sample must leave its group."""
        return self.value is None and self.outcome in (Outcome.error, Outcome.timeout)


@dataclass(frozen=True, slots=True)
class SampleReward:
    """The combined reward of one completion, and every component's score by name.

    value: None where a component failed or all abstained; never a zero in its place.
    vector: the components' values in config order, for multi-objective training; None where `value` is.
    """

    value: float | None
    scores: Mapping[str, Score] = field(default_factory=dict)
    vector: tuple[float | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Where the run is, under the names of the `trainer_state` that TRL gives to rewards."""

    global_step: int
    max_steps: int


class RewardError(RuntimeError):
    """A reward failed more often than its config allows; the message holds traceback and sample."""


@runtime_checkable
class RewardFunction(Protocol):
    """A reward: called with lists of equal length, returns one number (or None) for each completion."""

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Any: ...


def text_of(value: Text) -> str:
    """The text of a prompt or completion: the string itself, or the messages' contents joined."""
    if isinstance(value, str):
        return value
    parts: list[str] = []
    for message in value:
        content = message.get("content") or ""
        if isinstance(content, str):
            parts.append(content)
        else:  # OpenAI content parts
            parts.extend(str(part.get("text", "")) for part in content if part.get("type") == "text")
    return "\n".join(parts)


def correct(value: float = 1.0, detail: str = "") -> Score:
    """A judgement of `correct`."""
    return Score(value, Outcome.correct, detail)


def wrong(value: float = 0.0, detail: str = "") -> Score:
    """A judgement of `wrong`."""
    return Score(value, Outcome.wrong, detail)


def unparseable(value: float = 0.0, detail: str = "") -> Score:
    """Nothing to judge was found in the completion: it earns `value`."""
    return Score(value, Outcome.unparseable, detail)


def abstain(detail: str = "") -> Score:
    """The reward does not apply to this sample."""
    return Score(None, Outcome.abstain, detail)


def graded(value: float, detail: str = "", threshold: float = 0.5) -> Score:
    """A continuous score: `correct` from `threshold` on, `wrong` below."""
    return Score(value, Outcome.correct if value >= threshold else Outcome.wrong, detail)
