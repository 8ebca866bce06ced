"""An agent that knows nothing of rft: OpenAI's client, and a calculator as its one tool.

The task of `examples/calculator.yaml`, in a program. Its output is not read (`options: {reward: false}`): the
reward of the config scores the policy's last message.
"""

from __future__ import annotations

import ast
import json
import operator
import os
from pathlib import Path
from typing import Any

from openai import BadRequestError, OpenAI

EXPRESSION = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
TOOL: Any = {"type": "function", "function": {"name": "calculator", "parameters": EXPRESSION}}
APPLY = {ast.Add: operator.add, ast.Sub: operator.sub}


def calculate(node: ast.expr) -> int:
    """Evaluate sums and differences of whole numbers. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in APPLY:
        return int(APPLY[type(node.op)](calculate(node.left), calculate(node.right)))
    raise ValueError("only + and - of whole numbers")


def answer(arguments: str) -> str:
    """Return the result of a tool call, or its error, as text for the policy."""
    try:
        return str(calculate(ast.parse(json.loads(arguments)["expression"], mode="eval").body))
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        return json.dumps({"error": str(error)})


row = json.loads(Path(os.environ["RFT_ROW"]).read_text())
client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY name the session
messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
while True:
    try:
        reply = client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])
    except BadRequestError:  # the budget of the session is used up
        break
    message = reply.choices[0].message
    messages.append(message)
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        result = answer(call.function.arguments)
        messages.append(
            {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": result}
        )
