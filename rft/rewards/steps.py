"""Process rewards: a completion is judged step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    abstains on does not count; a step that fails makes the sample fail.
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
        values = [s.value for s in scores if s.value is not None]
        if not values:
            return abstain("no step applies")
        detail = f"steps: {[round(v, 3) for v in values]}"
        return graded(aggregate(values, self.aggregate), detail)
