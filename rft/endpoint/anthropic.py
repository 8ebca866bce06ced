"""Anthropic's dialect `messages`, translated to the chat form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
from rft.endpoint.openai import pieces
from rft.endpoint.types import Answer, Ask, Refused
from rft.environments.types import Message

ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class ToolBody(BaseModel):
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any] = {}


class MessagesBody(Body):
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: Any = None
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: dict[str, Any] | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)

    def ask(self) -> Ask:
        messages: list[Message] = []
        if system := text_of(self.system, "system"):
            messages.append({"role": "system", "content": system})
        for number, raw in enumerate(self.messages):
            messages += read_message(raw, f"messages.{number}")
        tools = [
            Function(name=t.name, description=t.description, parameters=t.input_schema).schema_of()
            for t in self.tools or []
        ]
        sampling = {n: v for n in ("temperature", "top_p") if (v := getattr(self, n)) is not None}
        return Ask(
            messages=conversation(messages),
            tools=[] if (self.tool_choice or {}).get("type") == "none" else tools,
            max_tokens=self.max_tokens,
            stop=tuple(word for word in self.stop_sequences or () if word),
            trained=self.model != UNTRAINED,
            sampling=sampling,
        )


class AnthropicMessages:
    prefix = "msg_"

    def read(self, body: Mapping[str, Any]) -> MessagesBody:
        return validated(MessagesBody, body)

    def write(self, sent: Sent[MessagesBody], answer: Answer) -> dict[str, Any]:
        usage = {"input_tokens": answer.prompt_length, "output_tokens": answer.length}
        return {**self._head(sent), "content": blocks(answer), **_ending(answer), "usage": usage}

    def opening(self, sent: Sent[MessagesBody]) -> Iterator[Event]:
        message = {**self._head(sent), "content": [], "stop_reason": None, "stop_sequence": None}
        message["usage"] = {"input_tokens": 0, "output_tokens": 0}  # not known yet: they are in message_delta
        yield _event("message_start", message=message)

    def answering(self, sent: Sent[MessagesBody], answer: Answer) -> Iterator[Event]:
        for index, block in enumerate(blocks(answer)):
            start, deltas = _deltas(block)
            yield _event("content_block_start", index=index, content_block=start)
            for delta in deltas:
                yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)
        usage = {"input_tokens": answer.prompt_length, "output_tokens": answer.length}
        yield _event("message_delta", delta=_ending(answer), usage=usage)
        yield _event("message_stop")

    def error(self, problem: Refused) -> dict[str, Any]:
        kind = ERROR_TYPES.get(problem.status)
        kind = kind or ("api_error" if problem.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": problem.message}}

    def failure(self, problem: Refused) -> Iterator[Event]:
        yield "error", self.error(problem)

    def _head(self, sent: Sent[MessagesBody]) -> dict[str, Any]:
        return {"id": sent.id, "type": "message", "role": "assistant", "model": sent.body.model}


def read_message(raw: dict[str, Any], where: str) -> list[Message]:
    """Translate a message; the results of tools in it become messages before it. Raises Refused."""
    role, content = raw.get("role"), raw.get("content")
    if role not in ("user", "assistant", "system"):
        raise invalid(f"{where}.role must be user or assistant", where)
    if not isinstance(content, list):
        return [{"role": role, "content": text_of(content, where)}]
    texts, thoughts = list[str](), list[str]()
    calls, results = list[dict[str, Any]](), list[Message]()
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use" and role == "assistant":
            calls.append(tool_call(block.get("name"), block.get("input"), block.get("id"), where))
        elif kind == "tool_result" and role == "user":
            result: Message = {"role": "tool", "content": text_of(block.get("content"), where)}
            if isinstance(block.get("tool_use_id"), str):
                result["tool_call_id"] = block["tool_use_id"]
            results.append(result)
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            texts.append(text_of([block], where))
    message: Message = {"role": role, "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [*results, message] if texts or calls or thoughts or not results else results


def blocks(answer: Answer) -> list[dict[str, Any]]:
    """Return the content of an answer as blocks."""
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content or not answer.tool_calls:
        content.append({"type": "text", "text": answer.content})
    for call in answer.tool_calls:
        content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments})
    return content


def _deltas(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a block as its stream begins, and the changes that complete it."""
    if block["type"] == "tool_use":
        text = arguments_text(block["input"])
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": text}]
    name = "thinking" if block["type"] == "thinking" else "text"
    deltas = [{"type": f"{name}_delta", name: piece} for piece in pieces(block[name])]
    return {**block, name: ""}, deltas


def _ending(answer: Answer) -> dict[str, Any]:
    reason = "max_tokens" if answer.finish == "length" else "end_turn"
    if answer.stopped_by is not None:
        reason = "stop_sequence"
    if answer.tool_calls:
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": answer.stopped_by}


def _event(name: str, **data: Any) -> Event:
    return name, {"type": name, **data}
