r"""Score math with a checkable answer: extract the final answer and compare it with the gold answer.

The extraction methods, in their default order; the first one that finds something decides:

1. `boxed`   the last `\boxed{...}` (or `\fbox{...}`), braces balanced, nested boxes unwrapped; boxes
             separated only by space, commas, "and", "or" or a name (`x = \boxed{2}, y = \boxed{5}`)
             are one answer
2. `tag`     the last `<answer>...</answer>`; `phrase` reads a sentence in it ("The answer is 5.")
3. `hash`    the text after the last `####` on its line (GSM8K)
4. `phrase`  the text after the last "the answer is", "final answer:", "answer:", to the end of the sentence
5. `number`  the last number in the text

Text up to a closing `</think>` is never searched. An unclosed thought, box or tag is a cut-off answer, and an
empty last box is not an answer: then the result is empty, and the weaker methods are not tried.
"""

from __future__ import annotations

import contextlib
import math as real
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from types import FrameType
from typing import Any, Literal, NamedTuple

from rft.rewards.answers import Choice, Clock, Infinity, Number, Words, read
from rft.rewards.equal import MAX_LENGTH, Verdict, equal, equal_numbers
from rft.rewards.notation import plain_tex
from rft.rewards.types import Outcome, Score, Text, text_of

Way = Literal["boxed", "tag", "hash", "phrase", "number"]
WAYS: tuple[Way, ...] = ("boxed", "tag", "hash", "phrase", "number")
MAX_PROMPT = 20_000  # longest prompt, in characters, that is searched for a repeated expression


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
    confidence: str | None = None,
) -> Score:
    """Score `correct` if the completion's final answer equals the column `answer`.

    answer: a number, a string (plain, LaTeX, a GSM8K solution with `####`, a solution with `\\boxed{}`),
        or a list of them, of which one must match.
    prompt: an answer that only repeats one of its expressions is wrong, unless the gold is written alike.
    extraction: the methods for finding the final answer, in order (see the top of this file).
    limit_s: time limit for sympy, in seconds; beyond it the value is None with the outcome `timeout`. It
        applies in the main thread only; a worker pool's limit applies everywhere.
    correct, wrong, unparseable: the values. confidence: regular expression whose first group is the
        confidence that a completion states, as 0.8, 80 or 80%, for `eval/ece`; it is removed before the
        answer is extracted. Raises ValueError for a gold entry without an answer.
    """
    stated = None
    if confidence is not None:
        stated, completion = stated_confidence(completion, confidence)
    golds = gold_answers(answer)
    answer_text = extract(completion, extraction)
    if answer_text is None or answer_text.text is None:
        why = (
            "no answer found"
            if answer_text is None
            else f"the answer is cut off or empty ({answer_text.way})"
        )
        return Score(unparseable, Outcome.unparseable, why, confidence=stated)
    try:
        for gold in golds:
            quick = equal_numbers(gold, answer_text.text)
            verdict = _limited(gold, answer_text.text, limit_s) if quick is None else quick
            if verdict.equal:
                break
    except OutOfTime:
        return Score(
            None, Outcome.timeout, f"comparing {answer_text.text!r} with {gold!r} exceeded {limit_s:g} s"
        )
    if verdict.equal and prompt and _repeats(text_of(prompt), answer_text.text, golds):
        detail = f"{answer_text.way}: {answer_text.text!r} repeats the question"
        return Score(wrong, Outcome.wrong, detail, answer=answer_text.text, confidence=stated)
    sign = "==" if verdict.equal else "!="
    detail = f"{answer_text.way}: {answer_text.text!r} {sign} {gold!r} ({verdict.how})"
    if verdict.equal:
        return Score(correct, Outcome.correct, detail, answer=answer_text.text, confidence=stated)
    return Score(wrong, Outcome.wrong, detail, answer=answer_text.text, confidence=stated)


def stated_confidence(text: str, pattern: str) -> tuple[float | None, str]:
    """Return the confidence that a text states last, 0 to 1, and the text without such statements.

    pattern: its first group is the number, as 0.8, 80 or 80%. None: no statement, or a number beyond 100.
    """
    stated: float | None = None
    for match in re.finditer(pattern, text):
        number = re.match(r"\s*(\d+(?:\.\d+)?|\.\d+)", match[1] or "")
        value = None if number is None else float(number[1])
        percent = value is not None and (value > 1 or "%" in match[0])
        stated = None if value is None or value > 100 else value / 100 if percent else value
    return stated, re.sub(pattern, "", text)


