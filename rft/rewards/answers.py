r"""Parse final answers into values: numbers, expressions, sequences, names, sets of reals, choices, times.

`read` accepts LaTeX and plain text. Anything else becomes an `Expr`, which `rft.rewards.equal` compares by
value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from rft.rewards.notation import FUNCTIONS, GREEK, plain_tex, words_of
from rft.rewards.numeric import parse, real_value, same_value
from rft.rewards.units import Tail, Unit, leading_currency, split_tail

MAX_DIGITS = 1000
MAX_DEPTH = 12  # deepest nesting of brackets that is parsed


@dataclass(frozen=True, slots=True)
class Number:
    """A rational number.

    digits: significant digits of a decimal, 0 for an exact notation. step: one unit of the last digit.
    letter: the unit is a bare letter, which may also be a variable.
    """

    value: Fraction
    percent: bool = False
    digits: int = 0
    step: Fraction = Fraction(0)
    unit: Unit | None = None
    letter: bool = False


@dataclass(frozen=True, slots=True)
class Expr:
    text: str
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Infinity:
    sign: int


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class Items:
    """A sequence. kind: `list` (no brackets), `{}`, `matrix`, `row`, `det`, or brackets such as `(]`."""

    kind: str
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval."""

    low: Value
    low_closed: bool
    high: Value
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Reals:
    """A union of intervals; `name` is the variable of the inequality that it was written as."""

    pieces: tuple[Piece, ...]
    name: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """Named values: `x = 3, y = 2`. equation: both sides as written, for a single name."""

    pairs: tuple[tuple[str, Value], ...]
    equation: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Relation:
    """An equation or inequality that does not give the value of one name. sign: `=`, `<`, `<=` or `!=`."""

    sign: str
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Residue:
    value: Value
    modulus: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A letter of a multiple-choice question, with the text of that choice where it is given."""

    letter: str
    rest: Value | None = None


@dataclass(frozen=True, slots=True)
class Clock:
    """A time: `3:45 PM`. half: am, pm, or empty."""

    hour: int
    minute: int
    second: int
    half: str = ""


@dataclass(frozen=True, slots=True)
class Ratio:
    parts: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Numeral:
    """Digits in a given base."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Approximate:
    r"""An approximation: `\frac{1}{3} \approx 0.333`."""

    exact: Value
    shown: Value


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A contradiction, equal to nothing: `2 + 2 = 5`, `3 = x = 4`."""

    text: str


Value = (
    Number
    | Expr
    | Infinity
    | Words
    | Items
    | Reals
    | Named
    | Relation
    | Residue
    | Choice
    | Clock
    | Ratio
    | Numeral
    | Approximate
    | Contradiction
)

INTEGER = re.compile(r"[-+]?[0-9]{1,1000}")
_THOUSANDS = re.compile(r"(?<![\d.,(\[{])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_SPACED = re.compile(r"[-+]?\d{1,3}(?:[ ']\d{3})+(?:\.\d+)?%?")
_NUMBER = re.compile(
    r"([-+]?)(\d*)(?:\.(\d*))?(?:(?:[eE]|(?:\\times|\\cdot|\*|x)10\^)(?:\{([-+]?\d{1,3})\}|([-+]?\d{1,3})))?"
)
_FRACTION = re.compile(r"([-+]?)(\d*)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}")
_RATIONAL = re.compile(r"([-+]?\d+)/(\d+)")
_MIXED = re.compile(r"([-+]?)(\d+)[ -](\d+)/(\d+)")
_FRAC_BARE = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_REPEATING = re.compile(
    r"([-+]?)(\d*)\.(\d*?)(?:\\(?:overline|bar|overbar|dot)\s*\{?(\d+)\}?|\((\d+)\))(?:\.\.\.)?"
)
_DOTTED = re.compile(r"([-+]?)(\d*)\.(\d*?)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
_ELLIPSIS = re.compile(r"([-+]?)(\d*)\.(\d+)\s*\.\.\.")
_VARIABLE = rf"(?:[a-zA-Z]|\\(?:{'|'.join(sorted(GREEK))})(?![a-zA-Z]))"
_NAME = re.compile(rf"({_VARIABLE})\s*(?:_\s*\{{?\s*(\w+)\s*\}}?)?'?")
_FUNCTION_NAME = re.compile(rf"({_VARIABLE}(?:\^\{{-1\}})?)\s*\(\s*{_VARIABLE}(?:\s*,\s*{_VARIABLE})*\s*\)")
_WORDY_NAME = re.compile(
    r"(?:(?:m\s*)?\\(?:angle|overline|triangle|widehat)\s*\{?\s*[A-Z]{1,4}\s*\}?|\|?[A-Z]{2,4}\|?|\[[A-Z]{3,6}\]"
    r"|[A-Za-z]\([^()=]{1,20}\)"
    r"|(?:\\words\{[^{}]*\}|[A-Za-z]{3,})(?:[ ](?:\\words\{[^{}]*\}|[A-Za-z]+)){0,5})"
)
# Words of a sentence that does not give a value for a name.
_NO_NAME = re.compile(
    r"(?<![a-zA-Z])(?:not|never|no|nor|neither|wrong|incorrect|false|least|most|than|except|unless|if|but|between|"
    r"opposite|minus|negative|without|half|twice|maybe|perhaps|or)(?![a-zA-Z])",
    re.IGNORECASE,
)
_WORDS = re.compile(r"(?:No|no|NO|[A-Za-z]{3,})(?:[ '-]+[A-Za-z]+)*")
_LETTER = re.compile(
    r"\(?\s*([A-J])\s*[).:]?|(?:[Oo]ption|[Cc]hoice|[Aa]nswer:?)\s*\(?([A-J])\)?|\(([a-j])\)|([a-j])\)"
)
_LETTERS = re.compile(r"[A-J](?:\s*,\s*[A-J])*,?\s+and\s+[A-J]")
_LETTER_FIRST = re.compile(
    r"(?:[Oo]ption\s+)?(?:\(\s*([A-J])\s*\)\s*[:.]?|([A-J])\s*[).:])\s*(?![\^*/=+_(!])(\S.*)"
)
_LETTER_LAST = re.compile(r"(\S.*?)\s+\(([A-J])\)")
_LETTER_AGAIN = re.compile(r"\([A-J]\)|(?<![A-Za-z\\])[A-J][).:]")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*(?:\\words\{)?\s*([AaPp])\.?\s*[Mm]\.?\s*\}?")
_BARE_CLOCK = re.compile(
    r"(\d{1,2}):(\d{2})(?::(\d{2}))?(?:\s*(?:\\words\{)?\s*(?:hours|hrs|o'clock|h)\s*\}?)?"
)
_NUMERAL = re.compile(r"\(?([-+]?[0-9A-Fa-f]+)\)?_\{?(?:(\d{1,2})|\\words\{\s*([a-z]+)\s*\}|([a-z]{3,}))\}?")
_BASES = {
    word: base
    for base, word in enumerate(
        words_of(
            "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
        ),
        2,
    )
} | {"bin": 2, "oct": 8, "dec": 10, "hex": 16}
_MODULUS = re.compile(
    r"(.*?)\s*(?:\\pmod|\\bmod|\\mod|\(\s*\\?(?:mod|bmod|words\{\s*mod\s*\})|(?<![a-zA-Z\\])mod(?![a-zA-Z])|\\words\{\s*mod\s*\})"
    r"\s*\{?\s*\(?(\d{1,30})\)?\s*\}?\s*\)?"
)
_MATRIX = re.compile(
    r"(.*?)\\begin\{([bpvBV]?(?:small)?matrix|array)\}(?:\{[clr| ]*\})?(.*)\\end\{\2\}(.*)", re.DOTALL
)
_SYSTEM = re.compile(
    r"(?:\\\{)?\s*\\begin\{(cases|aligned|align\*?|gathered|split)\}(.*)\\end\{\1\}", re.DOTALL
)
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_QUALIFIER = re.compile(
    r"[,;]?\s*(?:\\words\{\s*(?:where|for|with)\s*\}|where|for|with)?\s*\(?\s*(?<![a-zA-Z\\])(?:[a-z](?:\s*,\s*[a-z])*)\s*"
    r"\\in\s*\\mathbb\{[ZNQRC]\}(?:\^\{?[+*]\}?|_\{?[+>\d]\}?)?\s*\)?$"
)
_BUILDER = re.compile(r"\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?[:|]\s*(.+)")
_MEMBER = re.compile(r"([a-zA-Z](?:_\{?\w+\}?)?|\([a-z](?:,\s*[a-z])+\))\s*\\in\s*(?![a-zA-Z])(.+)")
_EQUIVALENT = re.compile(rf"{_VARIABLE}\s*\\equiv\s*(.+)")
_ABOUT = re.compile(
    r"(?:\\approx|\\sim|(?:\\words\{\s*)?(?:approximately|approx\.?|about|exactly|roughly)(?:\s*\})?)\s*(.+)"
)
_INTRODUCED = re.compile(
    r"(?:\\words\{\s*)?(?:[Tt]he\s+)?(?:[Ff]inal\s+)?[Aa]nswer(?:\s+is|\s*:)+\s*(?:\})?\s*:?\s*(.+)",
    re.DOTALL,
)
_COMPARISONS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", "=": "="}
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
_OPEN, _CLOSE = "([{", ")]}"
_EMPTY = frozenset(
    (
        "empty set",
        "the empty set",
        "no solution",
        "no solutions",
        "no real solution",
        "no real solutions",
        "none",
    )
)
_ALL_REALS = frozenset(("all real numbers", "all reals", "the real numbers", "real numbers", "all real"))
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_NUMBER_WORDS = {
    **{word: Fraction(n) for n, word in enumerate(_ONES)},
    **{word: Fraction(10 * n) for n, word in enumerate(_TENS, 2)},
    **{
        f"{tens} {ones}": Fraction(10 * n + k)
        for n, tens in enumerate(_TENS, 2)
        for k, ones in enumerate(_ONES[1:10], 1)
    },
    **{word: Fraction(1, 2) for word in ("half", "one half", "a half")},
    **{word: Fraction(1, 3) for word in ("one third", "a third")},
    **{word: Fraction(1, 4) for word in ("one fourth", "one quarter", "a quarter")},
    "two thirds": Fraction(2, 3),
    "three fourths": Fraction(3, 4),
    "three quarters": Fraction(3, 4),
    "one hundred": Fraction(100),
    "one thousand": Fraction(1000),
}
_ORDINAL = re.compile(r"(\d+)\s*(?:\^\s*)?(?:\{\s*)?(?:\\words\{\s*)?(?:st|nd|rd|th)(?:\s*\}){0,2}")
_DATE = re.compile(
    r"\d{4}-(?:0?[1-9]|1[0-2])-(?:0?[1-9]|[12]\d|3[01])|(?:0?[1-9]|[12]\d|3[01])-(?:0?[1-9]|[12]\d|3[01])-\d{4}"
)
_WORD_FORMS = {
    "dne": "undefined",
    "does not exist": "undefined",
    "doesn't exist": "undefined",
    "not defined": "undefined",
    "yes": "true",
    "no": "false",
    "infinitely many": "infinitely many solutions",
}


@lru_cache(maxsize=65_536)
def read(text: str) -> Value:
    """Parse a final answer."""
    return _read(plain_tex(text), 0)


def _read(text: str, depth: int) -> Value:
    text = text.strip()
    number = _read_number(text)
    if number is not None:
        return number
    if depth > MAX_DEPTH or not text:
        return Expr(text)
    text = _unbraced(text)
    for reader in _READERS:
        value = reader(text, depth + 1)
        if value is not None:
            return value
    return Expr(expanded_fractions(text))


def _unbraced(text: str) -> str:
    """Strip braces that enclose the whole text."""
    for _ in range(4):
        if not (text.startswith("{") and text.endswith("}") and _spans(text)):
            break
        text = text[1:-1].strip()
    return text


# -- numbers -----------------------------------------------------------------------------------------


def _read_number(text: str) -> Number | None:
    if not text or len(text) > MAX_DIGITS or text[-1].isalpha() or not text.isascii():
        return None
    percent = text.endswith("%")
    if percent:
        text = text[:-1].rstrip("\\ ")
    if "," in text:
        text = _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text)
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "").replace("'", "")
    if "frac" in text or "/" in text:
        value = _read_fraction(text)
        return None if value is None else Number(value, percent)
    if " " in text:
        if re.search(r"\d \d", text):
            return None
        text = text.replace(" ", "")
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        value = _read_repeating(text)
        return None if value is None else Number(value, percent)
    sign, whole, part, braced, bare = match.groups()
    exponent = braced or bare
    digits = (whole or "") + (part or "")
    value = Fraction(int(digits), 10 ** len(part or ""))
    step = Fraction(1, 10 ** len(part or ""))
    if exponent:
        value, step = value * Fraction(10) ** int(exponent), step * Fraction(10) ** int(exponent)
    if not (part or exponent):
        return Number(-value if sign == "-" else value, percent)
    return Number(-value if sign == "-" else value, percent, len(digits.lstrip("0")), step)


def _read_fraction(text: str) -> Fraction | None:
    mixed = _MIXED.fullmatch(text)
    if mixed and int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return -value if mixed[1] == "-" else value
    text = expanded_fractions(text.replace(" ", ""))
    match = _FRACTION.fullmatch(text)
    if match and int(match[4]):
        part = Fraction(int(match[3]), int(match[4]))
        if match[2] and not 0 <= part < 1:
            return None  # 2 \frac{5}{3} is not a mixed number
        value = int(match[2] or 0) + part
        return -value if match[1] == "-" else value
    match = _RATIONAL.fullmatch(text)
    if match and int(match[2]):
        return Fraction(int(match[1]), int(match[2]))
    return None


def _read_repeating(text: str) -> Fraction | None:
    r"""Read a repeating decimal: `0.1\overline{6}`, `0.1(6)`, `0.\dot{3}`, `0.333...`."""
    if match := _DOTTED.fullmatch(text):
        sign, whole, fixed, period = match[1], match[2], match[3], match[4] + match[5] + match[6]
    elif match := _REPEATING.fullmatch(text):
        sign, whole, fixed, period = match[1], match[2], match[3], match[4] or match[5]
    elif match := _ELLIPSIS.fullmatch(text):
        sign, whole, digits = match[1], match[2], match[3]
        period = _period(digits)
        if period is None:
            return None
        fixed = digits
        while fixed.endswith(period):
            fixed = fixed[: -len(period)]
    else:
        return None
    value = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    return -value if sign == "-" else value


def _period(digits: str) -> str | None:
    """Return the shortest block repeated at least twice at the end (three times if there is nothing else)."""
    for size in range(1, min(len(digits) // 2, 50) + 1):
        block = digits[-size:]
        if digits.endswith(block * 2):
            return block
    return None


def expanded_fractions(text: str) -> str:
    r"""Write `\frac12` as `\frac{1}{2}`."""
    return _FRAC_BARE.sub(lambda m: rf"\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)


# -- readers, in order: each takes plain LaTeX and returns a value, or None if it does not apply ---------


def _infinity(text: str, depth: int) -> Value | None:
    bare = re.sub(r"\\words\{\s*(\w+)\s*\}", r"\1", text).replace(" ", "").removeprefix("+")
    sign = -1 if bare.startswith("-") else 1
    return (
        Infinity(sign) if bare.removeprefix("-") in (r"\infty", "inf", "oo", "Infinity", "infinity") else None
    )


def _words(text: str, depth: int) -> Value | None:
    """Read plain words and phrases."""
    inner = re.sub(r"\\words\{([^{}]*)\}", r" \1 ", text)
    inner = " ".join(inner.split()).strip(" .,")
    wrapped = inner != text
    if wrapped and _LETTERS.fullmatch(inner):
        return _read(inner, depth)
    if not (
        _WORDS.fullmatch(inner) or (wrapped and re.fullmatch(r"[A-Za-z]{2,}(?:[ '-]+[A-Za-z]+)*", inner))
    ):
        return None
    if not wrapped and (inner in FUNCTIONS or any(w in FUNCTIONS or w in GREEK for w in inner.split())):
        return None
    low = inner.lower().replace("-", " ")
    if low in _NUMBER_WORDS:
        return Number(_NUMBER_WORDS[low])
    if match := _LETTER.fullmatch(inner):
        return Choice((match[1] or match[2] or match[3] or match[4]).upper())
    if low in ("infinity", "positive infinity", "inf", "infinite", "negative infinity", "minus infinity"):
        return Infinity(-1 if low.startswith(("neg", "min")) else 1)
    if low in _EMPTY:
        return Items("{}", ())
    if low in _ALL_REALS:
        return Reals((Piece(Infinity(-1), False, Infinity(1), False),))
    if {"and", "or", "mod", "to"} & set(low.split()):
        return _read(inner, depth) if wrapped else None
    if not wrapped and re.fullmatch(r"[b-df-hj-np-tv-z]{3}", inner):
        return None  # xyz is a product
    return Words(_WORD_FORMS.get(low, re.sub(r"^(?:the|an|a) (?=\w)", "", low)))


def _choice(text: str, depth: int) -> Value | None:
    text = re.sub(r"^\\words\{\s*([A-Ja-j])\s*\}", r"\1", text).strip()
    if match := _LETTER.fullmatch(text):
        return Choice((match[1] or match[2] or match[3] or match[4]).upper())
    if len(text) > 300:
        return None
    first, last = _LETTER_FIRST.fullmatch(text), _LETTER_LAST.fullmatch(text)
    if first:
        letter, rest = first[1] or first[2], first[3]
    elif last:
        letter, rest = last[2], last[1]
    else:
        return None
    if _LETTER_AGAIN.search(rest):
        return Contradiction(text)  # several choices
    return Choice(letter, _read(rest, depth))


def _ordinal(text: str, depth: int) -> Value | None:
    match = _ORDINAL.fullmatch(text)
    return Number(Fraction(int(match[1]))) if match else None


def _date(text: str, depth: int) -> Value | None:
    """Read 2023-01-02, which is not a difference."""
    return Words("-".join(part.lstrip("0") for part in text.split("-"))) if _DATE.fullmatch(text) else None


def _clock(text: str, depth: int) -> Value | None:
    if ":" not in text and text[-1:] not in "mM.}":
        return None
    match = _CLOCK.fullmatch(text) or _BARE_CLOCK.fullmatch(text)
    if match is None:
        return None
    half = match[4].lower() + "m" if match.re is _CLOCK else ""
    hour, minute, second = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    return Clock(hour, minute, second, half) if hour <= 24 and minute < 60 and second < 60 else None


def _ratio(text: str, depth: int) -> Value | None:
    text = re.sub(r"^(\d+)\s*(?:\\words\{\s*to\s*\}|to)\s*(\d+)$", r"\1:\2", text)
    if ":" not in text or ("{" in text and "\\{" in text):
        return None
    parts = _split(text, ":")
    if len(parts) < 2 or not all(parts) or any(re.search(r"[=<>,]|\\words", p) for p in parts):
        return None
    return Ratio(tuple(_read(p, depth) for p in parts))


def _numeral(text: str, depth: int) -> Value | None:
    match = _NUMERAL.fullmatch(text.replace(" ", "")) if "_" in text else None
    if match is None:
        return None
    base = int(match[2]) if match[2] else _BASES.get(match[3] or match[4])
    digits = match[1].lstrip("+").upper()
    if base is None or not 2 <= base <= 36 or not (match[1][-1].isdigit() or base > 10):
        return None
    if base <= 10 and not digits.lstrip("-").isdigit():
        return None
    sign = "-" if digits.startswith("-") else ""
    return Numeral(sign + (digits.lstrip("-").lstrip("0") or "0"), base)


def _residue(text: str, depth: int) -> Value | None:
    if "mod" not in text:
        return None
    match = _MODULUS.fullmatch(text)
    if match is None or not match[1]:
        return None
    inner = re.sub(rf"^{_VARIABLE}\s*(?:\\equiv|=)\s*|^\\equiv\s*", "", match[1])
    if r"\equiv" in inner:
        return None
    return Residue(_read(inner, depth), int(match[2]))


def _matrix(text: str, depth: int) -> Value | None:
    match = _MATRIX.fullmatch(text) if r"\begin" in text else None
    if match is None:
        return None
    before, kind, body, after = match[1].strip(), match[2], match[3], match[4].strip()
    before, after = before.rstrip("([").strip(), after.lstrip(")]").strip()
    if "=" in before or r"\begin" in body:
        return None
    rows = [row.split("&") for row in _ROW_END.split(body) if row.strip()]
    if len({len(row) for row in rows}) > 1:
        return Contradiction(text)
    if re.fullmatch(r"\^\s*\{?\s*\\?(?:T|mathsf\{T\})\s*\}?", after):
        rows = [list(column) for column in zip(*rows, strict=True)]
    elif after:
        return None
    before = re.sub(r"\\(?:cdot|times)\s*$", "", before).strip()
    if before:
        scale = "-1" if before == "-" else before
        rows = [[f"({scale})({cell.strip()})" for cell in row] for row in rows]
    cells = tuple(Items("row", tuple(_read(cell, depth) for cell in row)) for row in rows)
    return Items("det" if kind.startswith(("v", "V")) else "matrix", cells)


def _unqualified(text: str, depth: int) -> Value | None:
    r"""Read `\pi n, n \in \mathbb{Z}` without its qualifier."""
    match = _QUALIFIER.search(text) if r"\mathbb" in text else None
    return (
        _read(text[: match.start()], depth)
        if match and match.start() > 0 and match[0][0] in ",; (\\wf"
        else None
    )


def _about(text: str, depth: int) -> Value | None:
    match = _ABOUT.fullmatch(text) or (_INTRODUCED.fullmatch(text) if "nswer" in text else None)
    return _read(match[1], depth) if match else None


def _intervals_from_outside(text: str, depth: int) -> Value | None:
    """Read intervals with outward brackets: `]1,2[`, `]1,2]`, `[1,2[`."""
    if not (len(text) > 4 and text[0] in "[]" and text[-1] in "[]" and (text[0] == "]" or text[-1] == "[")):
        return None
    if re.search(r"[\[\]]", text[1:-1]):
        return None
    parts = _split(text[1:-1], ",;")
    if len(parts) != 2 or not all(parts):
        return None
    return Items(
        ("(" if text[0] == "]" else "[") + (")" if text[-1] == "[" else "]"),
        tuple(_read(p, depth) for p in parts),
    )


def _union(text: str, depth: int) -> Value | None:
    if text in (r"\mathbb{R}", r"\mathbb R"):
        return Reals((Piece(Infinity(-1), False, Infinity(1), False),))
    if match := re.fullmatch(r"\\mathbb\{R\}(?:\^\{?([-+])\}?|_\{?([<>])\s*0\}?)", text):
        zero = Number(Fraction(0))
        positive = (match[1] or match[2]) in "+>"
        return Reals(
            (Piece(zero, False, Infinity(1), False) if positive else Piece(Infinity(-1), False, zero, False),)
        )
    if match := re.fullmatch(r"\\mathbb\{R\}\s*(?:\\setminus|-|/)\s*\\\{(.*)\\\}", text):
        return _all_but([_read(p, depth) for p in _split(match[1], ",;")])
    if r"\cup" not in text or "=" in text or r"\in " in text:
        return None
    pieces: list[Piece] = []
    for part in _split_command(text, r"\cup"):
        more = as_pieces(_read(part, depth))
        if more is None:
            return None
        pieces += more
    return Reals(tuple(pieces))


def as_pieces(value: Value) -> list[Piece] | None:
    """Return the intervals of an interval, an inequality or a finite set (as points)."""
    if isinstance(value, Reals):
        return list(value.pieces)
    if isinstance(value, Items) and len(value.items) == 2 and value.kind in ("()", "(]", "[)", "[]"):
        low, high = value.items
        return [Piece(low, value.kind[0] == "[", high, value.kind[1] == "]")]
    if isinstance(value, Items) and value.kind == "{}":
        return [Piece(v, True, v, True) for v in value.items]
    return None


def _all_but(points: list[Value], name: str = "") -> Value | None:
    """Return the reals without the given points."""
    placed = []
    for value in points:
        expression = parse(show(value)) if isinstance(value, Number | Expr) else None
        real = real_value(expression, 30) if expression else None
        if real is None:
            return None
        placed.append((real, value))
    placed.sort(key=lambda pair: pair[0])
    ends: list[Value] = [Infinity(-1), *(value for _, value in placed), Infinity(1)]
    return Reals(tuple(Piece(a, False, b, False) for a, b in pairwise(ends)), name)


def _bracketed(text: str, depth: int) -> Value | None:
    """Read sets, tuples and intervals."""
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Items("{}", ())
    if text.startswith(r"\{") and text.endswith(r"\}") and r"\}" not in text[2:-2]:
        if match := _BUILDER.fullmatch(text[2:-2]):
            return _read(match[2], depth)
        return Items("{}", _flat(_read(p, depth) for p in _listed(text[2:-2])[0]))
    if text.startswith(r"\langle") and text.endswith(r"\rangle"):
        text = "(" + text[7:-7] + ")"
    if text[:1] in "([" and text[-1:] in ")]" and _spans(text):
        parts = _split(text[1:-1], ",;")
        if len(parts) > 1 and all(parts):
            if r"\pm" in text:
                return _plus_minus(text, depth)
            return Items(text[0] + text[-1], tuple(_read(p, depth) for p in parts))
        if text[0] + text[-1] in ("()", "[]") and parts[0] and not re.fullmatch(r"[^\\]", parts[0]):
            inner = _read(parts[0], depth)
            if not isinstance(inner, Number | Expr):
                return inner
    return None


def _flat(values: object) -> tuple[Value, ...]:
    """Flatten lists within a list, which a plus-minus sign produces."""
    out: list[Value] = []
    for value in values:  # type: ignore[attr-defined]
        out += value.items if isinstance(value, Items) and value.kind == "list" else [value]
    return tuple(out)


def _listed(text: str) -> tuple[list[str], list[str]]:
    """Split a list into its items and its separators: commas, semicolons, "and", "or"."""
    parts, joints, start, depth = [], [], 0, 0
    grouped = re.search(r"[,;]\s|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|;", text) is not None
    at = 0
    while at < len(text):
        char = text[at]
        if char == "\\" and text[at + 1 : at + 2] in ("{", "}"):
            depth += 1 if text[at + 1] == "{" else -1
            at += 2
            continue
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        joint = ""
        if depth <= 0:
            if char in ",;":
                digits = char == "," and grouped and re.compile(r"\d{3}(?!\d)").match(text, at + 1)
                joint = "" if digits and re.search(r"(?<!\d)\d{1,3}(?:,\d{3})*$", text[start:at]) else char
            elif char in "ao" and not (at and (text[at - 1].isalpha() or text[at - 1] in "\\{")):
                word = re.compile(r"(and|or)(?![a-zA-Z])").match(text, at)
                joint = word[1] if word else ""
        if joint:
            parts.append(text[start:at].strip())
            joints.append(joint)
            at += len(joint)
            start = at
        else:
            at += 1
    parts.append(text[start:].strip())
    kept = [parts[0]]
    kept_joints: list[str] = []
    for joint, part in zip(joints, parts[1:], strict=True):
        if not kept[-1] and len(kept) > 1:  # ", and"
            kept.pop()
            kept_joints.pop()
        kept.append(part)
        kept_joints.append(joint)
    return kept, kept_joints


def _system(text: str, depth: int) -> Value | None:
    """Read the lines of a system of equations."""
    match = _SYSTEM.fullmatch(text) if r"\begin" in text else None
    if match is None or r"\words" in match[2] or r"\begin" in match[2]:
        return None
    return _read(_ROW_END.sub(", ", match[2].replace("&", " ")).strip(" ,"), depth)


def _list(text: str, depth: int) -> Value | None:
    if not any(c in text for c in ",;") and "and" not in text and "or" not in text:
        return None
    parts, joints = _listed(text)
    if len(parts) < 2:
        return None
    if not all(parts):
        return Contradiction(text) if any(parts) else None
    if len(parts) > 200:
        return None
    values = [_read(part, depth) for part in parts]
    if all(isinstance(v, Named) for v in values):
        return _mapping(values)  # type: ignore[arg-type]
    if all(isinstance(v, Reals) for v in values):
        return _combined(values, "or" in joints)  # type: ignore[arg-type]
    first = values[0]
    if isinstance(first, Named) and len(first.pairs) == 1 and not any(isinstance(v, Named) for v in values):
        return Named(((first.pairs[0][0], Items("list", _flat([first.pairs[0][1], *values[1:]]))),))
    if isinstance(first, Named) and all(
        isinstance(v, Items) and len(v.items) == len(first.pairs) for v in values[1:]
    ):
        return Items("list", (Items("()", tuple(v for _, v in first.pairs)), *values[1:]))
    if len(set(values)) == 1 and len({spaceless(part) for part in parts}) > 1:
        return first  # one answer in several notations
    return Items("list", _flat(values))


def _mapping(values: list[Named]) -> Value:
    """Collect named values; several values of one name form a list."""
    grouped: dict[str, list[Value]] = {}
    for named in values:
        for name, value in named.pairs:
            grouped.setdefault(name, []).append(value)
    sizes = {len(v) for v in grouped.values()}
    if len(grouped) > 1 and sizes != {1}:  # (x = 1, y = 2), (x = 3, y = 4)
        return Items("list", tuple(values))
    return Named(tuple((n, v[0] if len(v) == 1 else Items("list", _flat(v))) for n, v in grouped.items()))


def _combined(values: list[Reals], either: bool) -> Value | None:
    """Combine inequalities: the union for "or", the intersection for "and" or a comma."""
    names = {v.name for v in values}
    if len(names) > 1:
        return Items("list", tuple(values))
    name = names.pop()
    pieces = [p for v in values for p in v.pieces]
    if either or not name:
        return Reals(tuple(pieces), name)
    if all(len(v.pieces) == 2 and v.pieces[0].high == v.pieces[1].low for v in values):  # x != 1, x != 2
        return _all_but([v.pieces[0].high for v in values], name)
    below = [p for p in pieces if p.low == Infinity(-1)]
    above = [p for p in pieces if p.high == Infinity(1)]
    if len(values) == 2 and len(pieces) == 2 and len(below) == len(above) == 1:
        up, down = above[0], below[0]
        return Reals((Piece(up.low, up.low_closed, down.high, down.high_closed),), name)
    return Reals(tuple(pieces), name)


def _relation(text: str, depth: int) -> Value | None:
    """Read equations, assignments and inequalities."""
    if match := _MEMBER.fullmatch(text):
        return _read(match[2], depth)
    if match := _EQUIVALENT.fullmatch(text):
        return _read(match[1], depth)
    if r"\approx" in text:
        left, _, right = text.rpartition(r"\approx")
        exact, shown = left.strip(), right.strip()
        if _name(exact) is not None:
            return Named(((_name(exact) or "", _read(shown, depth)),))
        return Approximate(_read(exact, depth), _read(shown, depth)) if exact and shown else None
    sides, signs = _compared(text)
    if not signs or not all(sides):
        return None
    if set(signs) == {"="}:
        return _equation(text, sides, depth)
    if len(signs) == 1:
        return _inequality(sides[0], signs[0], sides[1], depth)
    if len(signs) == 2 and (name := _name(sides[1])):
        if signs[0][0] == signs[1][0] == ">":
            sides, signs = sides[::-1], [_FLIPPED[s] for s in signs[::-1]]
        if signs[0][0] == signs[1][0] == "<":
            low, high = _read(sides[0], depth), _read(sides[2], depth)
            return Reals((Piece(low, signs[0] == "<=", high, signs[1] == "<="),), name)
    return None


def _compared(text: str) -> tuple[list[str], list[str]]:
    """Split a chain of comparisons into its sides and signs."""
    sides, signs, start, depth = [], [], 0, 0
    for match in re.finditer(r"\\(?:le|ge|ne)(?![a-zA-Z])|\\[{}]|[()\[\]{}<>=]", text):
        token = match[0]
        if token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
        elif depth == 0:
            sides.append(text[start : match.start()].strip())
            signs.append(_COMPARISONS[token])
            start = match.end()
    return [*sides, text[start:].strip()], signs


def _name(text: str) -> str | None:
    """Return the variable that `text` consists of: `x`, `x_1`; f for `f(x)`; "" for words and segments."""
    text = text.strip()
    if match := _NAME.fullmatch(text):
        return None if text in ("e", "i") else match[1].lstrip("\\") + (f"_{match[2]}" if match[2] else "")
    if match := _FUNCTION_NAME.fullmatch(text):
        return match[1].lstrip("\\")
    if (
        _WORDY_NAME.fullmatch(text)
        and not _NO_NAME.search(text)
        and not any(w in FUNCTIONS for w in re.findall("[a-zA-Z]+", text))
    ):
        return ""
    return None


def _equation(text: str, sides: list[str], depth: int) -> Value | None:
    if len(sides) > 20:
        return None
    first = sides[0]
    if len(sides) > 2:
        constants = [e for s in sides if (e := parse(expanded_fractions(s))) and not e.names]
        if any(same_value(constants[0], e) is False for e in constants[1:]):
            return Contradiction(text)
        name = _name(first)
        if name and any(_mentions(side, name) for side in sides[1:-1]):
            return Contradiction(text)  # y = 2x y = 3x: two equations, neither of which is the answer
        value = _read(sides[-1], depth)
        return value if name is None else Named(((name, value),))
    left, right = sides
    if (names := _names_of_tuple(left)) is not None:
        value = _read(right, depth)
        if isinstance(value, Items) and len(value.items) == len(names) and value.kind in ("()", "[]", "list"):
            return Named(tuple(zip(names, value.items, strict=True)))
        return value
    if (name := _name(left)) is None and (name := _name(right)) is not None:
        left, right = right, left
    if name is None or _name(right):
        a, b = parse(expanded_fractions(left)), parse(expanded_fractions(right))
        if a and b and not a.names and not b.names:
            return _read(right, depth) if same_value(a, b) else Contradiction(text)
        return Relation("=", left, right)
    expression = parse(expanded_fractions(right))
    if expression is not None and name and name in expression.names:
        return Relation("=", left, right)
    return Named(((name, _read(right, depth)),), (left, right))


def _mentions(text: str, name: str) -> bool:
    """Whether a variable occurs in a text, other than as a function or with an index."""
    return re.search(rf"(?<![a-zA-Z\\]){re.escape(name)}(?![a-zA-Z_(])", text) is not None


def _names_of_tuple(text: str) -> list[str] | None:
    if not (text.startswith("(") and text.endswith(")") and "," in text):
        return None
    names = [_name(part) for part in text[1:-1].split(",")]
    return [n for n in names if n] if all(names) else None


def _distance(inside: str, sign: str, right: str, depth: int) -> Value | None:
    """Read `|x - 2| < 3` as one or two intervals."""
    match = re.fullmatch(rf"({_VARIABLE})\s*(?:([-+])\s*(.+))?", inside.strip())
    radius = _read(right, depth)
    middle = _read(match[3], depth) if match and match[3] else Number(Fraction(0))
    if match is None or not isinstance(radius, Number) or not isinstance(middle, Number) or radius.value <= 0:
        return None
    center = middle.value * (1 if match[2] == "-" else -1)
    low, high = Number(center - radius.value), Number(center + radius.value)
    name, closed = _name(match[1]) or "", sign.endswith("=")
    if sign[0] == "<":
        return Reals((Piece(low, closed, high, closed),), name)
    return Reals((Piece(Infinity(-1), False, low, closed), Piece(high, closed, Infinity(1), False)), name)


def _inequality(left: str, sign: str, right: str, depth: int) -> Value | None:
    if left.count("|") == 2 and left[0] == left[-1] == "|" and sign != "!=":
        distance = _distance(left[1:-1], sign, right, depth)
        if distance is not None:
            return distance
    name = _name(left)
    if name is None and _name(right) is not None:
        left, right, sign, name = right, left, _FLIPPED[sign], _name(right)
    expression = parse(expanded_fractions(right))
    solved = name and not (expression is not None and expression.names)
    if not solved:
        if sign in (">", ">="):
            left, right, sign = right, left, _FLIPPED[sign]
        return Relation(sign, left, right)
    bound = _read(right, depth)
    if sign == "!=":
        return _all_but([bound], name or "")
    if sign[0] == "<":
        return Reals((Piece(Infinity(-1), False, bound, sign == "<="),), name or "")
    return Reals((Piece(bound, sign == ">=", Infinity(1), False),), name or "")


def _parts_of_quantity(text: str) -> tuple[str, Tail, Unit | None] | None:
    bare, currency = leading_currency(text)
    split = split_tail(bare)
    if currency is None and split is None:
        return None
    head, tail = split if split is not None else (bare, Tail())
    return head.strip(), tail, tail.unit or currency


def _counted(text: str, depth: int) -> Value | None:
    """Read a number preceded by a currency or followed by a unit or noun."""
    parts = _parts_of_quantity(text)
    number = _read_number(parts[0]) if parts else None
    if parts is None or number is None:
        return None
    _, tail, unit = parts
    n = tail.multiple
    return Number(
        number.value * n, number.percent or tail.percent, number.digits, number.step * n, unit, tail.letter
    )


def _quantity(text: str, depth: int) -> Value | None:
    """Read an expression preceded by a currency or followed by a unit or noun."""
    parts = _parts_of_quantity(text)
    if parts is None:
        return None
    head, tail, unit = parts
    if unit is not None and r"\degree" in text and re.search(r"\\(?:sin|cos|tan|cot|sec|csc|cis)", head):
        return None  # \sin 30 degrees
    if tail.percent:
        return Expr(f"({head})%")
    inner = _read(head, depth)
    if isinstance(inner, Expr):
        return Expr(inner.text if tail.multiple == 1 else f"{tail.multiple}({inner.text})", unit)
    return inner if tail.multiple == 1 else None


def _plus_minus(text: str, depth: int) -> Value | None:
    signs = re.findall(r"\\(?:pm|mp)(?![a-zA-Z])", text)
    if not signs or len(signs) > 3:
        return None
    coupled = r"\mp" in signs
    choices = [(1,) * len(signs), (-1,) * len(signs)] if coupled else _signs(len(signs))
    values = []
    for choice in choices:
        pending = list(choice)

        def sign(match: re.Match[str], pending: list[int] = pending) -> str:
            return "+" if (pending.pop(0) == 1) == (match[0] == r"\pm") else "-"

        written = re.sub(r"\\(?:pm|mp)(?![a-zA-Z])", sign, text)
        written = re.sub(r"(^|[(\[{,;=])\s*\+", r"\1", written)
        values.append(_read(written, depth))
    return Items("list", _flat(values))


def _signs(n: int) -> list[tuple[int, ...]]:
    return [()] if n == 0 else [(s, *rest) for s in (1, -1) for rest in _signs(n - 1)]


_READERS = (
    _infinity,
    _choice,
    _words,
    _ordinal,
    _date,
    _clock,
    _numeral,
    _about,
    _matrix,
    _residue,
    _system,
    _unqualified,
    _counted,
    _intervals_from_outside,
    _bracketed,
    _list,
    _union,
    _ratio,
    _relation,
    _quantity,
    _plus_minus,
)


# -- text helpers ------------------------------------------------------------------------------------


def spaceless(text: str) -> str:
    """Remove all spaces except those between digits."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", text)


def show(value: Value) -> str:
    """Format a number or expression as LaTeX."""
    if isinstance(value, Number):
        f = value.value
        text = (
            str(abs(f.numerator))
            if f.denominator == 1
            else rf"\frac{{{abs(f.numerator)}}}{{{f.denominator}}}"
        )
        return f"-{text}" if f < 0 else text
    if isinstance(value, Expr):
        return value.text
    if isinstance(value, Infinity):
        return r"\infty" if value.sign > 0 else r"-\infty"
    return ""


def _spans(text: str) -> bool:
    """Whether the first bracket closes with the last one, whatever their shapes."""
    depth = 0
    for i, char in enumerate(text):
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
            if depth == 0:
                return i == len(text) - 1
    return False


def _split(text: str, separators: str) -> list[str]:
    """Split at the separators outside all brackets."""
    parts, depth, last = [], 0, 0
    for i, char in enumerate(text):
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        elif char in separators and depth <= 0:
            parts.append(text[last:i].strip())
            last = i + 1
    parts.append(text[last:].strip())
    return parts


def _split_command(text: str, command: str) -> list[str]:
    return [part.strip() for part in re.split(re.escape(command) + r"(?![a-zA-Z])", text)]
