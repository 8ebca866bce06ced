"""A row of demonstrations or preferences, taken apart: its prompt, its responses, what they are worth."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rft.data.errors import RowProblem, missing_column
from rft.data.messages import Text, read_messages, read_text
from rft.data.rows import Row

GroupKind = Literal["sft", "preference", "pairwise", "unpaired", "ranked", "scored", "steps"]
PAIR_TEMPLATE = "{prompt}\n\nCandidate A: {a}\n\nCandidate B: {b}"  # what a pairwise reward model reads
CONVERSATIONS = ("messages", "conversations", "conversation")  # columns that hold a whole conversation
MAX_STEPS = 64  # steps that a process-supervised solution may have


@dataclass(frozen=True)
class Example:
    """One row. `responses` are strings, message lists, or (steps) lists of strings; `rewards` one each.

    `prompt` is None where the responses are whole conversations.
    """

    prompt: Text | None
    responses: list[Any]
    rewards: list[float]
    values: list[Mapping[str, float | tuple[float, ...]]] = field(default_factory=list)


def read_example(row: Row, kind: GroupKind, source: str, number: int) -> Example:
    """Take a row apart. Raises DataError for a missing column, RowProblem for values that do not fit."""

    def column(name: str) -> Any:
        if name not in row:
            raise missing_column(name, row, source, number + 1)
        if row[name] is None:
            raise RowProblem(f"`{name}` is null")
        return row[name]

    if kind == "sft":
        conversation = next((name for name in CONVERSATIONS if name in row), None)
        if conversation and "completion" not in row:
            return Example(None, [read_messages(row[conversation], conversation)], [1.0])
        return Example(column("prompt"), [column("completion")], [1.0])
    if kind == "preference":
        chosen, rejected = read_text(column("chosen"), "chosen"), read_text(column("rejected"), "rejected")
        if chosen == rejected:
            raise RowProblem("`chosen` and `rejected` are equal")
        return _split_pair(row.get("prompt", row.get("conversations")), chosen, rejected)
    if kind == "pairwise":
        return _both_orders(read_example(row, "preference", source, number))
    if kind == "unpaired":
        return Example(column("prompt"), [column("completion")], [_label(column("label"))])
    if kind == "ranked":
        return _ranked(column("prompt"), column("completions"), row.get("scores"))
    if kind == "scored":
        targets = _numbers(column("score"), "score")
        return Example(column("prompt"), [column("completion")], [targets[0]], [{"targets": tuple(targets)}])
    return _steps(column("prompt"), column("completions"), column("labels"))


def _split_pair(prompt: Any, chosen: Text, rejected: Text) -> Example:
    """The pair with its prompt, found as the common beginning where it is not given."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowProblem("`chosen` and `rejected` must both be strings, or both be message lists")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if chosen[0]["role"] != "assistant":  # conversations that repeat the prompt
            same = 0
            while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
                same += 1
            if not same:
                raise RowProblem("`chosen` and `rejected` have no common beginning, and there is no `prompt`")
            return Example(chosen[:same], [chosen[same:], rejected[same:]], [1.0, 0.0])
        if prompt is None:
            raise RowProblem("`chosen` and `rejected` begin with the assistant, and there is no `prompt`")
    if prompt is not None:
        return Example(prompt, [chosen, rejected], [1.0, 0.0])
    common = common_text(str(chosen), str(rejected))
    if not common:
        raise RowProblem("`chosen` and `rejected` have no common beginning, and there is no `prompt`")
    return Example(common, [chosen[len(common) :], rejected[len(common) :]], [1.0, 0.0])


def _both_orders(pair: Example) -> Example:
    """Both candidates after the prompt, in both orders: is the first one better?"""
    if not all(isinstance(text, str) for text in (pair.prompt, *pair.responses)):
        raise RowProblem("a pairwise model reads plain text: prompt and responses must be strings")
    a, b = pair.responses
    rest = PAIR_TEMPLATE.removeprefix("{prompt}")
    texts = [rest.format(a=a, b=b), rest.format(a=b, b=a)]
    return Example(pair.prompt, texts, [1.0, 0.0], [{"targets": (1.0,)}, {"targets": (0.0,)}])


def common_text(a: str, b: str) -> str:
    """The common beginning of two texts, cut between words so that neither rest is empty, and without the
    space before the first word that differs (a line break stays with the beginning)."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    while n and not (a[n:].strip() and b[n:].strip() and _between_words(a, n) and _between_words(b, n)):
        n -= 1
    while n and a[n - 1] == " ":
        n -= 1
    return a[:n]


def _between_words(text: str, n: int) -> bool:
    """Whether a text may be cut before its character `n`: at a space, or beside a character of a script that
    is written without spaces; never before a mark that belongs to the character in front of it."""
    before, after = text[n - 1], text[n]
    if unicodedata.category(after)[0] == "M" or "\u200d" in (before, after):
        return False
    return before.isspace() or after.isspace() or _wide(before) or _wide(after)


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF" and unicodedata.category(character) != "Sk"


def _label(value: Any) -> float:
    if isinstance(value, bool) or value in (0, 1):
        return float(value)
    raise RowProblem(f"`label` must be true or false, not {value!r:.40}")


def _numbers(value: Any, name: str) -> list[float]:
    """A number or a list of numbers, all finite; None in a list means unknown (nan)."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    out = []
    for v in values:
        if v is None and listed:
            out.append(math.nan)
        elif is_finite(v):
            out.append(float(v))
        else:
            raise RowProblem(f"`{name}` must be a finite number or a list of them, not {value!r:.40}")
    if not out or all(math.isnan(v) for v in out):
        raise RowProblem(f"`{name}` holds no number")
    return out


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float holds."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _ranked(prompt: Any, responses: Any, scores: Any) -> Example:
    if not isinstance(responses, list) or len(responses) < 2:
        raise RowProblem("`completions` must be a list of at least two responses, the best first")
    if scores is None:
        return Example(prompt, responses, [float(r) for r in range(len(responses) - 1, -1, -1)])
    values = _numbers(scores, "scores")
    if len(values) != len(responses) or any(math.isnan(v) for v in values):
        raise RowProblem(f"{len(responses)} `completions`, but {len(values)} `scores`")
    if len(set(values)) == 1:
        raise RowProblem("all `scores` are equal: nothing is preferred")
    return Example(prompt, responses, values)


def _steps(prompt: Any, steps: Any, labels: Any) -> Example:
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s for s in steps):
        raise RowProblem("`completions` must be a list of steps, each a non-empty string")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise RowProblem(f"{len(steps)} steps need as many `labels`")
    if len(steps) > MAX_STEPS:
        raise RowProblem(f"more than {MAX_STEPS} steps")
    marks = [_label(label) for label in labels]
    padded = (*marks, *[math.nan] * (MAX_STEPS - len(marks)))
    return Example(prompt, [steps], [sum(marks) / len(marks)], [{"step_labels": padded}])
