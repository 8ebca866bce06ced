"""Rewards written for verl: `compute_score(data_source, solution_str, ground_truth, extra_info)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rft.rewards.types import Text, text_of


def from_verl(compute_score: Callable[..., Any]) -> Callable[..., list[float | None]]:
    """`reward = from_verl(compute_score)`: verl's function in the convention of rft and TRL.

    The ground truth is the column `ground_truth`, or `reward_model["ground_truth"]` as in verl's
    datasets, or `answer`; `data_source` and `extra_info` are passed where the dataset has them. A dict
    result counts by its `score`. In a config, the prefix does the same: `verl:path.py:compute_score`.
    """

    def reward(
        completions: Sequence[Text], prompts: Sequence[Text] = (), **columns: Any
    ) -> list[float | None]:
        truths = columns.get("ground_truth") or columns.get("answer")
        if "reward_model" in columns:
            truths = [row["ground_truth"] for row in columns["reward_model"]]
        if truths is None:
            have = ", ".join(sorted(columns)) or "none"
            raise ValueError(
                "verl's compute_score needs a column `ground_truth`, `reward_model` or `answer`; "
                f"the columns here: {have}"
            )
        none = [None] * len(completions)
        rows = zip(
            columns.get("data_source", none),
            completions,
            truths,
            columns.get("extra_info", none),
            strict=True,
        )
        return [_number(compute_score(source, text_of(c), truth, extra)) for source, c, truth, extra in rows]

    return reward


def _number(result: Any) -> float | None:
    return result["score"] if isinstance(result, dict) else result
