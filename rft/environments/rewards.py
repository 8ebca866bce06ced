"""Read the reward that an environment returns. Standard library only, but for the number check of rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rft.rewards.load import finite_number

Returned = tuple[float | None, dict[str, float]]


def read_reward(value: Any, source: str) -> Returned:
    """Return (reward, named scores) of a number, a dict of named numbers, or None, which abstains.

    The reward of a dict is its entry `reward`, or the sum of its entries. Raises ValueError that names
    `source` for anything else.
    """
    if value is None:
        return None, {}
    number = None if isinstance(value, Mapping) else finite_number(value)
    if number is not None:
        return number, {}
    if isinstance(value, Mapping):
        scores = {}
        for name, part in value.items():
            number = finite_number(part)
            if number is None:
                raise ValueError(
                    f"{source} returned {part!r:.100} ({type(part).__name__}) as its score {name!r}: not a "
                    "finite number"
                )
            scores[str(name)] = number
        if scores:
            return scores.get("reward", sum(scores.values())), scores
    raise ValueError(
        f"{source} returned {value!r:.100} ({type(value).__name__}) as its reward: return a finite number, a "
        "dict of named numbers, or None to abstain"
    )
