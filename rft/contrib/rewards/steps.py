"""Process rewards: a completion is judged step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from rft.rewards.load import load_reward
from rft.rewards.types import Score, Text, abstain, graded, text_of

Aggregate = Literal["min", "mean", "product", "last"]


def split_steps(text: str, separator: str) -> list[str]:
    """The non-empty parts of `text` between separators."""
    return [part.strip() for part in text.split(separator) if part.strip()]


def aggregate(values: Sequence[float], how: Aggregate) -> float:
    """One number for a list of steps, of which there must be one at least."""
    if how == "mean":
        return sum(values) / len(values)
    if how == "last":
        return values[-1]
    return min(values) if how == "min" else math.prod(values)


class Process:
    """Any other reward, applied to every step; the value is the `aggregate` over the steps.

    function: the reward of a step (`regex`, `file.py:function`, ...) with its `options`; it gets the
    prompt with the steps before, the step as the completion, and the sample's columns. A step that it
    abstains on does not count; a step that fails makes the sample fail. The steps' values go along.
    """

    all_columns = True

    def __init__(
        self,
        *,
        function: str,
        options: dict[str, Any] | None = None,
        separator: str = "\n\n",
        aggregate: Aggregate = "mean",
        base_dir: str = ".",
    ) -> None:
        self.inner: Any = load_reward(function, base_dir=base_dir, **(options or {}))
        self.separator, self.aggregate = separator, aggregate

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Score]:
        """One Score per completion; the steps' values are in the detail."""
        owner: list[int] = []
        before: list[str] = []
        steps: list[str] = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            so_far = text_of(prompt)
            for step in split_steps(text_of(completion), self.separator):
                owner.append(i)
                before.append(so_far)
                steps.append(step)
                so_far += self.separator + step
        given = {name: [values[i] for i in owner] for name, values in columns.items()}
        scores = self.inner.score(before, steps, **given)
        grouped: list[list[Score]] = [[] for _ in completions]
        for i, score in zip(owner, scores, strict=True):
            grouped[i].append(score)
        return [self._combined(part) for part in grouped]

    def _combined(self, scores: Sequence[Score]) -> Score:
        for number, score in enumerate(scores):
            if score.failed:
                return Score(None, score.outcome, f"step {number}: {score.detail}")
        return judged_steps([s.value for s in scores], self.aggregate)


def judged_steps(values: Sequence[float | None], how: Aggregate) -> Score:
    """The Score of a completion from those of its steps; None: a step that does not apply."""
    applying = [v for v in values if v is not None]
    if not applying:
        return abstain("no step applies")
    mean = sum(applying) / len(applying)
    score = graded(aggregate(applying, how), f"steps: {[round(v, 3) for v in applying]}")
    return replace(score, steps=tuple(mean if v is None else v for v in values))
