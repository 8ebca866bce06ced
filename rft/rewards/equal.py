r"""Compare two final answers: exactly where that suffices, else by value, and with sympy as a last resort.

Both answers are parsed into values (`rft.rewards.answers`) and compared part by part. The rules:

- Integers and fractions are equal only exactly: no rounding, no threshold below which a value is zero.
- A decimal of at least 6 significant digits equals a non-integer if it is that number rounded or truncated
  at its last digit: 0.166667 is 1/6, 0.1667 is not, and 3.000001 is not 3. A decimal with the digits of a
  float (15 to 17) equals the decimal that it rounds to at 12 digits: 0.30000000000000004 is 0.3. Repeating
  decimals are exact.
- A percent sign may be omitted, or stand for 1/100 (50 %, 50, 1/2). A unit, currency or noun may be
  omitted; two known units are converted, and differ if they measure different things: 5 cents are
  $0.05, not $5.
- Lists without brackets and sets are unordered; tuples, intervals and matrices are ordered. A list equals a
  single value only if it gives that value in several notations.
- `x = 5` matches 5, but not `y = 5`. `x = 3, y = 2` is a mapping, and equals the tuple of its
  values in the alphabetical order of the names. Equations are equal if they have the same solutions; an
  unsolved equation (`2x = 10`) is not a solution.
- Inequalities in one variable, intervals, unions and set builders are sets of reals.
- `(B) 12` matches both B and 12. A numeral's base may be omitted, but not changed. `3 \pmod 5` is 3. Times
  are not ratios.
- Expressions are equal if they have the same value, however they are written: 2+3 is 5. (An answer that
  only repeats the question is rejected by `rft.rewards.math`.)
- An expression without a value (0/0, a power tower too high to compute) equals only the same notation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from rft.rewards.answers import (
    INTEGER,
    Approximate,
    Choice,
    Clock,
    Contradiction,
    Expr,
    Infinity,
    Items,
    Named,
    Number,
    Numeral,
    Piece,
    Ratio,
    Reals,
    Relation,
    Residue,
    Value,
    Words,
    as_pieces,
    expanded_fractions,
    read,
    show,
    spaceless,
)
from rft.rewards.notation import plain_tex
from rft.rewards.numeric import exact_value, parse, real_value, same_curve, same_relation, same_value
from rft.rewards.units import Unit

MAX_LENGTH = 2000  # characters; a longer answer equals nothing
MIN_DIGITS = 6  # of a decimal that may be a rounded number
FLOAT_DIGITS, NOISE_DIGITS = range(15, 18), 12  # more digits than a float has are taken as exact
MAX_UNORDERED = 60


class Verdict(NamedTuple):
    """Result of a comparison. how: exact (rationals), structure (parts of the values) or algebra (sympy)."""

    equal: bool
    how: str


def equal_numbers(gold: str, answer: str) -> Verdict | None:
    """Compare two numbers, or two identical texts, exactly and in microseconds; None for anything else."""
    if gold == answer:  # most correct answers end here
        return Verdict(bool(gold), "exact")
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return Verdict(int(gold) == int(answer), "exact")
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return None
    want, got = read(gold), read(answer)
    if isinstance(want, Number) and isinstance(got, Number):
        return Verdict(_same_number(want, got), "exact")
    return None


def equal(gold: str, answer: str) -> Verdict:
    """Whether `answer` means the same as `gold`. May take long in sympy; never raises for malformed LaTeX."""
    quick = equal_numbers(gold, answer)
    if quick is not None:
        return quick
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return Verdict(False, "exact")
    want, got = read(gold), read(answer)
    same = _same(want, got)
    if not same and _GROUPED.search(gold + " " + answer):
        same = _same_ungrouped(gold, answer, want, got) or same
    if same is not None:
        return Verdict(same, "structure")
    return Verdict(_algebra(plain_tex(gold), plain_tex(answer)), "algebra")


_GROUPED = re.compile(r"\d,\d{3}(?!\d)")


def _same_ungrouped(gold: str, answer: str, want: Value, got: Value) -> bool:
    """Read `100,200,300` as a list where the other answer is a list."""
    if isinstance(want, Number) and isinstance(got, Items) and got.kind in ("list", "{}"):
        return _same(read(gold.replace(",", ", ")), got) is True
    if isinstance(got, Number) and isinstance(want, Items) and want.kind in ("list", "{}"):
        return _same(want, read(answer.replace(",", ", "))) is True
    return False


# -- comparison: True, False, or None if undecided ---------------------------------------------------


def _same(a: Value, b: Value) -> bool | None:
    if isinstance(a, Contradiction) or isinstance(b, Contradiction):
        return False
    if a == b:
        return True
    for kind, compare in _COMPARED:
        if isinstance(a, kind):
            return compare(a, b)
        if isinstance(b, kind):
            return compare(b, a)
    return _same_leaf(a, b)


def _same_approximate(a: Approximate, b: Value) -> bool | None:
    if isinstance(b, Approximate):
        return _same(a.exact, b.exact)
    if not isinstance(a.shown, Number) or not _rounds_to(a.exact, a.shown):
        return False
    return _any([_same(a.exact, b), _same(a.shown, b)])


def _rounds_to(value: Value, shown: Number) -> bool:
    """Whether `shown` is `value` rounded: a decimal to its last digit, an integer to a whole number."""
    expression = parse(show(value)) if isinstance(value, Number | Expr) else None
    real = real_value(expression, 30) if expression is not None else None
    if real is None:
        return False
    scale = 100 if shown.percent and not (isinstance(value, Number) and value.percent) else 1
    gap = abs(real * scale - shown.value)
    if shown.step:
        return bool(gap <= shown.step)
    return bool(gap == 0 or (shown.value.denominator == 1 and gap < 1))


def _same_choice(a: Choice, b: Value) -> bool | None:
    if isinstance(b, Choice):
        if a.letter != b.letter:
            return False
        return a.rest is None or b.rest is None or _same(a.rest, b.rest) is not False
    if isinstance(b, Expr) and re.fullmatch("[a-jA-J]", b.text):
        return a.letter == b.text.upper()
    if isinstance(b, Items) and b.kind == "{}" and len(b.items) == 1:
        return _same(a, b.items[0])
    if a.rest is None:
        if isinstance(b, Named) and b.equation:
            return _same(Expr(a.letter), b)
        return False if isinstance(b, Number | Words | Choice | Items) else _same(Expr(a.letter), b)
    return _same(a.rest, b)


def _same_named(a: Named, b: Value) -> bool | None:
    if isinstance(b, Named):
        return _same_mappings(a, b)
    if isinstance(b, Relation):
        return _same_equations(a, b)
    if len(a.pairs) == 1:
        return _same(a.pairs[0][1], b)
    values = [value for _, value in sorted(a.pairs, key=lambda pair: _name_order(pair[0]))]
    if isinstance(b, Items) and b.kind in ("()", "[]", "list", "{}", "matrix"):
        if len({name.partition("_")[0] for name, _ in a.pairs}) == 1 and b.kind in ("list", "{}"):
            return _same_unordered(values, b.items)  # roots x_1, x_2
        if b.kind == "{}":
            return False
        return _same(Items("()", tuple(values)), b)
    return False


def _name_order(name: str) -> tuple[str, int]:
    base, _, index = name.partition("_")
    return base, int(index) if index.isdigit() else 0


def _same_mappings(a: Named, b: Named) -> bool | None:
    if len(a.pairs) != len(b.pairs):
        return False
    if len(a.pairs) == 1:
        (x, want), (y, got) = a.pairs[0], b.pairs[0]
        if x and y and x != y and {x, y} != {"f", "y"}:
            if a.equation and b.equation and _has_names(want) and _has_names(got):
                return _same_equations(a, b)  # y = 2x and x = y/2
            return False
        return _same(want, got)
    others = dict(b.pairs)
    if others.keys() != dict(a.pairs).keys():
        return False
    return _all([_same(value, others[name]) for name, value in a.pairs])


def _has_names(value: Value) -> bool:
    expression = parse(show(value)) if isinstance(value, Expr) else None
    return expression is not None and bool(expression.names)


def _same_equations(a: Named | Relation, b: Named | Relation) -> bool | None:
    first, second = _sides(a), _sides(b)
    if first is None or second is None:
        return None
    if any(isinstance(v, Named) and not _has_names(v.pairs[0][1]) for v in (a, b)):
        return False  # x = 5 and 2x = 10: the second is not solved
    x, y = parse(first), parse(second)
    return None if x is None or y is None else same_curve(x, y)


def _sides(value: Named | Relation) -> str | None:
    """Return left - right of an equation."""
    if isinstance(value, Named):
        if value.equation is None:
            return None
        left, right = value.equation
        left = value.pairs[0][0] if re.search(r"[({]", left) and value.pairs[0][0] else left
    else:
        left, right = value.left, value.right
    return f"({expanded_fractions(left)})-({expanded_fractions(right)})"


def _same_relation(a: Relation, b: Value) -> bool | None:
    if isinstance(b, Relation):
        if a.sign != b.sign:
            return False
        first, second = _sides(a), _sides(b)
        x, y = parse(first or ""), parse(second or "")
        if x is None or y is None:
            return None
        if a.sign == "=":
            return _same_equations(a, b)
        ratio = same_relation(x, y)
        return None if ratio is None else ratio > 0 or (ratio < 0 and a.sign == "!=")
    if a.sign == "=" and isinstance(b, Number | Expr):
        left = parse(expanded_fractions(a.left))
        right = read(a.right)
        summed = left is not None and len(left.names) > 1 and not re.search(r"\d", a.left)
        if summed and isinstance(right, Number | Expr) and not _has_names(right):
            return _same(right, b) if b != Number(Fraction(0)) else False  # a + b = 7
        if left is None and re.fullmatch(r"[A-Za-z\\]{1,12}[^=]{0,40}", a.left):
            return _same(right, b)  # \log_x y = 2
        return False
    if isinstance(b, Reals) and a.sign != "=":
        return None
    return False


def _same_clock(a: Clock, b: Value) -> bool | None:
    if isinstance(b, Clock):
        if (a.minute, a.second) != (b.minute, b.second):
            return False
        if a.half and b.half:
            return (a.hour, a.half) == (b.hour, b.half)
        return a.hour == b.hour or (bool(a.half or b.half) and _hour_24(a) == _hour_24(b))
    if isinstance(b, Number):
        if a.minute == a.second == 0 and a.half:
            return b.unit is None and a.hour == b.value
        return (
            not a.half
            and not a.second
            and a.minute > 0
            and Fraction(a.hour, a.minute) == b.value
            and b.digits == 0
        )
    return False


def _hour_24(clock: Clock) -> int:
    return clock.hour % 12 + (12 if clock.half == "pm" else 0) if clock.half else clock.hour


def _same_ratio(a: Ratio, b: Value) -> bool | None:
    if isinstance(b, Ratio):
        if len(a.parts) != len(b.parts):
            return False
        pairs = list(zip(a.parts, b.parts, strict=True))
        first, second = pairs[0]
        return _all([_same(_product(first, y), _product(x, second)) for x, y in pairs[1:]])
    if len(a.parts) == 2 and isinstance(b, Number | Expr):
        return _same(Expr(f"({show(a.parts[0])})/({show(a.parts[1])})"), b)
    return False


def _product(a: Value, b: Value) -> Value:
    if isinstance(a, Number) and isinstance(b, Number):
        return Number(a.value * b.value)
    return Expr(f"({show(a)})({show(b)})")


def _same_residue(a: Residue, b: Value) -> bool | None:
    if isinstance(b, Residue):
        if a.modulus != b.modulus:
            return False
        x, y = a.value, b.value
        if (
            isinstance(x, Number)
            and isinstance(y, Number)
            and x.value.denominator == y.value.denominator == 1
        ):
            return a.modulus > 0 and (x.value - y.value) % a.modulus == 0
        return _same(x, y)
    return _same(a.value, b)


def _same_numeral(a: Numeral, b: Value) -> bool | None:
    if isinstance(b, Numeral):
        return a.base == b.base and a.digits == b.digits
    if isinstance(b, Number) and b.value.denominator == 1:
        return str(b.value) == a.digits
    return False


def _same_reals(a: Reals, b: Value) -> bool | None:
    if isinstance(b, Relation) or (isinstance(b, Expr) and _unreadable(b)):
        return None
    if isinstance(b, Reals) and a.name and b.name and a.name != b.name:
        return False
    pieces = as_pieces(b)
    if pieces is None:
        if isinstance(b, Items) and b.kind == "list":  # intervals separated by a comma
            parts = [as_pieces(v) for v in b.items]
            pieces = [piece for part in parts if part for piece in part] if all(parts) else None
        if pieces is None:
            return False
    if len(pieces) != len(a.pieces):
        return False
    return _matched(list(a.pieces), pieces, _same_piece)


def _same_piece(a: Piece, b: Piece) -> bool | None:
    if (a.low_closed, a.high_closed) != (b.low_closed, b.high_closed):
        return False
    return _all([_same(a.low, b.low), _same(a.high, b.high)])


def _same_items(a: Items, b: Value) -> bool | None:
    if not isinstance(b, Items):
        if a.kind == "{}" and len(a.items) == 1:
            return _same(a.items[0], b)
        if a.kind == "list":
            if len(set(a.items)) == 1:
                return False  # 5,5 is not 5
            if all(isinstance(v, Choice) and v.rest is None for v in a.items) and isinstance(b, Expr | Words):
                letters = "".join(v.letter for v in a.items if isinstance(v, Choice))
                return sorted(letters) == sorted(b.text.upper())
            return _all([_same(x, b) for x in a.items])  # one answer in several notations
        if a.kind in ("row", "matrix", "det") and isinstance(b, Expr):
            return None
        return None if isinstance(b, Expr) and _unreadable(b) else False
    if {a.kind, b.kind} <= {"list", "{}"}:
        x, y = (_distinct(v.items) if v.kind == "{}" or "{}" in (a.kind, b.kind) else v.items for v in (a, b))
        return _same_unordered(x, y)
    if "matrix" in (a.kind, b.kind) and a.kind != b.kind:
        matrix, other = (a, b) if a.kind == "matrix" else (b, a)
        return _same_matrix(matrix, other)
    if len(a.items) != len(b.items):
        return False
    if a.kind != b.kind and not ("list" in (a.kind, b.kind) and {a.kind, b.kind} <= {"list", "()", "[]"}):
        return False
    return _all([_same(x, y) for x, y in zip(a.items, b.items, strict=True)])


def _same_matrix(a: Items, b: Items) -> bool | None:
    """Compare a vector written as a tuple, or a matrix written as lists of lists."""
    if b.kind not in ("()", "[]"):
        return False
    rows = [row for row in a.items if isinstance(row, Items)]
    if all(isinstance(v, Items) and v.kind in ("()", "[]") for v in b.items):
        if len(rows) != len(b.items):
            return False
        return _all([_same(Items(v.kind, row.items), v) for row, v in zip(rows, b.items, strict=True)])  # type: ignore[union-attr]
    if len(rows) == 1 or all(len(row.items) == 1 for row in rows):
        cells = tuple(cell for row in rows for cell in row.items)
        return _same(Items(b.kind, cells), b)
    return False


def _distinct(items: Sequence[Value]) -> tuple[Value, ...]:
    kept: list[Value] = []
    for item in items[:MAX_UNORDERED]:
        if not any(_same(item, other) for other in kept):
            kept.append(item)
    return (*kept, *items[MAX_UNORDERED:])


def _same_unordered(a: Sequence[Value], b: Sequence[Value]) -> bool | None:
    if len(a) != len(b) or len(a) > MAX_UNORDERED:
        return False
    return _matched(list(a), list(b), _same)


def _matched(a: list[Any], b: list[Any], same: Callable[[Any, Any], bool | None]) -> bool | None:
    """Whether the items of `a` can be matched one to one with items of `b`."""
    left, unknown = list(b), False
    for x in a:
        verdicts: list[bool | None] = []
        for i, y in enumerate(left):
            verdicts.append(same(x, y))
            if verdicts[-1]:
                del left[i]
                break
        else:
            if None not in verdicts:
                return False
            unknown = True
    return None if unknown else True


def _all(verdicts: list[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def _any(verdicts: list[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


_COMPARED: tuple[tuple[type, Callable[[Any, Value], bool | None]], ...] = (
    (Approximate, _same_approximate),
    (Choice, _same_choice),
    (Named, _same_named),
    (Residue, _same_residue),
    (Relation, _same_relation),
    (Clock, _same_clock),
    (Ratio, _same_ratio),
    (Numeral, _same_numeral),
    (Reals, _same_reals),
    (Items, _same_items),
)


# -- numbers, expressions and words ------------------------------------------------------------------


def _same_leaf(a: Value, b: Value) -> bool | None:
    if isinstance(a, Number) and isinstance(b, Number):
        return _same_number(a, b)
    if isinstance(a, Number | Expr) and isinstance(b, Number | Expr):
        return _same_quantity(a, b)
    if isinstance(a, Infinity | Words) and isinstance(b, Infinity | Words | Number):
        return False
    if isinstance(b, Infinity | Words) and isinstance(a, Number):
        return False
    if isinstance(a, Words) or isinstance(b, Words):
        return False
    return None


def _same_number(a: Number, b: Number) -> bool:
    scale = _conversion(a, b)
    if scale is None or (a.percent and b.unit is not None) or (b.percent and a.unit is not None):
        return False
    if scale != 1:
        b = Number(b.value * scale, b.percent, b.digits, b.step * scale)
    if _close(a, b):
        return True
    if a.percent != b.percent:  # 50 % and 1/2
        x, y = (a, b) if a.percent else (b, a)
        return _close(Number(x.value / 100, digits=x.digits, step=x.step / 100), y)
    return False


_POUND = Unit((("mass", 1),), Fraction(45359237, 100_000_000))
_DEGREE, _RADIAN = {"angle": 1}, {"radian": 1}


def _conversion(a: Number | Expr, b: Number | Expr) -> Fraction | None:
    """Return the factor from b's unit to a's unit; None where they measure different things."""
    if a.unit is None or b.unit is None:
        return Fraction(1)
    x, y = dict(a.unit.dimension), dict(b.unit.dimension)
    if {"pound", "mass"} == x.keys() | y.keys() and _POUND in (a.unit, b.unit):
        return Fraction(1)  # five pounds
    if (
        x != y
        and {"money"} & x.keys() & y.keys()
        and x.get("money") == y.get("money")
        and 1 in (len(x), len(y))
    ):
        return Fraction(1)  # dollars, dollars a day
    return b.unit.factor / a.unit.factor if x == y else None


def _close(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    for decimal, other in ((a, b), (b, a)):
        if (
            decimal.digits > other.digits
            and decimal.digits in FLOAT_DIGITS
            and _is_noise(decimal, other.value)
        ):
            return True
        precise = not other.digits or other.digits > decimal.digits
        if decimal.digits >= MIN_DIGITS and precise and _is_rounded(decimal, other.value):
            return True
    return False


def _is_rounded(decimal: Number, value: Fraction) -> bool:
    """Whether a decimal is `value` rounded or truncated at its last digit. Whole numbers are not rounded."""
    if value.denominator == 1:
        return False
    gap = abs(value - decimal.value)
    return 2 * gap <= decimal.step or (gap < decimal.step and abs(value) > abs(decimal.value))


def _is_noise(decimal: Number, value: Fraction) -> bool:
    """Whether a decimal with all the digits of a float equals `value` up to its last few digits."""
    if decimal.value.denominator == 1 or value * decimal.value <= 0:
        return False
    unit = decimal.step * Fraction(10) ** (decimal.digits - NOISE_DIGITS)
    return round(decimal.value / unit) * unit == value


def _same_quantity(a: Number | Expr, b: Number | Expr) -> bool | None:
    for angle, other in ((a, b), (b, a)):
        if (
            angle.unit
            and other.unit
            and (dict(angle.unit.dimension), dict(other.unit.dimension)) == (_DEGREE, _RADIAN)
        ):
            return _same_expression(Expr(rf"({show(angle)})\degree"), other, Fraction(1))
    letters = [v for v in (a, b) if isinstance(v, Number) and v.letter]
    scale = _conversion(a, b)
    if scale is None:
        return False
    same = _same_expression(a, b, scale)
    if not same and letters and a.unit is not b.unit:  # `5 m` may mean 5 times m
        return same
    if not same and (a.unit is None) != (b.unit is None):
        with_unit, other = (a, b) if a.unit is not None else (b, a)
        if dict(with_unit.unit.dimension) == _DEGREE and r"\pi" in show(other):  # type: ignore[union-attr]
            return _same_expression(Expr(rf"({show(with_unit)})\degree"), other, Fraction(1))
    if not same and isinstance(a, Number) != isinstance(b, Number):
        number, other = (a, b) if isinstance(a, Number) else (b, a)
        if isinstance(number, Number) and number.percent:
            return _same_expression(Number(number.value / 100), other, Fraction(1))
    return same


def _same_expression(a: Number | Expr, b: Number | Expr, scale: Fraction) -> bool | None:
    first, second = show(a), show(b)
    if scale != 1:
        second = f"({second})*({scale.numerator})/({scale.denominator})"
    if spaceless(first) == spaceless(second):
        return True
    same = _same_texts(first, second)
    if same is False:
        for decimal, other in ((a, second), (b, first)):
            if isinstance(decimal, Number) and decimal.digits >= MIN_DIGITS and scale == 1:
                expression = parse(other)
                if expression is None or exact_value(expression) is not None:
                    continue
                value = real_value(expression, decimal.digits + 5)
                if value is not None and _is_rounded(decimal, value):
                    return True
    return same


@lru_cache(maxsize=8192)
def _same_texts(a: str, b: str) -> bool | None:
    x, y = parse(a), parse(b)
    if x is None or y is None:
        return None
    return same_value(x, y)


def _unreadable(value: Expr) -> bool:
    return parse(value.text) is None


@lru_cache(maxsize=4096)
def _algebra(gold: str, answer: str) -> bool:
    """Compare the remaining cases with math-verify."""
    if spaceless(gold) == spaceless(answer):
        return True
    from rft.rewards.symbolic import same_expression

    return same_expression(gold, answer)
