"""Final answers as small values: exact rationals, sequences of values, or raw text.

Reads LaTeX and plain text: thousands separators, percents, currency, degrees, units, mixed numbers,
tuples, intervals, sets, unions, matrices, `a +- b`, assignments (`x = 5` reads as 5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_DIGITS = 1000


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

INTEGER = re.compile(r"[-+]?\d{1,1000}")
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
BASE = re.compile(r"([-+]?[0-9A-Fa-f]+)_\{?(\d{1,2})\}?")
WORDS = re.compile(r"[A-Za-z]{3,}(?:[' -][A-Za-z]+)*")
CHOICE = re.compile(r"\(?([A-Z])\)?")
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


def plain_tex(text: str) -> str:
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
    return _read(plain_tex(text))


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
    base = BASE.fullmatch(text.replace(" ", ""))
    if base:
        return Raw(f"{base.group(1)}_{{{base.group(2)}}}")
    stripped, unit = _without_unit(text)
    if stripped != text:
        number = _read_number(stripped)
        if number is not None:
            return Number(number.value, number.percent, number.decimal, unit)
        return _read(stripped)
    choice = CHOICE.fullmatch(text)
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
