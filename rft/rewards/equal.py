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
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rft.rewards.numeric import same_by_value

MAX_LENGTH = 2000  # characters; longer answers are no answers
MAX_DIGITS = 1000


class Verdict(NamedTuple):
    """`how`: exact (rationals), structure (sequences, words) or algebra (by value, or by sympy)."""

    equal: bool
    how: str


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction
    percent: bool = False
    decimal: bool = False
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Items:
    """kind: `list` (no brackets), `{}`, `union`, `matrix`, or a pair of brackets such as `(]`."""

    kind: str
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Raw:
    text: str


Value = Number | Items | Raw

_INTEGER = re.compile(r"[-+]?\d{1,1000}")
_THOUSANDS = re.compile(r"(?<![\d.,(\[{])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_NUMBER = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?(?:(?:[eE]|\\times10\^)\{?([-+]?\d{1,3})\}?)?")
_FRACTION = re.compile(r"([-+]?)(\d*)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}")
_RATIO = re.compile(r"([-+]?\d+)/(\d+)")
_FRAC_BARE = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_SPACING = re.compile(
    r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-zA-Z])|~|\\displaystyle|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])"
)
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|operatorname|textit)\s*\{([^{}]*)\}")
_UNIT_TEX = re.compile(r"(?<=[\d}.)\s%])\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}(?:\^\{?(\d)\}?)?$")
_UNIT_PLAIN = re.compile(
    r"(?<=[\d%])\s*([a-zA-Z]{2,}\.?(?:\s+[a-zA-Z/]+\.?)*|(?<=\s)[a-zA-Z])(?:\^\{?(\d)\}?)?$"
)
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\degree(?:s)?|°")
_ASSIGN = re.compile(r"^[a-zA-Z](?:_\{?\w+\}?)?(?:\([a-z]\))?\s*(?:=|\\in(?![a-zA-Z]))\s*([^=<>]+)$")
_BASE = re.compile(r"([-+]?[0-9A-Fa-f]+)_\{?(\d{1,2})\}?")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[' -][A-Za-z]+)*")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_MATRIX = re.compile(r"\\begin\{([bpvBV]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_UNITS = {
    word: name
    for name, words in {
        "inch": "in inch inches",
        "foot": "ft foot feet",
        "yard": "yd yard yards",
        "mile": "mi mile miles",
        "mm": "mm millimeter millimeters",
        "cm": "cm centimeter centimeters",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "lb": "lb lbs pound pounds",
        "second": "s sec second seconds",
        "minute": "min minute minutes",
        "hour": "h hr hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "yr year years",
        "cent": "cent cents",
        "dollar": "dollar dollars usd",
        "degree": "degree degrees",
        "liter": "l liter liters litre litres",
    }.items()
    for word in words.split()
}
_OPEN, _CLOSE = "([{", ")]}"


def equal(gold: str, answer: str) -> Verdict:
    """Whether `answer` means the same as `gold`. May take long in sympy; never raises for bad LaTeX."""
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):  # most answers end here
        return Verdict(int(gold) == int(answer), "exact")
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return Verdict(gold == answer, "exact")
    want, got = read(gold), read(answer)
    how = "exact" if isinstance(want, Number) and isinstance(got, Number) else "structure"
    same = _same(want, got)
    if same is None and not isinstance(want, Items) and not isinstance(got, Items):
        return Verdict(_algebra(_show(want), _show(got)), "algebra")
    if same is not None:
        return Verdict(same, how)
    return Verdict(_algebra(_tex(gold), _tex(answer)), "algebra")


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
    return _BASE.fullmatch(value.text) if isinstance(value, Raw) else None


def _same_numeral(a: Value, b: Value) -> bool:
    """Numerals with a base: the same digits, and the same base where both have one."""
    x, y = _based(a), _based(b)
    if x and y:
        return x.group(1) == y.group(1) and x.group(2) == y.group(2)
    match, other = (x, b) if x else (y, a)
    return match is not None and isinstance(other, Number) and str(other.value) == match.group(1).lstrip("+")


def _wordy(text: str) -> bool:
    """True for plain words: three letters or more, nothing of a formula."""
    return _WORDS.fullmatch(text) is not None or _CHOICE.fullmatch(text) is not None


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


# -- reading -----------------------------------------------------------------------------------------


