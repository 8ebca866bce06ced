"""Calls of the endpoint's server to a session, and their answers. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rft.environments.types import Message, ToolCall


class Refused(Exception):
    """A request is not answered. status: of HTTP; code: a word for programs; param: the field at fault."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(status, code, message, param)
        self.status, self.code, self.message, self.param = status, code, message, param


@dataclass(frozen=True)
class Ask:
    """One model call: a conversation (`messages`, `tools`), a prompt of token ids (`tokens`), or a text.

    id: of the response. details: the answer is to contain ids, log-probs and the texts of single tokens.
    echo: it is to begin with the prompt, whose tokens are scored with `details`; only `rft serve` does that,
    and there `max_tokens` may be 0. prompt_top: how many of the most likely tokens it is to name at each
    place of the prompt (None: it does not score the prompt); only `rft serve` does. sampling: the client's
    settings (temperature, top_p, seed), which only `rft serve` follows: a session samples as its run does.
    """

    id: str = ""
    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    tokens: tuple[int, ...] = ()
    text: str | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    trained: bool = True
    details: bool = False
    echo: bool = False
    prompt_top: int | None = None
    sampling: Mapping[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True)
class SetReward:
    """A reward for the call of a response, or for the whole session (None). A later one replaces it."""

    value: float
    response: str | None = None


class Echoed(NamedTuple):
    """A token of the prompt as text, its log-prob given its predecessors (None: it is the first one), and
    the most likely token in its place with that one's. id, top: of the token, and of the most likely ones
    (id, text, log-prob), with `Ask.prompt_top`."""

    text: str
    logp: float | None
    best: str
    best_logp: float | None
    id: int = -1
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """The answer to an Ask.

    content: without the stop string that ended it. stopped_by: that stop string. prompt_length, length:
    tokens. prompt, sampled, logps, texts: only with `Ask.details`. echoed: only with `Ask.echo`; without
    `details`, the prompt is one text.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: Literal["stop", "length"] = "stop"
    stopped_by: str | None = None
    prompt_length: int = 0
    length: int = 0
    prompt: tuple[int, ...] = ()
    sampled: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()
    echoed: tuple[Echoed, ...] = ()
