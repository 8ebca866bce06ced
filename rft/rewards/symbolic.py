"""Algebra for the math reward: `math-verify`, without its time-outs and with its errors told apart."""

from __future__ import annotations

import logging
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

for _name in ("math_verify.parser", "math_verify.grader", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # they warn that they have no limit: the caller has

_CONFIG = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
        ),
        try_extract_without_anchor=True,
    ),
    ExprExtractionConfig(),
]


def same_expression(gold: str, answer: str) -> bool:
    """Whether two expressions are equal. False where one of them cannot be read.

    Takes as long as sympy takes: the caller limits the time (math-verify's own limit works by an
    alarm signal, which threads do not have, and ends in `False`, as if the answer were wrong).
    """
    want, got = _parsed(gold), _parsed(answer)
    if not want or not got:
        return False
    return bool(verify(want, got, timeout_seconds=None))


def _parsed(text: str) -> list[Any]:
    if not re.search(r"[\w\\]", text):
        return []
    return parse(f"${text}$", _CONFIG, parsing_timeout=None)
