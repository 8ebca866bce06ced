"""Math with a checkable answer: find the final answer, compare it with the gold one."""

from __future__ import annotations

import math as real
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rft.rewards.answers import Choice, Clock, Infinity, Number, Words, read
from rft.rewards.equal import MAX_LENGTH, Verdict, equal, equal_numbers
from rft.rewards.extract import WAYS, Way, extract
from rft.rewards.limit import OutOfTime, time_limit
from rft.rewards.notation import plain_tex
from rft.rewards.types import Outcome, Score, Text, text_of

MAX_PROMPT = 20_000  # characters that are searched for a repeated expression


def math(
    completion: str,
    answer: Any,
    prompt: Text = "",
    *,
    extraction: Sequence[Way] = WAYS,
    limit_s: float = 10.0,
    correct: float = 1.0,
    wrong: float = 0.0,
    unparseable: float = 0.0,
) -> Score:
    """`correct` where the completion's final answer equals the column `answer`.

    answer: a number, a string (plain, LaTeX, a GSM8K solution with `####`, a solution with `\\boxed{}`),
        or a list of them, of which one must match.
    prompt: an answer that only repeats an expression of it, where the gold is written otherwise, is wrong.
    extraction: the ways of finding the final answer, in order (see `rft.rewards.extract`).
    limit_s: time for sympy; beyond it the score is None with the outcome `timeout`. In a thread that is
        not the main one no limit is possible here; a worker pool's own limit holds everywhere.
    correct, wrong, unparseable: the values. Raises ValueError for a gold answer that is none.
    """
    golds = gold_answers(answer)
    found = extract(completion, extraction)
    if found is None or found.text is None:
        why = "no answer found" if found is None else f"the answer is cut off or empty ({found.way})"
        return Score(unparseable, Outcome.unparseable, why)
    try:
        for gold in golds:
            quick = equal_numbers(gold, found.text)
            verdict = _limited(gold, found.text, limit_s) if quick is None else quick
            if verdict.equal:
                break
    except OutOfTime:
        return Score(None, Outcome.timeout, f"comparing {found.text!r} with {gold!r} exceeded {limit_s:g} s")
    if verdict.equal and prompt and _repeats(text_of(prompt), found.text, golds):
        return Score(wrong, Outcome.wrong, f"{found.way}: {found.text!r} repeats the question")
    sign = "==" if verdict.equal else "!="
    detail = f"{found.way}: {found.text!r} {sign} {gold!r} ({verdict.how})"
    if verdict.equal:
        return Score(correct, Outcome.correct, detail)
    return Score(wrong, Outcome.wrong, detail)


def _limited(gold: str, answer: str, limit_s: float) -> Verdict:
    with time_limit(limit_s):
        return equal(gold, answer)


# -- gold answers ------------------------------------------------------------------------------------


def gold_answers(answer: Any) -> list[str]:
    """The final answers of a gold entry, one of which must match. Raises ValueError where there is none."""
    if type(answer) is str:
        return [gold_answer(answer)]
    if isinstance(answer, list | tuple):
        if not answer:
            raise ValueError("the gold answer is an empty list")
        return [gold_answer(one) for one in answer]
    return [gold_answer(answer)]


def gold_answer(answer: Any) -> str:
    """The final answer of a gold entry. Raises ValueError where there is none."""
    if isinstance(answer, float):
        if not real.isfinite(answer):
            raise ValueError(f"the gold answer is no number: {answer!r}")
        return str(int(answer)) if answer.is_integer() else repr(answer)
    if not isinstance(answer, str | int | Fraction | Decimal):
        kind = "null" if answer is None else f"a {type(answer).__name__}"
        raise ValueError(f"the gold answer is {kind}, not a text or a number: {answer!r:.200}")
    text = str(answer).strip()
    if "####" in text or "\\boxed" in text or "\\fbox" in text:
        found = extract(text, ("boxed", "hash"))
        text = found.text or "" if found else ""
    if not text:
        raise ValueError(f"the gold answer is empty: {answer!r:.200}")
    return text


def gold_problem(answer: Any) -> str | None:
    """Why nothing can ever equal a gold entry; None where it is an answer. In words that fit many rows."""
    if (
        isinstance(answer, str)
        and answer.isalnum()
        and answer.isascii()
        and answer not in ("null", "nan", "NaN")
    ):
        return None
    try:
        golds = gold_answers(answer)
    except ValueError as error:
        return str(error).partition(":")[0]
    for gold in golds:
        if gold in ("null", "nan", "NaN"):
            return f"the gold answer is the text {gold!r}"
        if len(gold) > MAX_LENGTH:
            return f"the gold answer is longer than {MAX_LENGTH} characters, and has no \\boxed{{}} or ####"
        if gold.startswith(('{"', "{'")):
            return "the gold answer is a text that holds a dict"
        if _unbalanced(gold):
            return "the gold answer has a brace that is never closed"
        if not plain_tex(gold):
            return "the gold answer is empty"
    return None


math.column_checks = {"answer": gold_problem}  # type: ignore[attr-defined]


def _unbalanced(text: str) -> bool:
    plain = re.sub(r"\\[{}\\]", "", text)
    return plain.count("{") != plain.count("}")


# -- answers that are the question -------------------------------------------------------------------

_OPERATION = re.compile(
    r"[-+*/^!:=]|\d(?=[a-zA-Z(\\])"
    r"|\\(?:frac|sqrt|binom|cdot|times|div|log|ln|exp|sin|cos|tan|sec|csc|cot)(?![a-z])"
)
_FRACTION = re.compile(r"[-+]?(?:\\frac\{?\d+\}?\{?\d+\}?|\d+/\d+)")
_BEFORE, _AFTER = "+-*/^_({[\\,.", "+*/^_)}]!"


def _repeats(prompt: str, answer: str, golds: Sequence[str]) -> bool:
    """Whether an answer is an expression that stands in the prompt, still to be computed.

    No repetition where a gold is written with the same characters, or is the longer of the two.
    """
    if not answer or answer.isalnum() or len(prompt) > MAX_PROMPT:
        return False
    plain = plain_tex(answer)
    value = read(answer)
    if isinstance(value, Words | Choice | Clock | Infinity) or (
        isinstance(value, Number) and not _FRACTION.fullmatch(plain.replace(" ", ""))
    ):
        return False
    operations = len(_OPERATION.findall(plain.lstrip("-+")))
    if not operations:
        return False
    spelling = _spelling(plain)
    for gold in golds:
        written = plain_tex(gold)
        if _spelling(written) == spelling or len(_OPERATION.findall(written)) > operations:
            return False
    pattern = r"\s*".join(re.escape(c) for c in plain if not c.isspace())
    text = plain_tex(prompt)
    for match in re.finditer(pattern, text):
        before, after = text[: match.start()], text[match.end() :]
        if before[-1:].isalnum() or after[:1].isalnum():
            continue
        before, after = before.rstrip(), after.lstrip()
        if (not before or before[-1] not in _BEFORE) and (not after or after[0] not in _AFTER):
            return True
    return False


def _spelling(text: str) -> list[str]:
    r"""The characters of an expression, sorted: the same for `1+x` and `x+1`, `\frac12` and `1/2`."""
    text = re.sub(r"\\frac(?![a-zA-Z])", "/", text)
    return sorted(re.sub(r"[\s{}]|\\(?:cdot|times)(?![a-zA-Z])|\*", "", text))


def warm_up() -> None:
    """Import mpmath, sympy and math-verify ahead of the first answer that needs them."""
    import rft.rewards.symbolic  # noqa: F401


math.warm_up = warm_up  # type: ignore[attr-defined]
