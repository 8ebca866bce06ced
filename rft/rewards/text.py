"""Rewards on the text of a completion: format, matching, overlap, length, repetition, boxes, labels."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from rft.rewards.types import Outcome, Score, correct, graded, unparseable, wrong

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


# -- format ------------------------------------------------------------------------------------------


def regex(completion: str, *, pattern: str, full: bool = False, ignore_case: bool = False) -> Score:
    """Score 1 if `pattern` is found (full: matches the whole completion). `.` also matches newlines."""
    compiled = _compiled(pattern, ignore_case)
    match = compiled.fullmatch(completion) if full else compiled.search(completion)
    return correct() if match else wrong(detail=f"{pattern!r} does not match")


@lru_cache(maxsize=256)
def _compiled(pattern: str, ignore_case: bool) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL | (re.IGNORECASE if ignore_case else 0))


def format(completion: str, *, tags: Sequence[str] = ("think", "answer"), partial: bool = False) -> Score:
    """Score 1 if the completion is exactly these tags, in order, once each, with text in each:
    `<think>...</think><answer>...</answer>`. partial: the fraction of correct tags instead of 0.

    The opening of a leading tag may be missing if the chat template put it into the prompt.
    """
    parts = (
        rf"(?:<{re.escape(t)}>){'?' if i == 0 else ''}(.*?)</{re.escape(t)}>" for i, t in enumerate(tags)
    )
    match = _compiled(r"\s*" + r"\s*".join(parts) + r"\s*", False).fullmatch(completion)
    marks = [m for t in tags for m in (f"<{t}>", f"</{t}>")]
    if match and all(part.strip() and not any(m in part for m in marks) for part in match.groups()):
        return correct()
    counts = {m: completion.count(m) for m in marks}
    value = sum(n == 1 for n in counts.values()) / len(marks) if partial else 0.0
    return wrong(min(value, 1 - 1 / len(marks)), f"tags found: {counts}")


def json_schema(
    completion: str, schema: Any = None, *, default_schema: dict[str, Any] | None = None
) -> Score:
    """Score 1 if the completion, or its last code fence, is JSON that is valid under its schema.

    schema: a JSON Schema (a dict, or JSON text) per sample, else `default_schema`. Text that is not JSON is
    `unparseable`.
    """
    import jsonschema

    wanted = default_schema if schema is None else json.loads(schema) if isinstance(schema, str) else schema
    if wanted is None:
        raise ValueError("json_schema needs a column `schema` or the option `default_schema`")
    fences = _FENCED.findall(completion)
    try:
        value = json.loads(fences[-1] if fences else completion)
    except (json.JSONDecodeError, RecursionError) as error:
        return unparseable(detail=f"not JSON: {error}")
    problem = jsonschema.exceptions.best_match(
        jsonschema.validators.validator_for(wanted)(wanted).iter_errors(value)
    )
    return correct() if problem is None else wrong(detail=f"{problem.json_path}: {problem.message}"[:300])


# -- matching ----------------------------------------------------------------------------------------


def text_problem(answer: Any) -> str | None:
    """Explain why a column `answer` cannot be compared as text; None if it can."""
    if answer is None or isinstance(answer, dict | list | tuple):
        return f"the answer is {'null' if answer is None else f'a {type(answer).__name__}'}, not a text"
    return None if str(answer).strip() else "the answer is empty"


def _final(completion: str) -> str:
    """Return the final answer of a completion: in `<answer>`, in a box, or all text after `</think>`."""
    from rft.rewards.math import extract

    extracted = extract(completion, ("boxed", "tag"))
    if extracted is not None and extracted.text is not None:
        return extracted.text
    return completion.rpartition("</think>")[2].strip()


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def exact_match(completion: str, answer: str, *, strip: bool = True, ignore_case: bool = False) -> Score:
    """Score 1 if the whole completion equals the column `answer`."""
    got, want = (completion.strip(), str(answer).strip()) if strip else (completion, str(answer))
    if ignore_case:
        got, want = got.casefold(), want.casefold()
    score = correct() if got == want else wrong(detail=f"expected {want[:200]!r}, got {got[:200]!r}")
    return replace(score, answer=got)


def choice(completion: str, answer: str, *, letters: str = "ABCDEFGHIJ") -> Score:
    """Score 1 if the completion chooses the letter of the answer: "(B)", "B.", "the answer is B"."""
    from rft.rewards.math import extract

    extracted = extract(completion, ("boxed", "tag", "hash", "phrase"))
    text = completion.strip() if extracted is None else extracted.text or ""
    picked = re.findall(
        rf"(?<![A-Za-z])\(?([{letters}])(?![A-Za-z'])", re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    )
    if not picked or len(set(picked)) > 1:
        return unparseable(detail=f"no single choice in {text[:200]!r}")
    want = str(answer).strip().strip("().").upper()
    score = correct() if picked[0] == want else wrong(detail=f"expected {want}, got {picked[0]}")
    return replace(score, answer=picked[0])


def class_label(completion: str, answer: str) -> Score:
    """Score 1 if the class name equals the label, by words, ignoring case and punctuation (CLS-RL)."""
    got, want = _plain(_final(completion)), _plain(str(answer))
    score = correct() if got == want else wrong(detail=f"expected {want!r}, got {got[:200]!r}")
    return replace(score, answer=got)


def f1(completion: str, answer: str, *, threshold: float = 0.5) -> Score:
    """Score the F1 of the words of answer and completion, from 0 to 1 (SQuAD)."""
    got, want = Counter(_plain(_final(completion)).split()), Counter(_plain(str(answer)).split())
    common = sum((got & want).values())
    total = got.total() + want.total()
    return graded(2 * common / total if total else 1.0, threshold=threshold)


def rouge_l(completion: str, answer: str, *, threshold: float = 0.5) -> Score:
    """Score ROUGE-L: the F1 of the longest common subsequence of words (Lin 2004)."""
    got, want = _plain(_final(completion)).split(), _plain(str(answer)).split()
    if not got or not want:
        return graded(float(got == want), threshold=threshold)
    row = [0] * (len(want) + 1)
    for word in got:
        diagonal = 0
        for j, other in enumerate(want, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return graded(2 * row[-1] / (len(got) + len(want)), threshold=threshold)


for _matching in (exact_match, choice, class_label, f1, rouge_l):
    _matching.column_checks = {"answer": text_problem}  # type: ignore[attr-defined]


# -- length and repetition ---------------------------------------------------------------------------


def _length(completion: str, num_tokens: int | None) -> int:
    return len(completion.split()) if num_tokens is None else int(num_tokens)


def length(completion: str, num_tokens: int | None = None, *, target: int, scale: float = 1.0) -> Score:
    """Score -scale * |length - target| / target, at least -scale; in tokens, or words without tokens."""
    n = _length(completion, num_tokens)
    return Score(-scale * min(1.0, abs(n - target) / target), Outcome.correct, f"{n} long, target {target}")


def overlong(completion: str, num_tokens: int | None = None, *, max_length: int, cache: int) -> Score:
    """Score DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), in tokens:

    0 up to max_length - cache, then falling linearly to -1 at max_length, and -1 beyond.
    """
    n = _length(completion, num_tokens)
    if not 0 < cache <= max_length:
        raise ValueError(f"overlong: cache ({cache}) must be between 1 and max_length ({max_length})")
    value = min(0.0, max(-1.0, (max_length - cache - n) / cache))
    return Score(value, Outcome.correct if value == 0 else Outcome.wrong, f"{n} of {max_length}")


def repetition(completion: str, *, n: int = 4, scale: float = 1.0) -> Score:
    """Score -scale * the fraction of word n-grams that are repeated (Yeo et al. 2025, arXiv:2502.03373)."""
    words = completion.casefold().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return Score(0.0, Outcome.correct, "shorter than one n-gram")
    repeated = 1 - len(set(grams)) / len(grams)
    return Score(
        -scale * repeated, Outcome.correct if repeated < 0.5 else Outcome.wrong, f"{repeated:.0%} repeated"
    )


def not_truncated(completion: str, truncated: bool = False, *, penalty: float = -1.0) -> Score:
    """Score 0 for a completion that ended normally, `penalty` for one cut off by the length limit."""
    return wrong(penalty, "cut off") if truncated else correct(0.0)


# -- boxes -------------------------------------------------------------------------------------------

_BOX = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*[\])]")


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes (x1, y1, x2, y2); 0 if one has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    areas = [max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1]) for x in (a, b)]
    inter = max(0.0, width) * max(0.0, height)
    union = sum(areas) - inter
    return inter / union if union > 0 else 0.0


def iou(
    completion: str, boxes: Any, *, mode: Literal["mean", "threshold"] = "mean", threshold: float = 0.5
) -> Score:
    """Score Visual-RFT's detection reward: predicted boxes matched greedily to the column `boxes`.

    boxes: one box or a list of them, (x1, y1, x2, y2). mean: the sum of matched IoUs over the larger
    count, so that missing and spurious boxes both cost; threshold: the fraction of matches above it.
    """
    wanted = [boxes] if boxes and isinstance(boxes[0], int | float) else list(boxes)
    predicted = [[float(x) for x in m] for m in _BOX.findall(completion.rpartition("</think>")[2])]
    if not predicted:
        if not wanted:
            return correct()
        return unparseable(detail="no box [x1, y1, x2, y2] found")
    pairs = sorted(
        ((box_iou(p, w), i, j) for i, p in enumerate(predicted) for j, w in enumerate(wanted)), reverse=True
    )
    used: tuple[set[int], set[int]] = (set(), set())
    total = 0.0
    for value, i, j in pairs:
        if i in used[0] or j in used[1]:
            continue
        used[0].add(i)
        used[1].add(j)
        total += value if mode == "mean" else float(value >= threshold)
    count = max(len(predicted), len(wanted))
    return graded(total / count, f"{len(predicted)} boxes for {len(wanted)}", threshold)
