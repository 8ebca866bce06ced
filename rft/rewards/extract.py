r"""Finding the final answer in a completion.

The ways, tried in this order by default; the first that finds something decides:

1. `boxed`   the last `\boxed{...}` (or `\fbox{...}`), braces balanced, nested boxes unwrapped; boxes with
             nothing but space, commas, "and", "or" or a name between them (`x = \boxed{2}, y = \boxed{5}`)
             are one answer
2. `tag`     the last `<answer>...</answer>`; a sentence in it ("The answer is 5.") by the way `phrase`
3. `hash`    what follows the last `####` on its line (GSM8K)
4. `phrase`  what follows the last "the answer is", "final answer:", "answer:", to the end of the sentence
5. `number`  the last number in the text

Text up to a closing `</think>` is never searched. A thought, box or tag that is opened and never closed is a
cut-off answer, and an empty last box is none: then nothing is found, rather than something by a weaker way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

Way = Literal["boxed", "tag", "hash", "phrase", "number"]
WAYS: tuple[Way, ...] = ("boxed", "tag", "hash", "phrase", "number")


class Found(NamedTuple):
    """An extracted answer; `way` says how, `text` is None where the answer was cut off or left empty."""

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
    boxes: list[tuple[int, int, str]] = []  # of the boxes that are not in another one: start, end, content
    for match in _BOX.finditer(text):
        if boxes and match.start() < boxes[-1][1]:
            continue
        at = match.end()
        if text[at : at + 1] == "{":
            end = closing(text, at)
            if end < 0:
                return Found(None, "boxed")  # cut off: what came before was not final
            boxes.append((match.start(), end + 1, _unboxed(text[at + 1 : end].strip())))
        else:  # \boxed 5
            token = _TOKEN.match(text, at)
            boxes.append((match.start(), token.end() if token else at, token.group() if token else ""))
    if not boxes or not boxes[-1][2]:
        return Found(None, "boxed") if boxes else None
    return Found(_joined(text, boxes), "boxed")


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str:
    """The content of the last box, and of those before it that nothing but a joint separates."""
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
    """The content of a box, without the boxes in it."""
    if inner.count("\\boxed") + inner.count("\\fbox") > 20:
        return inner  # no answer
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
    if "<think>" in text:
        return Found(None, "think")  # cut off in thought
    for way in ways:
        found = _FIND[way](text)
        if found is not None:
            return found
    return None
