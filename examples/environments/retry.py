"""A second try: a wrong answer may be followed by a second one.

An environment of kind `text`: `reset` takes the row's columns, `step` the policy's text.
"""

from __future__ import annotations

from typing import Any

from rft.rewards.math import math

FEEDBACK = "That is not correct. Work it out again, line by line, and end with the answer in \\boxed{}."


class Retry:
    """Pay 1 for a right answer at once, and `later` for one after feedback."""

    def __init__(self, tries: int = 2, later: float = 0.5) -> None:
        self.tries, self.later = tries, later
        self.answer, self.tried = "", 0

    def reset(self, *, answer: str, **row: Any) -> None:
        """Begin with the row's prompt alone."""
        self.answer, self.tried = answer, 0

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Return (message to the policy, reward, solved, out of tries, {})."""
        self.tried += 1
        if math(text, self.answer).value == 1.0:
            return "", 1.0 if self.tried == 1 else self.later, True, False, {}
        last = self.tried >= self.tries
        return "" if last else FEEDBACK, 0.0, False, last, {}
