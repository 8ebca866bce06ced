"""Types that a session, its environment and the rollout share. Standard library only: workers import them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from rft.rewards.types import Score

Message = dict[str, Any]
"""A chat message: `role`, `content`, and for an assistant also `reasoning_content` and `tool_calls`."""
Row = Mapping[str, Any]
"""A row of the dataset: its columns, and `prompt` (a string, or a list of messages)."""


class EnvironmentFault(RuntimeError):
    """An environment cannot be loaded or started; the message says how to correct it."""


class OperationFailed(Exception):
    """An operation of the environment raised; the message is its traceback."""


class WorkerHung(Exception):
    """An operation exceeded its deadline; its worker was killed."""


class WorkerDied(Exception):
    """The worker process ended in an operation; the message says how."""


class PolicyLimit(Exception):
    """The policy exhausted a budget of its session. Its episode is scored: this is not a fault."""


class ContextFull(PolicyLimit):
    """The next call does not fit into the token budget of the session (`max_episode_tokens`)."""


class TurnLimit(PolicyLimit):
    """The session has made `max_turns` calls."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call that the policy wrote. arguments: by parameter name."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """One assistant message, parsed.

    content: the text without reasoning and tool calls. finish: `length` if the token limit cut it.
    call: its index in the session's calls. error: why the text of a tool call could not be parsed, for the
    policy to read; "" if there was none, or it was well-formed.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: Literal["stop", "length"] = "stop"
    call: int = -1
    error: str = ""

    def message(self) -> Message:
        """Return the reply as an assistant message, as chat templates read it."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": t.id} if t.id else {}),
                    "function": {"name": t.name, "arguments": t.arguments},
                }
                for t in self.tool_calls
            ]
        return message


class Sampled(Protocol):
    """One model call: `prompt` and `sampled` token ids, the log-probs of the sampled ones, how it ended."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def sampled(self) -> Sequence[int]: ...
    @property
    def logps(self) -> Sequence[float]: ...
    @property
    def finish(self) -> Literal["stop", "length"]: ...


class Session(Protocol):
    """Access of one episode to the policy. Every call is recorded with its exact tokens.

    `seed` is deterministic for the sample, for environments that draw at random; None: not reproducible.
    """

    @property
    def seed(self) -> int | None: ...

    @property
    def calls(self) -> Sequence[Sampled]: ...

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        trained: bool = True,
    ) -> Reply:
        """Return the policy's answer to the messages: all of them so far. trained False: not a part of the
        task (a title, a summary). Raises ContextFull, TurnLimit."""
        ...

    async def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        trained: bool = True,
    ) -> Sampled:
        """Return the policy's continuation of the tokens. Raises ContextFull, TurnLimit."""
        ...

    def reward(self, value: float, *, name: str = "reward", call: int | None = None) -> None:
        """Record a reward: of the turn `call` (an index), or of the whole session under a name."""
        ...


class Endpoint(Protocol):
    """The HTTP endpoint of a run (`rft.endpoint`), as the runner of the environment sees it."""

    counts: dict[str, int]

    async def close(self) -> None: ...


class Ending(StrEnum):
    """How an episode ended. After a fault it is repeated, or its sample leaves the group."""

    finished = "finished"
    context_full = "context_full"
    turn_limit = "turn_limit"
    environment_error = "environment_error"
    tool_error = "tool_error"
    timeout = "timeout"


FAULTS = (Ending.environment_error, Ending.tool_error, Ending.timeout)


@dataclass(frozen=True)
class Episode:
    """The result of one episode.

    reward: None if the environment gives none (then only the config's rewards apply), and after a fault.
    scores: named parts of the reward, and metrics. messages: the transcript; the first `start` of them were
    given to the policy in its first call. judged: scores of the config's rewards that read the environment.
    detail: for a fault, its traceback.
    """

    reward: float | None
    ending: Ending = Ending.finished
    scores: Mapping[str, float] = field(default_factory=dict)
    messages: Sequence[Message] = ()
    start: int = 0
    detail: str = ""
    judged: Mapping[str, Score] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether a fault ended it, so that its reward would not measure the policy."""
        return self.ending in FAULTS
