"""Embedded tasks and the tiny from-scratch model: nothing to download.

`TASKS[name](**options).rows(split, n, seed)` gives rows with `prompt`, `answer` and `completion`: a text, or
the messages of several turns.
"""

from rft.tasks.arithmetic import Arithmetic, HardArithmetic
from rft.tasks.guess import Guess
from rft.tasks.pairs import ArithmeticPairs
from rft.tasks.reasoning_gym import ReasoningGym
from rft.tasks.sums import Sums

TASKS: dict[str, type] = {
    task.name: task for task in (Arithmetic, HardArithmetic, ArithmeticPairs, Sums, Guess, ReasoningGym)
}


REVISION = 4
"""Part of the key of cached tiny models and warm starts: raise it when rows or tiny models change."""


__all__ = [
    "REVISION",
    "TASKS",
    "Arithmetic",
    "ArithmeticPairs",
    "Guess",
    "HardArithmetic",
    "ReasoningGym",
    "Sums",
]
