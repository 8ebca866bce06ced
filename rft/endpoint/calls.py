"""Answer the HTTP calls of one session, in the controller."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from rft.endpoint.handle import Access, Endpoint
from rft.endpoint.types import Answer, Ask, Refused, SetReward
from rft.environments import types
from rft.environments.runner import Remote
from rft.environments.types import ContextFull, Ending, Message, OperationFailed, Reply, TurnLimit
from rft.rollout.session import Session, SessionClosed, text_of

R = TypeVar("R")


class Follows(Protocol):
    """The maker of a session's calls: the `Remote` of an episode."""

    def follow(self, call: Coroutine[Any, Any, R]) -> asyncio.Task[R]: ...

    async def chat(self, **arguments: Any) -> Reply: ...

    def reward(self, value: float, name: str = "reward", call: int | None = None) -> None: ...


@dataclass
class SessionCalls:
    """The calls of one session that come by HTTP.

    limit: the budget that a call exceeded, if one did. calls: index of the call of a response's id. given:
    rewards by that id, and None for the whole session.
    """

    session: Session
    remote: Follows
    limit: Ending | None = None
    calls: dict[str, int] = field(default_factory=dict)
    given: dict[str | None, float] = field(default_factory=dict)
    # Answers with the stop string that ended them.
    _untruncated: dict[str, Message] = field(default_factory=dict)

    async def reply(self, ask: Ask | SetReward) -> Answer | None:
        """Answer one request. Raises Refused, and errors of the engine."""
        if isinstance(ask, SetReward):
            if ask.response is not None and ask.response not in self.calls:
                raise Refused(400, "invalid_request", f"this session has no response {ask.response[:100]!r}")
            self.given[ask.response] = ask.value
            return None
        answer = await self.remote.follow(self._answer(ask))
        if isinstance(answer, Refused):
            raise answer
        return answer

    def finish(self, failure: str = "") -> Ending:
        """Pass the rewards to the session, and return how its episode ended.

        failure: why the agent failed. It is a fault, raised as OperationFailed, unless the policy had used up
        a budget before: then the episode is scored.
        """
        for response, value in self.given.items():
            self.remote.reward(value, call=None if response is None else self.calls[response])
        self.given.clear()
        if failure and self.limit is None:
            raise OperationFailed(failure)
        return self.limit if failure and self.limit is not None else Ending.finished

    async def _answer(self, ask: Ask) -> Answer | Refused:
        """Return errors that the agent caused: others end the episode."""
        try:
            return await (self._chat(ask) if ask.messages else self._generate(ask))
        except ContextFull as limit:
            self.limit = Ending.context_full
            message = (
                f"this model's maximum context length is exceeded: {limit}"  # words that clients look for
            )
            return Refused(400, "context_length_exceeded", message)
        except TurnLimit as limit:
            self.limit = Ending.turn_limit
            return Refused(400, "turn_limit", str(limit))
        except SessionClosed as closed:
            return Refused(401, "invalid_api_key", str(closed))
        except (ValueError, TypeError, RecursionError) as error:  # the agent gave wrong arguments
            return Refused(400, "invalid_request", str(error))

    async def _chat(self, ask: Ask) -> Answer:
        if ask.stop_token_ids:
            raise ValueError("stop_token_ids is supported only with a prompt of token ids")
        reply = await self.remote.chat(
            messages=[self._untruncated.get(_key(m), m) for m in ask.messages],
            tools=ask.tools,
            max_tokens=ask.max_tokens,
            stop=ask.stop,
            trained=ask.trained,
        )
        content, stopped_by = (
            cut(reply.content, ask.stop) if reply.finish == "stop" else (reply.content, None)
        )
        if stopped_by is not None:
            self._untruncated[_key(replace(reply, content=content).message())] = reply.message()
        return self._filled(ask, reply.call, reply, content, stopped_by)

    async def _generate(self, ask: Ask) -> Answer:
        if ask.echo or ask.prompt_top is not None:
            raise ValueError(
                "echo, prompt_logprobs: a session records what the policy samples; texts are scored by "
                "`rft serve`"
            )
        self.session.check_length(len(ask.text or ""))
        call = await self.session.generate(
            tokens_of(ask, self.session.tokenizer),
            max_tokens=ask.max_tokens,
            stop=ask.stop,
            stop_token_ids=ask.stop_token_ids,
            trained=ask.trained,
        )
        index = next(i for i, other in enumerate(self.session.calls) if other is call)
        content, _ = text_of(call, self.session.tokenizer)
        stopped_by = None
        if call.finish == "stop":
            content, stopped_by = cut(content, ask.stop)
        return self._filled(ask, index, Reply(content, finish=call.finish), content, stopped_by)

    def _filled(self, ask: Ask, index: int, reply: Reply, content: str, stopped_by: str | None) -> Answer:
        call = self.session.calls[index]
        self.calls[ask.id] = index
        answer = Answer(
            content,
            reply.reasoning,
            reply.tool_calls,
            reply.finish,
            stopped_by,
            prompt_length=len(call.prompt),
            length=len(call.sampled),
        )
        if not ask.details:
            return answer
        texts = self.session.tokenizer.batch_decode([[token] for token in call.sampled])
        return replace(answer, prompt=call.prompt, sampled=call.sampled, logps=call.logps, texts=tuple(texts))


@asynccontextmanager
async def open_session(session: types.Session, remote: Remote) -> AsyncIterator[tuple[Access, SessionCalls]]:
    """Open an episode's session at the endpoint for the length of a block."""
    endpoint = remote.runner.endpoint
    assert isinstance(endpoint, Endpoint) and isinstance(session, Session)
    calls = SessionCalls(session, remote)
    async with endpoint.session(session.name, session.budget.context, calls.reply) as access:
        yield access, calls


def tokens_of(ask: Ask, tokenizer: Any) -> tuple[int, ...]:
    """Return the prompt of a call without messages."""
    if ask.text is None:
        return ask.tokens
    return tuple(tokenizer(ask.text.encode("utf-8", "replace").decode())["input_ids"])


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Return a text up to the first stop string in it, and that string."""
    hits = [(at, word) for word in stop if (at := text.find(word)) >= 0]
    if not hits:
        return text, None
    at, word = min(hits)
    return text[:at], word


def _key(message: Message) -> str:
    return json.dumps(message, sort_keys=True) if message["role"] == "assistant" else ""
