"""Compare expressions with `math-verify`, without its timeouts, rounding and guesses.

Used only for expressions that `rft.rewards.numeric` cannot read: sums, integrals, limits, curves of other
shapes.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from rft.rewards.notation import FUNCTIONS, GREEK, words_of

for _name in ("math_verify.parser", "math_verify.grader", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # they warn of a missing limit: the caller sets it

MAX_LENGTH = 300
_CONFIG = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
        ),
        try_extract_without_anchor=True,
    ),
    ExprExtractionConfig(),
]
_PROSE = re.compile(r"\\words|(?<![\\a-zA-Z])[a-zA-Z]{4,}|[?'\"@#`]|[^\x00-\x7f]|\d \d")
_BROKEN = re.compile(
    r"^\s*(?:[<>=*/^,;!]|\\(?:le|ge|ne|cdot|times)(?![a-z]))"
    r"|(?:[-+*/^<>=,;(\[{\\]|\\(?:cdot|times|le|ge|ne))\s*$|\.\.|\{\s*\}|\(\s*\)|\[\s*\]|[\d%]\s*_"
)
# math-verify skips unknown commands, and reads `9 \\to 5` as 5.
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_KNOWN = (
    FUNCTIONS
    | GREEK
    | frozenset(
        words_of(
            "sum int iint iiint oint prod lim limsup liminf sup inf max min gcd lcm det frac sqrt binom cdot "
            "times div pm mp pi infty partial nabla le ge ne cup cap bigcup bigcap setminus emptyset mathbb "
            "degree lfloor rfloor lceil rceil langle rangle begin end pmatrix bmatrix vmatrix matrix array "
            "vec hat overline bar mathcal ell hbar prime dot ddot deg Re Im arg"
        )
    )
)
_LIMITS = re.compile(r"\\(?:sum|int|prod|lim|cup|cap|bigcup|bigcap)(?![a-z])|[<>]|\\(?:le|ge)")
_EXPLOSIVE = re.compile(r"\d{5,}|\^\s*\{?\s*-?\d{3,}|\^[^+\-,=]{0,20}\^|\d{3,}\s*\)?\s*!|!\s*!")


def same_expression(gold: str, answer: str) -> bool:
    """Whether two expressions in plain LaTeX are equal. False if one of them cannot be read.

    Has no time limit: the caller sets one (math-verify uses an alarm signal, which is not available in
    threads, and returns `False` at the limit, as if the answer were wrong). Prose and signs unknown to
    math-verify are rejected, since it would read only a part. So are powers and factorials that sympy would
    expand.
    """
    for text in (gold, answer):
        if len(text) > MAX_LENGTH or _PROSE.search(text) or _BROKEN.search(text) or _EXPLOSIVE.search(text):
            return False
        unknown = set(_COMMAND.findall(text)) - _KNOWN
        if unknown - ({"to"} if r"\lim" in text else set()):
            return False
        if r"\infty" in text and not _LIMITS.search(text):
            return False  # arithmetic with infinity is undefined
    want, got = _parsed(gold), _parsed(answer)
    if not want or not got:
        return False
    return bool(verify(want, got, float_rounding=12, numeric_precision=30, timeout_seconds=None))


def _parsed(text: str) -> list[Any]:
    if not re.search(r"[\w\\]", text):
        return []
    return parse(
        f"${text.replace(chr(92) + 'degree', '^' + chr(92) + 'circ')}$", _CONFIG, parsing_timeout=None
    )
