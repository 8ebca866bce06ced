r"""Test equality of expressions by evaluation: exactly in the rationals, else at increasing precision.

Parses the plain LaTeX (see `rft.rewards.notation`) of common answers: `3\sqrt{13}`, `2k+2`,
`(a+5)(b+2)`, `1+274i`, `\log_2 8`, `\binom{5}{2}`, `2005!`. Rational arithmetic is exact, so
`2^{64}-1` is not `2^{64}`. A difference that is not rational counts as zero only if it vanishes with
increasing precision: there is no tolerance, absolute or relative. Expressions with variables are compared
at fixed points.

The limits below on digits, exponents, factorials and nesting bound the time: an expression beyond them is
undecided, and an undecided expression equals only the same text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

from rft.rewards.notation import FUNCTIONS, GREEK

MAX_TOKENS = 400
MAX_DEPTH = 40  # nesting of brackets
MAX_BITS = 200_000  # of an exact number
MAX_MAGNITUDE = 10**12  # of an exponent's logarithm, or of an angle
MAX_FACTORIAL = 10_000
PRECISIONS = (30, 80, 250, 1000)  # decimal digits; the last two only after a loss of digits

_TOKEN = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+|\\[a-zA-Z]+|[a-zA-Z]+|\S)")
_PLAIN_NAMES = FUNCTIONS | {"pi"}
_OPENING = {"(": ")", "{": "}", "[": "]"}

Value = Any  # Fraction, or a real or complex mpmath number
Point = Mapping[str, Value]
Node = Callable[[Point], Value]


class Unreadable(Exception):
    """The text is not an expression that this file can parse."""


class Undecided(Exception):
    """The expression is undefined at this point, or too large to compute."""


class Expression:
    """A parsed expression. `at` evaluates it at the current precision."""

    def __init__(self, node: Node, names: frozenset[str]) -> None:
        self.node, self.names = node, names

    def at(self, point: Point) -> Value:
        """Return the value at a point. Raises Undecided."""
        try:
            value = self.node(point)
        except (ArithmeticError, ValueError, RecursionError, MemoryError, TypeError):
            raise Undecided from None
        if not isinstance(value, Fraction) and not _mp().isfinite(value):
            raise Undecided
        return value


def parse(text: str) -> Expression | None:
    """Parse an expression; None if it cannot be read."""
    return _parse(text)


def exact_value(expression: Expression) -> Fraction | None:
    """Return the value of a constant if it is rational by exact arithmetic."""
    if expression.names:
        return None
    try:
        value = expression.at({})
    except Undecided:
        return None
    return value if isinstance(value, Fraction) else None


def real_value(expression: Expression, digits: int) -> Fraction | None:
    """Return the value of a real constant to at least `digits` digits, as a fraction."""
    if expression.names:
        return None
    mp = _mp()
    with mp.workdps(digits + 15):
        try:
            value = expression.at({})
        except Undecided:
            return None
        if isinstance(value, Fraction):
            return value
        if mp.im(value) != 0 and abs(mp.im(value)) > abs(value) * mp.mpf(10) ** -(digits + 5):
            return None
        real = mp.re(value)
        if real == 0 or abs(mp.mag(real)) > 4 * digits + 4096:
            return Fraction(0) if real == 0 else None
        sign, mantissa, exponent, _ = real._mpf_
        return (-1) ** sign * mantissa * Fraction(2) ** exponent


def same_value(a: Expression, b: Expression) -> bool | None:
    """Whether two expressions have the same value at two positive points; False without a value there.

    None if they differ only at a third point, where roots and logarithms take other branches.
    """
    names = sorted(a.names | b.names)
    try:
        for point in _positive_points(names):
            if not _vanishes(partial(_both, a, b, point)):
                return False
    except Undecided:
        return False
    if not names:
        return True
    point = _other_point(names, a, b)
    try:
        return True if _vanishes(partial(_both, a, b, point)) else None
    except Undecided:
        return None


def _both(a: Expression, b: Expression, point: Point) -> tuple[Value, Value]:
    return a.at(point), b.at(point)


def _crossed(a: Expression, b: Expression, p: Point, q: Point) -> tuple[Value, Value]:
    return _times(a.at(p), b.at(q)), _times(a.at(q), b.at(p))


def same_relation(a: Expression, b: Expression) -> int | None:
    """Return the sign of the constant ratio a / b, for a = 0 and b = 0; 0 if they are not multiples."""
    names = sorted(a.names | b.names)
    if not names:
        return None
    first, *others = [*_positive_points(names), {n: -v for n, v in _positive_points(names)[0].items()}]
    try:
        for point in others:
            if not _vanishes(partial(_crossed, a, b, first, point)):
                return 0
        ratio = _times(a.at(first), _power(b.at(first), Fraction(-1)))
    except (Undecided, ZeroDivisionError):
        return None
    ratio = ratio if isinstance(ratio, Fraction) else _mp().re(ratio)
    return 1 if ratio > 0 else -1 if ratio < 0 else None


def same_curve(a: Expression, b: Expression) -> bool | None:
    """Whether a = 0 and b = 0 have the same solutions; None if undecided.

    Multiples do. Otherwise an equation that is linear in a name is solved for it, and the solution must
    satisfy the other one.
    """
    ratio = same_relation(a, b)
    if ratio:
        return True
    both_ways = [_holds_where_solved(a, b), _holds_where_solved(b, a)]
    if False in both_ways:
        return False
    if both_ways == [True, True]:
        return True
    return False if ratio == 0 and _is_exact(a) and _is_exact(b) else None


def _is_exact(equation: Expression) -> bool:
    try:
        return all(isinstance(equation.at(p), Fraction) for p in _positive_points(sorted(equation.names)))
    except Undecided:
        return False


def _holds_where_solved(solved: Expression, other: Expression) -> bool | None:
    """Whether `other` vanishes where `solved` does, if `solved` is linear in one of its names."""
    names = sorted(solved.names | other.names)
    for name in sorted(solved.names):
        try:
            verdicts = [_holds_at(solved, other, name, point) for point in _positive_points(names)]
        except (Undecided, ArithmeticError):
            continue
        if None not in verdicts:
            return all(verdicts)
    return None


def _holds_at(solved: Expression, other: Expression, name: str, point: Point) -> bool | None:
    def line() -> tuple[Value, Value, Value]:
        one, two, three = (solved.at({**point, name: Fraction(k)}) for k in (1, 2, 3))
        return one, two, three

    def curvature() -> tuple[Value, Value]:
        one, two, three = line()
        return _plus(one, three), _times(Fraction(2), two)

    def at_root() -> tuple[Value, Value]:
        one, two, _ = line()
        slope = _plus(two, -one)
        root = _plus(Fraction(1), -_divided(one, slope))
        return other.at({**point, name: root}), Fraction(0)

    if not _vanishes(curvature) or _vanishes(lambda: line()[:2]):
        return None
    return _vanishes(at_root)


def _positive_points(names: list[str]) -> list[dict[str, Value]]:
    if not names:
        return [{}]
    return [{n: Fraction(seed + 171 * i, 1009 + i) for i, n in enumerate(names)} for seed in (631, 1339)]


def _other_point(names: list[str], a: Expression, b: Expression) -> dict[str, Value]:
    """Return a negative rational point if both values are rational there, else complex with real part < 0."""
    point = {n: Fraction(-743 - 149 * i, 1013 + i) for i, n in enumerate(names)}
    try:
        if isinstance(a.at(point), Fraction) and isinstance(b.at(point), Fraction):
            return point
    except Undecided:
        pass
    mp = _mp()
    return {n: mp.mpc(-0.75 - 0.125 * i, 0.5625 + 0.25 * i) for i, n in enumerate(names)}


def _vanishes(pair: Callable[[], tuple[Value, Value]]) -> bool:
    """Whether the difference of two values is zero: exactly, or decreasing with the precision.

    A nonzero difference does not change with the precision; the rounding error of a zero decreases with it.
    """
    mp = _mp()
    before: Any = None
    last = 0
    for digits in PRECISIONS:
        _lost[0] = False
        with mp.workdps(digits):
            x, y = pair()
            if isinstance(x, Fraction) and isinstance(y, Fraction):
                return x == y
            gap = abs(_inexact(x) - _inexact(y))
            if not mp.isfinite(gap):
                raise Undecided
            if before is not None:
                if not _lost[0] and (gap == 0 or gap < before * mp.mpf(10) ** (-0.7 * (digits - last))):
                    return True
                if gap > before * mp.mpf("1e-9") and before > 0:
                    return False
            before, last = gap, digits
    if _lost[0]:
        raise Undecided
    return False


# -- arithmetic --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _mp() -> Any:
    import mpmath

    return mpmath.MPContext()  # not the global context, whose precision others may change


def _inexact(value: Value) -> Any:
    if isinstance(value, Fraction):
        return _mp().mpf(value.numerator) / value.denominator
    return value


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise Undecided
    return value


_lost = [False]  # whether a sum lost a term below its precision


def _plus(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a + b)
    a, b = _inexact(a), _inexact(b)
    mp = _mp()
    if a != 0 and b != 0 and abs(mp.mag(a) - mp.mag(b)) > mp.prec - 16:
        _lost[0] = True
    return a + b


def _times(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a * b)
    return _inexact(a) * _inexact(b)


def _power(a: Value, b: Value) -> Value:
    if isinstance(b, Fraction) and isinstance(a, Fraction):
        exact = _exact_power(a, b)
        if exact is not None:
            return exact
    mp = _mp()
    a = _inexact(a)
    if isinstance(b, Fraction) and b.denominator == 1 and abs(b.numerator) < 2**40:
        return a ** int(b)
    if a == 0:
        if mp.re(_inexact(b)) > 0:
            return Fraction(0)
        raise Undecided
    return _exp(mp.log(a) * _inexact(b))


def _exact_power(a: Fraction, b: Fraction) -> Fraction | None:
    """Return a power if it is rational and of moderate size."""
    if a == 0:
        if b <= 0:
            raise Undecided  # 0^0, 1/0
        return a
    if b.denominator > 1:
        root = _exact_root(a, b.denominator)
        if root is None:
            return None
        a, b = root, Fraction(b.numerator)
    n = int(b)
    if abs(a) == 1:
        return a if n % 2 else Fraction(1)
    if abs(n) * (a.numerator.bit_length() + a.denominator.bit_length()) > MAX_BITS:
        return None
    return a**n


def _exact_root(a: Fraction, degree: int) -> Fraction | None:
    if a < 0 or degree > 64 or a.numerator.bit_length() + a.denominator.bit_length() > 4096:
        return None
    top, bottom = _integer_root(a.numerator, degree), _integer_root(a.denominator, degree)
    return Fraction(top, bottom) if top**degree == a.numerator and bottom**degree == a.denominator else None


def _integer_root(n: int, degree: int) -> int:
    """Return the largest integer whose power is at most n, by bisection."""
    if degree == 2:
        return math.isqrt(n)
    low, high = 0, 1 << (n.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= n else (low, middle - 1)
    return low


def _exp(z: Any) -> Any:
    if abs(z) > MAX_MAGNITUDE:
        raise Undecided  # a power tower
    return _mp().exp(z)


def _root(a: Value, degree: Value) -> Value:
    if degree == 0:
        raise Undecided
    if (
        isinstance(a, Fraction)
        and isinstance(degree, Fraction)
        and a < 0
        and degree.numerator % 2
        and degree.denominator == 1
    ):
        return _times(Fraction(-1), _power(-a, 1 / degree))  # the real root
    return _power(a, _divided(Fraction(1), degree))


def _divided(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a / b)
    return _inexact(a) / _inexact(b)


def _factorial(n: Value) -> Value:
    if isinstance(n, Fraction) and n.denominator == 1:
        if n < 0:
            raise Undecided
        if n <= MAX_FACTORIAL:
            return Fraction(math.factorial(int(n)))
    if abs(_inexact(n)) > 10**9:
        raise Undecided
    return _mp().gamma(_inexact(n) + 1)


def _binomial(n: Value, k: Value) -> Value:
    if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1:
        if 0 <= n <= MAX_FACTORIAL and k >= 0:
            return Fraction(math.comb(int(n), int(k)))
        raise Undecided
    if max(abs(_inexact(n)), abs(_inexact(k))) > 10**6:
        raise Undecided
    return _mp().binomial(_inexact(n), _inexact(k))


def _absolute(x: Value) -> Value:
    return abs(x)


def _rounded(direction: str) -> Callable[[Value], Value]:
    def apply(x: Value) -> Value:
        if isinstance(x, Fraction):
            return Fraction(math.floor(x) if direction == "floor" else math.ceil(x))
        if _mp().im(x) != 0 or abs(x) > 10**20:
            raise Undecided
        return Fraction(int(_mp().floor(x) if direction == "floor" else _mp().ceil(x)))

    return apply


_MP_NAMES = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arccot": "acot",
    "arcsec": "asec",
    "arccsc": "acsc",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
    "ln": "log",
    "lg": "log10",
}
_INVERSES = {n: "a" + n for n in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")}


def _function(name: str, x: Value) -> Value:
    mp = _mp()
    z = _inexact(x)
    if name == "exp":
        return _exp(z)
    if name in ("log", "ln", "lg"):
        if z == 0:
            raise Undecided
        return mp.log(z) if name == "ln" else mp.log(z) / mp.ln10
    if abs(z) > MAX_MAGNITUDE:
        raise Undecided
    if name == "cis":
        return mp.cos(z) + mp.mpc(0, 1) * mp.sin(z)
    if name == "arccot" and mp.im(z) == 0:
        return mp.pi / 2 - mp.atan(z)
    return getattr(mp, _MP_NAMES.get(name, name))(z)


# -- parsing -----------------------------------------------------------------------------------------


@lru_cache(maxsize=8192)
def _parse(text: str) -> Expression | None:
    if len(text) > 4300:  # limit of Python's int conversion
        return None
    try:
        parser = _Parser(text)
    except (Unreadable, RecursionError, ValueError):
        return None
    return Expression(parser.node, frozenset(parser.names))


class _Parser:
    """Recursive-descent parser; builds closures that are evaluated at points."""

    def __init__(self, text: str) -> None:
        self.tokens = list(_tokens(text))
        if not self.tokens or len(self.tokens) > MAX_TOKENS:
            raise Unreadable
        self.at = 0
        self.depth = 0
        self.bars = 0  # number of open absolute values
        self.names: set[str] = set()
        self.node = self._stacked()
        if self.at != len(self.tokens):
            raise Unreadable

    def _peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else ""

    def _take(self, wanted: str = "") -> str:
        token = self._peek()
        if not token or (wanted and token != wanted):
            raise Unreadable
        self.at += 1
        return token

    def _sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        terms = [self._product()]
        while self._peek() in ("+", "-"):
            negative = self._take() == "-"
            term = self._product()
            terms.append(_negated(term) if negative else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else _folded(_plus, terms)

    def _stacked(self) -> Node:
        """Parse a sum, or two stacked sums."""
        node = self._sum()
        if self._peek() in (r"\over", r"\choose"):
            operation = _divided if self._take() == r"\over" else _binomial
            node = _binary(operation, node, self._sum())
        return node

    def _product(self) -> Node:
        factors = [self._signed()]
        while True:
            token = self._peek()
            if token in ("*", "/", r"\cdot", r"\times", r"\div"):
                self._take()
                factor = self._signed()
                factors.append(_inverted(factor) if token in ("/", r"\div") else factor)
            elif self._starts_factor(token):
                if token[0].isdigit() and self.tokens[self.at - 1][-1].isdigit():
                    raise Unreadable  # two adjacent numbers
                factors.append(self._power())
            else:
                return factors[0] if len(factors) == 1 else _folded(_times, factors)

    def _starts_factor(self, token: str) -> bool:
        if not token or token in (r"\over", r"\choose", r"\rfloor", r"\rceil"):
            return False
        if token == "|":
            return self.bars == 0
        return token[0].isalnum() or token[0] in ".({[" or token[0] == "\\"

    def _signed(self) -> Node:
        signs = 0
        negative = False
        while self._peek() in ("-", "+"):
            negative ^= self._take() == "-"
            signs += 1
            if signs > 4:
                raise Unreadable
        node = self._power()
        return _negated(node) if negative else node

    def _power(self) -> Node:
        base = self._postfixed(self._atom())
        if self._peek() == "^":
            self._take()
            exponent = self._exponent()
            return self._postfixed(_binary(_power, base, exponent))
        return base

    def _exponent(self) -> Node:
        """Parse an exponent; nested powers associate to the right."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        if self._peek() in ("-", "+"):
            negative = self._take() == "-"
            inner = self._exponent()
            self.depth -= 1
            return _negated(inner) if negative else inner
        node = self._group("{", "}") if self._peek() == "{" else self._postfixed(self._atom())
        if self._peek() == "^":
            self._take()
            node = _binary(_power, node, self._exponent())
        self.depth -= 1
        return node

    def _postfixed(self, node: Node) -> Node:
        while self._peek() in ("!", "%", r"\degree"):
            token = self._take()
            if token == "!":
                if self._peek() == "!":
                    raise Unreadable  # a double factorial
                node = _unary(_factorial, node)
            elif token == "%":
                node = _binary(_divided, node, lambda p: Fraction(100))
            else:
                node = _binary(_times, node, lambda p: _mp().pi / 180)
        return node

    def _argument(self) -> Node:
        r"""Parse the argument of `\frac`, `\binom`: a group in braces, or one digit or letter."""
        if self._peek() == "{":
            return self._group("{", "}")
        token = self._peek()
        if token.isdigit() and len(token) > 1:  # \frac12
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self._atom()

    def _group(self, opening: str, closing: str) -> Node:
        self._take(opening)
        bars, self.bars = self.bars, 0
        node = self._stacked()
        self.bars = bars
        self._take(closing)
        return node

    def _atom(self) -> Node:
        token = self._peek()
        if token in _OPENING:
            return self._group(token, _OPENING[token])
        if token == "|":
            return self._absolute()
        self._take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return self._number(token)
        if token[0] == "\\":
            return self._command(token[1:])
        if token in _PLAIN_NAMES:
            return self._command(token)
        if len(token) == 1 and token.isalpha():
            return self._name(token)
        raise Unreadable

    def _absolute(self) -> Node:
        self._take("|")
        self.bars += 1
        node = self._sum()
        self.bars -= 1
        self._take("|")
        return _unary(_absolute, node)

    def _number(self, token: str) -> Node:
        number = Fraction(token if token[-1] != "." else token[:-1])
        if token.isdigit() and self._peek() == r"\frac" and (part := self._proper_fraction()) is not None:
            number += part
        return lambda p: number

    def _proper_fraction(self) -> Fraction | None:
        """Parse a proper fraction of two plain numbers, which is added to a preceding integer (1 4/5)."""
        t = self.tokens[self.at + 1 : self.at + 7]
        numbers = t[1:5:3] if t[:1] == ["{"] and len(t) == 6 and t[2:4] == ["}", "{"] and t[5] == "}" else []
        length = 7
        if not numbers and t and t[0].isdigit() and len(t[0]) == 2:  # 1\frac45
            numbers, length = [t[0][0], t[0][1]], 2
        if len(numbers) != 2 or not all(n.isdigit() for n in numbers) or int(numbers[1]) <= int(numbers[0]):
            return None
        self.at += length
        return Fraction(int(numbers[0]), int(numbers[1]))

    def _command(self, name: str) -> Node:
        if name == "frac":
            return _binary(_divided, self._argument(), self._argument())
        if name == "binom":
            return _binary(_binomial, self._argument(), self._argument())
        if name == "sqrt":
            return self._square_root()
        if name in ("lfloor", "lceil"):
            node = self._sum()
            self._take(r"\rfloor" if name == "lfloor" else r"\rceil")
            return _unary(_rounded(name[1:]), node)
        if name == "pi":
            return lambda p: +_mp().pi
        if name in FUNCTIONS:
            return self._applied(name)
        if name in GREEK:
            return self._name(name)
        raise Unreadable

    def _name(self, name: str) -> Node:
        if self._peek() == "_":
            self._take()
            if self._peek() == "{":
                end = self.tokens.index("}", self.at) if "}" in self.tokens[self.at :] else -1
                index = "".join(self.tokens[self.at + 1 : end])
                if end < 0 or not index.isalnum():
                    raise Unreadable
                self.at = end + 1
            else:
                index = self._take()
                if not index.isalnum():
                    raise Unreadable
            name = f"{name}_{index}"
        elif name == "e":
            return lambda p: +_mp().e
        elif name == "i":
            return lambda p: _mp().mpc(0, 1)
        self.names.add(name)
        return lambda p: p[name]

    def _square_root(self) -> Node:
        degree: Node = lambda p: Fraction(2)  # noqa: E731
        if self._peek() == "[":
            degree = self._group("[", "]")
        inner = (
            self._group("(", ")")
            if self._peek() == "("
            else self._group("{", "}")
            if self._peek() == "{"
            else self._atom()
        )
        return _binary(_root, inner, degree)

    def _applied(self, name: str) -> Node:
        r"""Parse a function and its argument factors: `\sin^2 x`, `\tan^{-1} 2`, `\log_2 8`, `\sin 2x`."""
        base: Node | None = None
        exponent: Node | None = None
        for _ in range(2):
            if self._peek() == "_" and name == "log" and base is None:
                self._take()
                base = self._argument_of_log()
            elif self._peek() == "^" and exponent is None:
                self._take()
                if (
                    self._peek() == "{"
                    and self.tokens[self.at : self.at + 4] == ["{", "-", "1", "}"]
                    and name in _INVERSES
                ):
                    self.at += 4
                    name = "arc" + name
                else:
                    exponent = self._exponent()
        inner = self._function_argument()
        node = _unary(lambda x: _function(name, x), inner)
        if base is not None:
            node = _binary(_logarithm, inner, base)
        return node if exponent is None else _binary(_power, node, exponent)

    def _argument_of_log(self) -> Node:
        """Parse the base of a logarithm: a group, or one token (`\\log_2 8`, `\\log_28` is base 2)."""
        token = self._peek()
        if token.isdigit() and len(token) > 1 and self._peek(1) not in ("(", "{", "\\", "|"):
            following = self._peek(1)
            if not following or not (following[0].isalpha() or following[0] == "\\"):
                return self._argument()
        return self._group("{", "}") if token == "{" else self._atom()

    def _function_argument(self) -> Node:
        if self._peek() in ("(", "{", "["):
            token = self._peek()
            return self._group(token, _OPENING[token])
        if self._peek() == "|":
            return self._absolute()
        negative = self._peek() == "-"
        if negative:
            self._take()
        factors = [self._power()]
        while (token := self._peek()) and self._plain_factor(token):
            if token[0].isdigit() and self.tokens[self.at - 1][-1].isdigit():
                raise Unreadable
            factors.append(self._power())
        node = factors[0] if len(factors) == 1 else _folded(_times, factors)
        return _negated(node) if negative else node

    def _plain_factor(self, token: str) -> bool:
        r"""Whether a factor joins the argument: `\sin 2x` takes it; `\sin x \cos x`, `\sin x(y)` do not."""
        if token in _PLAIN_NAMES:
            return token == "pi"
        if token[0] == "\\":
            name = token[1:]
            return name in GREEK or name in ("pi", "frac", "sqrt")
        return token[0].isalnum()