def _limited(gold: str, answer: str, limit_s: float) -> Verdict:
    with time_limit(limit_s):
        return equal(gold, answer)


# -- gold answers ------------------------------------------------------------------------------------


def gold_answers(answer: Any) -> list[str]:
    """Return the final answers of a gold entry, one of which must match. Raises ValueError if it has none."""
    if type(answer) is str:
        return [gold_answer(answer)]
    if isinstance(answer, list | tuple):
        if not answer:
            raise ValueError("the gold answer is an empty list")
        return [gold_answer(one) for one in answer]
    return [gold_answer(answer)]


def gold_answer(answer: Any) -> str:
    """Return the final answer of a gold entry. Raises ValueError if there is none."""
    if isinstance(answer, float):
        if not real.isfinite(answer):
            raise ValueError(f"the gold answer is not a finite number: {answer!r}")
        return str(int(answer)) if answer.is_integer() else repr(answer)
    if not isinstance(answer, str | int | Fraction | Decimal):
        kind = "null" if answer is None else f"a {type(answer).__name__}"
        raise ValueError(f"the gold answer is {kind}, neither text nor a number: {answer!r:.200}")
    text = str(answer).strip()
    if "####" in text or "\\boxed" in text or "\\fbox" in text:
        answer_text = extract(text, ("boxed", "hash"))
        text = answer_text.text or "" if answer_text else ""
    if not text:
        raise ValueError(f"the gold answer is empty: {answer!r:.200}")
    return text


def gold_problem(answer: Any) -> str | None:
    """Explain why nothing can equal a gold entry, in terms that fit many rows; None if it is an answer."""
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


# -- answers that repeat the question ----------------------------------------------------------------

_OPERATION = re.compile(
    r"[-+*/^!:=]|\d(?=[a-zA-Z(\\])"
    r"|\\(?:frac|sqrt|binom|cdot|times|div|log|ln|exp|sin|cos|tan|sec|csc|cot)(?![a-z])"
)
_FRACTION = re.compile(r"[-+]?(?:\\frac\{?\d+\}?\{?\d+\}?|\d+/\d+)")
_BEFORE, _AFTER = "+-*/^_({[\\,.", "+*/^_)}]!"


