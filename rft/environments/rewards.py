"""Read the reward that an environment returns. Standard library only, but for the number check of rewards."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from rft.rewards.load import SpecError, finite_number

USABLE = "return a finite number, a dict of named numbers, or None to abstain"

Returned = tuple[float | None, dict[str, float]]


class UnusableReward(ValueError):
    """A reward of a wrong type: an error of the environment's code, which ends the run at once."""


def refuse_text(function: Any, source: str) -> None:
    """Raise SpecError if a function that returns the reward is annotated to return text."""
    if getattr(function, "__annotations__", {}).get("return") in (str, "str", bytes, "bytes"):
        raise SpecError(f"{source} is annotated to return text as its reward: {USABLE}")


def read_reward(value: Any, source: str) -> Returned:
    """Return (reward, named scores) of a number, a dict of named numbers, or None, which abstains.

    The reward of a dict is its entry `reward`, or the sum of its entries. Raises UnusableReward for another
    type, and ValueError for a number that is not finite; both name `source`.
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
                raise _wrong(part)(
                    f"{source} returned {part!r:.100} ({type(part).__name__}) as its score {name!r}: not a "
                    "finite number"
                )
            scores[str(name)] = number
        if scores:
            return scores.get("reward", sum(scores.values())), scores
    raise _wrong(value)(f"{source} returned {value!r:.100} ({type(value).__name__}) as its reward: {USABLE}")


def _wrong(value: Any) -> type[ValueError]:
    """Return the error for a value: a number that is not finite may come from one unlucky episode."""
    return ValueError if isinstance(value, Real) or hasattr(value, "item") else UnusableReward
