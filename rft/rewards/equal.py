r"""Are two final answers the same? Exact arithmetic where it suffices, `math-verify` where it does not.

Both answers are read into small values: exact rationals, sequences of values (list, tuple, interval,
set, matrix), or raw text. Rationals are compared exactly and sequences element by element, so plain
answers never reach sympy; only the pieces that are left as text do.

Rules: a percent sign may be left out, or turned into a fraction (50 %, 50, 1/2). Currency, degrees and
units are dropped; two *different* known units are not equal. A decimal equals what it stands for to a
relative 1e-6, two integers only exactly. Lists without brackets and sets have no order, tuples,
intervals and matrices do. `x = 5`, `x \in [0, 1]` stand for their right sides. A numeral's base may be
left out, not changed.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from rft.rewards.answers import BASE, CHOICE, INTEGER, WORDS, Items, Number, Raw, Value, plain_tex, read
from rft.rewards.numeric import same_by_value

MAX_LENGTH = 2000  # characters; longer answers are no answers


class Verdict(NamedTuple):
    """`how`: exact (rationals), structure (sequences, words) or algebra (by value, or by sympy)."""

    equal: bool
    how: str


def equal_numbers(gold: str, answer: str) -> Verdict | None:
    """The verdict on two numbers, exactly and in microseconds; None where one is no number."""
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):  # most answers end here
        return Verdict(int(gold) == int(answer), "exact")
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return None
    want, got = read(gold), read(answer)
    if isinstance(want, Number) and isinstance(got, Number):
        return Verdict(_same_number(want, got), "exact")
    return None


def equal(gold: str, answer: str) -> Verdict:
    """Whether `answer` means the same as `gold`. May take long in sympy; never raises for bad LaTeX."""
    quick = equal_numbers(gold, answer)
    if quick is not None:
        return quick
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return Verdict(gold == answer, "exact")
    want, got = read(gold), read(answer)
    same = _same(want, got)
    if same is None and not isinstance(want, Items) and not isinstance(got, Items):
        return Verdict(_algebra(_show(want), _show(got)), "algebra")
    if same is not None:
        return Verdict(same, "structure")
    return Verdict(_algebra(plain_tex(gold), plain_tex(answer)), "algebra")


# -- comparing ---------------------------------------------------------------------------------------


def _same(a: Value, b: Value) -> bool | None:
    """True, False, or None: this needs algebra."""
    if isinstance(a, Number) and isinstance(b, Number):
        return _same_number(a, b)
    if isinstance(a, Items) and isinstance(b, Items):
        return _same_items(a, b)
    if _based(a) or _based(b):
        return _same_numeral(a, b)
    if isinstance(a, Raw) and isinstance(b, Raw) and a.text.casefold() == b.text.casefold():
        return True
    if isinstance(a, Items) != isinstance(b, Items):
        single, other = (a, b) if isinstance(a, Items) else (b, a)
        assert isinstance(single, Items)
        if single.kind == "{}" and len(single.items) == 1:
            return _same(single.items[0], other)
        if single.kind == "list" and all(_same(x, other) for x in single.items):
            return True  # one answer, spelled in several ways
        return False if isinstance(other, Number) else None
    texts = [v.text for v in (a, b) if isinstance(v, Raw)]
    if any(_wordy(t) for t in texts) and not all(_wordy(t) for t in texts):
        return False  # a word and a formula
    if all(_wordy(t) for t in texts):
        return False
    return None


def _based(value: Value) -> re.Match[str] | None:
    return BASE.fullmatch(value.text) if isinstance(value, Raw) else None


def _same_numeral(a: Value, b: Value) -> bool:
    """Numerals with a base: the same digits, and the same base where both have one."""
    x, y = _based(a), _based(b)
    if x and y:
        return x.group(1) == y.group(1) and x.group(2) == y.group(2)
    match, other = (x, b) if x else (y, a)
    return match is not None and isinstance(other, Number) and str(other.value) == match.group(1).lstrip("+")


def _wordy(text: str) -> bool:
    """True for plain words: three letters or more, nothing of a formula."""
    return WORDS.fullmatch(text) is not None or CHOICE.fullmatch(text) is not None


def _same_number(a: Number, b: Number) -> bool:
    if a.unit and b.unit and a.unit != b.unit:
        return False
    if _close(a, b):
        return True
    if a.percent != b.percent:  # 50 % and 1/2
        x, y = (a, b) if a.percent else (b, a)
        return _close(Number(x.value / 100, decimal=x.decimal), y)
    return False


def _close(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    if not (a.decimal or b.decimal):
        return False
    return abs(a.value - b.value) * 1_000_000 <= abs(a.value)


def _same_items(a: Items, b: Items) -> bool | None:
    if len(a.items) != len(b.items):
        return False
    kinds = {a.kind, b.kind}
    if kinds <= {"list", "{}", "union"}:
        return _same_unordered(a.items, b.items)
    if a.kind != b.kind and not (kinds & {"list"} and kinds <= {"list", "()", "[]"}):
        return False
    return all(_same_or_algebra(x, y) for x, y in zip(a.items, b.items, strict=True))


def _same_unordered(a: tuple[Value, ...], b: tuple[Value, ...]) -> bool:
    left = list(b)
    for x in a:
        for i, y in enumerate(left):
            if _same_or_algebra(x, y):
                del left[i]
                break
        else:
            return False
    return True


def _same_or_algebra(a: Value, b: Value) -> bool:
    same = _same(a, b)
    return _algebra(_show(a), _show(b)) if same is None else same


def _show(value: Value) -> str:
    """LaTeX of a value."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Number):
        f = value.value
        return str(f.numerator) if f.denominator == 1 else rf"\frac{{{f.numerator}}}{{{f.denominator}}}"
    inner = ", ".join(_show(v) for v in value.items)
    if value.kind == "union":
        return r" \cup ".join(_show(v) for v in value.items)
    if value.kind in ("list", "matrix"):
        return inner
    left, right = value.kind[0], value.kind[1]
    return rf"\{left}{inner}\{right}" if left == "{" else f"{left}{inner}{right}"


@lru_cache(maxsize=4096)
def _algebra(gold: str, answer: str) -> bool:
    """Equality by value where that decides, else by math-verify. No time limit of its own."""
    by_value = same_by_value(gold, answer)
    if by_value is not None:
        return by_value
    from rft.rewards.symbolic import same_expression

    return same_expression(gold, answer)
