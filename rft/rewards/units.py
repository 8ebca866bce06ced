r"""Parse the unit, currency or noun of a number: `12 km`, `5\text{ cents}`, `15 \text{ cm}^2`, `18 apples`.

A known unit is a dimension and a factor: `1.5 h` is `90 min`, and 5 cents are not 5 dollars. Any other
noun is dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rft.rewards.notation import FUNCTIONS, GREEK, words_of

Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measurement. factor: its size in the base unit of its dimension."""

    dimension: Dimension
    factor: Fraction


def _table() -> dict[str, tuple[str, Fraction]]:
    lines = """
        length 1/1000 mm millimeter millimeters millimetre millimetres
        length 1/100 cm centimeter centimeters centimetre centimetres
        length 1/10 dm decimeter decimeters
        length 1 m meter meters metre metres
        length 1000 km kilometer kilometers kilometre kilometres
        length 1/1000000 um micrometer micrometers micron microns
        length 1/1000000000 nm nanometer nanometers
        length 127/5000 in inch inches
        length 381/1250 ft foot feet
        length 1143/1250 yd yard yards
        length 201168/125 mi mile miles
        mass 1/1000000 mg milligram milligrams
        mass 1/1000 g gram grams gramme grammes
        mass 1 kg kilogram kilograms
        mass 1000 t ton tons tonne tonnes
        mass 45359237/100000000 lb lbs pound pounds
        mass 45359237/1600000000 oz ounce ounces
        time 1/1000 ms millisecond milliseconds
        time 1 s sec secs second seconds
        time 60 min mins minute minutes
        time 3600 h hr hrs hour hours
        time 86400 d day days
        time 604800 wk week weeks
        calendar 1 month months
        calendar 12 yr yrs year years
        volume 1/1000 ml mL milliliter milliliters millilitre millilitres
        volume 1/100 cl cL centiliter centiliters
        volume 1/10 dl dL deciliter deciliters
        volume 1 l L liter liters litre litres
        volume 473176473/125000000 gal gallon gallons
        volume 473176473/500000000 qt quart quarts
        volume 473176473/1000000000 pt pint pints
        money 1/100 cent cents penny pennies
        money 1 dollar dollars usd USD buck bucks
        euro 1 euro euros eur EUR
        yen 1 yen JPY
        rupee 1 rupee rupees Rs INR
        pound 1 GBP
        yuan 1 yuan RMB CNY
        angle 1 degree degrees deg
        radian 1 radian radians rad
        temperature_C 1 celsius Celsius
        temperature_F 1 fahrenheit Fahrenheit
        temperature_K 1 K kelvin kelvins
        current 1/1000 mA
        current 1 A amp amps ampere amperes
        voltage 1 V volt volts
        voltage 1000 kV
        resistance 1 ohm ohms Omega
        force 1 N newton newtons
        energy 1 J joule joules
        energy 1000 kJ kilojoule kilojoules
        power 1 W watt watts
        power 1000 kW kilowatt kilowatts
        frequency 1 Hz hertz
        frequency 1000 kHz
        pressure 1 Pa pascal pascals
        pressure 1000 kPa
        amount 1 mol mole moles
        data 1 byte bytes
        data 1/8 bit bits
        data 1024 KB kilobyte kilobytes
        data 1048576 MB megabyte megabytes
        data 1073741824 GB gigabyte gigabytes
    """
    table = {}
    for line in lines.strip().splitlines():
        dimension, factor, *words = line.split()
        for word in words:
            table[word] = (dimension, Fraction(factor))
    return table


