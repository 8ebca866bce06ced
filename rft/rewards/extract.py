r"""Finding the final answer in a completion.

The ways, tried in this order by default; the first that finds something decides:

1. `boxed`   the last `\boxed{...}` (or `\fbox{...}`), braces balanced, nested boxes unwrapped; boxes with
             nothing but a comma, "and" or "or" between them are one answer
2. `tag`     the last `<answer>...</answer>`
3. `hash`    what follows the last `####` on its line (GSM8K)
4. `phrase`  what follows the last "the answer is", "final answer:", "answer:", to the end of the sentence
5. `number`  the last number in the text

Text up to a closing `</think>` is never searched. A box or tag that is opened and never closed is a
cut-off answer: then nothing is found, rather than something else by a weaker way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

Way = Literal["boxed", "tag", "hash", "phrase", "number"]
WAYS: tuple[Way, ...] = ("boxed", "tag", "hash", "phrase", "number")


class Found(NamedTuple):
    """An extracted answer; `way` says how, `text` is None where the answer was cut off."""

    text: str | None
    way: Way


_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_TOKEN = re.compile(r"[^\s$\\.,;]+")
_JOINT = re.compile(r"[\s$,;]*(?:and|or)?[\s$]*", re.IGNORECASE)
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
    """The index of the brace that closes the one at `start`, or -1. Escaped braces do not count."""
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
    answers: list[str] = []
    covered = 0
    for match in _BOX.finditer(text):
        if match.start() < covered:
            continue  # nested in the box before
        at = match.end()
        if text[at : at + 1] == "{":
            end = closing(text, at)
            if end < 0:
                return Found(None, "boxed")  # cut off: what came before was not final
            inner = _unwrap(text[at + 1 : end].strip())
        else:  # \boxed 5
            token = _TOKEN.match(text, at)
            inner, end = (token.group(), token.end()) if token else ("", at)
        if inner:
            if answers and not _JOINT.fullmatch(text, covered, match.start()):
                answers.clear()
            if inner not in answers:
                answers.append(inner)
        covered = end + 1 if text[end : end + 1] == "}" else end
    return Found(", ".join(answers), "boxed") if answers else None


def _unwrap(inner: str) -> str:
    """The content of boxes within a box."""
    while (match := _BOX.match(inner)) and inner[match.end() : match.end() + 1] == "{":
        end = closing(inner, match.end())
        if end != len(inner) - 1:
            break
        inner = inner[match.end() + 1 : end].strip()
    return inner


def _tag(text: str) -> Found | None:
    start = text.rfind("<answer>")
    if start < 0:
        return None
    end = text.find("</answer>", start)
    if end < 0:
        return Found(None, "tag")
    inner = text[start + len("<answer>") : end].strip()
    return Found(inner, "tag") if inner else None


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
        if matches and not (len(window) < len(text) and len(matches) == 1):  # it may be cut by the window
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
    """The final answer of a completion, by the first of `ways` that finds one. Never raises."""
    end = text.rfind("</think>")
    if end >= 0:
        text = text[end + len("</think>") :]
    for way in ways:
        found = _FIND[way](text)
        if found is not None:
            return found
    return None
