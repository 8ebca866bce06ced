"""OpenAI's dialects `chat/completions` and `completions`, and vLLM's `inference/v1/generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Literal

from pydantic import BaseModel, Field

from rft.endpoint.dialect import (
    UNTRAINED,
    Body,
    Event,
    Function,
    Sent,
    arguments_text,
    conversation,
    invalid,
    text_of,
    tool_call,
    validated,
)
from rft.endpoint.types import Answer, Ask, Echoed, Refused
from rft.environments.types import Message

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
Stop = str | list[str] | None
TokenId = int


class OpenAIBody(Body):
    """The fields that both of OpenAI's forms have."""

    n: int = 1
    stop: Stop = None
    stop_token_ids: list[int] = Field([])
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream_options: dict[str, Any] | None = None
    return_token_ids: bool | None = False

    def shared(self) -> dict[str, Any]:
        """Return the fields of an Ask that do not depend on the form. Raises Refused."""
        if self.n != 1:
            raise invalid("n must be 1: each call is one turn of its session", "n")
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise invalid(f"{name} is not supported: it changes the distribution that is trained", name)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        sampling = {n: v for n in ("temperature", "top_p", "seed") if (v := getattr(self, n)) is not None}
        return {
            "stop": tuple(word for word in stop if word),
            "stop_token_ids": tuple(self.stop_token_ids),
            "trained": self.model != UNTRAINED,
            "sampling": sampling,
        }

    @property
    def wants_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class ToolBody(BaseModel):
    type: Literal["function"] = "function"
    function: Function


class ChatBody(OpenAIBody):
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None

    def ask(self) -> Ask:
        if (self.response_format or {}).get("type", "text") != "text":
            raise invalid(
                "response_format is not supported: sampling is not constrained; leave it out",
                "response_format",
            )
        if self.top_logprobs:
            raise invalid(
                "top_logprobs is not supported: only sampled tokens have log-probs; leave it out",
                "top_logprobs",
            )
        tools = [] if self.tool_choice == "none" else [t.function.schema_of() for t in self.tools or []]
        return Ask(
            messages=read_messages(self.messages),
            tools=tools,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            details=bool(self.logprobs or self.return_token_ids),
            **self.shared(),
        )


class CompletionBody(OpenAIBody):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = None
    echo: bool = False
    prompt_logprobs: int | None = Field(None, ge=0)
    best_of: int | None = None
    suffix: str | None = None

    def ask(self) -> Ask:
        for name, wrong in (
            ("best_of", (self.best_of or 1) != 1),
            ("suffix", bool(self.suffix)),
            ("logprobs", (self.logprobs or 0) > 1),
        ):
            if wrong:
                raise invalid(f"{name} is not supported; leave it out", name)
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise invalid(
                "max_tokens: 0 needs echo: true or prompt_logprobs, which score the prompt", "max_tokens"
            )
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise invalid("prompt must be one prompt, not a list of several", "prompt")
            prompt = prompt[0]
        given: dict[str, Any] = {"text": prompt} if isinstance(prompt, str) else {"tokens": tuple(prompt)}
        return Ask(
            **given,
            max_tokens=self.max_tokens,
            details=self.logprobs is not None or bool(self.return_token_ids),
            echo=self.echo,
            prompt_top=self.prompt_logprobs,
            **self.shared(),
        )


class OpenAIDialect:
    """Errors, which both of OpenAI's forms share."""

    def error(self, problem: Refused) -> dict[str, Any]:
        kind = ERROR_TYPES.get(problem.status)
        kind = kind or ("server_error" if problem.status >= 500 else "invalid_request_error")
        error = {"message": problem.message, "type": kind, "param": problem.param, "code": problem.code}
        return {"error": error}

    def failure(self, problem: Refused) -> Iterator[Event]:
        yield "", self.error(problem)
        yield "", "[DONE]"