_UNITS = _table()
_LOWER = {name.lower(): unit for name, unit in _UNITS.items() if len(name) > 2}
_SPEEDS = {
    "mph": ("mile", "hour"),
    "kph": ("km", "hour"),
    "kmh": ("km", "hour"),
    "mps": ("m", "s"),
    "fps": ("ft", "s"),
}
_AREAS = {"acre": Fraction(316160658, 78125), "hectare": Fraction(10_000), "ha": Fraction(10_000)}
_MULTIPLES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_MEANINGFUL = frozenset(
    words_of(
        "or and not plus minus times than over mod modulo remainder factorial squared cubed least "
        "most if but through to from between where when is are equals equal point negative positive "
        "either neither below above no none infinity infinite undefined false true with without "
        "except other others only more less fewer many half quarter third thirds base root sqrt power "
        "inverse so because since hence thus however wait maybe perhaps possibly answer answers "
        "solution solutions would could might also then therefore"
    )
)
_PIECE = re.compile(
    r"\s+|\\words\{[^{}]*\}|\\(?:dollar|euro|cent|pound|yen|rupee|degree)(?![a-zA-Z])|\\(?:cdot|times|Omega)(?![a-zA-Z])"
    r"|\\mu(?=\s?[a-zA-Z])|\^\{?-?\d\}?|[a-zA-Z]+\.?|/|%|\S"
)
_TAIL = re.compile(
    r"\s+|\\words\{[^{}]*\}|\\(?:dollar|euro|cent|pound|yen|rupee|degree|cdot|Omega)\s*|\^\{?-?\d\}?|[a-zA-Z]+\.?|/|%"
)
_CURRENCY_WORDS = {
    "dollar": "dollar",
    "euro": "euro",
    "cent": "cent",
    "pound": "GBP",
    "yen": "yen",
    "rupee": "rupee",
}
_LEADING = re.compile(
    r"([-+]?)\s*(?:\\(dollar|euro|pound|yen|rupee)(?![a-zA-Z])|(?:\\words\{\s*)?(US\s*\\dollar|USD|EUR|GBP|INR|JPY|CNY|Rs\.?)(?:\s*\})?)\s*(?=[-+\d.\\])"
)


@dataclass(frozen=True, slots=True)
class Tail:
    """The text after a number. multiple: of `5 million`; letter: a bare letter, which may be a variable."""

    unit: Unit | None = None
    multiple: int = 1
    percent: bool = False
    letter: bool = False


def leading_currency(text: str) -> tuple[str, Unit | None]:
    r"""Split off a leading currency (`\dollar 5`, `USD 1,200`): return the rest and the currency."""
    match = _LEADING.match(text)
    if match is None:
        return text, None
    written = match[2] or match[3].rstrip(".")
    name = _CURRENCY_WORDS.get(written, "USD" if written.startswith("US") else written)
    dimension, factor = _UNITS[name]
    return match[1] + text[match.end() :], Unit(((dimension, 1),), factor)


def split_tail(text: str) -> tuple[str, Tail] | None:
    """Split a text into its number and the units and nouns after it; None if there are none.

    The tail is the longest run of units and nouns at the end, after a digit, a bracket or a percent sign.
    """
    cut = _cut(text)
    if cut is None:
        return None
    head, tail = text[:cut].rstrip(), text[cut:]
    if not head or not re.search(r"\d|\\pi|\\infty|\\sqrt", head):
        return None
    meaning = _meaning(tail, attached=not tail[0].isspace() and head == text[:cut])
    return None if meaning is None else (head, meaning)


def _cut(text: str) -> int | None:
    """Return the index where the run of units and nouns at the end starts."""
    start: int | None = None
    at = 0
    while at < len(text):
        match = _TAIL.match(text, at)
        if match is None or (start is None and (at == 0 or text[at] in "/^")):
            start, at = None, at + _skip(text, at)
            continue
        if start is None:
            start = at
        at = match.end()
    if start is None or not text[start:].strip():
        return None
    before = text[:start].rstrip()
    return (
        start
        if before and (before[-1].isdigit() or before[-1] in ")}%.!]" or before.endswith(r"\pi"))
        else None
    )


def _skip(text: str, at: int) -> int:
    """Return the length of a command or character that is not a unit."""
    match = re.compile(r"\\[a-zA-Z]+").match(text, at)
    return match.end() - at if match else 1


def _meaning(tail: str, *, attached: bool) -> Tail | None:
    pieces = [p for p in _PIECE.findall(tail) if not p.isspace()]
    worded = any(p.startswith("\\words") for p in pieces)
    words: list[str] = []
    for piece in pieces:
        words += _words(piece)
    if words[:1] in (["%"], ["percent"], ["pct"]) or words[:2] == ["per", "cent"]:
        rest = words[2:] if words[0] == "per" else words[1:]
        return Tail(percent=True) if not rest or _is_noun(rest) else None
    if len(words) > 12:
        return None
    multiple = 1
    while words and words[0].lower() in _MULTIPLES:
        multiple *= _MULTIPLES[words.pop(0).lower()]
    if not words:
        return Tail(multiple=multiple)
    unit, used = _unit(words)
    rest = words[used:]
    if unit is not None:
        if attached and not worded and len(words[0]) == 1 and words[0].isalpha():
            return None  # 5m is 5 times m
        if rest and not _is_noun(rest, after_unit=True):
            return None
        letter = len(words) == 1 and len(words[0]) == 1 and words[0].isalpha() and not worded
        if letter and words[0] not in "mgshLlNJWVAK":
            return None
        return Tail(unit, multiple, letter=letter)
    if attached and not worded:
        return None  # 2xy
    return Tail(multiple=multiple) if _is_noun(words, worded=worded) else None


