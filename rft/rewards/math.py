"""Math with a checkable answer: find the final answer, compare it with the gold one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rft.rewards.equal import Verdict, equal, equal_numbers
from rft.rewards.extract import WAYS, Way, extract
from rft.rewards.limit import OutOfTime, time_limit
from rft.rewards.types import Outcome, Score


def math(
    completion: str,
    answer: Any,
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
    extraction: the ways of finding the final answer, in order (see `rft.rewards.extract`).
    limit_s: time for sympy; beyond it the score is None with the outcome `timeout`. In a thread that is
        not the main one no limit is possible here; a worker pool's own limit holds everywhere.
    correct, wrong, unparseable: the values. Raises ValueError for a gold answer that is empty.
    """
    golds = answer if isinstance(answer, list | tuple) else [answer]
    found = extract(completion, extraction)
    if found is None or found.text is None:
        why = "no answer found" if found is None else f"the answer is cut off (an open {found.way})"
        return Score(unparseable, Outcome.unparseable, why)
    try:
        for raw in golds:
            gold = gold_answer(raw)
            quick = equal_numbers(gold, found.text)
            verdict = _limited(gold, found.text, limit_s) if quick is None else quick
            if verdict.equal:
                break
    except OutOfTime:
        return Score(None, Outcome.timeout, f"comparing {found.text!r} with {gold!r} exceeded {limit_s:g} s")
    sign = "==" if verdict.equal else "!="
    detail = f"{found.way}: {found.text!r} {sign} {gold!r} ({verdict.how})"
    if verdict.equal:
        return Score(correct, Outcome.correct, detail)
    return Score(wrong, Outcome.wrong, detail)


def _limited(gold: str, answer: str, limit_s: float) -> Verdict:
    with time_limit(limit_s):
        return equal(gold, answer)


def gold_answer(answer: Any) -> str:
    """The final answer of a gold entry. Raises ValueError where there is none."""
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    text = str(answer).strip()
    if "####" in text or "\\boxed" in text or "\\fbox" in text:
        found = extract(text, ("boxed", "hash"))
        text = found.text or "" if found else ""
    if not text or answer is None:
        raise ValueError(f"the gold answer is empty: {answer!r}")
    return text


def warm_up() -> None:
    """Import sympy and math-verify ahead of the first answer that needs them (about half a second)."""
    import rft.rewards.symbolic  # noqa: F401


math.warm_up = warm_up  # type: ignore[attr-defined]