def _tex(text: str) -> str:
    """One spelling for the many of LaTeX: spacing, text, fractions, delimiters, currency, degrees."""
    text = text.strip().strip("$").strip()
    if text.startswith((r"\(", r"\[")) and text.endswith((r"\)", r"\]")):
        text = text[2:-2]
    text = text.replace("−", "-").replace("–", "-").replace("×", r"\times").replace("π", r"\pi")
    text = (
        text.replace("∞", r"\infty").replace("√", r"\sqrt").replace("**", "^") if not text.isascii() else text
    )
    text = text.replace(r"\$", "").replace("$", "").replace("€", "").replace("£", "")
    text = re.sub(r"(?<!\\)\\!\s*", "", text)
    text = _SPACING.sub(" ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = _DEGREES.sub("", text)
    text = text.rstrip().rstrip(".").rstrip()
    return re.sub(r"\s+", " ", text).strip()


@lru_cache(maxsize=65_536)
def read(text: str) -> Value:
    """A final answer as a value."""
    return _read(_tex(text))


def _read(text: str) -> Value:
    text = text.strip()
    number = _read_number(text)
    if number is not None:
        return number
    structured = _read_matrix(text) or _read_union(text) or _read_items(text)
    if structured is not None:
        return structured
    return _read_plain(text)


def _read_plain(text: str) -> Value:
    """Words, units, assignments, bases; what remains is raw."""
    assigned = _ASSIGN.match(text)
    if assigned:
        return _read(assigned.group(1))
    whole = _TEXT.fullmatch(text)
    if whole:
        text = whole.group(1).strip()
    base = _BASE.fullmatch(text.replace(" ", ""))
    if base:
        return Raw(f"{base.group(1)}_{{{base.group(2)}}}")
    stripped, unit = _without_unit(text)
    if stripped != text:
        number = _read_number(stripped)
        if number is not None:
            return Number(number.value, number.percent, number.decimal, unit)
        return _read(stripped)
    choice = _CHOICE.fullmatch(text)
    if choice:
        return Raw(choice.group(1))
    words = _TEXT.sub(r"\1", text).strip()
    if r"\pm" in text and text.count(r"\pm") == 1:
        plus, minus = text.replace(r"\pm", "+"), text.replace(r"\pm", "-")
        return Items("list", (_read(plus.removeprefix("+")), _read(minus)))
    return Raw(_expanded_fractions(words))


def _expanded_fractions(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`."""
    return _FRAC_BARE.sub(lambda m: rf"\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)


def _unit(word: str, power: str | None) -> str:
    """A known unit by one name, with its power (`square`, `sq` and `cubic` count); else nothing."""
    words = [w.rstrip(".") for w in word.lower().split()]
    if words and words[0] in ("square", "sq", "cubic", "cu"):
        power = "2" if words[0].startswith("sq") else "3"
        words = words[1:]
    name = _UNITS.get(words[0], "") if words else ""
    return f"{name}^{power}" if name and power else name


def _without_unit(text: str) -> tuple[str, str]:
    """A trailing unit or noun cut off a number; formulas keep their letters."""
    found = _UNIT_TEX.search(text)
    if found:
        return text[: found.start()].strip(), _unit(found.group(1), found.group(2))
    found = _UNIT_PLAIN.search(text)
    if found and "\\" not in text[max(0, found.start() - 1) : found.start() + 1]:
        head = text[: found.start()].strip()
        if _read_number(head) is not None:
            return head, _unit(found.group(1), found.group(2))
    return text, ""


def _read_number(text: str) -> Number | None:
    if not text or len(text) > MAX_DIGITS or text[-1].isalpha():
        return None
    percent = text.endswith("%")
    if percent:
        text = text[:-1].rstrip("\\ ")
    if "," in text:
        text = _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text)
    text = text.replace(" ", "") if not re.search(r"\d \d", text) else text
    if "frac" in text or "/" in text:
        value = _read_fraction(text)
        return None if value is None else Number(value, percent)
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, part, exponent = match.groups()
    value = Fraction(int((whole or "") + (part or "")), 10 ** len(part or ""))
    if exponent:
        value *= Fraction(10) ** int(exponent)
    return Number(-value if sign == "-" else value, percent, decimal=bool(part) or bool(exponent))


def _read_fraction(text: str) -> Fraction | None:
    mixed = re.fullmatch(r"([-+]?)(\d+) (\d+)/(\d+)", text)
    if mixed and int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return -value if mixed[1] == "-" else value
    text = _expanded_fractions(text.replace(" ", ""))
    match = _FRACTION.fullmatch(text)
    if match and int(match[4]):
        value = int(match[2] or 0) + Fraction(int(match[3]), int(match[4]))
        return -value if match[1] == "-" else value
    match = _RATIO.fullmatch(text)
    if match and int(match[2]):
        return Fraction(int(match[1]), int(match[2]))
    return None


def _read_matrix(text: str) -> Items | None:
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match.group(2)) if row.strip()]
    cells = [Items("row", tuple(_read(cell) for cell in row.split("&"))) for row in rows]
    return Items("matrix", tuple(cells))


def _read_union(text: str) -> Items | None:
    if r"\cup" not in text:
        return None
    return Items("union", tuple(_read(part) for part in text.split(r"\cup")))


def _read_items(text: str) -> Items | None:
    """Sets, tuples, intervals, and lists without brackets."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        parts = _split(text[2:-2])
        return Items("{}", tuple(_read(p) for p in parts))
    text = _TEXT.sub(lambda m: "," if m[1].strip() in ("and", "or") else m[0], text)
    if "," not in text:
        return None
    if text[0] in "([" and text[-1] in ")]" and _spans(text):
        parts = _split(text[1:-1])
        if len(parts) > 1:
            return Items(text[0] + text[-1], tuple(_read(p) for p in parts))
    parts = _split(re.sub(r",?\s+(?:and|or)\s+", ", ", text))
    return Items("list", tuple(_read(p) for p in parts)) if len(parts) > 1 and all(parts) else None


def _spans(text: str) -> bool:
    """True where the first bracket closes with the last one, whatever their shapes."""
    depth = 0
    for i, char in enumerate(text):
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
            if depth == 0:
                return i == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """At the commas outside of all brackets."""
    parts, depth, last = [], 0, 0
    for i, char in enumerate(text):
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        elif char == "," and depth <= 0:
            parts.append(text[last:i].strip())
            last = i + 1
    parts.append(text[last:].strip())
    return parts