def _words(piece: str) -> list[str]:
    if piece.startswith("\\words{"):
        return re.findall(r"[A-Za-z]+|\^\{?-?\d\}?|/|%|\S", piece[7:-1].replace("-", " "))
    if piece in (r"\cdot", r"\times"):
        return ["*"]
    if piece.startswith("\\"):
        return [_CURRENCY_WORDS.get(piece[1:], piece[1:])]
    return [piece.rstrip(".") if piece != "." else piece]


def _is_noun(words: list[str], *, after_unit: bool = False, worded: bool = False) -> bool:
    """Whether the words say which things are counted, and not how many."""
    plain = [w for w in words if w.isalpha()]
    if len(plain) > 6 or len(plain) + words.count("/") != len(words):
        return False
    if any(w.lower() in _MEANINGFUL or w in FUNCTIONS or w in GREEK or w == "pi" for w in plain):
        return False
    if worded or after_unit:
        return True
    return len(plain[0]) >= 3 and not _run_of_variables(plain[0])


def _run_of_variables(word: str) -> bool:
    """Whether a word is three consecutive letters: `abc`, `xyz`."""
    return len(word) == 3 and ord(word[2]) - ord(word[1]) == 1 == ord(word[1]) - ord(word[0])


def _unit(words: list[str]) -> tuple[Unit | None, int]:
    """Parse a unit at the start of the words; return it with the number of words used."""
    powers: dict[str, int] = {}
    factor = Fraction(1)
    sign, at, used = 1, 0, 0
    pending = 1
    while at < len(words):
        word = words[at]
        low = word.lower()
        if word == "/" or low == "per":
            if not powers:
                break
            sign, at = -1, at + 1
            continue
        if low in ("square", "sq", "cubic", "cu") and at + 1 < len(words):
            pending, at = (2 if low.startswith("sq") else 3), at + 1
            continue
        if word in ("*", "a", "an") and powers and at + 1 < len(words):
            sign, at = (-1 if word in ("a", "an") else sign), at + 1
            continue
        unit = _known(word)
        if unit is None or "angle" in powers:
            break
        dimensions, scale = unit
        power, at = pending, at + 1
        pending = 1
        if at < len(words) and (match := re.fullmatch(r"\^\{?(-?\d)\}?", words[at])):
            power, at = int(match[1]), at + 1
        elif at < len(words) and words[at].lower() in ("squared", "cubed"):
            power, at = (2 if words[at].lower() == "squared" else 3), at + 1
        for name, exponent in dimensions:
            powers[name] = powers.get(name, 0) + sign * power * exponent
        factor *= scale ** (sign * power)
        used = at
    if not used:
        return None, 0
    if powers.keys() & {"volume"}:  # a litre is a cube
        n = powers.pop("volume")
        powers["length"] = powers.get("length", 0) + 3 * n
        factor *= Fraction(1, 1000) ** n
    if "angle" in powers and used < len(words) and words[used] in ("C", "F"):
        powers = {f"temperature_{words[used]}": 1}
        used += 1
    elif "angle" in powers and used < len(words) and words[used].lower() in ("celsius", "fahrenheit"):
        powers = {f"temperature_{words[used][0].upper()}": 1}
        used += 1
    return Unit(tuple(sorted((n, p) for n, p in powers.items() if p)), factor), used


def _known(word: str) -> tuple[Dimension, Fraction] | None:
    if word in _UNITS or word.lower() in _LOWER:
        dimension, factor = _UNITS.get(word) or _LOWER[word.lower()]
        return ((dimension, 1),), factor
    low = word.lower()
    if low in _SPEEDS:
        top, bottom = _SPEEDS[low]
        return (("length", 1), ("time", -1)), _UNITS[top][1] / _UNITS[bottom][1]
    if low.rstrip("s") in _AREAS:
        return (("length", 2),), _AREAS[low.rstrip("s")]
    return None
