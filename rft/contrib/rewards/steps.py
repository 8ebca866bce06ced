"""Process rewards, which judge a completion step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from rft.rewards.load import load_reward
from rft.rewards.types import Score, Text, abstain, graded, text_of

Aggregate = Literal["min", "mean", "product", "last"]


def split_steps(text: str, separator: str) -> list[str]:
    """Split `text` at the separators into non-empty parts."""
    return [part.strip() for part in text.split(separator) if part.strip()]


def aggregate(values: Sequence[float], how: Aggregate) -> float:
    """Reduce the values of at least one step to one number."""
    if how == "mean":
        return sum(values) / len(values)
    if how == "last":
        return values[-1]
    return min(values) if how == "min" else math.prod(values)


class Process:
    """Apply any other reward to every step; the value is the `aggregate` over the steps.

    function: the reward of a step (`regex`, `file.py:function`, ...) with its `options`; it receives the
    prompt with the previous steps, the step as the completion, and the sample's columns. A step on which it
    abstains does not count; a step that fails makes the sample fail. The steps' values are reported too.
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
        """Return one Score per completion, with the steps' values in the detail."""
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
    """Combine the values of the steps into the Score of a completion; None: a step that does not apply."""
    applying = [v for v in values if v is not None]
    if not applying:
        return abstain("no step applies")
    mean = sum(applying) / len(applying)
    score = graded(aggregate(applying, how), f"steps: {[round(v, 3) for v in applying]}")
    return replace(score, steps=tuple(mean if v is None else v for v in values))
