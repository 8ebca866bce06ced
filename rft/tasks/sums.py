"""Generate sums of several numbers, with demonstrations that call a calculator or answer at once.

    48+91-33+25=?
    <tool_call>{"name": "calculator", "arguments": {"expression": "48+91-33+25"}}</tool_call>
    131
    #### 131

Without the tool a small model gets next to none of them right: every digit of the result depends on all
numbers. All demonstrations end in the right answer, but only a share of them (`calls`) call the tool. A model
that imitates them is right about as often as it calls; reinforcement learning has to discover that the call
pays.
"""

from __future__ import annotations

import operator
from random import Random
from typing import Any

from rft.config.tasks import SumsConfig
from rft.tasks.arithmetic import Split
from rft.utils.hashing import hash64

TEST_SHARE = 10  # one sum in ten is held out
CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {
                    "type": "string",
                    "description": "numbers, parentheses, + - * / // % **, the constants pi and e, and "
                    "functions such as sqrt(2), log(8), sin(1), min(1, 2), round(2.5)",
                }
            },
            "required": ["expression"],
        },
        "return": {"type": "string"},
    },
}
"""Schema of the built-in tool `calculator`, as an environment shows it to the policy."""
_APPLY = {"+": operator.add, "-": operator.sub}


class Sums:
    """The task. Options: see `SumsConfig`."""

    name = "sums"

    def __init__(self, **options: Any) -> None:
        """Raise pydantic.ValidationError for an unknown or out-of-range option."""
        self.config = SumsConfig(**options)

    def rows(self, split: Split, n: int, seed: int) -> list[dict[str, Any]]:
        """Return `n` rows, deterministic in the arguments.

        prompt: the sum. answer: its result. completion: the messages of a demonstration. tools: the schema
        of the calculator. A hash of the sum decides its split. Raises ValueError for an unknown split.
        """
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", not {split!r}')
        rng = Random(f"sums/{split}/{seed}")
        return [self._row(split, rng) for _ in range(n)]

    def _row(self, split: Split, rng: Random) -> dict[str, Any]:
        expression, result = self._draw(rng)
        while (hash64(expression) % TEST_SHARE == 0) != (split == "test"):
            expression, result = self._draw(rng)
        return {
            "prompt": f"{expression}=?",
            "answer": str(result),
            "completion": demonstrate(expression, result, with_call=rng.random() < self.config.calls),
            "tools": [CALCULATOR],
        }

    def _draw(self, rng: Random) -> tuple[str, int]:
        """Return a sum of which no partial result is negative or above the limit, and its result."""
        least, most = 10 ** (self.config.digits - 1), 10**self.config.digits - 1
        limit = self.config.limit
        result = rng.randint(least, most if limit is None else min(most, limit))
        expression = str(result)
        for _ in range(self.config.operands - 1):
            x, op = self._step(rng, least, most, result)
            expression, result = f"{expression}{op}{x}", _APPLY[op](result, x)
        return expression, result

    def _step(self, rng: Random, least: int, most: int, result: int) -> tuple[int, str]:
        """Draw a number and an operator that continue a sum with this partial result."""
        limit = self.config.limit
        while True:
            x = rng.randint(least, most)
            adds = limit is None or result + x <= limit
            usable = [op for op in self.config.operators if (adds if op == "+" else x <= result)]
            if limit is None:
                usable = usable or ["+"]
            if usable:
                return x, rng.choice(usable)


def demonstrate(expression: str, result: int, *, with_call: bool) -> list[dict[str, Any]]:
    """Return the messages that answer a sum: the call of the calculator and its result first, or the answer
    at once."""
    answer = {"role": "assistant", "content": f"#### {result}"}
    if not with_call:
        return [answer]
    function = {"name": "calculator", "arguments": {"expression": expression}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return [call, {"role": "tool", "name": "calculator", "content": str(result)}, answer]
