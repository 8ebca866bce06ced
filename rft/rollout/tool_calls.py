"""Parse the tool calls that a policy writes: JSON in tags, Llama 3's JSON, Python calls, and XML.

A parser never raises. A malformed call gives an error text for the policy to read, and its text stays in the
content.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rft.data.chat import Renderer
from rft.data.errors import RowProblem
from rft.environments.types import ToolCall

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Parsed:
    """content: the text without the calls. error: why a call could not be parsed, "" if all could."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    error: str = ""


class Malformed(ValueError):
    """The text of a tool call is not well-formed."""


@dataclass(frozen=True)
class Written:
    """A tool call at text[start:end]."""

    start: int
    end: int
    name: str
    arguments: dict[str, Any]


Reader = Callable[[str, Tools], Iterator[Written]]
"""Yields the calls of a text in order. Raises Malformed, or an error of Python's own parsers."""


def parse(format_: str, text: str, tools: Tools) -> Parsed:
    """Parse an answer in one of FORMATS. tools: schemas, as given to the chat template."""
    try:
        calls = list(FORMATS[format_](text, tools))
        for call in calls:
            json.dumps(call.arguments, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as problem:
        why = "nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        return Parsed(text, error=f"The tool call could not be parsed: {why}")
    content, at = "", 0
    for call in calls:
        content, at = content + text[at : call.start], call.end
    content = (content + text[at:]).strip() if calls else text
    numbered = enumerate(calls)
    return Parsed(content, tuple(ToolCall(c.name, c.arguments, f"call_{i}") for i, c in numbered))


# -- JSON ------------------------------------------------------------------------------------------------

_DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse(f"{name} is not JSON"))


def _refuse(why: str) -> Any:
    raise Malformed(why)


def _json_at(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value at text[at:] and its end."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise Malformed(f"invalid JSON: {error.msg} at character {error.pos - at}") from None


def _function(value: Any, start: int, end: int) -> Written:
    """Return a decoded call: an object with `name` and `arguments` (or `parameters`)."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise Malformed('expected an object {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json_at(arguments.strip() or "{}", 0)[0]
    if not isinstance(arguments, dict):
        raise Malformed(f"the arguments of {value['name']} must be an object")
    return Written(start, end, value["name"], arguments)


def _tagged(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start of a `<tool_call>` tag, start of its contents)."""
    at = 0
    while (start := text.find("<tool_call>", at)) >= 0:
        yield start, start + len("<tool_call>")
        at = start + len("<tool_call>")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _closed(text: str, at: int) -> int:
    """Return the end of the `</tool_call>` that must follow."""
    at = _skip_space(text, at)
    if not text.startswith("</tool_call>", at):
        raise Malformed("</tool_call> is missing")
    return at + len("</tool_call>")


def read_json(text: str, tools: Tools) -> Iterator[Written]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen)."""
    last = 0
    for start, inner in _tagged(text):
        if start < last:  # inside a string of the call before
            continue
        value, end = _json_at(text, _skip_space(text, inner))
        last = _closed(text, end)
        yield _function(value, start, last)
    if "</tool_call>" in text[last:]:
        raise Malformed("<tool_call> is missing")


def read_llama3(text: str, tools: Tools) -> Iterator[Written]:
    """`{"name": ..., "parameters": {...}}` as the whole answer, several separated by `;` (Llama 3)."""
    tag = text.find("<|python_tag|>")
    start = 0 if tag < 0 else tag
    at = _skip_space(text, start if tag < 0 else tag + len("<|python_tag|>"))
    if tag < 0 and not re.match(r'\{\s*"(name|type)"', text[at:]):
        return  # an ordinary answer
    while at < len(text):
        value, end = _json_at(text, at)
        at = _skip_space(text, end)
        if text.startswith(";", at):
            at = _skip_space(text, at + 1)
        yield _function(value, start, at)
        start = at


# -- Python ----------------------------------------------------------------------------------------------

_NAMES = {"true": True, "false": False, "null": None}


def read_pythonic(text: str, tools: Tools) -> Iterator[Written]:
    """`[name(key=value), ...]` as the whole answer (Llama 3.2 and 4)."""
    tagged = re.fullmatch(r"(.*?)<\|python_start\|>(.*?)(?:<\|python_end\|>\s*)?", text, re.DOTALL)
    before, code = tagged.groups() if tagged else ("", text)
    if not tagged and not re.match(r"\s*\[\s*[A-Za-z_][\w.]*\s*\(", code):
        return  # an ordinary answer
    try:
        tree = ast.parse(code.strip(), mode="eval").body
    except SyntaxError as error:
        raise Malformed(f"invalid syntax: {error.msg}") from None
    calls = tree.elts if isinstance(tree, ast.List) else [tree]
    ends = [len(before)] * (len(calls) - 1) + [len(text)]
    for call, end in zip(calls, ends, strict=True):
        if not isinstance(call, ast.Call):
            raise Malformed("expected a list of calls, [name(key=value), ...]")
        name = ast.unparse(call.func)
        yield Written(len(before), end, name, _keywords(name, call, tools))


def _keywords(name: str, call: ast.Call, tools: Tools) -> dict[str, Any]:
    """Return the arguments by name; those without a name are in the order of the schema."""
    order = list(_properties(name, tools))
    if len(call.args) > len(order):
        raise Malformed(f"write the arguments of {name} as name=value")
    pairs = [*zip(order, call.args, strict=False), *((k.arg, k.value) for k in call.keywords)]
    arguments: dict[str, Any] = {}
    for key, value in pairs:
        if key is None or key in arguments:
            raise Malformed(f"write every argument of {name} once, as name=value")
        arguments[key] = _literal(value)
    return arguments


def _literal(node: ast.expr) -> Any:
    """Evaluate a literal, in which JSON's true, false and null are allowed."""
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise Malformed("the keys of an object must be strings")
        return dict(zip(keys, map(_literal, node.values), strict=True))
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | None):
        raise Malformed(f"{ast.unparse(node)} is not a JSON value")
    return value


