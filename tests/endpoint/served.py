"""The server in this process, in front of real sessions whose policy's answers are written in advance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft.batch import Completion, Prompt
from rft.config.data import DataConfig
from rft.config.environment import EnvironmentConfig
from rft.data.chat import Renderer
from rft.endpoint.calls import SessionCalls
from rft.endpoint.server import Server
from rft.endpoint.types import Answer, Ask, Refused, SetReward
from rft.environments.runner import EnvironmentRunner, Remote
from rft.rollout.calls import lay_out
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.episodes import check_layout
from rft.rollout.session import Budget, Session
from tests.cases.families import HERMES, make_tokenizer

END = "<|im_end|>"
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
WIDE = Budget(64, 2000, 8000)


@dataclass
class Policy:
    """Gives its texts in turn to the calls of each session, the last one again and again.

    gate: answers wait for it. failure: raised instead.
    """

    tokenizer: Any
    says: Sequence[str] = (f"four{END}",)
    gate: asyncio.Event | None = None
    failure: Exception | None = None
    requests: list[Request] = field(default_factory=list)
    cancelled: int = 0

    async def __call__(self, request: Request) -> list[Generated]:
        self.requests.append(request)
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        turn = int(request.id.rpartition("-")[2])
        text = self.says[min(turn, len(self.says) - 1)]
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])[
            : request.sampling.max_tokens
        ]
        end = self.tokenizer.eos_token_id
        stopped = ids[-1] == end or any(word in text for word in request.sampling.stop)
        finish: Any = "stop" if stopped else "length"
        return [Generated(ids, (-0.5,) * len(ids), finish, ((0, 0, len(ids)),))]


@dataclass
class Served:
    """A server with its sessions. url: without `/v1`."""

    url: str
    server: Server
    policy: Policy
    render: Renderer
    budget: Budget
    runner: EnvironmentRunner
    sessions: dict[str, SessionCalls] = field(default_factory=dict)

    def open(self, name: str = "s", budget: Budget | None = None) -> tuple[SessionCalls, str]:
        """Open a session; return it with its key."""
        prompt = Prompt(0, tuple(self.render.prompt("hi")[1]), "hi")
        limits = budget or self.budget
        session = Session(self.policy, self.render, prompt, Sampling(1, 400, seed=7), limits, name, "json")
        self.sessions[name] = SessionCalls(session, Remote(self.runner, session))
        return self.sessions[name], self.server.open(name, limits.context)


def trained(calls: SessionCalls) -> Completion:
    """Lay a session out for training; every sampled token is trained once, in its context."""
    made = calls.session.calls
    completion = lay_out(made[0].prompt, made)
    check_layout(made[0].prompt, made, completion)
    return completion


@asynccontextmanager
async def served(
    *says: str, template: str = HERMES, budget: Budget = WIDE, gate: asyncio.Event | None = None
) -> AsyncIterator[Served]:
    tokenizer = make_tokenizer(template)
    policy = Policy(tokenizer, says or (f"four{END}",), gate)

    async def ask(name: str, ask: Ask | SetReward) -> Answer | None:
        if name not in served.sessions:
            raise Refused(401, "invalid_api_key", "the session has ended")
        return await served.sessions[name].reply(ask)

    server = Server(ask)
    port = await server.start("127.0.0.1", 0)
    runner = EnvironmentRunner(EnvironmentConfig(kind="function", path="none.py:none"), Path("."))
    render = Renderer(DataConfig(), tokenizer)
    served = Served(f"http://127.0.0.1:{port}", server, policy, render, budget, runner)
    try:
        yield served
    finally:
        await server.close()