class Chat(OpenAIDialect):
    prefix = "chatcmpl-"

    def read(self, body: Mapping[str, Any]) -> ChatBody:
        return validated(ChatBody, body)

    def write(self, sent: Sent[ChatBody], answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.content if answer.content or not answer.tool_calls else None,
        }
        if answer.reasoning:
            message |= {"reasoning": answer.reasoning, "reasoning_content": answer.reasoning}
        if answer.tool_calls:
            message["tool_calls"] = _tool_calls(answer)
        choice = {"index": 0, "message": message, **self._ending(sent.body, answer)}
        whole = {**self._head(sent, "chat.completion"), "choices": [choice], "usage": usage(answer)}
        return whole | ({"prompt_token_ids": list(answer.prompt)} if sent.body.return_token_ids else {})

    def opening(self, sent: Sent[ChatBody]) -> Iterator[Event]:
        yield self._chunk(sent, {"role": "assistant", "content": ""})

    def answering(self, sent: Sent[ChatBody], answer: Answer) -> Iterator[Event]:
        if answer.reasoning:
            thought = {"reasoning": answer.reasoning, "reasoning_content": answer.reasoning}
            yield self._chunk(sent, thought)
        for piece in pieces(answer.content):
            yield self._chunk(sent, {"content": piece})
        for index, call in enumerate(_tool_calls(answer)):
            yield self._chunk(sent, {"tool_calls": [{"index": index, **call}]})
        more = {"prompt_token_ids": list(answer.prompt)} if sent.body.return_token_ids else {}
        yield self._chunk(sent, {}, self._ending(sent.body, answer), more)
        if sent.body.wants_usage:
            head = self._head(sent, "chat.completion.chunk")
            yield "", {**head, "choices": [], "usage": usage(answer)}
        yield "", "[DONE]"

    def _head(self, sent: Sent[ChatBody], kind: str) -> dict[str, Any]:
        return {"id": sent.id, "object": kind, "created": sent.created, "model": sent.body.model}

    def _chunk(
        self,
        sent: Sent[ChatBody],
        delta: dict[str, Any],
        ending: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Event:
        choice = {"index": 0, "delta": delta, **(ending or {"logprobs": None, "finish_reason": None})}
        return "", {**self._head(sent, "chat.completion.chunk"), "choices": [choice], **(more or {})}

    def _ending(self, body: ChatBody, answer: Answer) -> dict[str, Any]:
        ending: dict[str, Any] = {"logprobs": None}
        if body.logprobs:
            rows = zip(answer.texts, answer.logps, strict=True)
            ending["logprobs"] = {"content": [_logprob(text, logp) for text, logp in rows]}
        if body.return_token_ids:
            ending["token_ids"] = list(answer.sampled)
        ending["finish_reason"] = "tool_calls" if answer.tool_calls else answer.finish
        return ending


class Completions(OpenAIDialect):
    prefix = "cmpl-"

    def read(self, body: Mapping[str, Any]) -> CompletionBody:
        return validated(CompletionBody, body)

    def write(self, sent: Sent[CompletionBody], answer: Answer) -> dict[str, Any]:
        return {**self._head(sent), "choices": [self._choice(sent.body, answer)], "usage": usage(answer)}

    def opening(self, sent: Sent[CompletionBody]) -> Iterator[Event]:
        yield from ()

    def answering(self, sent: Sent[CompletionBody], answer: Answer) -> Iterator[Event]:
        yield "", {**self._head(sent), "choices": [self._choice(sent.body, answer)]}
        if sent.body.wants_usage:
            yield "", {**self._head(sent), "choices": [], "usage": usage(answer)}
        yield "", "[DONE]"

    def _head(self, sent: Sent[CompletionBody]) -> dict[str, Any]:
        return {
            "id": sent.id,
            "object": "text_completion",
            "created": sent.created,
            "model": sent.body.model,
        }

    def _choice(self, body: CompletionBody, answer: Answer) -> dict[str, Any]:
        echoed = answer.echoed if body.echo else ()
        text = "".join(token.text for token in echoed) + answer.content
        choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None}
        if body.logprobs is not None:
            sampled = zip(answer.texts, answer.logps, strict=True)
            rows = [*echoed, *(Echoed(text, logp, text, logp) for text, logp in sampled)]
            choice["logprobs"] = {
                "tokens": [row.text for row in rows],
                "token_logprobs": [row.logp for row in rows],
                # The most likely token last: of two tokens with one text, it keeps its log-prob.
                "top_logprobs": [
                    None if row.logp is None else {row.text: row.logp, row.best: row.best_logp}
                    for row in rows
                ],
                "text_offset": [0, *accumulate(len(row.text) for row in rows)][: len(rows)],
            }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [_prompt_logprobs(token) for token in answer.echoed]
        if body.return_token_ids:
            choice |= {"token_ids": list(answer.sampled), "prompt_token_ids": list(answer.prompt)}
        return {**choice, "finish_reason": answer.finish}


