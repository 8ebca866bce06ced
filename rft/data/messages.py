"""Normalise chat messages to one format: `role`, text `content`, without null keys.

Supported are the OpenAI format (content as a list of parts, tool calls with JSON text), ShareGPT (`from`,
`value`), either as stored by Arrow (missing keys filled with null), and all of these as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rft.data.errors import RowProblem

Messages = list[dict[str, Any]]
Text = str | Messages

_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def is_messages(value: Any) -> bool:
    """Return whether a value is a non-empty list of chat messages."""
    return isinstance(value, list) and bool(value) and all(_is_message(m) for m in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and (
        isinstance(value.get("role"), str) or isinstance(value.get("from"), str)
    )


def read_text(value: Any, column: str) -> Text:
    """Return a column's value as text or as normalised messages. Raises RowProblem."""
    if isinstance(value, str):
        parsed = _json_messages(value)
        return value if parsed is None else read_messages(parsed, column)
    return read_messages(value, column)


def read_messages(value: Any, column: str) -> Messages:
    """Normalise messages from any supported format. Raises RowProblem."""
    if isinstance(value, str):
        parsed = _json_messages(value)
        if parsed is None:
            raise RowProblem(f"`{column}` must be a list of {{role, content}} messages, not text")
        value = parsed
    if _is_message(value):
        value = [value]
    if not is_messages(value):
        raise RowProblem(
            f"`{column}` must be a string or a list of {{role, content}} messages, not {value!r:.80}"
        )
    return [_message(message, i, column) for i, message in enumerate(value, 1)]


def _json_messages(text: str) -> Any:
    """Parse messages from JSON text; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    content_keys = ("content", "value", "tool_calls")
    return value if is_messages(value) and all(any(key in m for key in content_keys) for m in value) else None


def _message(raw: Mapping[str, Any], number: int, column: str) -> dict[str, Any]:
    """Normalise a message: without nulls, content as text, tool-call arguments as objects."""
    message = {k: without_nulls(v) for k, v in raw.items() if v is not None and k != "content"}
    content = raw.get("content")
    if "role" not in message:
        content = raw.get("value")
        message = _from_sharegpt(message, content, number, column)
        content = None if "tool_calls" in message else content
    where = f"message {number} ({message['role']}) of `{column}`"
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _tool_calls(calls, where)
    text = _content(content, where)
    if text is None:
        if not calls:
            raise RowProblem(f"{where} has no content (null)")
        text = ""
    ordered = {"role": message.pop("role"), "content": text}
    return {**ordered, **message}


def _from_sharegpt(message: dict[str, Any], value: Any, number: int, column: str) -> dict[str, Any]:
    name = message.pop("from")
    message.pop("value", None)
    role = _SHAREGPT_ROLES.get(name)
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        raise RowProblem(f"message {number} of `{column}` is from {name!r}; the known roles are {known}")
    if name == "function_call":
        call = _parsed(value, f"message {number} (function_call) of `{column}`")
        calls = call if isinstance(call, list) else [call]
        message["tool_calls"] = [{"type": "function", "function": c} for c in calls]
    return {"role": role, **message}


def _content(content: Any, where: str) -> str | None:
    """Return text, or a list of text parts, as text; None stays None. Raises RowProblem."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowProblem(f"{where} has content that is not text: {content!r:.40}")
    texts = []
    for part in content:
        kept = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else part
        text = kept.get("text") if isinstance(kept, Mapping) else kept
        kind = kept.get("type", "text") if isinstance(kept, Mapping) else "text"
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            shown = kind if kind != "text" else f"part {kept!r:.40}"
            raise RowProblem(f"{where} contains {_named(str(shown))}; rft trains on text only")
        texts.append(text)
    return "".join(texts) if texts else None


def _named(kind: str) -> str:
    for medium in ("image", "audio", "video", "file"):
        if medium in kind:
            return f"{'an' if medium[0] in 'ai' else 'a'} {medium} ({kind})"
    return f"a {kind}"


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Normalise tool-call arguments to objects: most templates would encode JSON text as JSON again."""
    out = []
    for call in _listed(_parsed(calls, where) if isinstance(calls, str) else calls):
        if not isinstance(call, Mapping):
            raise RowProblem(f"{where} has a tool call that is not an object: {call!r:.40}")
        inner = call.get("function", call)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RowProblem(f"{where} has a tool call without the name of its function")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"{where}, arguments of {inner['name']}")
        filled = {**inner, "arguments": arguments}
        out.append({**call, "function": filled} if inner is not call else filled)
    return out


def read_tools(value: Any) -> list[Any] | None:
    """Parse the `tools` column: a list of function schemas, its JSON text, or None. Raises RowProblem."""
    value = _parsed(value, "`tools`") if isinstance(value, str) and value.strip() else value
    if not value:
        return None
    tools = [_parsed(t, "`tools`") if isinstance(t, str) else without_nulls(t) for t in _listed(value)]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise RowProblem(f"`tools` must be a list of function schemas, not {value!r:.40}")
    return tools


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parsed(text: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise RowProblem(f"{where}: not JSON: {text!r:.60}") from None


def without_nulls(value: Any) -> Any:
    """Remove the null keys that Arrow adds to objects, recursively."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