def _tokens(text: str) -> Iterator[str]:
    for token in _TOKEN.findall(text):
        if token.isascii() and token.isalpha() and len(token) > 1 and token not in _PLAIN_NAMES:
            yield from _letters(token)
        elif token.isascii():
            yield token
        else:
            raise Unreadable


def _letters(token: str) -> list[str]:
    """Split a run of letters into variables, after a leading function name or pi (`sinx`, `pix`)."""
    for name in ("arcsin", "arccos", "arctan", "sqrt", "sin", "cos", "tan", "log", "ln"):
        if token.startswith(name) and len(token) - len(name) <= 2:
            return [name, *token[len(name) :]]
    if len(token) > 3:
        raise Unreadable  # a word
    return ["pi", *token[2:]] if token.startswith("pi") else list(token)


def _logarithm(x: Value, base: Value) -> Value:
    x, base = _inexact(x), _inexact(base)
    if x == 0 or base in (0, 1):
        raise Undecided
    return _mp().log(x) / _mp().log(base)


def _unary(operation: Callable[[Value], Value], a: Node) -> Node:
    return lambda p: operation(a(p))


def _binary(operation: Callable[[Value, Value], Value], a: Node, b: Node) -> Node:
    return lambda p: operation(a(p), b(p))


def _negated(a: Node) -> Node:
    return lambda p: -a(p)


def _inverted(a: Node) -> Node:
    return lambda p: _divided(Fraction(1), a(p))


def _folded(operation: Callable[[Value, Value], Value], nodes: list[Node]) -> Node:
    """Combine all nodes from the left in one closure."""

    def evaluate(p: Point) -> Value:
        value = nodes[0](p)
        for node in nodes[1:]:
            value = operation(value, node(p))
        return value

    return evaluate
