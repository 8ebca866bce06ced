"""Built-in tools: `calculator`, and `python` in the code sandbox, with state per session."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from rft.sandbox import PROTECTIONS, Backend, Limits, Sandbox, SandboxError, Session

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(math, name)
    for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "floor", "ceil", "gcd", "lcm")
} | {"abs": abs, "round": round, "min": min, "max": max}
_CONSTANTS = {"pi": math.pi, "e": math.e}
MAX_EXPRESSION = 1000  # characters
MAX_DIGITS = 4000  # of an intermediate result; Python writes integers of at most 4300 digits


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: numbers, parentheses, + - * / // % **, the constants pi and e, and functions such as
            sqrt(2), log(8), sin(1), min(1, 2), round(2.5)
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(
            f"the expression has {len(expression)} characters; at most {MAX_EXPRESSION} are allowed"
        )
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
    except SyntaxError:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from None
    return str(_evaluate(tree.body))


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_evaluate(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _evaluate(node.left), _evaluate(node.right)
        _check_size(node.op, left, right)
        return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id in _FUNCTIONS:
            return _FUNCTIONS[node.func.id](*map(_evaluate, node.args))
        raise ValueError(f"there is no function {node.func.id!r}; the functions are {', '.join(_FUNCTIONS)}")
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")


def _check_size(op: ast.operator, left: Any, right: Any) -> None:
    """Refuse integers that are too long to compute or to write."""
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    bits = left.bit_length()
    if isinstance(op, ast.Pow):
        bits *= max(1, right)
    elif isinstance(op, ast.Mult):
        bits += right.bit_length()
    if bits > MAX_DIGITS * math.log2(10):
        raise ValueError(f"a result has more than {MAX_DIGITS} digits; use decimal numbers")


class Python:
    """The tool `python`: a process in the code sandbox that keeps its variables within a session.

    timeout_s: of one call, if `wall_s` is not given. wall_s, memory_mib, output: limits of the program, in
    seconds, MiB and characters. readable, require, sandbox: as for the reward `code`.
    """

    def __init__(
        self,
        timeout_s: float,
        wall_s: float | None = None,
        memory_mib: int = 512,
        output: int = 1 << 14,
        readable: Sequence[str] = (),
        require: Sequence[str] = PROTECTIONS,
        sandbox: Backend = "auto",
    ) -> None:
        wall_s = wall_s or 0.8 * timeout_s  # before the worker itself is killed
        self.limits = Limits(
            wall_s=wall_s, cpu_s=math.ceil(20 * wall_s), memory=memory_mib << 20, output=output
        )
        self._of = (tuple(readable), tuple(require), sandbox)
        self._sandbox: Sandbox | None = None  # started in the worker that uses it, and kept
        self._session: Session | None = None

    def python(self, code: str) -> str:
        """Run Python code. Variables, functions and files are kept between calls.

        Args:
            code: the source; the output is its printed text, and the value of a last expression
        """
        if self._sandbox is None:
            self._sandbox = Sandbox(*self._of)
        if self._session is None:
            self._session = self._sandbox.session(limits=self.limits)
        result = self._session.run(code)
        shown = result.stdout + (f"\n{result.stderr}" if result.stderr else "")
        if result.error:
            return f"{shown}\n{result.error}".strip()
        if result.exceeded or result.code or result.signal:
            self._session = None
            how = f"it exceeded its limit: {result.exceeded}" if result.exceeded else "it ended its process"
            raise SandboxError(f"{how}; variables are lost. Output so far:\n{shown}".strip())
        return shown.strip() or "(no output)"

    @property
    def pid(self) -> int | None:
        """Return the process id of the sandbox, which is kept after a session."""
        return None if self._sandbox is None else self._sandbox.pid

    def close(self) -> None:
        """End the session; the sandbox stays for the next one."""
        if self._session is not None:
            self._session.close()
            self._session = None
