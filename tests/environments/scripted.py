"""A session whose answers are written in advance, for tests of environments without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rft.environments.types import ContextFull, Reply, ToolCall, TurnLimit

Answer = str | Reply | ToolCall | Exception | Callable[[list[dict[str, Any]]], Any]


@dataclass(frozen=True)
class Call:
    prompt: tuple[int, ...]
    sampled: tuple[int, ...]
    logps: tuple[float, ...]
    finish: str = "stop"


class ScriptedSession:
    """Answers in order; a function is given the messages; an exception is raised. Then TurnLimit."""

    def __init__(self, *answers: Answer, seed: int | None = 1, delay_s: float = 0.0) -> None:
        self.answers, self.seed, self.delay_s = list(answers), seed, delay_s
        self.calls: list[Call] = []
        self.seen: list[list[dict[str, Any]]] = []
        self.tools: Any = None
        self.rewards: list[tuple[float, str, int | None]] = []

    async def chat(
        self,
        messages: Sequence[Any],
        *,
        tools: Any = None,
        max_tokens: Any = None,
        stop: Any = (),
        trained: bool = True,
    ) -> Reply:
        await asyncio.sleep(self.delay_s)
        self.seen.append([dict(m) for m in messages])
        self.tools = tools
        if not self.answers:
            raise TurnLimit("no more turns")
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer(self.seen[-1])
        index = len(self.calls)
        self.calls.append(Call((1, 2), (3, index), (-0.5, -0.25)))
        if isinstance(answer, ToolCall):
            return Reply("", tool_calls=(answer,), call=index)
        if isinstance(answer, str):
            return Reply(answer, call=index)
        assert isinstance(answer, Reply)
        return answer

    async def generate(self, tokens: Sequence[int], **_: Any) -> Call:
        if len(tokens) > 8:
            raise ContextFull("9 tokens do not fit into 8")
        self.calls.append(Call(tuple(tokens), (7,), (-1.0,)))
        return self.calls[-1]

    def reward(self, value: float, *, name: str = "reward", call: int | None = None) -> None:
        self.rewards.append((value, name, call))
