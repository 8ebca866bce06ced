"""Generated pairs of answers with known verdicts: rewritten by sympy, or with a number that is changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import sympy as sp


class Pair(NamedTuple):
    kind: str
    gold: str
    answer: str
    same: bool


X, Y, N = sp.symbols("x y n", positive=True)


def pairs(seed: int, n: int) -> Iterator[Pair]:
    """`n` pairs, equal by construction or different by a perturbation that was checked."""
    rng = random.Random(seed)
    kinds = [
        integer,
        rational,
        decimal,
        surd,
        polynomial,
        quotient,
        trigonometric,
        logarithm,
        sequence,
        interval,
        line,
        named,
    ]
    made = 0
    while made < n:
        pair = rng.choice(kinds)(rng, rng.random() < 0.5)
        if pair is not None:
            yield pair
            made += 1


def _pair(kind: str, gold: sp.Expr, answer: sp.Expr, same: bool) -> Pair | None:
    if not same and sp.simplify(gold - answer) == 0:
        return None
    return Pair(kind, sp.latex(gold), sp.latex(answer), same)


def integer(rng: random.Random, same: bool) -> Pair | None:
    value = rng.choice(
        [rng.randrange(-50, 50), rng.randrange(10**6), rng.randrange(10**20), 2 ** rng.randrange(10, 90)]
    )
    other = value if same else rng.choice([value + 1, value - 1, -value, value * 10, value + 10**5])
    if not same and other == value:
        return None
    forms = [str(other), f"{other:,}", f"{other:,}".replace(",", "{,}"), f"{other}.0", rf"\text{{{other}}}"]
    return Pair("integer", str(value), rng.choice(forms), same)


def rational(rng: random.Random, same: bool) -> Pair | None:
    value = sp.Rational(rng.randrange(-60, 60), rng.randrange(2, 40))
    k = rng.randrange(2, 7)
    other = value if same else value + sp.Rational(1, rng.choice([7, 60, 10**6, 10**15]))
    forms = [
        sp.latex(other),
        rf"\dfrac{{{other.p * k}}}{{{other.q * k}}}",
        f"{other.p}/{other.q}",
        rf"x = \frac{{{other.p}}}{{{other.q}}}",
    ]
    return Pair("rational", sp.latex(value), rng.choice(forms), same)


def decimal(rng: random.Random, same: bool) -> Pair | None:
    places = rng.randrange(1, 8)
    number = rng.randrange(1, 10**6)
    value = sp.Rational(number, 10**places)
    other = value if same else value + sp.Rational(1, 10**places)
    return Pair(
        "decimal",
        f"{number / 10**places:.{places}f}",
        rng.choice([sp.latex(other), f"{other.p}/{other.q}"]),
        same,
    )


def surd(rng: random.Random, same: bool) -> Pair | None:
    a, b, c, d = (rng.randrange(1, 30) for _ in range(4))
    value = (sp.Integer(a) + b * sp.sqrt(c)) / d
    other = value if same else value + sp.Rational(1, rng.choice([1, 100, 10**9]))
    return _pair(
        "surd", value, rng.choice([sp.expand, sp.radsimp, sp.together, sp.factor, sp.sqrtdenest])(other), same
    )


def polynomial(rng: random.Random, same: bool) -> Pair | None:
    names = rng.choice([[X], [X, Y], [N]])
    value = sp.Integer(1)
    for _ in range(rng.randrange(1, 4)):
        value *= sum(rng.randrange(-9, 10) * v ** rng.randrange(1, 3) for v in names) + rng.randrange(-9, 10)
    other = value if same else value + rng.choice([1, -2, names[0], sp.Rational(1, 10**8)])
    return _pair("polynomial", value, rng.choice([sp.expand, sp.factor, sp.horner])(other), same)


def quotient(rng: random.Random, same: bool) -> Pair | None:
    a, b, c, d = (rng.randrange(-6, 7) for _ in range(4))
    value = (a * X + b) / (X + 9 + abs(c)) + sp.Integer(d) / (X + 2)
    other = value if same else value + rng.choice([1, 1 / X, sp.Rational(1, 100)])
    return _pair("quotient", value, rng.choice([sp.together, sp.apart, sp.factor, sp.cancel])(other), same)


def trigonometric(rng: random.Random, same: bool) -> Pair | None:
    k = rng.randrange(1, 5)
    value = rng.choice(
        [
            sp.sin(k * X),
            sp.cos(k * X),
            sp.sin(X) ** 2 * k,
            sp.tan(X) * k,
            k * sp.pi / 6,
            sp.cos(sp.pi * k / 12),
        ]
    )
    other = value if same else value + rng.choice([1, sp.Rational(1, 1000), sp.pi])
    return _pair("trigonometric", value, rng.choice([sp.expand_trig, sp.simplify, sp.trigsimp])(other), same)


def logarithm(rng: random.Random, same: bool) -> Pair | None:
    a, b = rng.randrange(2, 40), rng.randrange(2, 9)
    value = sp.log(a) + b * sp.log(b) + rng.choice([0, sp.exp(b), sp.E**-b])
    other = value if same else value + rng.choice([1, sp.Rational(1, 10**9)])
    gold, answer = (
        sp.latex(e).replace(r"\log", r"\ln")
        for e in (value, rng.choice([sp.logcombine, sp.expand_log])(other))
    )
    return Pair("logarithm", gold, answer, same)


def sequence(rng: random.Random, same: bool) -> Pair | None:
    items = [
        sp.Rational(rng.randrange(-20, 20), rng.choice([1, 1, 2, 3])) for _ in range(rng.randrange(2, 5))
    ]
    kind = rng.choice(["()", r"\{\}", ""])
    other = list(items)
    if not same:
        other[rng.randrange(len(other))] += 1
    elif kind != "()":
        rng.shuffle(other)
    if not same and kind != "()" and sorted(other) == sorted(items):
        return None
    left, right = ("(", ")") if kind == "()" else (r"\{", r"\}") if kind else ("", "")
    gold, answer = (left + ", ".join(map(sp.latex, v)) + right for v in (items, other))
    if kind == r"\{\}" and (len(set(items)) < len(items) or len(set(other)) < len(other)):
        return None
    return Pair("sequence", gold, answer, same)


def interval(rng: random.Random, same: bool) -> Pair | None:
    low = rng.randrange(-9, 9)
    high = low + rng.randrange(1, 9)
    left, right = rng.choice("(["), rng.choice(")]")
    gold = f"{left}{low}, {high}{right}"
    a, b = ("<" if left == "(" else r"\le"), ("<" if right == ")" else r"\le")
    if not same:
        a = r"\le" if a == "<" else "<"
    return Pair("interval", gold, f"{low} {a} x {b} {high}", same)


def line(rng: random.Random, same: bool) -> Pair | None:
    m, b, k = rng.randrange(-9, 10), rng.randrange(-9, 10), rng.randrange(1, 6)
    if m == 0:
        return None
    other = b if same else b + 1
    return Pair(
        "line",
        sp.latex(sp.Eq(Y, m * X + b, evaluate=False)),
        sp.latex(sp.Eq(k * m * X - k * Y, -k * other, evaluate=False)),
        same,
    )


def named(rng: random.Random, same: bool) -> Pair | None:
    a, b = rng.randrange(-9, 10), rng.randrange(-9, 10)
    if a == b:
        return None
    answer = f"y = {b}, x = {a}" if same else f"y = {a}, x = {b}"
    return Pair("named", f"x = {a}, y = {b}", answer, same)
