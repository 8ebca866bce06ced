"""Types of reward results: the score of one completion, its outcome, and the combined reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

Messages = list[dict[str, Any]]
Text = str | Messages
"""A prompt or a completion: a string, or a list of chat messages."""


class Outcome(StrEnum):
    """How a judgement ended. `error`, and a `timeout` of the reward itself, have no value."""

    correct = "correct"
    wrong = "wrong"
    unparseable = "unparseable"
    timeout = "timeout"
    error = "error"
    abstain = "abstain"


@dataclass(frozen=True, slots=True)
class Score:
    """One judgement of one completion.

    value: the reward, or None if it does not apply (`abstain`) or could not be computed (`error`, `timeout`).
        A completion without an answer is `unparseable` and has a value. A program that exceeds its own
        time limit is `timeout` with a value; a reward that hangs is `timeout` without.
    detail: the extracted answer and the reason for the judgement; for `error`, the traceback.
    seconds: wall time of the judgement.
    steps: the value of each step, from a reward that judges step by step; a step that it abstains on
        has the mean of the others.
    answer: the extracted final answer, for votes over samples; "": none, or the reward reads no answer.
    confidence: the probability of being correct that the completion states, 0 to 1; None: it states none.
    """

    value: float | None
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    steps: tuple[float, ...] = ()
    answer: str = ""
    confidence: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the reward could not be computed, so that the sample must leave its group."""
        return self.value is None and self.outcome in (Outcome.error, Outcome.timeout)


@dataclass(frozen=True, slots=True)
class SampleReward:
    """The combined reward of one completion, and the score of each component by name.

    value: None if a component failed or all abstained; never replaced by zero.
    vector: the components' values in config order, for multi-objective training; None if `value` is.
    """

    value: float | None
    scores: Mapping[str, Score] = field(default_factory=dict)
    vector: tuple[float | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Progress of the run, under the names of TRL's `trainer_state` for rewards."""

    global_step: int
    max_steps: int


class RewardError(RuntimeError):
    """A reward failed more often than its config allows; the message contains traceback and sample."""


@runtime_checkable
class RewardFunction(Protocol):
    """A reward: called with lists of equal length, returns one number (or None) for each completion."""

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Any: ...


def text_of(value: Text) -> str:
    """Return the text of a prompt or completion: the string itself, or the joined message contents."""
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
    return Score(value, Outcome.correct, detail)


def wrong(value: float = 0.0, detail: str = "") -> Score:
    return Score(value, Outcome.wrong, detail)


def unparseable(value: float = 0.0, detail: str = "") -> Score:
    """Return `value` for a completion that contains nothing to judge."""
    return Score(value, Outcome.unparseable, detail)


def abstain(detail: str = "") -> Score:
    """Return a Score without a value: the reward does not apply to this sample."""
    return Score(None, Outcome.abstain, detail)


def graded(value: float, detail: str = "", threshold: float = 0.5) -> Score:
    """Return a continuous score: `correct` from `threshold` on, `wrong` below."""
    return Score(value, Outcome.correct if value >= threshold else Outcome.wrong, detail)
