"""The samples that are trained on: `Prompt`, `Completion` and `Group`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "demonstration"]
TURNS_MEASURED = 8  # turns of sessions that metrics report separately; the last one also has all later turns


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset, tokenised.

    `id` is stable over epochs and resumes. `text` is passed to the rewards: a string, or a list of
    chat messages. `columns` are the row's other columns, passed to rewards by name.
    """

    id: int
    tokens: tuple[int, ...]
    text: str | list[dict[str, Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)


class Branch(NamedTuple):
    """The tokens of a completion from `start` to the next branch's start follow position `after` of (prompt +
    completion), which may lie in the prompt; -1: they start a tree without the prompt."""

    start: int
    after: int


class Turn(NamedTuple):
    """The tokens start:end of a completion that one call of its session sampled (none for a call that is not
    trained), the part of the session's reward that the turn earned, and the state in which it was sampled."""

    start: int
    end: int
    reward: float | None
    state: str | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The K tokens that a teacher finds most likely in the place of each of n tokens: `ids` [n, K] int32 and
    their log-probs `logps` [n, K] float32, in nats. An id of -1, with the log-prob -inf: there is none."""

    ids: np.ndarray[Any, Any]
    logps: np.ndarray[Any, Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TopTokens) and all(
            np.array_equal(a, b) for a, b in ((self.ids, other.ids), (self.logps, other.logps))
        )


class Origin(NamedTuple):
    """A session's seed, how its episode ended, and the messages of its first call, for records only."""

    seed: int | None
    ending: str
    opening: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Completion:
    """One response to a prompt: sampled by an engine, or read from a dataset.

    `logps[i]` is the sampler's log-prob of `tokens[i]` (None: not sampled), `ref_logps[i]` the reference's,
    if precomputed. `teacher`: the most likely tokens of a teacher in the place of each token. `mask[i]` says
    whether the loss may act on `tokens[i]` (None: on all). The first `demonstrated` tokens come from a
    demonstration instead of the policy. `versions` are (policy version, start, end) spans.
    `reward` is the combined reward; None means that it could not be judged (never a zero).
    `values` are further per-sequence numbers for the algorithm (a margin, a reward vector); nan: unknown.
    A session has `turns`, one for each of its model calls, and `branches` if one call's prompt did not extend
    the call before; `tokens` are those of all branches. No branches: the tokens follow the prompt's last.
    `messages` is the session's transcript after the prompt, and `text` its final message.
    """

    tokens: tuple[int, ...]
    text: str = ""
    finish: FinishReason = "stop"
    logps: tuple[float, ...] | None = None
    ref_logps: tuple[float, ...] | None = None
    teacher: TopTokens | None = None
    mask: tuple[bool, ...] | None = None
    demonstrated: int = 0
    versions: tuple[tuple[int, int, int], ...] = ()
    reward: float | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    turns: tuple[Turn, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    origin: Origin | None = None

    @property
    def num_sampled(self) -> int:
        """The number of tokens without those that were only read (`mask` False)."""
        return len(self.tokens) if self.mask is None else sum(self.mask)


@dataclass(frozen=True)
class Group:
    """A prompt with its completions: G rollouts, a preference pair, or a single demonstration."""

    prompt: Prompt
    completions: tuple[Completion, ...]
