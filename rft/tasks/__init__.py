"""Embedded tasks and the tiny from-scratch model: nothing to download.

`TASKS[name](**options).rows(split, n, seed)` gives rows with `prompt`, `answer` and `completion`.
"""

from pathlib import Path

from rft.tasks.arithmetic import Arithmetic, HardArithmetic
from rft.tasks.pairs import ArithmeticPairs
from rft.tasks.reasoning_gym import ReasoningGym

TASKS: dict[str, type] = {
    task.name: task for task in (Arithmetic, HardArithmetic, ArithmeticPairs, ReasoningGym)
}


def source() -> list[str]:
    """Return the source code that rows and tiny models depend on, for cache keys."""
    rft = Path(__file__).parents[1]
    names = ("tasks/arithmetic.py", "config/tasks.py", "tasks/pairs.py", "tasks/tiny.py")
    return [(rft / name).read_text(encoding="utf-8") for name in names]


__all__ = ["TASKS", "Arithmetic", "ArithmeticPairs", "HardArithmetic", "ReasoningGym", "source"]
