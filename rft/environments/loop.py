"""Parts that kinds share: the loop of tool calls, the first messages, and values as text for the policy."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rft.environments.types import ContextFull, Ending, Message, Row, Session, ToolCall, TurnLimit

CallTool = Callable[[ToolCall], Awaitable[str]]


async def tool_loop(
    session: Session, messages: list[Message], tools: Sequence[Mapping[str, Any]], call_tool: CallTool
) -> Ending:
    """Chat, execute the tool calls of the answer, append their results, until an answer has none.

    messages: the conversation, which is extended in place. Text that is meant as a tool call but cannot be
    parsed is answered by an error message.
    """
    while True:
        try:
            reply = await session.chat(messages, tools=tools)
        except ContextFull:
            return Ending.context_full
        except TurnLimit:
            return Ending.turn_limit
        messages.append(reply.message())
        if reply.error:
            messages.append({"role": "tool", "name": "error", "content": error_text(reply.error)})
        elif not reply.tool_calls:
            return Ending.finished
        for call in reply.tool_calls:
            result: Message = {"role": "tool", "name": call.name, "content": await call_tool(call)}
            if call.id:
                result["tool_call_id"] = call.id
            messages.append(result)


def error_text(error: str) -> str:
    """Write an error for the policy to read."""
    return json.dumps({"error": error}, ensure_ascii=False)


def first_messages(row: Row, observation: Any = None, separator: str = "") -> list[Message]:
    """Return the prompt as messages, with the environment's first observation at the end of the user's
    message, after `separator`. observation: a text, content parts, a list of messages, or None."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if observation is None or observation == "" or observation == []:
        return messages
    if is_messages(observation):
        return messages + observation
    last = messages[-1]
    text = as_text(observation)
    if last["role"] != "user":
        return [*messages, {"role": "user", "content": text}]
    return [*messages[:-1], {**last, "content": f"{last['content']}{separator}{text}"}]


def is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def as_text(value: Any) -> str:
    """Return a value as text for the policy: a string unchanged, the text of content parts, else JSON."""
    if isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(p, dict) and p.get("type") == "text" for p in value)
    ):
        return "".join(part["text"] for part in value)
    if isinstance(value, dict | list | tuple):
        try:
            return json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError):  # keys that are not strings, circular references
            return str(value)
    return str(value)


def _is_text_part(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str)