def _prompt_logprobs(token: Echoed) -> dict[str, Any] | None:
    """Return vLLM's entry of a token of the prompt: the most likely tokens and the one given, by id."""
    if token.logp is None:
        return None
    rows = {i: {"logprob": p, "rank": r, "decoded_token": t} for r, (i, t, p) in enumerate(token.top, 1)}
    rows.setdefault(token.id, {"logprob": token.logp, "rank": None, "decoded_token": token.text})
    return {str(i): row for i, row in rows.items()}


# -- vLLM's form -------------------------------------------------------------------------------------------


class SamplingParams(BaseModel):
    """The sampling parameters of vLLM that rft reads."""

    n: int = 1
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None


class GenerateBody(Body):
    token_ids: list[int] = Field(min_length=1)
    sampling_params: SamplingParams = SamplingParams()

    def ask(self) -> Ask:
        params = self.sampling_params
        if self.stream:
            raise invalid("stream is not supported here", "stream")
        if params.n != 1:
            raise invalid("sampling_params.n must be 1", "sampling_params.n")
        stop = [params.stop] if isinstance(params.stop, str) else params.stop or []
        sampling = {n: v for n in ("temperature", "top_p", "seed") if (v := getattr(params, n)) is not None}
        return Ask(
            tokens=tuple(self.token_ids),
            max_tokens=params.max_tokens,
            stop=tuple(word for word in stop if word),
            stop_token_ids=tuple(params.stop_token_ids or ()),
            trained=self.model != UNTRAINED,
            details=True,
            sampling=sampling,
        )


class Generate(OpenAIDialect):
    prefix = "gen-"

    def read(self, body: Mapping[str, Any]) -> GenerateBody:
        return validated(GenerateBody, body)

    def write(self, sent: Sent[GenerateBody], answer: Answer) -> dict[str, Any]:
        rows = zip(answer.sampled, answer.logps, strict=True)
        content = [{"token": f"token_id:{t}", "logprob": p, "top_logprobs": []} for t, p in rows]
        choice = {
            "index": 0,
            "token_ids": list(answer.sampled),
            "logprobs": {"content": content},
            "finish_reason": answer.finish,
        }
        return {
            "request_id": sent.id,
            "created": sent.created,
            "model": sent.body.model,
            "prompt_token_ids": list(answer.prompt),
            "choices": [choice],
            "usage": usage(answer),
        }

    def opening(self, sent: Sent[GenerateBody]) -> Iterator[Event]:
        yield from ()

    def answering(self, sent: Sent[GenerateBody], answer: Answer) -> Iterator[Event]:
        yield from ()


# -- messages ----------------------------------------------------------------------------------------------


def read_messages(given: list[dict[str, Any]]) -> list[Message]:
    """Return OpenAI's messages as a session reads them: only the fields that chat templates know."""
    return conversation([_message(raw, f"messages.{i}") for i, raw in enumerate(given)])


def _message(raw: dict[str, Any], where: str) -> Message:
    role = raw.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise invalid(f"{where}.role must be system, developer, user, assistant or tool", where)
    kinds = ("text", "input_text", "output_text")
    message: Message = {
        "role": "system" if role == "developer" else role,
        "content": text_of(raw.get("content"), where, kinds),
    }
    if role == "assistant":
        reasoning = raw.get("reasoning_content") or raw.get("reasoning")
        if isinstance(reasoning, str) and reasoning:
            message["reasoning_content"] = reasoning
        calls = raw.get("tool_calls") or []
        if not isinstance(calls, list):
            raise invalid(f"{where}.tool_calls must be a list", where)
        if calls:
            message["tool_calls"] = [_call(call, where) for call in calls]
    for name in ("name", "tool_call_id"):
        if role != "assistant" and isinstance(raw.get(name), str):
            message[name] = raw[name]
    return message


def _call(raw: Any, where: str) -> dict[str, Any]:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(function, dict):
        raise invalid(f"{where}: a tool call needs a function", where)
    return tool_call(function.get("name"), function.get("arguments", {}), raw.get("id"), where)


def _tool_calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": arguments_text(call.arguments)},
        }
        for call in answer.tool_calls
    ]


def _logprob(text: str, logp: float) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": logp,
        "bytes": list(text.encode("utf-8", "replace")),
        "top_logprobs": [],
    }


def usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_length,
        "completion_tokens": answer.length,
        "total_tokens": answer.prompt_length + answer.length,
    }


def pieces(text: str, length: int = 512) -> Iterator[str]:
    """Split a text for a stream. The engine returns whole answers, so that more pieces would help nobody."""
    for at in range(0, len(text), length):
        yield text[at : at + length]