# -- XML -------------------------------------------------------------------------------------------------

_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>(.*?)</parameter>", re.DOTALL)
_PAIR = re.compile(r"\s*<arg_key>([^<>\n]+)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def read_xml(text: str, tools: Tools) -> Iterator[Written]:
    """`<function=name><parameter=key>value</parameter></function>` (Qwen3-Coder), or
    `name<arg_key>key</arg_key><arg_value>value</arg_value>` (GLM), each in `<tool_call>` tags."""
    last = 0
    for start, inner in _tagged(text):
        if start < last:  # inside a value of the call before
            continue
        at = _skip_space(text, inner)
        head = re.compile(r"<function=([^<>\n]+)>|([\w.\-]+)").match(text, at)
        if head is None:
            raise Malformed("the name of the function is missing after <tool_call>")
        coder = head[1] is not None
        name, at = (head[1] or head[2]).strip(), head.end()
        arguments: dict[str, Any] = {}
        while pair := (_PARAMETER if coder else _PAIR).match(text, at):
            key, at = pair[1].strip(), pair.end()
            if key in arguments:
                raise Malformed(f"the argument {key} of {name} is given twice")
            value = pair[2].removeprefix("\n").removesuffix("\n") if coder else pair[2]
            arguments[key] = _typed(value, name, key, tools)
        if coder:
            at = _skip_space(text, at)
            if not text.startswith("</function>", at):
                raise Malformed(f"</function> is missing after the arguments of {name}")
            at += len("</function>")
        last = _closed(text, at)
        yield Written(start, last, name, arguments)
    if "</tool_call>" in text[last:]:
        raise Malformed("<tool_call> is missing")


def _typed(value: str, name: str, key: str, tools: Tools) -> Any:
    """Return a value as its schema says: text for a string, JSON for anything else. A value that is not JSON
    stays text: checking it against the schema names the argument."""
    schema = _properties(name, tools).get(key)
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return value
    try:
        result, end = _json_at(value, _skip_space(value, 0))
    except Malformed:
        return value
    return value if value[end:].strip() else result


def _properties(name: str, tools: Tools) -> Mapping[str, Any]:
    """Return the schemas of a function's parameters by name."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties")
            return properties if isinstance(properties, Mapping) else {}
    return {}


FORMATS: dict[str, Reader] = {
    "json": read_json,
    "llama3": read_llama3,
    "pythonic": read_pythonic,
    "xml": read_xml,
}


# -- the format of a chat template -------------------------------------------------------------------------

_TOOL = {
    "type": "function",
    "function": {
        "name": "rft_tool",
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"rft_key": {"type": "string", "description": "A key."}},
            "required": ["rft_key"],
        },
    },
}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "rftcall00",  # Mistral's templates want nine characters
            "function": {"name": "rft_tool", "arguments": {"rft_key": "rft_value"}},
        }
    ],
}


def format_of(render: Renderer) -> str:
    """Return the format in which a chat template writes tool calls, one of FORMATS. Raises RowProblem if it
    does not write tools or tool calls, or writes them in no known format."""
    question = [{"role": "user", "content": "rft-asks"}]
    render.check_tools([*question, _CALL], [_TOOL])
    text = render.render([*question, _CALL], [_TOOL])
    head = render.render(question, [_TOOL], generate=True)
    at = next((i for i, (a, b) in enumerate(zip(text, head, strict=False)) if a != b), len(head))
    at = len(re.sub(r"[<\[{]\S*\Z", "", text[:at]))  # both may begin with `<t`: `<think>`, `<tool_call>`
    end = text.rfind(render.end) if render.end else -1
    written = text[at : end if end >= at else None]
    for format_ in FORMATS:
        calls = parse(format_, written, [_TOOL]).calls
        if [(c.name, c.arguments) for c in calls] == [("rft_tool", {"rft_key": "rft_value"})]:
            return format_
    raise RowProblem(
        f"the chat template writes tool calls in a format that rft does not know: {written!r:.200}; set "
        f"environment.tool_parser to the format that the model writes ({', '.join(FORMATS)})"
    )
