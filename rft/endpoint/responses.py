"""OpenAI's dialect `responses`, translated to the chat form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

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
from rft.endpoint.openai import OpenAIDialect, pieces
from rft.endpoint.types import Answer, Ask, Refused
from rft.environments.types import Message

TEXT = ("text", "input_text", "output_text")


class ToolBody(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str = "function"
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ResponsesBody(Body):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    previous_response_id: str | None = None
    conversation: Any = None
    text: dict[str, Any] | None = None
    background: bool | None = None

    def ask(self) -> Ask:
        if self.previous_response_id or self.conversation:
            raise invalid("responses are not stored: send the whole conversation in `input`", "input")
        if self.background:
            raise invalid("background is not supported", "background")
        form = (self.text or {}).get("format")
        if isinstance(form, dict) and form.get("type", "text") != "text":
            raise invalid("text.format is not supported: sampling is not constrained; leave it out", "text")
        other = next((t.type for t in self.tools or [] if t.type != "function" or not t.name), None)
        if other is not None:
            raise invalid(f"tools: only functions with a name are supported, not {other!r}", "tools")
        messages: list[Message] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        sampling = {n: v for n in ("temperature", "top_p") if (v := getattr(self, n)) is not None}
        return Ask(
            messages=conversation(messages + read_items(given)),
            tools=[]
            if self.tool_choice == "none"
            else [
                Function(name=t.name or "", description=t.description, parameters=t.parameters).schema_of()
                for t in self.tools or []
            ],
            max_tokens=self.max_output_tokens,
            trained=self.model != UNTRAINED,
            sampling=sampling,
        )


class Responses(OpenAIDialect):
    prefix = "resp_"

    def read(self, body: Mapping[str, Any]) -> ResponsesBody:
        return validated(ResponsesBody, body)

    def write(self, sent: Sent[ResponsesBody], answer: Answer) -> dict[str, Any]:
        cut = answer.finish == "length"
        return {
            **self._head(sent, "incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items(sent, answer),
            "usage": {
                "input_tokens": answer.prompt_length,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": answer.length,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": answer.prompt_length + answer.length,
            },
        }

    def opening(self, sent: Sent[ResponsesBody]) -> Iterator[Event]:
        started = self._head(sent, "in_progress")
        for number, name in enumerate(("response.created", "response.in_progress")):
            yield name, {"type": name, "sequence_number": number, "response": started}

    def answering(self, sent: Sent[ResponsesBody], answer: Answer) -> Iterator[Event]:
        numbers = count(2)

        def event(kind: str, **data: Any) -> Event:
            return kind, {"type": kind, "sequence_number": next(numbers), **data}

        for index, item in enumerate(items(sent, answer)):
            place = {"item_id": item["id"], "output_index": index}
            yield event("response.output_item.added", output_index=index, item=_in_progress(item))
            if item["type"] == "message":
                (part,) = item["content"]
                empty = {**part, "text": ""}
                yield event("response.content_part.added", **place, content_index=0, part=empty)
                for piece in pieces(part["text"]):
                    yield event(
                        "response.output_text.delta", **place, content_index=0, delta=piece, logprobs=[]
                    )
                text = part["text"]
                yield event("response.output_text.done", **place, content_index=0, text=text, logprobs=[])
                yield event("response.content_part.done", **place, content_index=0, part=part)
            elif item["type"] == "function_call":
                text = item["arguments"]
                yield event("response.function_call_arguments.delta", **place, delta=text)
                yield event(
                    "response.function_call_arguments.done", **place, name=item["name"], arguments=text
                )
            yield event("response.output_item.done", output_index=index, item=item)
        last = "response.incomplete" if answer.finish == "length" else "response.completed"
        yield event(last, response=self.write(sent, answer))

    def failure(self, problem: Refused) -> Iterator[Event]:
        yield (
            "error",
            {"type": "error", "sequence_number": 2, "code": problem.code, "message": problem.message},
        )

    def _head(self, sent: Sent[ResponsesBody], status: str) -> dict[str, Any]:
        body = sent.body
        return {
            "id": sent.id,
            "object": "response",
            "created_at": sent.created,
            "status": status,
            "model": body.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tool_choice": "none" if body.tool_choice == "none" else "auto",
            "tools": [{"strict": False, **t.model_dump()} for t in body.tools or []],
        }


def items(sent: Sent[ResponsesBody], answer: Answer) -> list[dict[str, Any]]:
    """Return an answer as output items."""
    name, status = sent.id.removeprefix("resp_"), "incomplete" if answer.finish == "length" else "completed"
    output: list[dict[str, Any]] = []
    if answer.reasoning:
        content = [{"type": "reasoning_text", "text": answer.reasoning}]
        output.append({"id": f"rs_{name}", "type": "reasoning", "summary": [], "content": content})
    if answer.content or not answer.tool_calls:
        part = {"type": "output_text", "text": answer.content, "annotations": [], "logprobs": []}
        message = {"id": f"msg_{name}", "type": "message", "role": "assistant", "status": status}
        output.append({**message, "content": [part]})
    for number, call in enumerate(answer.tool_calls):
        output.append(
            {
                "id": f"fc_{name}_{number}",
                "type": "function_call",
                "call_id": call.id,
                "name": call.name,
                "arguments": arguments_text(call.arguments),
                "status": status,
            }
        )
    return output


def _in_progress(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item as its stream begins."""
    if item["type"] == "message":
        return {**item, "content": [], "status": "in_progress"}
    if item["type"] == "function_call":
        return {**item, "arguments": "", "status": "in_progress"}
    return {**item, "content": []}


def read_items(given: list[dict[str, Any]]) -> list[Message]:
    """Translate input items. The policy's output of one response is one message. Raises Refused."""
    messages: list[Message] = []
    assistant: Message | None = None  # the assistant's message that further items of the response belong to

    def answer() -> Message:
        nonlocal assistant
        if assistant is None:
            assistant = {"role": "assistant", "content": ""}
            messages.append(assistant)
        return assistant

    for number, item in enumerate(given):
        where, kind = f"input.{number}", item.get("type", "message")
        if kind == "function_call":
            call = tool_call(item.get("name"), item.get("arguments", {}), item.get("call_id"), where)
            answer().setdefault("tool_calls", []).append(call)
        elif kind == "reasoning":
            assistant = None  # a response begins with its thought
            if text := text_of(item.get("content"), where, (*TEXT, "reasoning_text")):
                answer()["reasoning_content"] = text
        elif kind == "function_call_output":
            assistant = None
            result: Message = {"role": "tool", "content": text_of(item.get("output"), where, TEXT)}
            if isinstance(item.get("call_id"), str):
                result["tool_call_id"] = item["call_id"]
            messages.append(result)
        elif kind == "message" and item.get("role") == "assistant":
            text = text_of(item.get("content"), where, TEXT)
            if assistant is not None and (assistant["content"] or "tool_calls" in assistant):
                assistant = None
            answer()["content"] = text
        elif kind == "message" and item.get("role") in ("user", "system", "developer"):
            assistant = None
            role = "user" if item["role"] == "user" else "system"
            messages.append({"role": role, "content": text_of(item.get("content"), where, TEXT)})
        else:
            raise invalid(
                f"{where}: items of type {kind!r} with role {item.get('role')!r} are not supported", "input"
            )
    return messages
