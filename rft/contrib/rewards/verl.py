"""Adapt rewards written for verl: `compute_score(data_source, solution_str, ground_truth, extra_info)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rft.rewards.load import Arguments, SpecError
from rft.rewards.types import Text, text_of

TRUTHS = ("ground_truth", "reward_model", "answer")


def from_verl(compute_score: Callable[..., Any], /, **options: Any) -> Callable[..., list[float | None]]:
    """Convert verl's function to the convention of rft and TRL: `reward = from_verl(compute_score)`.

    The ground truth is the column `ground_truth`, or `reward_model["ground_truth"]` as in verl's
    datasets, or `answer`; `data_source` and `extra_info` are passed if the dataset has them. Arguments
    are passed by name, as in verl. The value of a dict result is its `score`. In a config, the prefix does
    the same: `verl:path.py:compute_score`. Raises SpecError for a function that does not take `solution_str`.
    """
    arguments = Arguments("verl's compute_score", compute_score)
    if "solution_str" not in arguments.names and not arguments.takes_all:
        raise SpecError(
            f"verl's compute_score must take `solution_str`; this one takes {', '.join(arguments.names)}"
        )

    def reward(
        completions: Sequence[Text], prompts: Sequence[Text] = (), **columns: Any
    ) -> list[float | None]:
        n = len(completions)
        truths = columns.get("ground_truth", columns.get("answer", [None] * n))
        if "reward_model" in columns:
            truths = [row["ground_truth"] for row in columns["reward_model"]]
        given = {name: columns[name] for name in ("data_source", "extra_info") if name in columns}
        result = []
        for i, completion in enumerate(completions):
            offered: dict[str, Any] = {
                "data_source": None,
                "extra_info": None,
                **{k: v[i] for k, v in given.items()},
            }
            offered |= {"solution_str": text_of(completion), "ground_truth": truths[i], **options}
            result.append(_number(arguments.call(compute_score, offered)))
        return result

    reward.any_of = TRUTHS if "ground_truth" in arguments.required else ()  # type: ignore[attr-defined]
    return reward


def _number(result: Any) -> float | None:
    return result["score"] if isinstance(result, dict) else result
