r"""Identity of expressions by evaluation: exact enough, and a thousand times faster than algebra.

Reads the LaTeX and plain text of everyday answers (`3\sqrt{13}`, `2k+2`, `(a+5)(b+2)`, `1+274i`) and
evaluates both sides at fixed points. They are equal if they agree to 1e-9 at real and complex points,
different if they are apart at a point where both are real and well-behaved; anything else is left to
algebra.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache

_TOKEN = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+|\\[a-zA-Z]+|[a-zA-Z]+|\S)")
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda z: 1 / cmath.tan(z),
    "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "ln": cmath.log,
    "exp": cmath.exp,
}
_GREEK = {"alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "varphi"}
_SAME, _APART, _MAX_TOKENS = 1e-9, 1e-6, 400
Point = Mapping[str, complex]
Node = Callable[[Point], complex]


class Unreadable(Exception):
    """The text is not an expression that this file knows."""


def same_by_value(gold: str, answer: str) -> bool | None:
    """True or False where evaluation decides; None where it does not."""
    try:
        a, b = _parse(gold), _parse(answer)
    except (Unreadable, RecursionError):
        return None
    if (a.right is None) != (b.right is None):
        return None
    names = sorted(a.names | b.names)
    verdicts = [_compare_at(a, b, point) for point in _points(names)]
    if a.right is not None:
        return _same_equation(a, b, names)
    if all(v is True for v in verdicts):
        return True
    return False if verdicts[0] is False or verdicts[1] is False else None


class Expression:
    """A parsed expression, or the two sides of an equation."""

    def __init__(self, left: Node, right: Node | None, names: frozenset[str]) -> None:
        self.left, self.right, self.names = left, right, names

    def at(self, point: Point) -> complex | None:
        """Its value (for an equation left - right); None where it has none."""
        try:
            value = self.left(point)
            if self.right is not None:
                value -= self.right(point)
        except (ZeroDivisionError, OverflowError, ValueError):
            return None
        return value if cmath.isfinite(value) else None


def _points(names: list[str]) -> list[Point]:
    """Two real positive points, then a complex one with a negative real part."""
    seeds = ((0.6180339887, 0.0), (1.3247179572, 0.0), (-0.7548776662, 0.5698402910))
    return [
        {n: complex(re_ * (1 + 0.1713 * i), im * (1 + 0.2319 * i)) for i, n in enumerate(names)}
        for re_, im in seeds
    ]


def _compare_at(a: Expression, b: Expression, point: Point) -> bool | None:
    x, y = a.at(point), b.at(point)
    if x is None or y is None:
        return None
    scale = max(1e-12, abs(x), abs(y))
    gap = abs(x - y)
    if gap <= _SAME * scale or gap < 1e-14:
        return True
    return False if gap >= _APART * scale else None


def _same_equation(a: Expression, b: Expression, names: list[str]) -> bool | None:
    """left - right are multiples of each other."""
    ratios = []
    for point in _points(names):
        x, y = a.at(point), b.at(point)
        if x is None or y is None or abs(y) < 1e-9 or abs(x) < 1e-9:
            return None
        ratios.append(x / y)
    gap = max(abs(r - ratios[0]) for r in ratios) / abs(ratios[0])
    return True if gap <= _SAME else None  # other shapes of the same curve are for algebra


# -- parsing -----------------------------------------------------------------------------------------


@lru_cache(maxsize=8192)
def _parse(text: str) -> Expression:
    if text.count("=") > 1 or len(text) > 1000:
        raise Unreadable
    left, equals, right = text.partition("=")
    first = _Parser(left)
    second = _Parser(right) if equals else None
    names = first.names | (second.names if second else set())
    return Expression(first.node, second.node if second else None, frozenset(names))


class _Parser:
    """Recursive descent; builds closures that are evaluated at points."""

    def __init__(self, text: str) -> None:
        self.tokens = _TOKEN.findall(text)
        if not self.tokens or len(self.tokens) > _MAX_TOKENS:
            raise Unreadable
        self.tokens = [t for token in self.tokens for t in _letters(token)]
        self.at = 0
        self.names: set[str] = set()
        self.node = self._sum()
        if self.at != len(self.tokens):
            raise Unreadable

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self, wanted: str = "") -> str:
        token = self._peek()
        if not token or (wanted and token != wanted):
            raise Unreadable
        self.at += 1
        return token

    def _sum(self) -> Node:
        node = self._product()
        while self._peek() in ("+", "-"):
            node = _binary(self._take(), node, self._product())
        return node

    def _product(self) -> Node:
        node = self._signed()
        while True:
            token = self._peek()
            if token in ("*", "/", r"\cdot", r"\times", r"\div"):
                self._take()
                node = _binary("/" if token in ("/", r"\div") else "*", node, self._signed())
            elif token and (_alnum(token) or token[0] == "." or token in ("(", "{") or token[0] == "\\"):
                if _digits(token[0]) and _digits(self.tokens[self.at - 1][-1]):
                    raise Unreadable  # two numbers side by side
                node = _binary("*", node, self._power())
            else:
                return node

    def _signed(self) -> Node:
        if self._peek() in ("-", "+"):
            sign = self._take()
            inner = self._signed()
            return inner if sign == "+" else lambda p: -inner(p)
        return self._power()

    def _power(self) -> Node:
        base = self._atom()
        while self._peek() == "^":
            self._take()
            base = _binary("^", base, self._argument(signed=True))
        return base

    def _argument(self, *, signed: bool = False) -> Node:
        """What belongs to `^`, `\\frac`, `\\sqrt`: a group in braces, or one token."""
        if self._peek() == "{":
            return self._group("{", "}")
        if signed and self._peek() in ("-", "+"):
            return self._signed()
        token = self._peek()
        if _digits(token) and len(token) > 1 and not signed:  # \frac12
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self._atom()

    def _group(self, opening: str, closing: str) -> Node:
        self._take(opening)
        node = self._sum()
        self._take(closing)
        return node

    def _atom(self) -> Node:
        token = self._peek()
        if token in ("(", "{", "["):
            return self._group(token, {"(": ")", "{": "}", "[": "]"}[token])
        self._take()
        if _digits(token[0]) or (token[0] == "." and len(token) > 1):
            number = complex(float(token))
            if _digits(token) and self._peek() == r"\frac" and self._mixed():
                self._take()
                return _binary("+", lambda p: number, _binary("/", self._argument(), self._argument()))
            return lambda p: number
        name = token.lstrip("\\")
        if name == "frac" and token[0] == "\\":
            return _binary("/", self._argument(), self._argument())
        if name == "sqrt":
            return self._root()
        if name in _FUNCTIONS:
            return self._function(_FUNCTIONS[name])
        if name in ("pi", "e", "i"):
            constant = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}[name]
            return lambda p: constant
        if (len(token) == 1 and token.isascii() and token.isalpha()) or (token[0] == "\\" and name in _GREEK):
            self.names.add(name)
            return lambda p: p[name]
        raise Unreadable

    def _mixed(self) -> bool:
        """At a fraction of two plain numbers: after a whole number it is added (1 4/5)."""
        following = self.tokens[self.at + 1 : self.at + 7]
        return (
            following[::3] == ["{", "{"]
            and _digits(following[1])
            and following[4:5] != [""]
            and (_digits(following[4]) and following[5:] == ["}"])
        )

    def _root(self) -> Node:
        if self._peek() != "[":
            inner = self._group("(", ")") if self._peek() == "(" else self._argument()
            return lambda p: cmath.sqrt(inner(p))
        degree = self._group("[", "]")
        inner = self._argument()
        return lambda p: _root(inner(p), degree(p))

    def _function(self, function: Callable[[complex], complex]) -> Node:
        exponent: Node | None = None
        if self._peek() == "^":
            self._take()
            exponent = self._argument(signed=True)
        inner = self._power()  # \sin 2x would be ambiguous: one factor only
        if self._peek() and (_alnum(self._peek()) or self._peek()[0] == "\\"):
            raise Unreadable
        if exponent is None:
            return lambda p: function(inner(p))
        power = exponent
        return lambda p: function(inner(p)) ** power(p)


def _digits(token: str) -> bool:
    return token.isascii() and token.isdigit()


def _alnum(token: str) -> bool:
    return token[0].isascii() and token[0].isalnum()


def _letters(token: str) -> list[str]:
    """A run of letters as single variables, unless it names a function."""
    if not token.isalpha() or token in _FUNCTIONS or token in ("pi", "sqrt"):
        return [token]
    if len(token) > 3:
        raise Unreadable  # a word
    return list(token)


def _root(value: complex, degree: complex) -> complex:
    if value.imag == 0 and value.real < 0 and degree.imag == 0 and degree.real % 2 == 1:
        return complex(-((-value.real) ** (1 / degree.real)))
    return value ** (1 / degree)


def _binary(op: str, a: Node, b: Node) -> Node:
    if op == "+":
        return lambda p: a(p) + b(p)
    if op == "-":
        return lambda p: a(p) - b(p)
    if op == "*":
        return lambda p: a(p) * b(p)
    if op == "/":
        return lambda p: a(p) / b(p)
    return lambda p: a(p) ** b(p)
