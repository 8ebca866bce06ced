"""Parsers of tool calls: what is written is read back, and no text makes them raise."""

from __future__ import annotations

import json
from keyword import iskeyword
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.config.data import DataConfig
from rft.data.chat import Renderer
from rft.data.errors import RowProblem
from rft.environments.types import ToolCall
from rft.rollout.tool_calls import FORMATS, Parsed, format_of, parse
from tests.cases.families import CHATML, TOOLS, make_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "number"}, "note": {"type": "string"}},
        },
    },
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAME = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda name: not iskeyword(name))


def write(format_: str, name: str, arguments: dict[str, Any]) -> str:
    if format_ == "json":
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    if format_ == "llama3":
        return json.dumps({"name": name, "parameters": arguments})
    if format_ == "pythonic":
        return f"[{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})]"
    body = "".join(f"<parameter={k}>\n{json.dumps(v)}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


@pytest.mark.parametrize("format_", FORMATS)
@given(name=NAME, arguments=st.dictionaries(NAME, VALUES, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_written_call_is_read_back(format_: str, name: str, arguments: dict[str, Any]) -> None:
    text = write(format_, name, arguments)
    if format_ == "xml" and (
        "</parameter>" in text.replace("</parameter>\n", "") or "<tool_call>" in text[11:]
    ):
        return  # XML has no way to write these
    assert parse(format_, text, []) == Parsed("", (ToolCall(name, arguments, "call_0"),))


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<function=f>",
    "</function>",
    "<parameter=a>",
    "</parameter>",
    '{"name": "f", ',
]
PIECES += [
    '"arguments": {',
    "}",
    "[f(",
    ")",
    "]",
    "a=1",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "\\ud800",
    '"',
    ";",
]
PIECES += [
    "<|python_tag|>",
    "<|python_start|>",
    "{" * 3000,
    "[" * 3000,
    "1e999",
    "NaN",
    "9" * 5000,
    "\n",
    "x",
    "*",
    "**",
]


@pytest.mark.parametrize("format_", FORMATS)
@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join))
@settings(max_examples=150, deadline=None)
def test_no_text_makes_a_parser_raise(format_: str, text: str) -> None:
    parsed = parse(format_, text, [TOOL])
    assert not (parsed.error and parsed.calls)
    for call in parsed.calls:  # can cross the socket and be written by a template
        assert json.loads(json.dumps(call.arguments, allow_nan=False)) == call.arguments
        json.dumps(call.arguments, ensure_ascii=False).encode()
    if not parsed.calls:
        assert parsed.content == text


@pytest.mark.parametrize(
    ("format_", "text", "why"),
    [
        ("json", '<tool_call>{"name": "add", "arguments": {"a": 1}}', "</tool_call> is missing"),
        ("json", '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', "invalid JSON"),
        ("json", '<tool_call>{"arguments": {}}</tool_call>', '"name"'),
        ("json", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "must be an object"),
        ("json", '{"name": "add"}</tool_call>', "<tool_call> is missing"),
        ("json", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "NaN is not JSON"),
        ("json", '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>', "surrogates"),
        ("llama3", '{"name": "add", "parameters": {"a": 1}', "invalid JSON"),
        ("llama3", '<|python_tag|>print(1)', "invalid JSON"),
        ("pythonic", "[add(1, 2, 'x', 4)]", "name=value"),
        ("pythonic", "[add(a=1, a=2)]", "once"),
        ("pythonic", "[add(a=open('x'))]", "malformed"),
        ("pythonic", "[add(a=1)", "invalid syntax"),
        ("xml", "<tool_call><function=add><parameter=a>1</function></tool_call>", "</function> is missing"),
        ("xml", "<tool_call><function=add></function>", "</tool_call> is missing"),
    ],
)  # fmt: skip
def test_a_malformed_call_says_why(format_: str, text: str, why: str) -> None:
    parsed = parse(format_, text, [TOOL])
    assert why in parsed.error and parsed.calls == () and parsed.content == text


@pytest.mark.parametrize(
    ("format_", "text"),
    [("llama3", '{"answer": 4}'), ("pythonic", "[1, 2]"), ("json", "3 < 4"), ("xml", "plain")],
)
def test_an_ordinary_answer_has_no_calls(format_: str, text: str) -> None:
    assert parse(format_, text, [TOOL]) == Parsed(text)


def test_several_calls_and_text_around_them() -> None:
    call = '<tool_call>{"name": "add", "arguments": {"note": "</tool_call><tool_call>"}}</tool_call>'
    parsed = parse("json", f"First.\n{call}\n{call}", [TOOL])
    assert (
        parsed.content == "First."
        and [c.arguments for c in parsed.calls] == [{"note": "</tool_call><tool_call>"}] * 2
    )
    assert [c.id for c in parsed.calls] == ["call_0", "call_1"]
    both = parse(
        "llama3", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', []
    )
    assert [c.name for c in both.calls] == ["f", "g"] and both.content == ""


def test_values_of_xml_have_the_types_of_the_schema() -> None:
    text = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>3</arg_value>\n<arg_key>note</arg_key>\n"
    text += "<arg_value>4</arg_value>\n</tool_call>"
    assert parse("xml", text, [TOOL]).calls[0].arguments == {"a": 3, "note": "4"}
    coder = (
        "<tool_call>\n<function=add>\n<parameter=note>\n{\n  1\n</parameter>\n"
        "<parameter=b>\nx\n</parameter>\n"
    )
    assert parse("xml", f"{coder}</function>\n</tool_call>", [TOOL]).calls[0].arguments == {
        "note": "{\n  1",
        "b": "x",
    }


HEAD = "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}{%- for c in m.tool_calls or [] -%}"
TAIL = (
    "{%- endfor -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n<think>\n{%- endif -%}"
)
SCHEMAS = "{%- if tools -%}{{ tools | tojson }}{%- endif -%}"
EACH = "{%- for k, v in c.function.arguments.items() -%}"
CODER = (
    f"<tool_call>\n<function={{{{ c.function.name }}}}>\n{EACH}<parameter={{{{ k }}}}>\n"
    "{{ v }}\n</parameter>\n{%- endfor -%}</function>\n</tool_call>"
)
GLM = (
    f"<tool_call>{{{{ c.function.name }}}}\n{EACH}<arg_key>{{{{ k }}}}</arg_key>\n"
    "<arg_value>{{ v }}</arg_value>\n{%- endfor -%}</tool_call>"
)
PYTHONIC = f"[{{{{ c.function.name }}}}({EACH}{{{{ k }}}}='{{{{ v }}}}'{{% endfor %}})]"


@pytest.mark.parametrize(
    ("written", "format_"),
    [
        ("<tool_call>\n{{ c.function | tojson }}\n</tool_call>", "json"),
        ('{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}', "llama3"),
        (PYTHONIC, "pythonic"),
        (CODER, "xml"),
        (GLM, "xml"),
    ],
)
def test_the_template_chooses_the_format(written: str, format_: str) -> None:
    tokenizer = make_tokenizer(SCHEMAS + HEAD + written + TAIL)
    assert format_of(Renderer(DataConfig(), tokenizer)) == format_


def test_templates_without_tools_or_of_an_unknown_format_are_refused() -> None:
    with pytest.raises(RowProblem, match="leaves out `tools`"):
        format_of(Renderer(DataConfig(), make_tokenizer(CHATML)))
    with pytest.raises(RowProblem, match=r"environment\.tool_parser"):
        format_of(Renderer(DataConfig(), make_tokenizer(TOOLS)))