def _repeats(prompt: str, answer: str, golds: Sequence[str]) -> bool:
    """Whether an answer is an unevaluated expression of the prompt.

    False if a gold answer consists of the same characters, or is the longer of the two.
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
    r"""Return the sorted characters of an expression: equal for `1+x` and `x+1`, `\frac12` and `1/2`."""
    text = re.sub(r"\\frac(?![a-zA-Z])", "/", text)
    return sorted(re.sub(r"[\s{}]|\\(?:cdot|times)(?![a-zA-Z])|\*", "", text))


def warm_up() -> None:
    """Import mpmath, sympy and math-verify before the first answer that needs them."""
    import rft.rewards.symbolic  # noqa: F401


math.warm_up = warm_up  # type: ignore[attr-defined]


# -- finding the final answer -------------------------------------------------------------------------


class Found(NamedTuple):
    """An extracted answer. way: the method used; text: None if the answer was cut off or left empty."""

    text: str | None
    way: Way | Literal["think"]


_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_TOKEN = re.compile(r"[^\s$\\.,;]+")
_GAP = r"(?:[\s$,;&]|\\[,;:!() \[\]\\]|\\q?quad(?![a-zA-Z]))"
_JOINT = re.compile(
    rf"{_GAP}*+(?:(?:\\(?:text|mbox|mathrm)\s?\{{\s*)?(?:and|or)(?:\s*\}})?)?{_GAP}*+"
    rf"(?P<name>[a-zA-Z](?:_\{{?\w{{1,3}}\}}?)?\s?=)?{_GAP}*+",
    re.IGNORECASE,
)
_NAMED_BOX = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z](?:_\{?\w{1,3}\}?)?)\s?=\s?\$?\s?$")
_PHRASE = re.compile(
    r"(?:the\s+(?:final\s+|correct\s+)?(?:answer|result|solution)\s*(?:is|equals|=|:)"
    r"|(?:final\s+)?answer\W{0,3}:)[\s:*]*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|\*\*|(?<=\S)\s+(?:because|since|so that|which)\b")
_NUMBER = re.compile(
    r"(?<![\w.])[-−+]?\s?\$?\s?(?:\\d?frac\{-?\d+\}\{-?\d+\}|"
    r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s?/\s?\d+(?![\d.]))?|\.\d+)\s?(?:\\?%)?"
)


def closing(text: str, start: int) -> int:
    """Return the index of the brace that closes the one at `start`, or -1. Escaped braces do not count."""
    depth, i, n = 0, start, len(text)
    while i < n:
        char = text[i]
        if char == "\\":
            i += 2
            continue
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return -1


def _boxed(text: str) -> Found | None:
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    boxes: list[tuple[int, int, str]] = []  # outermost boxes: start, end, content
    for match in _BOX.finditer(text):
        if boxes and match.start() < boxes[-1][1]:
            continue
        at = match.end()
        if text[at : at + 1] == "{":
            end = closing(text, at)
            if end < 0:
                return Found(None, "boxed")  # cut off: earlier boxes were not the final answer
            boxes.append((match.start(), end + 1, _unboxed(text[at + 1 : end].strip())))
        else:  # \boxed 5
            token = _TOKEN.match(text, at)
            boxes.append((match.start(), token.end() if token else at, token.group() if token else ""))
    if not boxes or not boxes[-1][2]:
        return Found(None, "boxed") if boxes else None
    return Found(_joined(text, boxes), "boxed")


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str:
    """Join the last box with those before it that only separators divide from it."""
    answers = [boxes[-1][2]]
    first = len(boxes) - 1
    named = False
    while first > 0:
        joint = _JOINT.fullmatch(text, boxes[first - 1][1], boxes[first][0])
        if joint is None or not boxes[first - 1][2]:
            break
        if joint["name"]:
            answers[0], named = f"{joint['name']} {answers[0]}", True
        first -= 1
        answers.insert(0, boxes[first][2])
    if named and (name := _NAMED_BOX.search(text, max(0, boxes[first][0] - 20), boxes[first][0])):
        answers[0] = f"{name[1]} = {answers[0]}"
    return ", ".join(dict.fromkeys(answers))


def _unboxed(inner: str) -> str:
    """Return the content of a box without nested boxes."""
    if inner.count("\\boxed") + inner.count("\\fbox") > 20:
        return inner  # not an answer
    while (match := _BOX.search(inner)) is not None:
        at = match.end()
        end = closing(inner, at) if inner[at : at + 1] == "{" else -1
        content = inner[at + 1 : end] if end >= 0 else ""
        inner = inner[: match.start()] + content + inner[end + 1 if end >= 0 else at :]
    return inner.strip()


def _tag(text: str) -> Found | None:
    start = text.rfind("<answer>")
    if start < 0:
        return None
    end = text.find("</answer>", start)
    if end < 0:
        return Found(None, "tag")
    inner = text[start + len("<answer>") : end].strip()
    sentence = _phrase(inner) if inner else None
    if sentence is not None and sentence.text:
        inner = sentence.text
    return Found(inner or None, "tag")


def _hash(text: str) -> Found | None:
    start = text.rfind("####")
    if start < 0:
        return None
    line = text[start + 4 :].lstrip(" \t").split("\n", 1)[0].strip()
    return Found(line, "hash") if line else None


def _phrase(text: str) -> Found | None:
    if "nswer" not in text and "NSWER" not in text and "esult" not in text and "olution" not in text:
        return None
    last = None
    for last in _PHRASE.finditer(text):  # noqa: B007 - the last one counts
        pass
    if last is None:
        return None
    rest = text[last.end() :]
    end = _SENTENCE_END.search(rest)
    answer = (rest[: end.start()] if end else rest).strip(" *:")
    return Found(answer, "phrase") if answer else None


def _number(text: str) -> Found | None:
    for window in (text[-200:], text):
        matches = _NUMBER.findall(window)
        if matches and not (len(window) < len(text) and len(matches) == 1):  # the window may cut the match
            return Found(matches[-1].strip(), "number")
    return None


_FIND: dict[Way, Callable[[str], Found | None]] = {
    "boxed": _boxed,
    "tag": _tag,
    "hash": _hash,
    "phrase": _phrase,
    "number": _number,
}


def extract(text: str, ways: Sequence[Way] = WAYS) -> Found | None:
    """Extract the final answer of a completion with the first of `ways` that finds one. Never raises."""
    end = text.rfind("</think>")
    if end >= 0:
        text = text[end + len("</think>") :]
    if "<think>" in text:
        return Found(None, "think")  # cut off before the end of the thought
    for way in ways:
        extracted = _FIND[way](text)
        if extracted is not None:
            return extracted
    return None


# -- time limit ---------------------------------------------------------------------------------------


class OutOfTime(BaseException):
    """The time limit was exceeded. Not an Exception, so that a broad `except Exception` does not catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds`. No effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
