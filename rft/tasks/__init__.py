"""Embedded tasks and the tiny from-scratch model: nothing to download.

`TASKS[name](**options).rows(split, n, seed)` gives rows with `prompt`, `answer` and `completion`.
"""

from rft.tasks.arithmetic import Arithmetic, HardArithmetic
from rft.tasks.reasoning_gym import ReasoningGym

TASKS: dict[str, type] = {task.name: task for task in (Arithmetic, HardArithmetic, ReasoningGym)}

__all__ = ["TASKS", "Arithmetic", "HardArithmetic", "ReasoningGym"]
